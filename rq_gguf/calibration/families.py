"""What calibration must know about a model family, one row per family, for the layout of transformers 5 (and of 4.57 where it says so).

A decoder layer's block has a router (`gate` or `router`) and `experts`. In transformers 5 the experts are one module with `gate_up_proj`
[n_expert, 2 n_ff, n_embd] and `down_proj` [n_expert, n_embd, n_ff] or their transposes, and the router answers with its logits, the gate
weights and the ids of the chosen experts: it is asked, so that groups, biases and scales need no code here. In 4.57 the first families
of the table have a ModuleList of experts and a router that is nn.Linear; they all route by softmax, then the top k.
Shared experts (`shared_expert`, `shared_experts`) see every token: to calibration they are dense layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from rq_gguf.calibration.observe import Hidden, Units, expert_hidden
from rq_gguf.errors import UserError


@dataclass(frozen=True)
class Routing4:
    """How a family chooses experts by transformers 4.57, where the router only gives logits: softmax, then the top k."""

    renormalize: bool | None
    """Whether the chosen gate weights are divided by their sum; None: config.norm_topk_prob says."""
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Attributes of gate, up and down in an expert of the ModuleList."""
    selection_bias: str | None = None
    """Path in the block of a tensor of n_expert values added to the probabilities for the choice alone."""
    norm_min: str | None = None
    """Name of the config's lower bound on the sum that gate weights are divided by; None: no bound."""
    float32_router: bool = False
    """Whether the router's logits are computed in float32 in a model of any type."""


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """GPT-OSS's activation, with the constants of llama.cpp's ggml_swiglu_oai."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@dataclass(frozen=True)
class Family:
    """How transformers lays out one model family."""

    arch: str
    """GGUF architecture; "" where there is none."""
    n_expert: str = "num_experts"
    """Name of the config's expert count."""
    router: str = "gate.weight"
    """Path of the router's weight [n_expert, n_embd] in the block; its first part is the router."""
    router_also_takes: str | None = None
    """Attribute of the block that the router is called with besides the block's inputs."""
    transposed: bool = False
    """Whether the experts' matrices are stored [columns, rows]."""
    interleaved: bool = False
    """Whether rows of gate and up take turns in `gate_up_proj`, instead of all of gate before all of up."""
    activation: Callable[[Tensor, Tensor], Tensor] | None = None
    """Outputs of gate and of up -> input of down, with the experts' biases added before; None: silu(gate) * up, without biases."""
    weighs_inputs: bool = False
    """Whether gate weights scale what goes into an expert instead of what comes out."""
    permuted: tuple[str, ...] = ()
    """Ends of names of linear layers whose columns llama.cpp's converter puts in another order: no importance rows for them."""
    own_class: bool = False
    """Whether the model's class is in calibration.paper_models, since transformers has none; its blocks may have `route` and `expert`."""
    routing4: Routing4 | None = None
    """None: transformers 5 is needed."""


SWITCH = "switch_transformers"
FAMILIES = {
    "mixtral": Family("llama", "num_local_experts", routing4=Routing4(True, ("w1", "w3", "w2"))),
    "olmoe": Family("olmoe", routing4=Routing4(None)),
    "qwen2_moe": Family("qwen2moe", routing4=Routing4(None)),
    "qwen3_moe": Family("qwen3moe", routing4=Routing4(None)),
    "ernie4_5_moe": Family(
        "ernie4_5-moe",
        "moe_num_experts",
        routing4=Routing4(True, selection_bias="moe_statics.e_score_correction_bias", norm_min="moe_norm_min", float32_router=True),
    ),
    "gpt_oss": Family("gpt-oss", "num_local_experts", "router.weight", transposed=True, interleaved=True, activation=clamped_swiglu),
    "qwen3_next": Family("qwen3next", permuted=("linear_attn.out_proj",)),
    "qwen3_5_moe_text": Family("qwen35moe", permuted=("linear_attn.out_proj",)),
    "deepseek_v2": Family("deepseek2", "n_routed_experts"),
    "deepseek_v3": Family("deepseek2", "n_routed_experts"),
    "glm4_moe": Family("glm4moe", "n_routed_experts"),
    "glm4_moe_lite": Family("deepseek2", "n_routed_experts"),
    "llama4_text": Family("llama4", "num_local_experts", "router.weight", transposed=True, weighs_inputs=True),
    "phimoe": Family("phimoe", "num_local_experts", "router.weight"),
    "granitemoe": Family("granitemoe", "num_local_experts", "router.weight"),
    "granitemoeshared": Family("granitemoe", "num_local_experts", "router.weight"),
    "granitemoehybrid": Family("granitehybrid", "num_local_experts", "router.weight"),
    "dots1": Family("dots1", "n_routed_experts"),
    "hunyuan_v1_moe": Family("hunyuan-moe", router="gate.wg.weight"),
    "lfm2_moe": Family("lfm2moe", router_also_takes="expert_bias"),
    "minimax_m2": Family("minimax-m2", "num_local_experts", router_also_takes="e_score_correction_bias"),
    "jamba": Family("jamba", router="router.weight"),
    "deepseek": Family("deepseek", "n_routed_experts", routing4=Routing4(None), own_class=True),
    "llama_moe": Family("llama", own_class=True),
    SWITCH: Family("", router="router.classifier.weight"),  # see calibration.switch
}
"""transformers' model_type (of the text model, where there are several) -> family."""

_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")  # names of the MoE block in a decoder layer
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_topk")


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a model by its config.json. Raises UserError for a dense model, an unknown family or an odd activation."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config = {"model_type": config.get("model_type"), **text}
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        if not any(_most(config.get(k)) > 1 for k in _EXPERT_COUNTS):
            raise UserError(f"{where} is a dense model ({model_type}): without experts there is nothing to replicate; use llama-quantize")
        raise UserError(
            f"{where} is of family {model_type} (model_type in config.json), and calibration knows {', '.join(FAMILIES)}. The way round: "
            "convert it with llama.cpp's convert_hf_to_gguf.py, run llama-imatrix on that file, and give both to rq-gguf "
            "(rq-gguf build MODEL.gguf OUT.gguf --imatrix IMATRIX.gguf)"
        )
    if _most(config.get(family.n_expert, 2)) < 2:
        raise UserError(f"{where} is a dense model ({family.n_expert} is {config[family.n_expert]}): there is nothing to replicate")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where} has activation {config['hidden_act']}, and llama.cpp runs {model_type} with silu only")
    return family


def _most(count: Any) -> int:
    """A config's count of experts, the largest where it has one per layer."""
    counts = count if isinstance(count, list) else [count]
    return max((c for c in counts if isinstance(c, int)), default=0)


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
        return attrgetter(self.family.router)(self.module)

    @property
    def n_expert(self) -> int:
        return int(self.router.shape[0])

    def expert(self, e: int) -> tuple[Tensor, Tensor, Tensor]:
        """(gate [n_ff, n_embd], up [n_ff, n_embd], down [n_embd, n_ff]) of one expert: views, so that writing to them changes the model."""
        if hasattr(self.module, "expert"):
            return self.module.expert(e)  # type: ignore[operator]
        experts: Any = self.module.experts
        if isinstance(experts, nn.ModuleList):
            assert self.family.routing4 is not None
            gate, up, down = (getattr(experts[e], name).weight for name in self.family.routing4.matrices)
            return gate, up, down
        both, down = experts.gate_up_proj[e], experts.down_proj[e]
        if self.family.transposed:
            both, down = both.T, down.T
        gate, up = (both[0::2], both[1::2]) if self.family.interleaved else both.chunk(2, dim=0)
        return gate, up, down

    def hidden(self, e: int) -> Hidden:
        """What one expert makes of its inputs before `down`."""
        activation = self.family.activation
        if activation is None:
            return expert_hidden
        bias: Tensor = self.module.experts.gate_up_proj_bias[e]  # type: ignore[union-attr,index,assignment]
        parts = (bias[0::2], bias[1::2]) if self.family.interleaved else bias.chunk(2)

        def hidden(x: Tensor, gate: Tensor, up: Tensor, units: Units = None) -> Tensor:
            of_gate, of_up = ((b if units is None else b[units]).to(x.device, x.dtype) for b in parts)
            return activation(x @ gate.T + of_gate, x @ up.T + of_up)

        return hidden

    def output_bias(self, e: int) -> Tensor | None:
        """[n_embd] what one expert adds to the output of `down`; None where it has no biases."""
        bias: Any = getattr(getattr(self.module, "experts", None), "down_proj_bias", None)
        return None if bias is None else bias[e]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids [n, top_k], gate weights [n, top_k] float32) for block inputs [n, n_embd]."""
        if hasattr(self.module, "route"):
            return self.module.route(x)  # type: ignore[operator]
        router: Any = getattr(self.module, self.family.router.split(".")[0])
        also = self.family.router_also_takes
        answer = router(x) if also is None else router(x, getattr(self.module, also, None))
        if isinstance(answer, tuple) and len(answer) == 3:
            _, weights, ids = answer
            return ids, weights.float()
        if self.family.weighs_inputs:
            scores, logits = answer
            ids = torch.topk(logits, self.top_k, dim=-1).indices
            return ids, scores.gather(-1, ids).float()
        return self._route4(x)

    def _route4(self, x: Tensor) -> tuple[Tensor, Tensor]:
        routing, router = self.family.routing4, self.router
        assert routing is not None
        if routing.float32_router:
            x, router = x.float(), router.float()
        probs = torch.softmax(torch.nn.functional.linear(x, router), dim=-1, dtype=torch.float32)
        choice = probs
        if routing.selection_bias is not None:
            choice = probs + attrgetter(routing.selection_bias)(self.module).reshape(-1)
        ids = torch.topk(choice, self.top_k, dim=-1).indices
        weights = probs.gather(-1, ids)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=self.norm_min)
        return ids, weights


def decoder(model: Any) -> Any:
    """The module that has the decoder layers: of a causal LM, or of the language model in one that sees and hears too."""
    return getattr(model.model, "language_model", model.model)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers."""
    return decoder(model).layers


def moe_blocks(layers: nn.ModuleList, config: Any) -> Iterator[MoeBlock]:
    """The MoE blocks among a model's decoder layers (some families mix in dense ones). config: transformers' config object.

    Raises UserError where this version of transformers lays out the family in a way that is not known.
    """
    config = config.get_text_config()
    family = FAMILIES[config.model_type]
    routing = family.routing4 or Routing4(True)
    renormalize = bool(config.norm_topk_prob) if routing.renormalize is None else routing.renormalize
    norm_min = 0.0 if routing.norm_min is None else float(getattr(config, routing.norm_min))
    for i, layer in enumerate(layers):
        block = next((getattr(layer, name) for name in _BLOCKS if hasattr(layer, name)), None)
        if block is None or not (hasattr(block, "experts") or hasattr(block, "expert")):
            continue
        made = MoeBlock(i, block, family, _top_k(config, i), renormalize, norm_min)
        if problem := _unknown_layout(made):
            raise UserError(
                f"this version of transformers lays out {config.model_type} in a way that rq-gguf does not know ({problem}); use "
                "transformers 5, or convert the model to GGUF and give that with a file of llama-imatrix (--imatrix)"
            )
        yield made


def _top_k(config: Any, layer: int) -> int:
    k = getattr(config, "num_selects", None) or config.num_experts_per_tok  # LLaMA-MoE's name and all others'
    return int(k[layer] if isinstance(k, list) else k)


def _unknown_layout(block: MoeBlock) -> str | None:
    """Why a block is not what its family's row says, or None."""
    if hasattr(block.module, "expert"):
        return None
    family, experts = block.family, block.module.experts
    try:
        n_expert, n_embd = block.router.shape
    except AttributeError:
        return f"layer {block.layer} has no {family.router}"
    if isinstance(experts, nn.ModuleList):
        return None if family.routing4 is not None else f"layer {block.layer} has a module per expert"
    down = getattr(experts, "down_proj", None)
    if not hasattr(experts, "gate_up_proj") or down is None:
        return f"layer {block.layer} has no experts.gate_up_proj and experts.down_proj"
    if bool(getattr(experts, "is_transposed", family.transposed)) != family.transposed:
        return "its experts are stored the other way round"
    if bool(getattr(experts, "is_concatenated", not family.interleaved)) == family.interleaved:
        return "gate and up are put together in another way"
    if hasattr(experts, "gate_up_proj_bias") and family.activation is None:
        return "its experts have biases"
    n_ff = down.shape[1 if family.transposed else 2]
    expected = (n_expert, n_ff, n_embd) if family.transposed else (n_expert, n_embd, n_ff)
    if tuple(down.shape) != expected:
        return f"experts.down_proj of layer {block.layer} is {list(down.shape)}"
    return None
