"""Small random models of the families that calibration knows, and a tokenizer for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rq_gguf.calibration.families import decoder_layers, moe_blocks
from rq_gguf.calibration.paper_models import DeepseekMoeConfig, LlamaMoeConfig, register

N_EXPERT, TOP_K, N_EMBD, N_FF = 8, 2, 64, 32


@dataclass(frozen=True)
class Size:
    """What a model of any family is built to."""

    n_expert: int = N_EXPERT
    top_k: int = TOP_K
    n_embd: int = N_EMBD
    n_ff: int = N_FF
    """Of a routed expert."""
    layers: int = 2
    vocabulary: int = 96
    heads: int = 2


Own = Callable[[Size], dict[str, Any]]
_MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}


def _dense_first(s: Size) -> dict[str, Any]:
    """DeepSeek's names, which others took over."""
    return {
        "n_routed_experts": s.n_expert,
        "moe_intermediate_size": s.n_ff,
        "intermediate_size": 96,
        "n_shared_experts": 1,
        "num_hidden_layers": s.layers + 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    }


def _linear_attention(s: Size) -> dict[str, Any]:
    return {
        "num_experts": s.n_expert,
        "moe_intermediate_size": s.n_ff,
        "shared_expert_intermediate_size": 48,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["full_attention" if i % 2 else "linear_attention" for i in range(s.layers)],
    }


_CONFIGS: dict[str, tuple[str, Own]] = {
    "mixtral": ("MixtralConfig", lambda s: {"num_local_experts": s.n_expert, "intermediate_size": s.n_ff}),
    "olmoe": ("OlmoeConfig", lambda s: {"num_experts": s.n_expert, "intermediate_size": s.n_ff, "norm_topk_prob": False}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        lambda s: {
            "num_experts": s.n_expert,
            "moe_intermediate_size": s.n_ff,
            "shared_expert_intermediate_size": 48,
            "intermediate_size": 80,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        lambda s: {
            "num_experts": s.n_expert,
            "moe_intermediate_size": s.n_ff,
            "intermediate_size": 80,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        lambda s: {
            "moe_num_experts": s.n_expert,
            "moe_k": s.top_k,
            "moe_intermediate_size": s.n_ff,
            "intermediate_size": s.heads * s.n_ff,  # the converter takes the shared expert's as this over the number of heads
            "num_hidden_layers": s.layers + 1,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        lambda s: {
            "num_local_experts": s.n_expert,
            "intermediate_size": s.n_ff,
            "head_dim": 32,
            "sliding_window": 128,
            "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(s.layers)],
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "qwen3_next": ("Qwen3NextConfig", lambda s: {**_linear_attention(s), "intermediate_size": 80}),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", _linear_attention),
    "deepseek_v2": (
        "DeepseekV2Config",
        lambda s: {**_dense_first(s), **_MLA, "n_shared_experts": 2, "q_lora_rank": None, "norm_topk_prob": False},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        lambda s: {**_dense_first(s), **_MLA, "q_lora_rank": 48, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "glm4_moe": ("Glm4MoeConfig", lambda s: {**_dense_first(s), "head_dim": 32, "use_qk_norm": True}),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        lambda s: {**_dense_first(s), **_MLA, "q_lora_rank": 48, "mlp_layer_types": ["dense"] + ["sparse"] * s.layers},
    ),
    "llama4_text": (
        "Llama4TextConfig",
        lambda s: {
            "num_local_experts": s.n_expert,
            "num_experts_per_tok": 1,
            "intermediate_size": s.n_ff,
            "intermediate_size_mlp": 96,
            "head_dim": 32,
            "num_hidden_layers": 2 * s.layers,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        lambda s: {
            "num_local_experts": s.n_expert,
            "intermediate_size": s.n_ff,
            "attention_bias": True,
            "lm_head_bias": True,
            "original_max_position_embeddings": 128,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", lambda s: _granite(s)),
    "granitemoeshared": ("GraniteMoeSharedConfig", lambda s: {**_granite(s), "shared_intermediate_size": 48}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        lambda s: {
            **_granite(s),
            "shared_intermediate_size": 48,
            "layer_types": ["attention" if i % 2 else "mamba" for i in range(s.layers)],
            "mamba_n_heads": 4,
            "mamba_d_head": s.n_embd // 2,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
        },
    ),
    "dots1": (
        "Dots1Config",
        lambda s: {**_dense_first(s), "n_shared_experts": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "head_dim": 32},
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        lambda s: {
            "num_experts": s.n_expert,
            "num_experts_per_tok": [s.top_k] * s.layers,
            "intermediate_size": s.n_ff,
            "head_dim": 32,
            "moe_intermediate_size": [s.n_ff] * s.layers,
            "num_shared_expert": [1] * s.layers,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        lambda s: {
            "num_experts": s.n_expert,
            "moe_intermediate_size": s.n_ff,
            "intermediate_size": 96,
            "num_dense_layers": 1,
            "num_hidden_layers": s.layers + 1,
            "layer_types": ["conv" if i % 2 == 0 else "full_attention" for i in range(s.layers + 1)],
        },
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        lambda s: {"num_local_experts": s.n_expert, "intermediate_size": s.n_ff, "head_dim": 32, "rotary_dim": 16},
    ),
    "jamba": (
        "JambaConfig",
        lambda s: {
            "num_experts": s.n_expert,
            "intermediate_size": s.n_ff,
            "num_hidden_layers": 2 * s.layers,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 16,
            "use_mamba_kernels": False,
        },
    ),
}


_OWN_CONFIGS: dict[str, tuple[type, Own]] = {
    "deepseek": (DeepseekMoeConfig, lambda s: {**_dense_first(s), "n_shared_experts": 2, "norm_topk_prob": False}),
    "llama_moe": (
        LlamaMoeConfig,
        lambda s: {
            "num_experts": s.n_expert,
            "num_selects": s.top_k,
            "intermediate_size": s.n_expert * s.n_ff,
            "gate_network": "mlp",
            "score_scale_factor": 4.0,
        },
    ),
}
"""Of the classes in calibration.paper_models."""


def _granite(s: Size) -> dict[str, Any]:
    return {
        "num_local_experts": s.n_expert,
        "intermediate_size": s.n_ff,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.15,
    }


def tiny_config(model_type: str, size: Size | None = None, **changes: Any) -> Any:
    """transformers' config of a small model of a family."""
    size = size or Size()
    kind, own = _OWN_CONFIGS[model_type] if model_type in _OWN_CONFIGS else _CONFIGS[model_type]
    common = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.n_embd,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "num_experts_per_tok": size.top_k,
        "max_position_embeddings": 128,
        "initializer_range": 0.02 if size == Size() else size.n_embd**-0.5,  # so that experts move the logits
    }
    make = getattr(transformers, kind) if isinstance(kind, str) else kind
    return make(**(common | own(size) | changes))


def tiny_model(model_type: str, size: Size | None = None, seed: int = 7, **changes: Any) -> Any:
    """A random model of a family, in float32; its routers are wide enough to choose clearly, and a selection bias tips some choices."""
    config = tiny_config(model_type, size, **changes)
    torch.manual_seed(seed)
    register()
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for block in moe_blocks(decoder_layers(model), model.config):
        width = 0.5 * (64 / block.router.shape[1]) ** 0.5
        block.router.normal_(std=width)
        for name, p in [*block.module.named_parameters(), *block.module.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                p.normal_(std=0.03)
            if name.endswith(("proj_bias", "router.bias")):
                p.normal_(std=0.1)
            if ("gate_up_proj" in name and p.ndim == 3 and block.family.transposed) or "calculator.experts" in name:
                p.normal_(std=config.get_text_config().initializer_range)
    return model


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of the words w0 to w95."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
