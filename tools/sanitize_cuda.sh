#!/usr/bin/env bash
# Busy experts in VRAM under NVIDIA's compute-sanitizer: placement, the hand-over between CPU and GPU, and exchanges, for a prompt at once
# and in batches of 8, then 100 tokens (racecheck, which is slow: 16). A quarter of the experts has slots. PROGRAMS: where llama-completion
# lies, built with CUDA from the patched tree. Fails on any finding, and where nothing was exchanged. What CUDA's functions return is not
# looked at: llama.cpp does, and that a graph cannot be updated, upon which it makes a new one, is no fault.
#
#   bash tools/sanitize_cuda.sh MODEL.gguf PROGRAMS      a small model, three minutes
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: bash tools/sanitize_cuda.sh MODEL.gguf PROGRAMS" >&2
    exit 2
fi
model=$1 program=$2/llama-completion
limit=600 # seconds for a case
root="$(dirname "${BASH_SOURCE[0]}")/.."

sanitizer=$(command -v compute-sanitizer || true)
for folder in /usr/local/cuda/bin /usr/local/cuda/compute-sanitizer; do
    [ -n "$sanitizer" ] || [ ! -x "$folder/compute-sanitizer" ] || sanitizer=$folder/compute-sanitizer
done
[ -n "$sanitizer" ] || { echo "compute-sanitizer is needed; it comes with the CUDA toolkit" >&2; exit 2; }
[ -r "$model" ] || { echo "$model cannot be read" >&2; exit 2; }
[ -x "$program" ] || { echo "$program is no program" >&2; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export LLAMA_CACHE=$work/cache LLAMA_EXPERT_VRAM=25%
prompt=$(head -c 700 "$root/README.md")

# run_case NAME TOOL OPTIONS...
run_case() {
    local name=$1 tool=$2 start=$SECONDS status=0 tokens=100
    [ "$tool" != racecheck ] || tokens=16
    timeout "$limit" "$sanitizer" --tool "$tool" --report-api-errors no --leak-check no --error-exitcode 66 "$program" -m "$model" -ngl 99 \
        --override-kv rq.vram_layout=str:slots -no-cnv --fit off -p "$prompt" -n "$tokens" --ignore-eos --temp 0 -t 2 -c 1024 -lv 4 "${@:3}" \
        >"$work/log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ] || ! grep -Eq "SUMMARY: 0 (errors|hazards)" "$work/log"; then
        tail -n 60 "$work/log" >&2
        echo "$tool, $name: exit status $status" >&2
        exit 1
    fi
    if ! grep -E "experts in fast memory took .* [1-9][0-9]* exchanged" "$work/log" >"$work/took"; then
        tail -n 20 "$work/log" >&2
        echo "$tool, $name: nothing was exchanged" >&2
        exit 1
    fi
    echo "$tool, $name: $(grep -Eo "SUMMARY: .*" "$work/log"), $(grep -Eo "[0-9]+ exchanged" "$work/took") ($((SECONDS - start)) s)"
}
for tool in memcheck racecheck; do
    run_case "prompt at once" "$tool"
    run_case "prompt in batches of 8" "$tool" -b 8 -ub 8
done
echo "nothing found"
