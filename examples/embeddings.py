"""How alike texts are: embeddings, and the cosines between them.

    python examples/embeddings.py OUT.gguf "The owl hunts at night." "Birds fly south." "The price of corn rose."

Any model will do to try; one that was trained for embeddings is better. Needs llama-cpp-python with the patched llama.cpp:
pip install "$(rq-gguf runtime wheel)"
"""

import sys

import numpy as np
from llama_cpp import LLAMA_POOLING_TYPE_MEAN, Llama

if len(sys.argv) < 3:
    sys.exit(__doc__)
_, model, *texts = sys.argv

llm = Llama(model_path=model, embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN, n_ctx=2048, n_gpu_layers=-1, verbose=False)
vectors = np.array(llm.embed(texts, normalize=True))  # [texts, n_embd], each of length 1
for text, cosines in zip(texts, vectors @ vectors.T, strict=True):
    print(" ".join(f"{cosine:6.3f}" for cosine in cosines), text)
