#!/usr/bin/env bash
# Passes all the tests, in an environment of its own that it makes if need be: bash scripts/test.sh [pytest's flags]
set -euo pipefail
source "$(dirname "$0")/environment.sh" pytest pytest-xdist pytest-timeout filelock hypothesis pyarrow ruff

say "Checking the style"
ruff check --no-cache .
ruff format --no-cache --check .
say "Running the tests"
python -m pytest --numprocesses logical --maxprocesses 4 "$@"
