"""From a checkpoint to a calibration: small models end to end, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import N_EMBD, N_EXPERT, N_FF, TOP_K, save_tokenizer, tiny_model

from rq_gguf.calibration import run
from rq_gguf.calibration.checkpoint import resolve_model
from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.families import FAMILIES, SWITCH, moe_blocks
from rq_gguf.calibration.file import read_any, write_calibration
from rq_gguf.calibration.fingerprint import router_fingerprint
from rq_gguf.calibration.imatrix import expected_selections
from rq_gguf.calibration.measure import rounded
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml

TEXT = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, 96, 1000))


def save(directory: Path, model_type: str = "mixtral", **changes: Any) -> Path:
    """A tiny checkpoint with its tokenizer."""
    model = tiny_model(model_type, **changes)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def calibrate(directory: Path, ggml: Ggml, **options: Any) -> Calibration:
    return run.calibrate(directory, options.pop("text", TEXT), ggml=ggml, device="cpu", threads=1, progress=False, **options)


NORMALIZED = ("mixtral", "qwen3_moe", "ernie4_5_moe", "gpt_oss", "qwen3_next", "qwen3_5_moe_text", "glm4_moe")
NORMALIZED += ("granitemoe", "granitemoeshared", "granitemoehybrid", "hunyuan_v1_moe", "lfm2_moe", "minimax_m2")
"""Families whose gate weights add up to 1."""


@pytest.mark.parametrize("model_type", [m for m in FAMILIES if m != SWITCH])
def test_whole_line(tmp_path: Path, ggml: Ggml, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tmp_path / "m", model_type)
    if model_type == "qwen3_5_moe_text":  # transformers takes a class of this family's for any tokenizer, and it splits words otherwise
        monkeypatch.setattr(run, "tokenize", lambda _, text: (np.array([int(word[1:]) for word in text.split()]), None))
    got = calibrate(directory, ggml, types=("q4_0", "q8_0"))
    used = 1 if model_type == "llama4_text" else TOP_K
    assert (got.n_tokens, got.n_expert_used, got.n_embd, got.n_ff) == (1000, used, N_EMBD, N_FF)
    assert (got.arch, got.model, got.types) == (FAMILIES[model_type].arch, "m", ("q4_0", "q8_0"))
    model = tiny_model(model_type)
    assert [layer.layer for layer in got.layers] == [b.layer for b in moe_blocks(model.model.layers, model.config)]
    for layer in got.layers:
        assert layer.selections.sum() == 1000 * used and layer.residual_energy > 0
        hit = layer.selections > 0
        assert (layer.output_energy[hit] > 0).all() and (layer.gate_weight[hit] > 0).all() and (layer.wanda[hit] > 0).all()
        assert layer.in_sum2["gate"].shape == (N_EXPERT, N_EMBD) and layer.in_sum2["down"].shape == (N_EXPERT, N_FF)
        assert (layer.error > 0).all() and (layer.error[hit, :, 1] < layer.error[hit, :, 0] / 20).all()
        norm = layer.gate_weight.sum() / layer.selections.sum() * used
        assert (norm == pytest.approx(1, rel=1e-5)) == (model_type in NORMALIZED)
    names = {
        "deepseek_v2": {"blk.0.attn_q.weight", "blk.0.attn_output.weight", "blk.1.ffn_down_shexp.weight", "blk.0.ffn_up.weight"},
        "deepseek_v3": {"blk.0.attn_q_a.weight", "blk.0.attn_q_b.weight", "blk.0.attn_kv_a_mqa.weight"},
        "glm4_moe_lite": {"blk.0.attn_q_a.weight", "blk.0.attn_q_b.weight", "blk.0.attn_kv_a_mqa.weight"},
        "qwen3_next": {"blk.1.attn_q.weight", "blk.0.ffn_down_shexp.weight"},
        "qwen3_5_moe_text": {"blk.0.attn_qkv.weight", "blk.1.attn_q.weight", "blk.0.ffn_down_shexp.weight"},
        "granitemoehybrid": {"blk.0.ssm_in.weight", "blk.0.ssm_out.weight", "blk.1.attn_q.weight"},
        "lfm2_moe": {"blk.0.shortconv.in_proj.weight", "blk.0.shortconv.out_proj.weight", "blk.1.attn_output.weight"},
        "jamba": {"blk.0.ssm_in.weight", "blk.0.ssm_x.weight", "blk.1.attn_q.weight"},
    }.get(model_type, {"blk.0.attn_q.weight", "blk.1.attn_output.weight"})
    # The converter puts this one's columns in another order.
    assert "blk.0.ssm_out.weight" not in got.dense_in_sum2 or not model_type.startswith("qwen3")
    if model_type == "qwen2_moe":
        names |= {"blk.0.ffn_down_shexp.weight", "blk.0.ffn_gate_shexp.weight"}
    if model_type == "ernie4_5_moe":
        names |= {"blk.0.ffn_down.weight", "blk.0.ffn_gate.weight", "blk.1.ffn_down_shexp.weight", "blk.2.ffn_gate_shexp.weight"}
    assert names <= set(got.dense_in_sum2) and not any("exps" in n for n in got.dense_in_sum2)
    if model_type == "mixtral":
        write_calibration(tmp_path / "a.gguf", got)
        write_calibration(tmp_path / "b.gguf", calibrate(directory, ggml, types=("q4_0", "q8_0")))
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
        assert read_any(tmp_path / "a.gguf").model_fingerprint == got.model_fingerprint


def test_fingerprint_is_the_checkpoints(tmp_path: Path, ggml: Ggml) -> None:
    """In bfloat16 on disk: what the converter writes to a GGUF as float32."""
    directory = tmp_path / "m"
    model = tiny_model("mixtral").bfloat16()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    tensors = load_file(directory / "model.safetensors")
    routers = [tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"].float().numpy() for i in range(2)]
    assert calibrate(directory, ggml).model_fingerprint == router_fingerprint(routers)
    routers[1][0, 0] += 1
    assert calibrate(directory, ggml).model_fingerprint != router_fingerprint(routers)


def test_never_hit_experts(tmp_path: Path, ggml: Ggml, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("mixtral")
    for block in moe_blocks(model.model.layers, model.config):
        # Two pairs of opposite logits: two are always positive, so the experts with logit 0 are never among the top two.
        block.router[1], block.router[4] = -block.router[0], -block.router[2]
        block.router[3] = block.router[5] = 0
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with caplog.at_level(logging.WARNING):
        got = calibrate(tmp_path, ggml)
    never = [(layer.layer, int(e)) for layer in got.layers for e in np.flatnonzero(layer.selections == 0)]
    assert {(i, e) for i in (0, 1) for e in (3, 5)} <= set(never) and f"{len(never)} of 16 experts were never picked" in caplog.text
    for i, e in never:
        layer = got.layers[i]
        assert 0 < layer.error[e].max() < layer.error.max() and layer.wanda[e] == 0


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "llama_moe"])
def test_all_samples_give_the_true_error(tmp_path: Path, ggml: Ggml, model_type: str) -> None:
    """With every token sampled, the measured error is the change of the block's output summed over all tokens."""
    directory = save(tmp_path, model_type)
    got = calibrate(directory, ggml, types=("q8_0",), samples=1000)
    some = calibrate(directory, ggml, types=("q8_0",), samples=100)
    for a, b in zip(got.layers, some.layers, strict=True):
        assert b.error.sum() == pytest.approx(a.error.sum(), rel=0.1)
        assert np.array_equal(a.selections, b.selections)

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    blocks = list(moe_blocks(model.model.layers, model.config))
    inputs: list[torch.Tensor] = []
    blocks[1].module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].reshape(-1, N_EMBD)))
    ids, bos = run.tokenize(directory, TEXT)
    with torch.inference_mode():
        for s in run.batches(run.cut((ids, bos), 5000, 128)):
            model.model(input_ids=s, use_cache=False)
        x = torch.cat(inputs)
        chosen, weights = blocks[1].route(x)
        error, expected = 0.0, expected_selections(got.layers[1].selections)
        for e in range(N_EXPERT):
            token, slot = torch.where(chosen == e)
            gate, up, down = blocks[1].expert(e)
            weight, weighs = weights[token, slot, None], blocks[1].family.weighs_inputs
            hidden = blocks[1].hidden(e)(x[token] * weight if weighs else x[token], gate, up)
            q = ggml.dequantize("q8_0", ggml.quantize("q8_0", down.numpy()), N_FF)
            change = (rounded(hidden, "q8_0") @ torch.from_numpy(q).T - hidden @ down.T) * (1 if weighs else weight)
            error += change.square().sum().item() * expected[e] / len(token)
    # Llama-4 uses one expert a token: some have so few that tokens of others are added.
    tolerance = 1e-2 if model_type == "llama4_text" else 1e-3
    assert got.layers[1].error[:, 1, 0].sum() == pytest.approx(error / got.layers[1].residual_energy, rel=tolerance)


def test_sequences() -> None:
    ids = np.arange(1000)
    spread = run.cut((ids, None), 300, 100)
    assert [s[0] for s in spread] == [0, 300, 600] and all(len(s) == 100 for s in spread)
    with_bos = run.cut((ids, 7777), 200, 100)
    assert [s[:2].tolist() for s in with_bos] == [[7777, 0], [7777, 495]] and all(len(s) == 100 for s in with_bos)
    everything = run.cut((ids[:250], None), 1000, 100)
    assert np.array_equal(np.concatenate(everything), ids[:250])
    shapes = [tuple(b.shape) for b in run.batches(run.cut((np.arange(950), None), 5000, 100))]
    assert shapes == [(8, 100), (1, 100), (1, 50)]
    for wrong, words in (
        (lambda: run.cut((ids[:99], None), 100, 100), "only 99 tokens"),
        (lambda: run.cut((ids, None), 0, 100), "0 tokens"),
    ):
        with pytest.raises(UserError, match=words):
            wrong()


def rewrite(directory: Path, name: str, value: float, index: int = 0) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[index] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_non_finite_weights(tmp_path: Path, ggml: Ggml) -> None:
    rewrite(save(tmp_path), "model.layers.1.block_sparse_moe.experts.6.w2.weight", float("nan"))
    with pytest.raises(UserError, match=r"layers\.1\..*down_proj.*expert 6.* not finite|layers\.1\..*experts\.6\.w2.* not finite"):
        calibrate(tmp_path, ggml)


def test_overflowing_activations(tmp_path: Path, ggml: Ggml) -> None:
    rewrite(save(tmp_path), "model.layers.1.post_attention_layernorm.weight", 3e38)
    with pytest.raises(UserError, match="layer 1"):
        calibrate(tmp_path, ggml)


def test_text_too_short(tmp_path: Path, ggml: Ggml) -> None:
    with pytest.raises(UserError, match="only 3 tokens"):
        calibrate(save(tmp_path), ggml, text="w1 w2 w3")


def test_unsuitable_checkpoints(tmp_path: Path, ggml: Ggml) -> None:
    def expect(words: str, model: Path | str = tmp_path / "m", **options: Any) -> None:
        with pytest.raises(UserError, match=words):
            calibrate(model, ggml, **options)  # type: ignore[arg-type]

    expect("neither a directory")
    directory = save(tmp_path / "m")
    expect("unknown type .q9.", types=("q9",))
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    expect(r"model\.safetensors is truncated")
    weights.write_bytes(whole[:100])
    expect(r"model\.safetensors is not a whole safetensors file")
    weights.unlink()
    expect("m has no weights")
    (directory / "pytorch_model.bin").touch()
    expect("safetensors first")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    expect(r"model-1\.safetensors is missing")
    save_file({"b": torch.zeros(1)}, directory / "model-1.safetensors")
    expect(r"model-1\.safetensors lacks tensor a")
    (directory / "model.safetensors.index.json").write_text("{}")
    expect("index of weights")
    (directory / "config.json").write_text("{")
    expect(r"config\.json cannot be read")
    (directory / "config.json").unlink()
    expect(r"has no config\.json")


def test_missing_tensor(tmp_path: Path, ggml: Ggml) -> None:
    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks tensor model\.norm\.weight"):
        calibrate(tmp_path, ggml)


def test_devices() -> None:
    assert run.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="unknown device 'tpu'"):
        run.pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no cuda device"):
            run.pick_device("cuda")


def test_no_tokenizer(tmp_path: Path, ggml: Ggml) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        calibrate(tmp_path, ggml)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="owner/name-of-nothing is no local directory, and the hub cannot be reached"):
        resolve_model("owner/name-of-nothing")


@pytest.mark.golden
def test_demo_model(demo_model: Path, shared: Path, ggml: Ggml) -> None:
    """Loads agree with figures computed independently on mixed text; eight bits hurt far less than four."""
    text = (shared / "data" / "calibration.txt").read_text(encoding="utf-8")
    got = calibrate(demo_model, ggml, text=text, tokens=8192, types=("q4_k", "q8_0"))
    lis = [layer.selections.max() * layer.n_expert / layer.selections.sum() for layer in got.layers]
    assert lis == pytest.approx([2.7, 3.5, 5.0, 3.4], rel=0.15)
    for layer in got.layers:
        assert layer.selections.min() > 0
        ratio = layer.error[:, :, 1] / layer.error[:, :, 0]
        assert (ratio < 0.2).all() and (ratio > 0.001).all()  # inputs rounded to 8 bits are most of it
    assert 1e-3 < np.mean([layer.error[:, :, 0].sum() for layer in got.layers]) < 4e-3
