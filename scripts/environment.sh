# Sourced by quickstart.sh and test.sh: enters the repository and a virtual environment with what it needs.
# Usage: source scripts/environment.sh [extra packages]. Everything is made in work/, which git ignores.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPYCACHEPREFIX="$PWD/work/pycache" TOKENIZERS_PARALLELISM=true
say() { printf '\n\033[1m%s\033[0m\n' "== $*"; }

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $python is missing or older than Python 3.10; name another one: PYTHON=/path/to/python bash $0" >&2
    exit 2
fi
if [ ! -x work/venv/bin/pip ]; then
    say "Making a virtual environment in work/venv"
    rm -rf work/venv
    if ! "$python" -m venv work/venv; then
        echo "error: $python can't make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
fi
source work/venv/bin/activate
wanted="$(cat requirements.txt) $*"
if [ "$(cat work/venv/installed.txt 2>/dev/null)" != "$wanted" ]; then
    say "Installing the requirements (PyTorch is large; this can take some minutes)"
    pip install --disable-pip-version-check --progress-bar off -q -r requirements.txt "$@"
    echo "$wanted" > work/venv/installed.txt
fi
