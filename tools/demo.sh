#!/usr/bin/env bash
# The main job on the embedded demo model, from nothing: sets up .venv, builds the patched llama.cpp (about 10 minutes on 2 cores the
# first time), calibrates, plans, writes out/demo-rq.gguf, generates text with it and prints the verdict on held-out text.
#
#   bash tools/demo.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup ".[calibrate]"
rq-gguf runtime install
mkdir -p out
rq-gguf build demo out/demo-rq.gguf --json out/demo-build.json

echo
echo "== text from out/demo-rq.gguf"
"$(rq-gguf runtime path llama-completion)" -m out/demo-rq.gguf -no-cnv -p "Once upon a time" -n 64 --seed 7 --temp 0.8 </dev/null 2>out/demo-completion.log ||
    { tail -n 20 out/demo-completion.log >&2; exit 1; }

echo
echo "== out/demo-rq.gguf against the unquantized model, on held-out text"
rq-gguf eval out/demo-rq.gguf --base out/demo-rq.gguf.rq/base.gguf --text rq_gguf/data/heldout.txt --json out/demo-eval.json
