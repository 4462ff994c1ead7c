"""The random models that stand for the families, one row each: docs/families.md is made of what `check` finds on them."""

from dataclasses import dataclass, field
from typing import Any

from tiny_models import Size


@dataclass(frozen=True)
class Case:
    """A random model of one family."""

    name: str
    """As people know the family."""
    model_type: str
    """transformers' name of it; a key of calibration.families.FAMILIES."""
    size: Size
    seed: int
    vocabulary: str = "gpt-2"
    """A key of vocabulary.SIZES."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the configuration."""
    special: str = ""
    """What this family has that others have not."""
    slow: bool = False
    """Not in every run of the tests."""
    converter: str = ""
    """A script of this folder to run the converter through."""
    differs: str = ""
    """Why stock llama.cpp does not compute what transformers does, where it does not."""

    @property
    def top_k(self) -> int:
        """Experts that a token uses."""
        return int(self.changes.get("num_experts_per_tok", self.size.top_k))


def _size(n_expert: int, top_k: int, n_embd: int, n_ff: int, *, layers: int = 2, heads: int = 4, vocabulary: str = "gpt-2") -> Size:
    from families.vocabulary import SIZES

    return Size(n_expert, top_k, n_embd, n_ff, layers, SIZES[vocabulary], heads)


_SPM = "sentencepiece"
CASES = (
    Case("Mixtral", "mixtral", _size(8, 2, 256, 256, vocabulary=_SPM), 1, _SPM),
    Case("OLMoE", "olmoe", _size(64, 8, 256, 128), 2, slow=True),
    Case("Qwen1.5-MoE, Qwen2-MoE", "qwen2_moe", _size(60, 4, 192, 96), 3, special="shared expert with a gate", slow=True),
    Case("Qwen3-MoE", "qwen3_moe", _size(128, 8, 256, 96), 4, slow=True),
    Case("Qwen3-Next", "qwen3_next", _size(64, 10, 256, 64), 5, special="linear attention in three of four layers, shared expert"),
    Case(
        "Qwen3.5-MoE",
        "qwen3_5_moe_text",
        _size(32, 8, 64, 64, heads=2, vocabulary="qwen3.5"),
        6,
        "qwen3.5",
        {"tie_word_embeddings": True},
        "linear attention in three of four layers, shared expert",
        slow=True,
    ),
    Case("DeepSeek-MoE", "deepseek", _size(64, 6, 256, 96), 23, special="two shared experts, dense first layer", slow=True),
    Case(
        "DeepSeek-V2-Lite",
        "deepseek_v2",
        _size(64, 6, 64, 96, layers=26),
        7,
        special="MLA, two shared experts, dense first layer",
        slow=True,
    ),
    Case("DeepSeek-V3", "deepseek_v3", _size(32, 8, 256, 128), 8, special="MLA, groups, selection bias, shared expert, dense first layer"),
    Case("GPT-OSS", "gpt_oss", _size(32, 4, 288, 288), 9, special="biases, clamped activation, sinks"),
    Case("Granite-MoE", "granitemoe", _size(32, 8, 256, 96), 10, slow=True),
    Case("Granite-MoE with shared experts", "granitemoeshared", _size(32, 8, 192, 64), 11, slow=True, special="shared expert"),
    Case("Granite 4 hybrid", "granitemoehybrid", _size(32, 8, 256, 96), 12, slow=True, special="Mamba-2 layers, shared expert"),
    Case(
        "Phi-3.5-MoE",
        "phimoe",
        _size(16, 2, 256, 160, vocabulary=_SPM),
        13,
        _SPM,
        special="LayerNorm, biases in attention",
        differs="llama.cpp divides the two gate weights by their sum, and sparsemixer does not",
        slow=True,
    ),
    Case("GLM-4-MoE", "glm4_moe", _size(64, 8, 256, 96), 14, special="selection bias, shared expert, dense first layer", slow=True),
    Case("GLM-4.7-Flash", "glm4_moe_lite", _size(32, 4, 256, 96), 15, slow=True, special="MLA, selection bias, dense first layer"),
    Case("Llama-4", "llama4_text", _size(16, 1, 256, 192), 16, special="gate weights scale the inputs, every other layer dense"),
    Case(
        "ERNIE-4.5-MoE",
        "ernie4_5_moe",
        _size(64, 6, 256, 96, vocabulary=_SPM),
        17,
        _SPM,
        special="selection bias, dense first layer",
        slow=True,
    ),
    Case("dots1", "dots1", _size(32, 6, 256, 96), 18, special="selection bias, two shared experts", slow=True),
    Case("Hunyuan-MoE", "hunyuan_v1_moe", _size(16, 2, 256, 160), 19, special="shared expert", converter="convert_with_gpt2.py", slow=True),
    Case("LFM2-MoE", "lfm2_moe", _size(32, 4, 256, 128), 20, special="short convolutions, selection bias"),
    Case("MiniMax-M2", "minimax_m2", _size(64, 8, 256, 96), 21, special="selection bias", slow=True),
    Case("Jamba", "jamba", _size(16, 2, 256, 256, vocabulary=_SPM), 22, _SPM, special="Mamba layers, every other layer dense", slow=True),
)
