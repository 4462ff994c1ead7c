"""Complete a text.

    python examples/complete.py OUT.gguf "Once upon a time"

Needs llama-cpp-python with the patched llama.cpp: pip install "$(rq-gguf runtime wheel)"
"""

import sys

from llama_cpp import Llama

if len(sys.argv) != 3:
    sys.exit(__doc__)
_, model, prompt = sys.argv

# n_gpu_layers: -1 is all that fit a GPU, where llama.cpp was built for one. flash_attn: what llama.cpp's own programs choose.
llm = Llama(model_path=model, n_ctx=2048, n_gpu_layers=-1, flash_attn=True, verbose=False)
answer = llm(prompt, max_tokens=64, temperature=0)  # 0: always the likeliest token
print(prompt + answer["choices"][0]["text"])
