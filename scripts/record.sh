#!/usr/bin/env bash
# Measure everything that profiles/results holds, step by step, most important first.
#
#   bash scripts/record.sh OUT [STEP[=SECONDS] ...]
#
# Without steps all run. Each is stopped at its time and keeps what it has written by then; the
# next one runs whatever happened before. OUT gets STEP.json, STEP.log and summary.txt. PYTHON
# names the interpreter, COMMIT the commit where the code lies outside git, WORKERS the processes
# that the tests share a GPU with.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}" workers="${WORKERS:-8}"

declare -A limit=(
    [gate]=120 [small]=110 [sublayer]=260 [ops]=160 [seam]=60 [model]=260 [tests]=420
    [recompute]=200 [compile]=300 [inference]=180 [compat]=200 [layers]=160 [paths]=200
    [quickstart]=200 [integrations]=180
)
order=(
    gate small sublayer ops seam model tests recompute inference compat layers integrations paths
    quickstart compile
)

bench() { # NAME SCRIPT [arguments]: one benchmark, recorded
    local name=$1 script=$2
    shift 2
    "$python" -m "scripts.$script" "$@" ${COMMIT:+--commit "$COMMIT"} --json "$out/$name.json"
}

gpu_tests() { "$python" -m pytest -m "gpu and not full" -q -rf -n "$workers" --dist worksteal "$@"; }

step() {
    case "$1" in
        gate) gpu_tests tests/test_ops_gpu.py tests/kernels -x -k "bitwise or token or delayed" ;;
        small) bench small bench_ops --tables small --compile-budget 60 ;;
        sublayer) bench sublayer bench_ops --tables sublayer --plot "$out/sublayer.png" ;;
        ops) bench ops bench_ops --tables ops ;;
        seam) bench seam bench_ops --tables seam ;;
        model) bench model bench_model --per-pass --plot "$out/model.png" ;;
        tests) gpu_tests tests ;;
        recompute) bench recompute bench_model --quick --width 2560 --layers 8 --recompute \
            --memory-plot "$out/memory.png" ;;
        compile) bench compile bench_compile_time --layers 32 ;;
        inference) bench inference bench_inference --presets residual mhc mhc-v4.1 ;;
        compat) bench compat bench_compat ;;
        layers) bench layers bench_layers ;;
        integrations) bench integrations bench_integrations --seconds 150 ;;
        paths) "$python" -m scripts.profile_paths --steps 50 --out "$out/paths" \
            ${COMMIT:+--commit "$COMMIT"} ;;
        quickstart) "$python" -m scripts.quickstart --steps 60 --out "$out/quickstart" ;;
    esac
}

if [ "${1:-}" = --step ]; then # how this script calls itself, under a time limit
    out="$3"
    step "$2"
    exit
fi
out="$(mkdir -p "${1:?OUT, a folder for the results}" && cd "$1" && pwd)"
shift
[ $# -gt 0 ] || set -- "${order[@]}"
for chosen in "$@"; do
    name="${chosen%%=*}"
    [ -n "${limit[$name]:-}" ] || { echo "STEP must be one of ${order[*]}, got $name" >&2; exit 2; }
done
for chosen in "$@"; do
    name="${chosen%%=*}" began=$SECONDS status=0
    seconds="${limit[$name]}"
    [ "$chosen" = "$name" ] || seconds="${chosen#*=}"
    timeout -k 5 "$seconds" bash scripts/record.sh --step "$name" "$out" \
        >"$out/$name.log" 2>&1 || status=$?
    last="$(tail -n 1 "$out/$name.log" | cut -c1-120)"
    echo "$name: exit $status after $((SECONDS - began)) s: $last" | tee -a "$out/summary.txt"
done
