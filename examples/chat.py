"""Talk to a model, in the form that its own chat template gives.

    python examples/chat.py OUT.gguf "What is an owl?" "And where does it live?"

Each message is answered in turn; the model sees what was said before. Without messages they are read line by line.
Needs llama-cpp-python with the patched llama.cpp: pip install "$(rq-gguf runtime wheel)"
"""

import sys

from llama_cpp import Llama

if len(sys.argv) < 2:
    sys.exit(__doc__)
_, model, *messages = sys.argv

llm = Llama(model_path=model, n_ctx=2048, n_gpu_layers=-1, flash_attn=True, verbose=False)
if "tokenizer.chat_template" not in llm.metadata:
    print("note: this file has no chat template, so the model was hardly trained to talk", file=sys.stderr)

said = []
for message in messages or sys.stdin:
    said.append({"role": "user", "content": message.strip()})
    answer = llm.create_chat_completion(said, max_tokens=64, temperature=0)["choices"][0]["message"]
    said.append(answer)
    print(answer["content"])
