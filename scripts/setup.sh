# Sourced by test.sh and quickstart.sh: brings .venv in the repository root up to date and puts it first on PATH.
#
#   setup EXTRA    EXTRA is dev or quickstart; an installed dev serves for quickstart
#
# PYTHON=/path/to/python chooses the interpreter; without it python3.11 is used, else python3.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

find_python() {
    local candidate candidates=(python3.11 python3)
    if [[ -n "${PYTHON:-}" ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        # the interpreter behind an activated environment: .venv cannot be remade from inside itself
        "$candidate" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys._base_executable)' \
            2>/dev/null && return
    done
    echo "dlor-peft needs Python 3.11 or newer, and found none as: ${candidates[*]}." >&2
    echo "Install Python 3.11, or name an interpreter: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# Two lines: what .venv itself stands on (it survives neither a new interpreter nor being moved), then what is in it.
fingerprint() {
    "$1" -c '
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
inputs = b"".join((root / name).read_bytes() for name in ("pyproject.toml", "scripts/constraints.txt"))
print(f"{sys.version.split()[0]} {sys.base_prefix} {root}\n{hashlib.sha256(inputs).hexdigest()}")' "$root"
}

setup() {
    local extra="$1" stamp="$venv/.dlor-setup" installed="" python wanted
    python="$(find_python)"
    wanted="$(fingerprint "$python")"
    # of two runs at once the second waits for the first one's install
    if command -v flock >/dev/null; then
        exec 9<"$root/scripts/setup.sh"
        flock 9
    fi
    if [[ -f "$stamp" ]]; then
        installed="$(<"$stamp")"
    elif [[ -e "$venv" ]]; then
        echo "$venv was not made by this script: move it away, and run again." >&2
        return 1
    fi
    if [[ "$installed" == *" dev" ]]; then
        extra=dev
    fi
    if [[ "$installed" != "$wanted $extra" ]]; then
        echo "Setting up $venv with the extra '$extra' (minutes the first time)"
        if [[ "${installed%%$'\n'*}" != "${wanted%%$'\n'*}" ]]; then
            rm -rf "$venv"
            mkdir "$venv"
        fi
        # an install that is cut off leaves this word, and the next run starts afresh
        echo incomplete >"$stamp"
        [[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
        (cd "$root" && "$venv/bin/python" -m pip install --constraint scripts/constraints.txt --editable ".[$extra]")
        echo "$wanted $extra" >"$stamp"
    fi
    exec 9<&-
    export PATH="$venv/bin:$PATH"
}
