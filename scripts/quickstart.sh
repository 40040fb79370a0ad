#!/usr/bin/env bash
# Trains one model in three agreeing paths and shows what each costs. From a clean clone it makes
# .venv first.
#
#   bash scripts/quickstart.sh [--python PATH] [options of python -m scripts.quickstart]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

python_option="" rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        --python) python_option="${2:?--python needs a path}"; shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
prepare_environment "$python_option" torch numpy
cd "$ROOT"
exec "$PYTHON" -m scripts.quickstart "${rest[@]+"${rest[@]}"}"
