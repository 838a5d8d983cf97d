#!/usr/bin/env bash
# From a bare clone to a trained adapter. Arguments go to `dlor train quickstart`.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup quickstart

exec dlor train quickstart "$@"
