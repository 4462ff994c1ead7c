#!/usr/bin/env bash
# Fuzzes what the patches added to llama.cpp's loader, and the graphs of what loads, under AddressSanitizer and UndefinedBehaviorSanitizer.
# Needs `rq-gguf runtime install` (for the source), clang-19 with compiler-rt and .venv; the first build takes half an hour on 2 cores.
#
#   bash tools/fuzz.sh [SECONDS]     60 by default; finds are kept beside the build and printed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
seconds=${1:-60}

command -v clang++-19 >/dev/null || { echo "clang-19 is needed for fuzzing: apt-get install clang-19 libclang-rt-19-dev lld-19" >&2; exit 1; }
source_dir=$(python -c 'from rq_gguf.runtime.tools import source_path; print(source_path().parent)')
build=$(dirname "$source_dir")/fuzzed
launcher=$(command -v ccache || true)
generator=$(command -v ninja >/dev/null && echo Ninja || echo "Unix Makefiles")
flags="-O1 -g1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize=vptr,function"

echo "building libllama with sanitizers and coverage"
cmake -S "$source_dir" -B "$build" -G "$generator" -DCMAKE_BUILD_TYPE=None -DCMAKE_C_COMPILER=clang-19 -DCMAKE_CXX_COMPILER=clang++-19 \
    -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_EXE_LINKER_FLAGS="-fuse-ld=lld" -DCMAKE_SHARED_LINKER_FLAGS="-fuse-ld=lld" \
    -DGGML_CCACHE=OFF -DGGML_OPENMP=OFF -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=OFF \
    -DCMAKE_C_COMPILER_LAUNCHER="$launcher" -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" >"$build.log" 2>&1 ||
    { tail -n 20 "$build.log" >&2; exit 1; }
cmake --build "$build" --target llama -j "$(nproc)" >>"$build.log" 2>&1 || { tail -n 20 "$build.log" >&2; exit 1; }
find_library() { find "$build" -name "lib$1.a" -print -quit; }
clang++-19 -std=c++17 -O1 -g1 -fsanitize=fuzzer,address,undefined -fno-sanitize=vptr,function -fuse-ld=lld \
    -I "$source_dir/include" -I "$source_dir/ggml/include" tests/robustness/fuzz_tiers.cpp -o "$build/fuzz-tiers" \
    "$(find_library llama)" "$(find_library ggml)" "$(find_library ggml-cpu)" "$(find_library ggml-base)" -lpthread -lm -ldl

# What is found by chance goes to a corpus beside the build; the one in the repository is where it starts.
mkdir -p "$build/corpus" "$build/finds"
export UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
status=0
"$build/fuzz-tiers" -max_total_time="$seconds" -max_len=256 -len_control=0 -rss_limit_mb=4096 -timeout=20 -print_final_stats=1 \
    -artifact_prefix="$build/finds/" "$build/corpus" tests/robustness/corpus 2>"$build.err" || status=$?
grep -E "^(Done|stat::number_of_executed_units|INFO: +[0-9]+ files|#[0-9]+\s+DONE)" "$build.err" || true
if grep -q "tiers.*runtime error" "$build.err"; then
    grep "tiers.*runtime error" "$build.err" | sort | uniq -c >&2
    status=1
fi
[ "$status" = 0 ] || { echo "found something; inputs in $build/finds, report in $build.err:" >&2; tail -n 40 "$build.err" >&2; }
exit "$status"
