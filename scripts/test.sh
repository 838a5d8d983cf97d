#!/usr/bin/env bash
# Lint, types, import layers, tests: everything that must pass. Arguments go to pytest.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
cd "$root"

# pyright would ask the registry whether it is the newest
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1

ruff check
ruff format --check
pyright
lint-imports --no-logo
pytest "$@"
