"""Real vocabularies for random models: the converter knows BPE tokenizers by what they encode, so a home-made one would be refused."""

import shutil
from functools import cache
from pathlib import Path

import gguf
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rq_gguf.runtime.tools import source_path

DEMO = Path(__file__).resolve().parents[2] / "rq_gguf" / "data" / "demo"
SIZES = {"gpt-2": 50264, "qwen3.5": 248320, "sentencepiece": 16384}
"""Kind -> tokens."""


_BPE = {"gpt-2": "gpt-2", "qwen3.5": "qwen35"}
"""Kind -> what llama.cpp calls it."""


def save_vocabulary(kind: str, directory: Path) -> None:
    """The tokenizer's files: `sentencepiece` is the demo model's tokenizer.model, the others are byte-level BPE."""
    if kind == "sentencepiece":
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            shutil.copy(DEMO / name, directory / name)
    else:
        wrapped = transformers.PreTrainedTokenizerFast(
            tokenizer_object=_bpe(_BPE[kind]), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        )
        wrapped.save_pretrained(directory)


@cache
def _bpe(name: str) -> Tokenizer:
    """A tokenizer of the vocabulary that llama.cpp's source holds for its own tests; words are split as GPT-2 does it, unless the model's
    family has a tokenizer class that splits otherwise."""
    reader = gguf.GGUFReader(source_path(f"models/ggml-vocab-{name}.gguf"))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>"])  # the converter asks for GLM's
    return tokenizer
