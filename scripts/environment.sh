# Sourced by quickstart.sh, test.sh, proof.sh and short_runs.sh: enters the repository and a virtual environment with
# what it needs. Everything is made in work/, which git ignores.
#
# What may be set before:
#   PYTHON       the Python to use (python3). If it has a PyTorch that requirements.txt allows, that one is used.
#   TORCH_INDEX  where to install PyTorch from. By default PyTorch's own index of builds for CPUs where there is no GPU,
#                else pip's usual one.
# The script that sources this may set more_requirements, the name of a further requirements file.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPYCACHEPREFIX="$PWD/work/pycache" TOKENIZERS_PARALLELISM=true
unset PYTHONDONTWRITEBYTECODE # container images set it; each process would then compile PyTorch's source again
CPU_INDEX=https://download.pytorch.org/whl/cpu
bold="" plain=""
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
say() { echo; echo "$bold== $*$plain"; }

fitting_torch() { # prints where the PyTorch of this Python lies; fails if it has none that requirements.txt allows
    "$1" - "$(sed -n 's/^torch>=//p' requirements.txt)" 2> /dev/null << 'END'
import importlib.metadata, importlib.util, pathlib, sys
numbers = lambda version: [int(part) for part in version.split(".")[:2]]
assert numbers(importlib.metadata.version("torch")) >= numbers(sys.argv[1])
print(pathlib.Path(importlib.util.find_spec("torch").origin).parents[1])
END
}

make_environment() {
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $python is missing or older than Python 3.10; name another one: PYTHON=/path/to/python bash $0" >&2
        exit 2
    fi
    say "Making a virtual environment in work/venv"
    rm -rf work/venv
    if ! "$python" -m venv work/venv; then
        echo "error: $python can't make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
    local packages
    if packages=$(fitting_torch "$python"); then
        echo "with the PyTorch of $python, in $packages"
        echo "$packages" > "$(work/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
        printf '#!/bin/sh\nexec "%s" -m torch.distributed.run "$@"\n' "$PWD/work/venv/bin/python" > work/venv/bin/torchrun
        chmod +x work/venv/bin/torchrun # that of the other Python would start the other Python
    fi
}

install_torch() {
    local index=${TORCH_INDEX:-}
    if [ -z "$index" ] && [ "$(uname -s)" = Linux ] && ! nvidia-smi -L > /dev/null 2>&1; then
        if python -c "import urllib.request; urllib.request.urlopen('$CPU_INDEX/torch/', timeout=10)" 2> /dev/null; then
            echo "No GPU here, so PyTorch's build for CPUs. For the usual one:"
            echo "  TORCH_INDEX=https://pypi.org/simple bash $0"
            index=$CPU_INDEX
        else
            echo "No GPU here, but PyTorch's builds for CPUs can't be reached ($CPU_INDEX)."
            echo "PyPI's build brings gigabytes of libraries for GPUs. To avoid them, stop (Ctrl-C) and name a mirror:"
            echo "  TORCH_INDEX=... bash $0"
        fi
    fi
    pip install -qq ${index:+--index-url "$index"} -c constraints.txt torch
}

python=${PYTHON:-python3}
[ -x work/venv/bin/pip ] || make_environment
source work/venv/bin/activate
requirements=(requirements.txt ${more_requirements:-})
wanted=$(cat "${requirements[@]}" constraints.txt)
if [ "$(cat work/venv/installed.txt 2> /dev/null)" != "$wanted" ]; then
    say "Installing the requirements (PyTorch is large; this can take some minutes)"
    fitting_torch python > /dev/null || install_torch
    grep -v '^torch==' constraints.txt > work/venv/constraints.txt # a PyTorch that fits stays as it is
    pip install -qq "${requirements[@]/#/-r}" -c work/venv/constraints.txt
    echo "$wanted" > work/venv/installed.txt
fi
