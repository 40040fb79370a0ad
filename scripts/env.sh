# Sourced by the other scripts: finds or makes a Python with what they need, sets $PYTHON.
#
#   prepare_environment "$python_option" package…
#
# --python PATH, an active environment ($VIRTUAL_ENV, $CONDA_PREFIX) or a python3 that already
# imports torch is used as it is and nothing is installed. Otherwise .venv is made here.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH_PIN="torch==2.13.0"
TRITON_PIN="triton==3.7.1" # the release that torch 2.13.0 is built against
EXTRAS="dev,profile"

die() {
    echo "error: $*" >&2
    exit 1
}

find_base_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "need Python 3.10 or newer on PATH, found none; name one with --python PATH"
}

# The given environment, or nothing when .venv is to be used.
find_existing_python() {
    if [ -n "$1" ]; then
        command -v "$1" || die "--python must be an executable, got $1"
    elif [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        echo "$VIRTUAL_ENV/bin/python"
    elif [ -n "${CONDA_PREFIX:-}" ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
        echo "$CONDA_PREFIX/bin/python"
    elif python3 -c 'import torch' 2>/dev/null; then
        command -v python3
    fi
}

# Fails naming every package that the environment lacks.
require_packages() {
    "$PYTHON" - "$@" <<'PY' || die "$PYTHON is used as it is; install these there, or unset it"
import importlib.util
import sys

if sys.version_info < (3, 10):
    sys.exit(f"error: Python must be 3.10 or newer, got {sys.version.split()[0]}")
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("error: missing packages: " + ", ".join(missing))
PY
}

stamp() {
    { cat "$ROOT/pyproject.toml"; echo "$TORCH_PIN $TRITON_PIN $EXTRAS"; } | cksum
}

# torch goes first and alone, so that no other package chooses its build.
install_environment() {
    local venv="$ROOT/.venv" pins=("$TORCH_PIN")
    if [ ! -x "$venv/bin/python" ]; then
        echo "== making .venv"
        "$(find_base_python)" -m venv "$venv" ||
            die "python3 -m venv failed (on Debian: apt install python3-venv)"
    fi
    PYTHON="$venv/bin/python"
    [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$(stamp)" ] && return
    [ "$(uname -s)" = Linux ] && pins+=("$TRITON_PIN")
    echo "== installing into .venv"
    "$PYTHON" -m pip install --quiet --upgrade pip
    "$PYTHON" -m pip install --quiet "${pins[@]}"
    "$PYTHON" -m pip install --quiet -e "$ROOT[$EXTRAS]"
    stamp >"$venv/.stamp"
}

prepare_environment() {
    PYTHON="$(find_existing_python "$1")"
    if [ -n "$PYTHON" ]; then
        echo "== using $PYTHON, installing nothing"
        require_packages "${@:2}"
    else
        install_environment
    fi
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}
