"""What calibration must know about a model family, one row per family, for the layouts of transformers 4.57 and 5.

A decoder layer's block has a router `gate` with `weight` [n_expert, n_embd] (a module of its own in 5, nn.Linear in 4.57) and `experts`:
one module with `gate_up_proj` [n_expert, 2 n_ff, n_embd] and `down_proj` [n_expert, n_embd, n_ff] in 5, a ModuleList in 4.57.
All families here route by softmax over all experts in float32, then the top k, and compute down(silu(gate(x)) * up(x)).
Shared experts (`shared_expert`, `shared_experts`) see every token: to calibration they are dense layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from rq_gguf.errors import UserError


@dataclass(frozen=True)
class Family:
    """How transformers lays out one model family."""

    arch: str
    """GGUF architecture."""
    n_expert: str
    """Name of the config's expert count."""
    renormalize: bool | None
    """Whether the chosen gate weights are divided by their sum; None: config.norm_topk_prob says."""
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Attributes of gate, up and down in an expert of a ModuleList."""
    selection_bias: str | None = None
    """Path of a tensor of n_expert values added to the probabilities for the choice alone: in the router in 5, in the block in 4.57."""
    norm_min: str | None = None
    """Name of the config's lower bound on the sum that gate weights are divided by; None: no bound."""
    float32_router: bool = False
    """Whether the router's logits are computed in float32 in a model of any type."""


FAMILIES = {
    "mixtral": Family("llama", "num_local_experts", True, ("w1", "w3", "w2")),
    "olmoe": Family("olmoe", "num_experts", None),
    "qwen2_moe": Family("qwen2moe", "num_experts", None),
    "qwen3_moe": Family("qwen3moe", "num_experts", None),
    "ernie4_5_moe": Family(
        "ernie4_5-moe",
        "moe_num_experts",
        True,
        selection_bias="moe_statics.e_score_correction_bias",
        norm_min="moe_norm_min",
        float32_router=True,
    ),
}
"""transformers' config.model_type -> family."""

_BLOCKS = ("mlp", "block_sparse_moe")  # names of the MoE block in a decoder layer
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_topk")


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a model by its config.json. Raises UserError for a dense model, an unknown family or an odd activation."""
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        if not any(isinstance(config.get(k), int) and config[k] > 1 for k in _EXPERT_COUNTS):
            raise UserError(f"{where} is a dense model ({model_type}): without experts there is nothing to replicate; use llama-quantize")
        raise UserError(
            f"{where} is of family {model_type}, and calibration knows {', '.join(FAMILIES)}: "
            "convert it to GGUF, run llama-imatrix on that, and give both to rq-gguf (MODEL.gguf --calibration IMATRIX.gguf)"
        )
    if int(config.get(family.n_expert, 2)) < 2:
        raise UserError(f"{where} is a dense model ({family.n_expert} is {config[family.n_expert]}): there is nothing to replicate")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where} has activation {config['hidden_act']}, and llama.cpp runs {model_type} with silu only")
    return family


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block of a loaded model."""

    layer: int
    """Decoder layer in the model = block in the GGUF."""
    module: nn.Module
    family: Family
    top_k: int
    renormalize: bool
    norm_min: float

    @property
    def router(self) -> Tensor:
        """[n_expert, n_embd]"""
        return self.module.gate.weight  # type: ignore[union-attr,return-value]

    @property
    def selection_bias(self) -> Tensor | None:
        """[n_expert] what is added to the router's probabilities to choose by; None in a family without it."""
        if self.family.selection_bias is None:
            return None
        first = self.family.selection_bias.split(".")[0]
        owner: Any = self.module.gate if hasattr(self.module.gate, first) else self.module
        return attrgetter(self.family.selection_bias)(owner).reshape(-1)

    @property
    def n_expert(self) -> int:
        return int(self.router.shape[0])

    def expert(self, e: int) -> tuple[Tensor, Tensor, Tensor]:
        """(gate [n_ff, n_embd], up [n_ff, n_embd], down [n_embd, n_ff]) of one expert."""
        experts: Any = self.module.experts
        if isinstance(experts, nn.ModuleList):
            gate, up, down = (getattr(experts[e], name).weight for name in self.family.matrices)
        else:
            gate, up = experts.gate_up_proj[e].chunk(2, dim=0)
            down = experts.down_proj[e]
        return gate, up, down

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids [n, top_k], gate weights [n, top_k] float32) for block inputs [n, n_embd]."""
        router = self.router
        if self.family.float32_router:
            x, router = x.float(), router.float()
        probs = torch.softmax(torch.nn.functional.linear(x, router), dim=-1, dtype=torch.float32)
        bias = self.selection_bias
        ids = torch.topk(probs if bias is None else probs + bias, self.top_k, dim=-1).indices
        weights = probs.gather(-1, ids)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=self.norm_min)
        return ids, weights


def moe_blocks(layers: nn.ModuleList, config: Any) -> Iterator[MoeBlock]:
    """The MoE blocks among a model's decoder layers (some families mix in dense ones). config: transformers' config object."""
    family = FAMILIES[config.model_type]
    renormalize = bool(config.norm_topk_prob) if family.renormalize is None else family.renormalize
    norm_min = 0.0 if family.norm_min is None else float(getattr(config, family.norm_min))
    for i, layer in enumerate(layers):
        block = next((getattr(layer, name) for name in _BLOCKS if hasattr(layer, name)), None)
        if block is None or not (hasattr(block, "gate") and hasattr(block, "experts")):
            continue
        experts = block.experts
        if not isinstance(experts, nn.ModuleList) and getattr(experts, "is_transposed", False):
            raise UserError(f"this version of transformers stores {config.model_type}'s experts transposed, which rq-gguf does not know")
        yield MoeBlock(i, block, family, int(config.num_experts_per_tok), renormalize, norm_min)
