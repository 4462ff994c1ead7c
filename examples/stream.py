"""Complete a text, each piece shown as soon as it is there.

    python examples/stream.py OUT.gguf "Once upon a time"

Needs llama-cpp-python with the patched llama.cpp: pip install "$(rq-gguf runtime wheel)"
"""

import sys

from llama_cpp import Llama

if len(sys.argv) != 3:
    sys.exit(__doc__)
_, model, prompt = sys.argv

llm = Llama(model_path=model, n_ctx=2048, n_gpu_layers=-1, flash_attn=True, verbose=False)
print(prompt, end="", flush=True)
for piece in llm(prompt, max_tokens=64, temperature=0, stream=True):
    print(piece["choices"][0]["text"], end="", flush=True)
print()
