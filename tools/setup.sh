# Sourced by demo.sh and test.sh: goes to the repository's top and makes .venv with the project in it.
#   setup TARGET...    what pip installs, such as ".[calibrate]" or -e ".[calibrate,test]"
# PYTHON names the interpreter that .venv is made with (python3).

cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup() {
    local python=${PYTHON:-python3}
    if [ ! -x .venv/bin/pip ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (set PYTHON to one)" >&2; exit 2; }
        echo "making .venv"
        "$python" -m venv .venv
    fi
    export PATH="$PWD/.venv/bin:$PATH"
    if ! python -c 'import torch' 2>/dev/null; then
        echo "installing torch into .venv"
        pip install -q torch==2.13.0 || echo "no torch 2.13.0 to be had: pip will choose one"
    fi
    echo "installing rq-gguf into .venv"
    pip install -q "$@"
}
