"""What a run of the suite needs: its source, the stand-in models, the packages that it imports, a pytest process."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
# imported inside tests, or only asked after; without them a file would have nothing to test
_ALSO_NEEDED = {
    # by PEFT itself
    "test_initialization.py": ("attr",),
    "test_quantization.py": ("bitsandbytes", "torchao"),
}
_PIP_NAMES = {"attr": "attrs", "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# all passed, some failed, none collected
_RAN = (0, 1, 5)


def fetch_source(work: Path) -> Path:
    """The unpacked source distribution of the installed PEFT, downloaded unless it is there."""
    version = importlib.metadata.version("peft")
    source = work / f"peft-{version}"
    if not source.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            command = ["pip", "download", "--no-deps", "--no-binary", "peft", "--dest", folder, f"peft=={version}"]
            subprocess.run([sys.executable, "-m", *command], check=True)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            # whole or not at all
            (Path(folder) / source.name).rename(source)
    # the modules import each other relatively, but the distribution has no such file
    (source / "tests" / "__init__.py").touch()
    return source


def build_models(work: Path) -> Path:
    """A Hugging Face cache with the stand-in models, built unless one from the same code is there."""
    cache = work / "hub"
    stamp = work / "hub.stamp"
    wanted = _fingerprint()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"building the stand-in models in {cache}")
        subprocess.run([sys.executable, "-m", f"{_HERE.name}.models", str(cache)], check=True, env=_environment(cache))
        stamp.write_text(wanted)
    return cache


def missing_packages(tests: Path, files: Sequence[str]) -> dict[str, list[str]]:
    """What pip would have to install -> the files that need it."""
    missing: dict[str, list[str]] = {}
    for file in files:
        for name in sorted(_imports(tests, file) | set(_ALSO_NEEDED.get(file, ()))):
            if importlib.util.find_spec(name) is None:
                missing.setdefault(_PIP_NAMES.get(name, name), []).append(file)
    return missing


def run(source: Path, cache: Path, files: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """The report that the plugin writes about a run of pytest on these files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "-p", f"{_HERE.name}.plugin", f"--dlor-report={path}"]
        # the suite's own configuration, except that it measures coverage
        command += ["--rootdir", str(source), "-c", str(source / "pyproject.toml"), "-o", "addopts="]
        command += ["--tb=short", "--quiet", "--disable-warnings", "-rN"]
        command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
        command += [*(f"tests/{file}" for file in files), *arguments]
        finished = subprocess.run(command, cwd=source, env=_environment(cache), check=False)
        if finished.returncode not in _RAN or not path.is_file():
            sys.exit(f"pytest did not get through: it ended with {finished.returncode}")
        return json.loads(path.read_text()) | {"files": list(files)}


def _environment(cache: Path) -> dict[str, str]:
    paths = [str(_HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {
        # the models are too small to share their work between cores
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def _fingerprint() -> str:
    """Of the code that builds the stand-ins, and of the packages that it builds them with."""
    import dlor_peft

    code = hashlib.sha256()
    for folder in (_HERE, Path(dlor_peft.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            code.update(path.read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("peft", "torch", "transformers")]
    return " ".join([*versions, code.hexdigest()])


def _imports(tests: Path, file: str) -> set[str]:
    """The packages that a module of the suite imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse((tests / file).read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= _imports(tests, f"{node.module}.py")
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - {"tests"}
