"""Small random models of the families that calibration knows, and a tokenizer for them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

N_EXPERT, TOP_K, N_EMBD, N_FF = 8, 2, 64, 32
_COMMON = {
    "vocab_size": 96,
    "hidden_size": N_EMBD,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": N_EXPERT, "intermediate_size": N_FF}),
    "olmoe": ("OlmoeConfig", {"num_experts": N_EXPERT, "intermediate_size": N_FF, "norm_topk_prob": False}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": N_EXPERT, "moe_intermediate_size": N_FF, "shared_expert_intermediate_size": 48, "intermediate_size": 80},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": N_EXPERT, "moe_intermediate_size": N_FF, "intermediate_size": 80, "norm_topk_prob": True, "head_dim": 32},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": N_EXPERT,
            "moe_k": TOP_K,
            "moe_intermediate_size": N_FF,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
}


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A random model of a family, in float32; its routers are wide enough to choose clearly, and a selection bias tips some choices."""
    name, own = _CONFIGS[model_type]
    config = getattr(transformers, name)(**(_COMMON | own | changes))
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for layer in model.model.layers:
        block = getattr(layer, "mlp", None) or layer.block_sparse_moe
        if hasattr(block, "gate"):
            block.gate.weight.normal_(std=0.5)
        for name, p in block.named_parameters():
            if name.endswith("e_score_correction_bias"):
                p.normal_(std=0.03)
    return model


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of the words w0 to w95."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
