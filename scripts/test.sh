#!/usr/bin/env bash
# Lint, types and tests. From a clean clone it makes .venv first.
#
#   bash scripts/test.sh [--python PATH] [--full] [--gpu] [further pytest arguments]
#
# --full adds the whole product of cases; --gpu runs the cases that need a CUDA device.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

python_option="" full=0 gpu=0 rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        --python) python_option="${2:?--python needs a path}"; shift 2 ;;
        --full) full=1; shift ;;
        --gpu) gpu=1; shift ;;
        *) rest+=("$1"); shift ;;
    esac
done
prepare_environment "$python_option" torch numpy pytest xdist pytest_timeout
cd "$ROOT"
failed=0 passed_total=0 failed_total=0

heading() { printf '\n== %s\n' "$*"; }

# Runs a check of the sources when the environment has its tool; the script goes on either way.
check() {
    heading "$*"
    if "$PYTHON" -c "import $1" 2>/dev/null; then
        "$PYTHON" -m "$@" || failed=1
    else
        echo "$1 is not installed here: left out"
    fi
}

# count FILE WORDS: the sum of the numbers before these words in pytest's closing line.
count() {
    tail -n 1 "$1" | grep -oE "[0-9]+ ($2)" | awk '{ sum += $1 } END { print sum + 0 }' || true
}

# Runs one tier of tests; a tier that holds none (pytest's exit 5) is no failure.
tier() {
    local log status=0
    log="$(mktemp)"
    heading "pytest $*"
    "$PYTHON" -m pytest -q "$@" "${rest[@]+"${rest[@]}"}" 2>&1 | tee "$log" || status=$?
    [ "$status" -eq 0 ] || [ "$status" -eq 5 ] || failed=1
    passed_total=$((passed_total + $(count "$log" passed)))
    failed_total=$((failed_total + $(count "$log" "failed|errors?")))
    rm -f "$log"
}

main="not gpu and not interpreter and not full" interpreted="interpreter and not full"
[ "$full" -eq 1 ] && main="not gpu and not interpreter" interpreted="interpreter"
workers="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"
[ "$workers" -gt 8 ] && workers=8

check ruff check .
check ruff format --check .
check pyright --pythonpath "$PYTHON"
# One thread a worker: workers that each spin a pool of threads slow each other down.
# Tests differ a hundredfold in time: a worker that is done takes what others have left.
OMP_NUM_THREADS=1 tier -n "$workers" --dist worksteal -m "$main"
# Interpreted kernels replace compiled ones for the whole process, so they get their own.
OMP_NUM_THREADS=1 TRITON_INTERPRET=1 tier -n "$workers" --dist worksteal -m "$interpreted"
[ "$gpu" -eq 1 ] && tier -m gpu

heading "all tiers"
[ "$failed_total" -gt 0 ] && failed=1
[ "$passed_total" -gt 0 ] || { echo "no test ran"; failed=1; }
echo "$passed_total passed, $failed_total failed"
exit "$failed"
