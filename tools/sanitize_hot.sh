#!/usr/bin/env bash
# Busy experts in fast memory under ThreadSanitizer, or AddressSanitizer and UndefinedBehaviorSanitizer: prompts, decoding and exchanges on
# a device behind RPC, several contexts and models at a time, and too little memory (tests/hot/cpp/exchange.cpp); on a device that works
# beside the CPU on a thread of its own (tests/hot/cpp/overlap.cpp and staging.cpp). Needs `rq-gguf runtime
# install` (for the source) and .venv; a quarter of an hour on 2 cores the first time. Fails on any finding but three in llama.cpp's own RPC:
# a device remembers the last graph without a lock, so two contexts must not use it at the same time; a server reads messages from
# addresses that are not aligned; what a client registers is never freed (leaks are not looked for).
#
#   bash tools/sanitize_hot.sh thread|address MODEL.gguf
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

case "${1:-}" in
    thread) sanitizers=thread cases=(contexts models) ;;
    address) sanitizers=address,undefined cases=(contexts models memory) ;;
    *) echo "usage: bash tools/sanitize_hot.sh thread|address MODEL.gguf" >&2; exit 2 ;;
esac
model=${2:?a stock file with experts, small}
limit=600 # seconds for a case

source_dir=$(python -c 'from rq_gguf.runtime.tools import source_path; print(source_path().parent)')
build=${SANITIZED_BUILD:-$(dirname "$source_dir")/sanitized-hot-$1}
launcher=$(command -v ccache || true)
generator=$(command -v ninja >/dev/null && echo Ninja || echo "Unix Makefiles")

echo "building libllama with -fsanitize=$sanitizers"
cmake -S "$source_dir" -B "$build" -G "$generator" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
    -DCMAKE_C_FLAGS_RELWITHDEBINFO="-O1 -g1" -DCMAKE_C_FLAGS="-fsanitize=$sanitizers" -DCMAKE_CXX_FLAGS="-fsanitize=$sanitizers" \
    -DGGML_CCACHE=OFF -DGGML_OPENMP=OFF -DGGML_RPC=ON -DGGML_METAL=OFF -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DCMAKE_C_COMPILER_LAUNCHER="$launcher" -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" \
    >"$build.log" 2>&1 || { tail -n 20 "$build.log" >&2; exit 1; }
cmake --build "$build" --target llama ggml-rpc -j "$(nproc)" >>"$build.log" 2>&1 || { tail -n 20 "$build.log" >&2; exit 1; }
for program in exchange overlap staging; do
    c++ -std=c++17 -O1 -g1 "-fsanitize=$sanitizers" -I "$source_dir/include" -I "$source_dir/ggml/include" -I "$source_dir/ggml/src" \
        "tests/hot/cpp/$program.cpp" -o "$build/bin/$program" -L "$build/bin" -Wl,-rpath,"$build/bin" -lllama -lggml-rpc -lggml -lggml-cpu -lggml-base -lpthread
done

work=$(mktemp -d)
export LLAMA_CACHE=$work/cache
export TSAN_OPTIONS="exitcode=66 suppressions=$work/race" UBSAN_OPTIONS="print_stacktrace=1 halt_on_error=1 suppressions=$work/alignment"
export ASAN_OPTIONS="detect_leaks=0"
echo "race:ggml_backend_rpc_graph_compute" >"$work/race"
echo "alignment:libggml-rpc.so" >"$work/alignment"
[ "$1" = thread ] && export EXCHANGE_RACE=1

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$build/bin/exchange" serve "$port" "$work/memory" >"$work/device" 2>&1 &
device=$!
trap 'kill $device 2>/dev/null || true; rm -rf "$work"' EXIT
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do kill -0 $device; sleep 0.2; done

# run_case NAME PROGRAM ARGUMENTS...
run_case() {
    local status=0 start=$SECONDS
    timeout "$limit" "$build/bin/$2" "${@:3}" 2>"$work/log" || status=$?
    if [ "$status" -ne 0 ]; then
        cat "$work/log" "$work/device" >&2
        [ "$status" -ne 124 ] || echo "$1: not done after $limit s" >&2
        exit 1
    fi
    echo "$1: $((SECONDS - start)) s"
}
for name in "${cases[@]}"; do
    run_case "$name" exchange "$model" "$port" "$work/memory" "$name"
done
for works in order thread; do
    run_case "overlap, $works" overlap "$works" "$model"
    run_case "staging, $works" staging "$works" "$model"
done
if grep -q "Sanitizer\|runtime error" "$work/device"; then
    cat "$work/device" >&2
    exit 1
fi
echo "nothing found"
