#!/usr/bin/env bash
# Passes all the tests, in an environment of its own that it makes if need be: bash scripts/test.sh [pytest's flags]
set -euo pipefail
more_requirements=tests/requirements.txt
source "$(dirname "$0")/environment.sh"

say "Checking the style"
python -m ruff check --no-cache .
python -m ruff format --no-cache --check .
say "Running the tests"
# More than there are cores: some tests wait for processes that they have started.
python -m pytest --numprocesses "$(python -c 'import os; print(min(4, os.cpu_count() + 2))')" "$@"
