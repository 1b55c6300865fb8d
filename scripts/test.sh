#!/usr/bin/env bash
# Passes all the tests, in an environment of its own that it makes if need be: test.sh [--clients] [flags of pytest]
set -euo pipefail
more_requirements=tests/requirements.txt
source "$(dirname "$0")/environment.sh"

say "Checking the style"
python -m ruff check --no-cache .
python -m ruff format --no-cache --check .
if [ "${1:-}" = --clients ]; then # those that hold models against other software, which is fetched first
    shift
    say "Installing sentence-transformers, datatrove and Triton, and Transformers.js into work/clients"
    pip install --quiet --constraint work/venv/constraints.txt "sentence-transformers>=5" "datatrove[io]>=0.10" "kubeflow-trainer-api>=2.2" triton
    version=$(sed -n 's/.*VERSION = .*"\([0-9.]*\)".*/\1/p' scripts/demo.py)
    npm install --silent --no-audit --no-fund --ignore-scripts --prefix work/clients \
        "@huggingface/transformers@$version" playwright-core@1
    set -- tests/clients "$@"
fi
say "Running the tests"
# More than there are cores: some tests wait for processes that they have started.
python -m pytest --numprocesses "$(python -c 'import os; print(min(4, os.cpu_count() + 2))')" "$@"
