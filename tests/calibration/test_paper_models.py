"""DeepSeek-MoE and LLaMA-MoE, whose classes are the project's own. DeepSeek-MoE is compared with llama.cpp's in tests/families."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Size, save_tokenizer, tiny_config, tiny_model

from rq_gguf.build import build
from rq_gguf.calibration import run
from rq_gguf.calibration.families import decoder_layers, moe_blocks
from rq_gguf.calibration.paper_models import LlamaMoEForCausalLM
from rq_gguf.choices import check_choices
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml

TEXT = " ".join(f"w{7 * i % 96}" for i in range(600))


def test_llama_moe_with_a_plain_router_is_mixtral() -> None:
    """A router of one matrix and no scale: the same weights give the same logits."""
    ours = tiny_model("llama_moe", gate_network="linear", score_scale_factor=1.0, rms_norm_eps=1e-5, rope_theta=10000.0)
    theirs = tiny_model("mixtral", rms_norm_eps=1e-5, rope_theta=10000.0)
    weights = {name: p for name, p in ours.state_dict().items() if ".mlp." not in name}
    left = theirs.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    blocks = (moe_blocks(decoder_layers(m), m.config) for m in (ours, theirs))
    for a, b in zip(*blocks, strict=True):
        b.router.copy_(a.router)
        for e in range(a.n_expert):
            for own, other in zip(a.expert(e), b.expert(e), strict=True):
                other.copy_(own)
    ids = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(0))
    logits = [m(input_ids=ids, use_cache=False).logits for m in (ours, theirs)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-6) and logits[0].std() > 0.01


def test_scales_differ_by_layer() -> None:
    model = tiny_model("llama_moe", score_scale_factor=[2.0, 3.0])
    totals = [b.route(torch.randn(5, 64))[1].sum(dim=-1) for b in moe_blocks(decoder_layers(model), model.config)]
    assert [t.tolist() for t in totals] == [pytest.approx([2.0] * 5), pytest.approx([3.0] * 5)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size_experts": [[32] * 7 + [48]] * 2}, "experts of different sizes"),
        ({"gate_use_softmax": False}, "gate_use_softmax False"),
        ({"add_weight_norm": True}, "add_weight_norm True"),
        ({"gate_network": "deep"}, "gate_network deep"),
    ],
)
def test_settings_that_are_not_known(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LlamaMoEForCausalLM(tiny_config("llama_moe", Size(), **changes))


def test_code_in_the_repository_is_not_needed(tmp_path: Path, ggml: Ggml) -> None:
    """A published checkpoint: it names its code, holds weights that only training needs, and was saved long ago."""
    tiny_model("llama_moe").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "configuration_llama_moe.LlamaMoEConfig", "AutoModelForCausalLM": "modeling_llama_moe_hf.LlamaMoEForCausalLM"}
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "head_dim")}
    (tmp_path / "config.json").write_text(json.dumps(old | {"auto_map": code, "rope_scaling": None, "num_experts_per_tok": None}))
    tensors = load_file(tmp_path / "model.safetensors")
    noise = {f"model.layers.{i}.mlp.gate.weight_noise.weight": torch.zeros(8, 64) for i in range(2)}
    noise |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(16) for i in range(2)}
    save_file(tensors | noise, tmp_path / "model.safetensors", {"format": "pt"})
    got = run.calibrate(tmp_path, TEXT, types=("q4_0", "q8_0"), ggml=ggml, device="cpu", threads=1, progress=False)
    assert [layer.selections.sum() for layer in got.layers] == [2 * 600] * 2
    assert not any("noise" in name for name in got.dense_in_sum2)


def test_build_says_why_there_is_no_file(tmp_path: Path, runtime: Path) -> None:
    directory = tmp_path / "model"
    tiny_model("llama_moe").save_pretrained(directory)
    with pytest.raises(UserError, match="model is a LLaMA-MoE, whose routers are networks of two layers"):
        build(str(directory), tmp_path / "out.gguf", check_choices("q8_0", None, "auto", "budget"), say=lambda line: None)
