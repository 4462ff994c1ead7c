"""The adapters see what the models do: the same choices, and experts that add up to the block's own output."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import N_EMBD, N_EXPERT, N_FF, TOP_K, tiny_model
from torch import Tensor, nn

from rq_gguf.calibration.families import FAMILIES, SWITCH, MoeBlock, decoder_layers, family_of, moe_blocks
from rq_gguf.calibration.observe import observe_block
from rq_gguf.errors import UserError


def routed_sum(block: MoeBlock, x: Tensor) -> Tensor:
    """[n, n_embd] what the experts add, computed from the adapter alone."""
    ids, weights = block.route(x)
    out = torch.zeros_like(x)
    for e in range(block.n_expert):
        token, slot = torch.where(ids == e)
        gate, up, down = block.expert(e)
        weight = weights[token, slot, None]
        inputs, weight = (x[token] * weight, torch.ones_like(weight)) if block.family.weighs_inputs else (x[token], weight)
        own = block.hidden(e)(inputs, gate, up) @ down.T
        bias = block.output_bias(e)
        out[token] += (own if bias is None else own + bias) * weight
    return out


def passed(model: Any) -> list[tuple[MoeBlock, Tensor, Tensor, Any]]:
    """Per block: (adapter, its inputs, its outputs, its router's outputs) for a pass of random tokens."""
    blocks = list(moe_blocks(decoder_layers(model), model.config))
    seen: dict[int, list[Any]] = {b.layer: [] for b in blocks}
    for b in blocks:
        router = getattr(b.module, b.family.router.split(".")[0])
        b.module.register_forward_hook(lambda _m, args, out, i=b.layer: seen[i].extend([args[0], out]))
        router.register_forward_hook(lambda _m, _args, out, i=b.layer: seen[i].append(out))
    model.model(input_ids=torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(1)), use_cache=False)
    result = []
    for b in blocks:
        router, x, out = seen[b.layer][:3]
        out = out[0] if isinstance(out, tuple) else out
        result.append((b, x.reshape(-1, N_EMBD), out.reshape(-1, N_EMBD), router))
    return result


def chosen(block: MoeBlock, router: Any) -> Tensor:
    """[n, top_k] ids from what the router module returned: its choice (transformers 5) or its logits (4.57, Llama-4, DeepSeek-MoE)."""
    if isinstance(router, tuple) and len(router) == 3:
        return router[2]
    if isinstance(router, tuple):
        return torch.topk(router[1], block.top_k, dim=-1).indices
    probs = torch.softmax(router.float(), dim=-1)
    statics = getattr(block.module, "moe_statics", None)
    return torch.topk(probs if statics is None else statics(probs), TOP_K, dim=-1).indices


def ernies_routing(block: MoeBlock, router: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities [n, n_expert], gate weights [n, top_k], ids [n, top_k]) as its router returned them."""
    if not isinstance(router, tuple):
        pytest.skip("the router of transformers 4.57 returns no choice")
    logits, weights, ids = router
    return logits.softmax(-1), weights, ids


SHARED = ("shared_experts", "shared_mlp")
DECODERS = [model_type for model_type in FAMILIES if model_type != SWITCH]


@pytest.mark.parametrize("model_type", DECODERS)
def test_choices_and_outputs(model_type: str) -> None:
    for block, x, out, router in passed(tiny_model(model_type)):
        assert block.n_expert == N_EXPERT
        ids, weights = block.route(x)
        assert ids.shape == weights.shape == (len(x), block.top_k)
        assert torch.equal(ids.sort().values, chosen(block, router).reshape(-1, block.top_k).sort().values)
        expected = torch.bincount(chosen(block, router).reshape(-1), minlength=N_EXPERT)
        assert expected.min() < expected.max()
        sums = observe_block(
            x,
            ids,
            weights,
            block.expert,
            n_expert=N_EXPERT,
            n_ff=N_FF,
            hidden=block.hidden,
            output_bias=block.output_bias,
            weighs_inputs=block.family.weighs_inputs,
        )
        assert sums.selections.tolist() == expected.tolist()
        assert sums.gate_weight.sum() == pytest.approx(weights.sum().item(), rel=1e-5)

        routed = out
        if hasattr(block.module, "shared_expert"):
            shared: Any = block.module.shared_expert
            gate: Any = getattr(block.module, "shared_expert_gate", None)
            routed = out - (shared(x) if gate is None else torch.sigmoid(gate(x)) * shared(x))
        for name in SHARED:
            if getattr(block.module, name, None) is not None:
                routed = out - getattr(block.module, name)(x)
        assert routed.abs().max() > 1e-5
        assert torch.allclose(routed_sum(block, x), routed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalized", [True, False])
def test_normalization_follows_the_config(normalized: bool) -> None:
    for block, x, out, _ in passed(tiny_model("olmoe", norm_topk_prob=normalized)):
        total = block.route(x)[1].sum(dim=-1)
        assert torch.allclose(total, torch.ones_like(total)) == normalized
        assert torch.allclose(routed_sum(block, x), out, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model_type", [m for m in DECODERS if m not in ("deepseek", "llama_moe")])
def test_choices_in_bfloat16(model_type: str, tmp_path: Path) -> None:
    """Where the checkpoint's own type is kept, logits round as the model's do, which decides close calls."""
    tiny_model(model_type).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    for block, x, _, router in passed(model):
        assert torch.equal(block.route(x)[0], chosen(block, router).reshape(-1, block.top_k))


@pytest.mark.parametrize("norm_min", [1e-12, 0.8])
def test_ernies_bias_chooses_and_does_not_weigh(norm_min: float) -> None:
    blocks = passed(tiny_model("ernie4_5_moe", moe_norm_min=norm_min))
    assert [b.layer for b, *_ in blocks] == [1, 2]
    for block, x, _, router in blocks:
        probs, weights, ids = ernies_routing(block, router)
        ours = block.route(x)
        assert torch.equal(ours[0], ids) and torch.equal(ours[1], weights)
        unbiased = probs.topk(TOP_K, -1).indices
        assert 0.02 < (unbiased.sort().values != ids.sort().values).any(-1).float().mean() < 0.5
        sums = probs.gather(-1, ids).sum(-1)
        assert sums.min() < 0.8 < sums.max()
        assert torch.allclose(ours[1].sum(-1), (sums / norm_min).clamp(max=1))


def test_ernies_bias_in_the_block() -> None:
    """transformers 4.57 keeps it beside the router, not in it."""
    for block, x, _, router in passed(tiny_model("ernie4_5_moe")):
        _, weights, ids = ernies_routing(block, router)
        block.module.moe_statics = block.module.gate.moe_statics  # type: ignore[union-attr]
        linear = nn.Linear(N_EMBD, N_EXPERT, bias=False)
        linear.weight = block.module.gate.weight  # type: ignore[union-attr,assignment]
        block.module.gate = linear
        ours = block.route(x)
        assert torch.equal(ours[0], ids) and torch.equal(ours[1], weights)


class _Expert(nn.Module):
    def __init__(self, names: tuple[str, ...], weights: tuple[Tensor, ...]) -> None:
        super().__init__()
        for name, w in zip(names, weights, strict=True):
            linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
            linear.weight = nn.Parameter(w, requires_grad=False)
            setattr(self, name, linear)


@pytest.mark.parametrize(("model_type", "names"), [("mixtral", ("w1", "w3", "w2")), ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"))])
def test_experts_in_a_module_list(model_type: str, names: tuple[str, ...]) -> None:
    """The layout of transformers 4.57, made from the fused one, gives the same matrices."""
    model = tiny_model(model_type)
    layers = model.model.layers
    fused = list(moe_blocks(layers, model.config))
    weights = [[b.expert(e) for e in range(N_EXPERT)] for b in fused]
    for b in fused:
        b.module.experts = nn.ModuleList(_Expert(names, weights[b.layer][e]) for e in range(N_EXPERT))
        for name in ("mlp", "block_sparse_moe"):
            if hasattr(layers[b.layer], name):
                delattr(layers[b.layer], name)
        layers[b.layer].block_sparse_moe = b.module
    apart = list(moe_blocks(layers, model.config))
    assert [b.layer for b in apart] == [0, 1]
    for b in apart:
        for e in range(N_EXPERT):
            gate, up, down = b.expert(e)
            assert (gate.shape, down.shape) == ((N_FF, N_EMBD), (N_EMBD, N_FF))
            assert all(torch.equal(a, w) for a, w in zip((gate, up, down), weights[b.layer][e], strict=True))


def test_dense_layers_between_are_passed_over() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    assert [b.layer for b in moe_blocks(model.model.layers, model.config)] == [0, 2]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "M is a dense model"),
        ({"model_type": "qwen3_moe", "num_experts": 0}, "M is a dense model"),
        ({"model_type": "dbrx", "num_local_experts": 16}, r"family dbrx \(model_type .* knows mixtral, olmoe, .*llama-imatrix.*--imatrix"),
        ({"model_type": "new", "text_config": {"model_type": "new_text", "num_experts": [8, 16]}}, "M is of family new_text"),
        ({"model_type": "mixtral", "num_local_experts": 8, "hidden_act": "gelu"}, "activation gelu"),
    ],
)
def test_unsuitable_models(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        family_of(config, "M")


def test_architectures_are_those_of_gguf() -> None:
    import gguf

    assert {f.arch for name, f in FAMILIES.items() if name != SWITCH} <= set(gguf.MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda experts: setattr(experts, "is_transposed", True), "stored the other way round"),
        (lambda experts: setattr(experts, "is_concatenated", False), "gate and up are put together in another way"),
        (lambda experts: setattr(experts, "gate_up_proj_bias", torch.zeros(1)), "its experts have biases"),
        (lambda experts: delattr(experts, "down_proj"), "no experts.gate_up_proj and experts.down_proj"),
        (lambda experts: setattr(experts, "down_proj", nn.Parameter(torch.zeros(N_EXPERT, N_FF, N_EMBD))), r"down_proj of layer 0 is"),
    ],
)
def test_layouts_of_another_transformers(change: Any, words: str) -> None:
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    if isinstance(experts, nn.ModuleList):
        pytest.skip("the layout of transformers 4.57")
    change(experts)
    with pytest.raises(UserError, match=f"lays out qwen3_moe in a way that rq-gguf does not know .*{words}.*--imatrix"):
        list(moe_blocks(model.model.layers, model.config))
