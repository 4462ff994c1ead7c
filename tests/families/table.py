"""docs/families.md, made of the cases and of what was found on them."""

from families.cases import Case
from families.check import MOST_CHANGED, MOST_DIFFERENT, Found

INTRODUCTION = """# Model families

What `rq-gguf build` does with each family, tried on random weights in the family's own layout (`python tools/family_table.py` makes this
page, `tests/families` finds the same).

- *calibrates*: `rq-gguf calibrate` passes text through the Hugging Face model and measures its experts. Of other families a GGUF and a file
  of llama-imatrix do instead: `rq-gguf build MODEL.gguf OUT.gguf --imatrix IMATRIX.gguf`.
- *runs*: a file with copies and several types per layer loads in the patched llama.cpp and computes what the original does, but for
  quantization.
- *as stock*: files with experts in one type, shuffled and copied or not, give the logits of llama-quantize's file on unpatched llama.cpp,
  bit for bit, for prompts and for single tokens.
- *as transformers*: stock llama.cpp gives transformers' logits for the converted model, in F32, up to rounding.

"""
HEADER = """| family | `model_type` | architecture | experts tried | what is special | calibrates | runs | as stock | as transformers |
|---|---|---|---|---|---|---|---|---|
"""


def row(case: Case, found: Found) -> str:
    """A line of the table."""
    size = case.size
    cells = [
        case.name,
        f"`{case.model_type}`",
        f"`{found.arch}`",
        f"{size.n_expert}, {case.top_k} used",
        case.special,
        "yes",
        _yes(found.copies > 0 and found.from_f32 < MOST_CHANGED),
        _yes(found.same_as_stock),
        f"no: {case.differs}" if case.differs else _yes(found.from_transformers < MOST_DIFFERENT),
    ]
    return f"| {' | '.join(cells)} |"


def is_of(line: str, case: Case) -> bool:
    """Whether a line of the page is the case's row."""
    return line.startswith(f"| {case.name} | `{case.model_type}` |")


def _yes(fact: bool) -> str:
    return "yes" if fact else "**no**"


def page(rows: list[str]) -> str:
    """The whole page."""
    return INTRODUCTION + HEADER + "\n".join(rows) + "\n" + OTHERS


OTHERS = """
Not in the table:

| family | what works | why |
|---|---|---|
| Switch Transformer (`switch_transformers`) | `calibrate`, `plan` | llama.cpp has no graph for it: `build` says so |
| LLaMA-MoE (`llama_moe`) | `calibrate`, `plan` | its routers are networks of two layers, llama.cpp's are one matrix: `build` says so |
| Nemotron-H with experts | nothing | its experts have no gate matrix: the GGUF is refused |
| GroveMoE, DeepSeek-V4 | nothing | more tensors belong to their experts (`chexps`, `tid2eid`): the GGUF is refused, by the tensor's name |
| all others that llama.cpp runs | GGUF and imatrix | calibration has no row for them; it says what it looked for, and this way round |

What checkpoints and files may be (`tests/families/test_sources.py`):

- float32, float16, bfloat16, FP8 with a scale per block, and MXFP4, in one safetensors file or several. Other quantized checkpoints (GPTQ,
  AWQ, ...) are refused: give the model they were made from.
- A base GGUF may be in several files, and so may a finished one (`--split-max-size 4GB`): `llama-gguf-split --merge` puts them together,
  `--split` takes them apart, and the patched llama.cpp loads either.
- All layers with experts must have equally many: llama.cpp knows one number for a model.
- Blocks that predict further tokens (GLM-4, Qwen3-Next, Qwen3.5, where the checkpoint has them) keep their experts together, in the type
  that llama-quantize gives them: nothing is known of their load.
- Rows that do not fit a type's blocks take llama-quantize's fallback. Layers may differ in whether they have experts, not in how many:
  llama.cpp has one number for all.
- Hunyuan's converter reads the vocabulary through code that comes with the model, which nothing here runs: convert it yourself, and give
  the GGUF and a file of llama-imatrix.
"""
