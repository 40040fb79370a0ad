#!/usr/bin/env bash
# Measure everything that profiles/results holds, step by step, most important first.
#
#   bash scripts/record.sh OUT [STEP[=SECONDS] ...]
#   GPUS=4 bash scripts/record.sh OUT            # steps side by side, one GPU of the host each
#
# Without steps all run. Each is stopped at its time and keeps what it has written by then; the
# next one runs whatever happened before. OUT gets STEP.json, STEP.log and summary.txt. PYTHON
# names the interpreter, COMMIT the commit where the code lies outside git, WORKERS the processes
# that the tests share a GPU with. Side by side, GPUs are separate but the CPU's cores are shared:
# figures that are bound by launches are better taken alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-$(command -v python || command -v python3)}" workers="${WORKERS:-8}"

declare -A limit=(
    [gate]=120 [small]=110 [sublayer]=260 [chains]=220 [ops]=160 [seam]=60 [model]=340
    [model4096]=260 [nets]=170
    [tests]=420 [recompute]=400 [compile]=300 [inference]=280 [compat]=480 [layers]=260
    [paths]=200 [quickstart]=200 [integrations]=280 [integrations2]=420
    [kernels]=150
)
order=(
    gate small sublayer chains ops seam model tests recompute inference compat layers
    integrations integrations2 model4096 nets paths quickstart compile kernels
)

chains=()
for preset in "" "v4.1, "; do
    for length in 4 8; do chains+=("ours, ${preset}hc.compile, chain of $length"); done
done

bench() { # NAME SCRIPT [arguments]: one benchmark, recorded
    local name=$1 script=$2
    shift 2
    "$python" -m "scripts.$script" "$@" ${COMMIT:+--commit "$COMMIT"} --json "$out/$name.json"
}

gpu_tests() { "$python" -m pytest -m "gpu and not full" -q -rf -n "$workers" --dist worksteal "$@"; }

step() { # those that can start nothing new shortly before their time, to end by themselves
    local ending=(--seconds "$((seconds > 60 ? seconds - 30 : seconds))")
    case "$1" in
        gate) gpu_tests tests/test_ops_gpu.py tests/kernels -x -k "bitwise or token or delayed" ;;
        small) bench small bench_ops --tables small --compile-budget 60 "${ending[@]}" ;;
        sublayer) bench sublayer bench_ops --tables sublayer --plot "$out/sublayer.png" \
            "${ending[@]}" ;;
        chains) bench chains bench_ops --tables sublayer --ways "${chains[@]}" \
            --shapes 8192x2560 4096x7168 16384x4096 "${ending[@]}" ;;
        ops) bench ops bench_ops --tables ops "${ending[@]}" ;;
        seam) bench seam bench_ops --tables seam "${ending[@]}" ;;
        model) bench model bench_model --width 2560 --per-pass --plot "$out/model.png" ;;
        model4096) bench model4096 bench_model --width 4096 --plot "$out/model4096.png" ;;
        nets) bench nets bench_model --width 2560 4096 \
            --ways "ours, hc.compile" "ours, v4.1, hc.compile" ;;
        tests) gpu_tests tests ;;
        recompute) bench recompute bench_model --quick --width 2560 --layers 8 --recompute \
            --memory-plot "$out/memory.png" ;;
        compile) bench compile bench_compile_time --layers 32 ;;
        inference) bench inference bench_inference --quick --layers 4 \
            --presets residual mhc mhc-v4.1 ;;
        compat) bench compat bench_compat "${ending[@]}" ;;
        layers) bench layers bench_layers ;;
        integrations) bench integrations bench_integrations --models deepseek_v4 llama \
            "${ending[@]}" ;;
        integrations2) bench integrations2 bench_integrations --models hy_v4 glm5_next \
            "${ending[@]}" ;;
        kernels) bench kernels profile_kernels ;;
        paths) "$python" -m scripts.profile_paths --steps 50 --out "$out/paths" \
            ${COMMIT:+--commit "$COMMIT"} ;;
        quickstart) "$python" -m scripts.quickstart --steps 60 --out "$out/quickstart" \
            ${COMMIT:+--commit "$COMMIT"} ;;
    esac
}

run() { # STEP[=SECONDS]
    local name="${1%%=*}" began=$SECONDS status=0 seconds last
    seconds="${limit[$name]}"
    [ "$1" = "$name" ] || seconds="${1#*=}"
    timeout -k 5 "$seconds" bash scripts/record.sh --step "$name" "$out" "$seconds" \
        >"$out/$name.log" 2>&1 || status=$?
    last="$(tail -n 1 "$out/$name.log" | cut -c1-120)"
    echo "$name: exit $status after $((SECONDS - began)) s: $last" | tee -a "$out/summary.txt"
}

if [ "${1:-}" = --step ]; then # how this script calls itself, under a time limit
    out="$3" seconds="$4"
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
if [ "${GPUS:-1}" -gt 1 ]; then # each GPU takes the next step that none has taken
    taken="$(mktemp -d)"
    IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}"
    for gpu in "${visible[@]:0:GPUS}"; do
        (
            export CUDA_VISIBLE_DEVICES="$gpu"
            for chosen in "$@"; do
                if mkdir "$taken/${chosen%%=*}" 2>/dev/null; then run "$chosen"; fi
            done
        ) &
    done
    wait
    rm -r "$taken"
else
    for chosen in "$@"; do run "$chosen"; done
fi
