"""Two of the paper's models that transformers knows only by code in their repositories, which nothing here runs: DeepSeek-MoE, LLaMA-MoE.

Both are LLaMA with other feed-forward layers. The classes here have the checkpoints' own names for all weights, by modeling_deepseek.py of
deepseek-moe-16b and modeling_llama_moe_hf.py of LLaMA-MoE (arXiv 2406.16554). `register` makes transformers' Auto classes find them.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from rq_gguf.errors import UserError


class DeepseekMoeConfig(transformers.LlamaConfig):
    """model_type `deepseek`: LlamaConfig's values and those of the experts."""

    model_type = "deepseek"


class _DeepseekMoe(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.renormalize = bool(getattr(config, "norm_topk_prob", False))
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(_mlp(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts))
        shared = getattr(config, "n_shared_experts", None)
        self.shared_experts = _mlp(config, config.moe_intermediate_size * shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        probs = torch.softmax(self.gate(flat), dim=-1, dtype=torch.float32)
        weights, ids = torch.topk(probs, self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = _weighted_sum(flat, ids, weights, lambda e, t: self.experts[e](t)).reshape(x.shape)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class DeepseekForCausalLM(transformers.LlamaForCausalLM):
    """DeepSeek-MoE."""

    config_class = DeepseekMoeConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            if i >= config.first_k_dense_replace and i % getattr(config, "moe_layer_freq", 1) == 0:
                layer.mlp = _DeepseekMoe(config)
        self.post_init()


class LlamaMoeConfig(transformers.LlamaConfig):
    """model_type `llama_moe`: LlamaConfig's values and those of the experts."""

    model_type = "llama_moe"


class _LlamaMoeGate(nn.Module):
    """A network of two layers, or one, to logits; softmax over the best of them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k, self.n_expert = config.num_selects, config.num_experts
        layers: list[nn.Module] = [nn.Linear(config.hidden_size, self.n_expert, bias=False)]
        if config.gate_network == "mlp":
            layers += [nn.Tanh(), nn.Linear(self.n_expert, self.n_expert, bias=False)]
        self.gate_network = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    @property
    def weight(self) -> Tensor:
        """[n_expert, ...] of the last layer: what a model is told apart by."""
        last = self.gate_network if isinstance(self.gate_network, nn.Linear) else self.gate_network[-1]  # type: ignore[index]
        return last.weight  # type: ignore[union-attr,return-value]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate_network(x)
        best, ids = torch.topk(logits, self.top_k, dim=-1)
        return logits, torch.softmax(best, dim=-1, dtype=torch.float32), ids


class _LlamaMoeExperts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        rows = config.intermediate_size // config.num_experts
        shapes = {"weight_gate": (rows, config.hidden_size), "weight_up": (rows, config.hidden_size)}
        for name, shape in (shapes | {"weight_down": (config.hidden_size, rows)}).items():
            setattr(self, name, nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(config.num_experts)))


class _LlamaMoeCalculator(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.experts = _LlamaMoeExperts(config)


class _LlamaMoe(nn.Module):
    def __init__(self, config: Any, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.gate = _LlamaMoeGate(config)
        self.calculator = _LlamaMoeCalculator(config)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids [n, top_k], gate weights [n, top_k] float32), the layer's scale in them."""
        _, weights, ids = self.gate(x)
        return ids, weights * self.scale

    def expert(self, e: int) -> tuple[Tensor, Tensor, Tensor]:
        """(gate, up, down) of one expert."""
        experts: Any = self.calculator.experts
        return experts.weight_gate[e], experts.weight_up[e], experts.weight_down[e]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = self.route(flat)

        def one(e: int, t: Tensor) -> Tensor:
            gate, up, down = self.expert(e)
            return (nn.functional.silu(t @ gate.T) * (t @ up.T)) @ down.T

        return _weighted_sum(flat, ids, weights, one).reshape(x.shape)


class LlamaMoEForCausalLM(transformers.LlamaForCausalLM):
    """LLaMA-MoE."""

    config_class = LlamaMoeConfig
    _keys_to_ignore_on_load_unexpected = [r"mlp\.gate\.weight_noise", r"rotary_emb\.inv_freq"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _check_llama_moe(config)
        for i, layer in enumerate(self.model.layers):
            scale = getattr(config, "score_scale_factor", 1.0)
            layer.mlp = _LlamaMoe(config, float(scale[i] if isinstance(scale, list) else scale))
        self.post_init()


def _check_llama_moe(config: Any) -> None:
    """Raise UserError for settings that no published checkpoint has."""
    sizes = [n for layer in getattr(config, "size_experts", None) or [] for n in layer]
    if len(set(sizes)) > 1 or config.intermediate_size % config.num_experts:
        raise UserError("this LLaMA-MoE has experts of different sizes (size_experts in config.json), which rq-gguf does not know")
    for name, wanted in (("gate_use_softmax", True), ("multiply_gate_scores", True), ("add_weight_norm", False)):
        if getattr(config, name, wanted) != wanted:
            raise UserError(f"this LLaMA-MoE has {name} {getattr(config, name)} in config.json, which rq-gguf does not know")
    if config.gate_network not in ("mlp", "linear"):
        raise UserError(f"this LLaMA-MoE has gate_network {config.gate_network} in config.json; rq-gguf knows mlp and linear")


def _mlp(config: Any, n_ff: int) -> LlamaMLP:
    made = LlamaMLP(config)
    for name, (rows, cols) in {
        "gate_proj": (n_ff, config.hidden_size),
        "up_proj": (n_ff, config.hidden_size),
        "down_proj": (config.hidden_size, n_ff),
    }.items():
        setattr(made, name, nn.Linear(cols, rows, bias=False))
    return made


def _weighted_sum(x: Tensor, ids: Tensor, weights: Tensor, expert: Any) -> Tensor:
    """[n, n_embd] gate-weighted outputs of the chosen experts. ids, weights: [n, top_k]."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, expert(e, x[token]) * weights[token, slot, None].to(x.dtype))
    return out


def register() -> None:
    """Make transformers' Auto classes know both. Doing it again changes nothing."""
    for config, model in ((DeepseekMoeConfig, DeepseekForCausalLM), (LlamaMoeConfig, LlamaMoEForCausalLM)):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, model, exist_ok=True)
