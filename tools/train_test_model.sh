#!/usr/bin/env bash
# Trains the third test model, of another shape than `demo` and `lab`: ERNIE-4.5-MoE, 256 wide, 5 layers of which the first is dense,
# 64 experts of width 256 with 6 picked per token and one shared expert, 56.8M parameters (113.6 MB in bfloat16). Needs ../shared beside
# the checkout and a python3 (or PYTHON) with torch for CUDA and transformers 5; 5 minutes on one H100.
#
#   bash tools/train_test_model.sh OUT_DIR [train_moe.py's arguments, which override those below]
#
# The token stream (45.5 million tokens) and seed 0 are fixed; the number of steps follows the clock: the training lasts 240 seconds,
# so another card gives another model. Seen on an H100 80GB, torch 2.11, transformers 5.17, experts by grouped_mm: about 930
# steps, 122M tokens at 510 thousand a second; validation loss 2.9209 (perplexity 18.56); LIS of layers 1 to 4 on the validation
# tokens 2.73 2.29 2.62 4.50. Held-out texts of ../shared/data/heldout by llama-perplexity, bf16, 80 chunks of 512, mixed: PPL 36.65.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash tools/train_test_model.sh OUT_DIR [ARGUMENTS]" >&2; exit 2; }
out=$(realpath -m "$1")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shared=$(realpath ../shared)
python=${PYTHON:-python3}
[ ! -e "$out" ] || { echo "$out exists: name a new directory" >&2; exit 2; }
[ -f "$shared/tools/train_moe.py" ] || { echo "$shared/tools/train_moe.py is missing: the recipe needs it and $shared/data" >&2; exit 2; }

mkdir -p "$(dirname "$out")"
work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$python" - "$shared/data/tokens_free.u16.xz" "$work/tokens.u16" <<'PY'
import lzma, shutil, sys

with lzma.open(sys.argv[1]) as packed, open(sys.argv[2], "wb") as tokens:
    shutil.copyfileobj(packed, tokens)
PY
"$python" "$shared/tools/train_moe.py" --family ernie4_5_moe --hidden 256 --layers 5 --heads 4 --kv-heads 2 --experts 64 --top-k 6 \
    --expert-ff 256 --batch 128 --lr 2e-3 --seconds 240 --seed 0 --tokens "$work/tokens.u16" --out "$work/model" "$@"
cp rq_gguf/data/demo/tokenizer.json rq_gguf/data/demo/tokenizer.model rq_gguf/data/demo/tokenizer_config.json "$work/model/"
chmod -R u+w "$work/model"
mv "$work/model" "$out"
echo "$out holds the model: rq-gguf build $out OUT.gguf --calibration $shared/data/calibration.txt"
