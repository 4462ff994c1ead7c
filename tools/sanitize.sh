#!/usr/bin/env bash
# The patched llama.cpp under AddressSanitizer and UndefinedBehaviorSanitizer: its CPU test of the new ops, and every damaged file of
# tests/robustness. Needs `rq-gguf runtime install` (for the source) and .venv; a few minutes on 2 cores the first time.
#
#   bash tools/sanitize.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

source_dir=$(python -c 'from rq_gguf.runtime.tools import source_path; print(source_path().parent)')
build=$(dirname "$source_dir")/sanitized
launcher=$(command -v ccache || true)
generator=$(command -v ninja >/dev/null && echo Ninja || echo "Unix Makefiles")

echo "building libllama with sanitizers"
cmake -S "$source_dir" -B "$build" -G "$generator" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
    -DCMAKE_C_FLAGS_RELWITHDEBINFO="-O1 -g1" -DGGML_CCACHE=OFF -DGGML_OPENMP=OFF -DLLAMA_SANITIZE_ADDRESS=ON -DLLAMA_SANITIZE_UNDEFINED=ON \
    -DCMAKE_C_COMPILER_LAUNCHER="$launcher" -DCMAKE_CXX_COMPILER_LAUNCHER="$launcher" -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF >"$build.log" 2>&1 ||
    { tail -n 20 "$build.log" >&2; exit 1; }
cmake --build "$build" --target llama -j "$(nproc)" >>"$build.log" 2>&1 || { tail -n 20 "$build.log" >&2; exit 1; }

flags=(-std=c++17 -O1 -g1 -fsanitize=address,undefined -I "$source_dir/include" -I "$source_dir/ggml/include"
    -L "$build/bin" -Wl,-rpath,"$build/bin" -lllama -lggml -lggml-cpu -lggml-base)
c++ tests/robustness/load_model.cpp -o "$build/bin/load-model" "${flags[@]}"
c++ "$source_dir/tests/test-moe-tiers.cpp" -o "$build/bin/test-moe-tiers" "${flags[@]}"

export UBSAN_OPTIONS=print_stacktrace=1
echo "test-moe-tiers"
"$build/bin/test-moe-tiers" 2>"$build.err" | tail -n 5
if grep -q "tiers.*runtime error" "$build.err"; then
    grep "tiers.*runtime error" "$build.err" >&2
    exit 1
fi
RQ_GGUF_SANITIZED="$build/bin" python -m pytest -q tests/robustness -k "refused or good" "$@" </dev/null
