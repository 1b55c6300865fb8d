#!/usr/bin/env bash
# Passes the tests with the oldest or the newest versions that requirements.txt allows, in an environment of its own:
#
#     bash scripts/try_versions.sh oldest
#     bash scripts/try_versions.sh newest tests/test_train.py
#
# To be run by hand when a range in requirements.txt changes: each takes some minutes and gigabytes. PYTHON and
# TORCH_INDEX are as for environment.sh; PyTorch's index of builds for CPUs spares the libraries for GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-}
case $which in
    oldest) versions=$(sed -E 's/>=([^,]+).*/==\1/' requirements.txt) pyarrow="pyarrow<20" ;; # of numpy 1's time
    newest) versions=$(cat requirements.txt) pyarrow=pyarrow ;;
    *) echo "error: say oldest or newest: bash $0 oldest" >&2 && exit 2 ;;
esac
shift
"${PYTHON:-python3}" -m venv --clear "work/$which"
source "work/$which/bin/activate"
export PYTHONPYCACHEPREFIX="$PWD/work/$which/pycache" TOKENIZERS_PARALLELISM=true
echo "$versions" > "work/$which/requirements.txt"
pip install -qq ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch[=>]' "work/$which/requirements.txt")"
pip install -qq --upgrade -r "work/$which/requirements.txt" -r tests/requirements.txt "$pyarrow"
pip list 2> /dev/null | grep -iE "^($(sed -E 's/[>=].*//' requirements.txt | paste -sd '|')) "
python -m pytest --numprocesses logical --maxprocesses 4 "$@"
