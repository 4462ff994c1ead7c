#!/usr/bin/env bash
# All checks: ruff, mypy and pytest, in .venv. Builds the patched llama.cpp and, for comparisons, an unpatched one first (about 15 minutes
# on 2 cores the first time, seconds after).
#
#   bash tools/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup -e ".[calibrate,report,test]"
ruff check .
mypy
rq-gguf runtime install
rq-gguf runtime install --unpatched
pip install -q "$(rq-gguf runtime wheel)" # for tests/examples
exec python -m pytest "$@" </dev/null
