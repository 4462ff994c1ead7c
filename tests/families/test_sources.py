"""Checkpoints as they come: 8 and 4 bits, several files, blocks for further tokens, odd shapes; and GGUFs in several files, in and out."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families.check import HELD_OUT, TEXT, logits_of, steps
from families.marks import SLOW
from families.vocabulary import SIZES, save_vocabulary
from golden.llama_lib import Job, run
from golden.reference import nmse
from safetensors.torch import load_file, save_file
from tiny_models import Size, tiny_model

from rq_gguf.build import BuildReport, build
from rq_gguf.calibration import run as calibration_run
from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.dequantize import check_quantization, dequantized
from rq_gguf.choices import check_choices
from rq_gguf.cli import main
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import read_header
from rq_gguf.runtime.tools import library_path, run_tool
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.source import Source

pytestmark = [pytest.mark.runtime]


def slow(test: Any) -> Any:
    for mark in SLOW:
        test = mark(test)
    return test


TOKENS = {"text": HELD_OUT.read_text(encoding="utf-8")[:TEXT]}


def save(directory: Path, model_type: str, size: Size, vocabulary: str, seed: int = 3, **changes: Any) -> Any:
    """A checkpoint and its model."""
    model = tiny_model(model_type, size, seed, **changes)
    model.save_pretrained(directory)
    save_vocabulary(vocabulary, directory)
    return model


def calibrate(directory: Path) -> Calibration:
    ggml = Ggml(library_path("ggml-base"))
    return calibration_run.calibrate(directory, TOKENS["text"], types=("q4_0", "q8_0"), ggml=ggml, device="cpu", progress=False)


def built(directory: Path, work: Path, budget: str = "q4_k", types: str = "q4_k,q8_0") -> BuildReport:
    text = work / "text.txt"
    text.write_text(TOKENS["text"], encoding="utf-8")
    return build(str(directory), work / "out.gguf", check_choices(budget, types, "2", "budget"), calibration=text, say=lambda line: None)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_fp8(tmp_path: Path, runtime: Path) -> None:
    """Calibration and conversion see the weights that the 8 bits and the blocks' scales stand for. Blocks at the edges are incomplete."""
    plain, fp8 = tmp_path / "plain", tmp_path / "fp8"
    save(plain, "deepseek_v3", Size(8, 2, 192, 160, vocabulary=SIZES["gpt-2"]), "gpt-2")
    shutil.copytree(plain, fp8)
    tensors, stored = load_file(plain / "model.safetensors"), {}
    rng = torch.Generator().manual_seed(1)
    for name, w in tensors.items():
        if "proj" not in name:
            stored[name] = w
            continue
        blocks = [-(-n // 128) for n in w.shape]
        scale = torch.rand(blocks, generator=rng) + 0.5
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
        stored[name] = (w / spread).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        tensors[name] = stored[name].float() * spread
    save_file(stored, fp8 / "model.safetensors", {"format": "pt"})
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    change_config(fp8, quantization_config=settings)

    ours, theirs = calibrate(fp8), calibrate(plain)
    assert ours.model_fingerprint == theirs.model_fingerprint
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert np.array_equal(a.selections, b.selections)
        assert np.array_equal(a.error, b.error)
    convert_base(fp8, tmp_path / "base.gguf", progress=False)
    with Source(tmp_path / "base.gguf") as source:
        assert source.fingerprint() == ours.model_fingerprint
        got = source.expert(1, "down", 5, Ggml(library_path("ggml-base")))
    assert np.allclose(got, tensors["model.layers.1.mlp.experts.5.down_proj.weight"].numpy(), rtol=2**-8, atol=0)


def test_mxfp4(tmp_path: Path, runtime: Path, stock_runtime: Path) -> None:
    """GPT-OSS as it is published: experts stay in their 4 bits where the plan keeps them, and calibration sees the same values."""
    size = Size(8, 2, 96, 64, vocabulary=SIZES["gpt-2"])
    directory = tmp_path / "model"
    model = save(directory, "gpt_oss", size, "gpt-2")
    tensors, rng = load_file(directory / "model.safetensors"), np.random.default_rng(2)
    for i, layer in enumerate(model.model.layers):
        for name, rows, cols in (("gate_up_proj", 2 * size.n_ff, size.n_embd), ("down_proj", size.n_embd, size.n_ff)):
            del tensors[(key := f"model.layers.{i}.mlp.experts.{name}")]
            blocks = torch.from_numpy(rng.integers(0, 256, (size.n_expert, rows, cols // 32, 16), dtype=np.uint8))
            scales = torch.from_numpy(rng.integers(120, 124, (size.n_expert, rows, cols // 32), dtype=np.uint8))
            tensors[key + "_blocks"], tensors[key + "_scales"] = blocks, scales
            values = dequantized({key + "_blocks": blocks, key + "_scales": scales}, (128, 128))[key]
            getattr(layer.mlp.experts, name).copy_(values)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    change_config(directory, quantization_config=settings)

    report = built(directory, tmp_path, budget="8bpw", types="mxfp4")
    base, taken = report.job / "base.gguf", steps(size.vocabulary, 4)
    with Source(base) as source:
        assert {t.type for matrices in source.experts.values() for t in matrices.values()} == {"mxfp4"}
        gate, up, down = (source.expert(1, m, 3, Ggml(library_path("ggml-base"))) for m in ("gate", "up", "down"))
    experts = model.model.layers[1].mlp.experts
    for got, wanted in ((gate, experts.gate_up_proj[3, :, 0::2]), (up, experts.gate_up_proj[3, :, 1::2]), (down, experts.down_proj[3])):
        assert np.array_equal(got, wanted.T.numpy())
    stock = run(Job(stock_runtime / "libllama.so", base, taken, n_ctx=128, repack=False, precise=True), tmp_path)
    ours = run(Job(runtime / "libllama.so", tmp_path / "out.gguf", taken, n_ctx=128, repack=False, precise=True), tmp_path)
    wanted_logits = logits_of(model, taken)
    # Activations are rounded to 8 bits where weights have 4.
    assert max(np.median(nmse(a, b)) for a, b in zip(stock.logits, wanted_logits, strict=True)) < 1e-3
    assert max(np.median(nmse(a, b)) for a, b in zip(ours.logits, wanted_logits, strict=True)) < 0.01
    assert {"mxfp4"} == {t.type for name, t in read_header(tmp_path / "out.gguf").tensors.items() if "_exps" in name and t.type != "f32"}


def test_other_quantized_checkpoints_are_refused() -> None:
    check_quantization({}, "M")
    with pytest.raises(
        UserError, match=r"M is quantized already \(quantization_config.quant_method gptq .* fp8 and mxfp4 only: .*--imatrix"
    ):
        check_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "M")
    with pytest.raises(UserError, match=r"w_scale_inv is \[1, 2\], which does not fit w with \[200, 64\]"):
        dequantized({"w": torch.zeros(200, 64), "w_scale_inv": torch.ones(1, 2)}, (128, 128))
    with pytest.raises(UserError, match="x_blocks and x_scales are .* no MXFP4"):
        dequantized({"x_blocks": torch.zeros(2, 4, 1, 16), "x_scales": torch.zeros(2, 4, 1)}, (128, 128))


@slow
def test_several_safetensors_files(tmp_path: Path, runtime: Path) -> None:
    size = Size(8, 2, 64, 32, vocabulary=SIZES["sentencepiece"])
    one, several = tmp_path / "1" / "model", tmp_path / "2" / "model"
    model = tiny_model("mixtral", size, 3).bfloat16()
    for directory, most in ((one, "1GB"), (several, "1MB")):
        model.save_pretrained(directory, max_shard_size=most)
        save_vocabulary("sentencepiece", directory)
    assert len(list(several.glob("model-*.safetensors"))) > 2
    ours, theirs = calibrate(several), calibrate(one)
    assert ours.model_fingerprint == theirs.model_fingerprint
    assert all(np.array_equal(a.error, b.error) for a, b in zip(ours.layers, theirs.layers, strict=True))
    for directory in (one, several):
        convert_base(directory, directory.parent / "base.gguf", progress=False)
    assert (several.parent / "base.gguf").read_bytes() == (one.parent / "base.gguf").read_bytes()


def test_split_ggufs(tmp_path: Path, runtime: Path) -> None:
    """A base in several files gives the same file as one; a built file can be split, runs so, and can be put together again."""
    size = Size(8, 2, 64, 64, vocabulary=SIZES["sentencepiece"])
    directory = tmp_path / "model"
    save(directory, "mixtral", size, "sentencepiece")
    report = built(directory, tmp_path, budget="q8_0")
    whole, base = tmp_path / "out.gguf", report.job / "base.gguf"

    run_tool(["llama-gguf-split", "--split", "--split-max-size", "5M", base, tmp_path / "base"])
    first = min(tmp_path.glob("base-00001-of-*.gguf"))
    assert len(list(tmp_path.glob("base-*.gguf"))) > 1
    again, calibration = tmp_path / "again.gguf", report.job / "calibration.gguf"
    build(str(first), again, check_choices("q8_0", "q4_k,q8_0", "2", "budget"), calibration=calibration, say=lambda line: None)
    ours_header, theirs = read_header(again), read_header(whole)
    assert {n: (t.type, t.ne) for n, t in ours_header.tensors.items()} == {n: (t.type, t.ne) for n, t in theirs.tensors.items()}
    with again.open("rb") as a, whole.open("rb") as b:
        for name, t in ours_header.tensors.items():
            a.seek(t.offset)
            b.seek(theirs.tensors[name].offset)
            assert a.read(t.n_bytes) == b.read(t.n_bytes), name

    run_tool(["llama-gguf-split", "--split", "--split-max-size", "2M", whole, tmp_path / "parts"])
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 1
    taken = steps(size.vocabulary, 5)
    choices = check_choices("q8_0", "q4_k,q8_0", "2", "budget")
    ours = build(str(base), tmp_path / "split.gguf", choices, calibration=calibration, split_bytes=2_000_000, say=lambda line: None)
    assert ours.out.name == f"split-00001-of-{ours.files:05}.gguf" and ours.files == len(list(tmp_path.glob("split-*.gguf"))) > 1
    runs = [run(Job(runtime / "libllama.so", path, taken, n_ctx=128), tmp_path).logits for path in (whole, parts[0], ours.out)]
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(*runs, strict=True))
    for command in (["inspect"], ["report", "-o", str(tmp_path / "report.html")]):
        done = CliRunner().invoke(main, [*command, str(ours.out)])
        assert done.exit_code == 0, done.output
    run_tool(["llama-gguf-split", "--merge", parts[0], tmp_path / "merged.gguf"])
    assert read_header(tmp_path / "merged.gguf").tensors.keys() == theirs.tensors.keys()


@slow
def test_blocks_for_further_tokens(tmp_path: Path, runtime: Path) -> None:
    """GLM-4's last block predicts one token more: its experts stay as llama-quantize stores them, and nothing else changes."""
    size = Size(8, 2, 64, 64, vocabulary=SIZES["gpt-2"])
    without, directory = tmp_path / "1" / "model", tmp_path / "2" / "model"
    model = save(without, "glm4_moe", size, "gpt-2")
    shutil.copytree(without, directory)
    tensors, n = load_file(without / "model.safetensors"), len(model.model.layers)
    last, width = f"model.layers.{n - 1}.", size.n_embd
    mtp = {name.replace(last, f"model.layers.{n}."): t.clone() for name, t in tensors.items() if name.startswith(last)}
    mtp |= {f"model.layers.{n}.{name}.weight": torch.ones(width) for name in ("enorm", "hnorm", "shared_head.norm")}
    mtp[f"model.layers.{n}.eh_proj.weight"] = torch.zeros(width, 2 * width)
    save_file(tensors | mtp, directory / "model.safetensors", {"format": "pt"})
    change_config(directory, num_nextn_predict_layers=1)

    work = [tmp_path / "1", tmp_path / "2"]
    built(without, work[0], budget="24bpw")
    built(directory, work[1], budget="24bpw")
    header = read_header(work[1] / "out.gguf")
    assert header.tensors[f"blk.{n}.ffn_up_exps.weight"].type == "q8_0"
    assert f"blk.{n - 1}.ffn_up_exps.0.weight" in header.tensors
    taken = steps(size.vocabulary, 6)
    runs = [run(Job(runtime / "libllama.so", w / "out.gguf", taken, n_ctx=128), tmp_path).logits for w in work]
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("model_type", "vocabulary", "size", "changes"),
    [
        # Rows of 96 and 40: no block of 256, for down not even of 32. One layer of four has experts. The head is the embedding.
        (
            "ernie4_5_moe",
            "sentencepiece",
            Size(12, 3, 96, 40, 3, SIZES["sentencepiece"]),
            {"moe_layer_start_index": 3, "tie_word_embeddings": True},
        ),
        # Nothing fits any block: all experts are F16.
        pytest.param("mixtral", "sentencepiece", Size(5, 1, 72, 56, 2, SIZES["sentencepiece"]), {}, marks=SLOW),
    ],
)
def test_odd_shapes(tmp_path: Path, runtime: Path, model_type: str, vocabulary: str, size: Size, changes: dict[str, Any]) -> None:
    directory = tmp_path / "model"
    model = save(directory, model_type, size, vocabulary, **changes)
    built(directory, tmp_path, budget="24bpw", types="q4_k,q8_0")
    taken = steps(size.vocabulary, 7)
    ours = run(Job(runtime / "libllama.so", tmp_path / "out.gguf", taken, n_ctx=128, precise=True), tmp_path)
    assert max(np.median(nmse(a, b)) for a, b in zip(ours.logits, logits_of(model, taken), strict=True)) < 0.01
    types = {t.type for name, t in read_header(tmp_path / "out.gguf").tensors.items() if "_down_exps" in name}
    assert types == {"f16"}
