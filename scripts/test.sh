#!/usr/bin/env bash
# Lint, types, import layers, tests, PEFT's own tests: everything that must pass. Arguments go to pytest; they choose
# among our tests, and PEFT's are not run then.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
cd "$root"

# pyright would ask the registry whether it is the newest
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1
# one process a core, each with one thread
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff check
ruff format --check
pyright
lint-imports --no-logo
pytest --quiet --numprocesses logical "$@"
if [[ $# -eq 0 ]]; then
    python scripts/peft_suite.py
fi
