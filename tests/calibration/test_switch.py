"""Switch Transformer: loads as its own router makes them, errors of two matrices, a plan; and no file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import save_tokenizer

from rq_gguf.build import build, plan_calibration
from rq_gguf.calibration import run
from rq_gguf.calibration.file import read_any, write_calibration
from rq_gguf.calibration.switch import pass_text
from rq_gguf.calibration.wanda import wanda_importance
from rq_gguf.choices import check_choices
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.planning.budget import expert_shape

N_EXPERT, N_EMBD, N_FF, N_TOKENS = 8, 64, 96, 1500
TEXT = " ".join(f"w{i}" for i in np.random.default_rng(5).integers(0, 96, N_TOKENS))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers each, every other one with experts."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=96,
        d_model=N_EMBD,
        d_kv=16,
        d_ff=N_FF,
        num_heads=4,
        num_experts=N_EXPERT,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        expert_capacity=1000,
        decoder_start_token_id=0,
    )
    torch.manual_seed(3)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("classifier.weight"):
            torch.nn.init.normal_(p, std=0.5)
    path = tmp_path_factory.mktemp("switch") / "switch"
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def calibrated(directory: Path, ggml: Ggml, **options: Any) -> Any:
    return run.calibrate(directory, TEXT, types=("q4_0", "q8_0"), ggml=ggml, device="cpu", threads=1, progress=False, **options)


def test_loads_are_the_routers(directory: Path, ggml: Ggml) -> None:
    got = calibrated(directory, ggml)
    assert [layer.layer for layer in got.layers] == [1, 3]  # the encoder's second, the decoder's second
    assert (got.n_tokens, got.n_expert_used, got.n_embd, got.n_ff, got.arch) == (N_TOKENS, 1, N_EMBD, N_FF, "")

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
    counts: dict[str, torch.Tensor] = {}

    def count(name: str) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            counts[name] = counts.get(name, 0) + out[0].sum(dim=(0, 1))

        return hook

    for name, module in model.named_modules():
        if name.endswith("mlp.router"):
            module.register_forward_hook(count(name))
    sequences = run.cut(run.tokenize(directory, TEXT), 5000, 512)
    with torch.inference_mode():
        for _ in pass_text(model, list(run.batches(sequences, 2)), torch.device("cpu")):
            pass
    theirs = [counts[name].tolist() for name in sorted(counts, key=lambda n: "decoder" in n)]
    assert [layer.selections.tolist() for layer in got.layers] == theirs
    assert max(theirs[0]) > min(theirs[0])


def test_errors_and_importance_are_of_two_matrices(directory: Path, ggml: Ggml, tmp_path: Path) -> None:
    got = calibrated(directory, ggml, samples=N_TOKENS)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
    experts: Any = model.encoder.block[1].layer[-1].mlp.experts
    layer = got.layers[0]
    assert set(layer.in_sum2) == {"up", "down"}
    hit = layer.selections > 0
    assert (layer.error[hit] > 0).all() and (layer.error[hit, :, 1] < layer.error[hit, :, 0] / 20).all()
    for e in np.flatnonzero(hit):
        weights = {"up": experts[f"expert_{e}"].wi.weight, "down": experts[f"expert_{e}"].wo.weight}
        matrices = {m: w.detach().numpy() for m, w in weights.items()}
        assert layer.wanda[e] == pytest.approx(wanda_importance(matrices, {m: layer.in_sum2[m][e] for m in matrices}))
    write_calibration(tmp_path / "c.gguf", got)
    back = read_any(tmp_path / "c.gguf")
    shape = expert_shape(back)
    assert not shape.gated and shape.weights == 2 * N_EMBD * N_FF
    assert np.array_equal(back.layers[1].error, got.layers[1].error)


@pytest.mark.parametrize("policy", ["budget", "paper"])
def test_plan(directory: Path, ggml: Ggml, tmp_path: Path, policy: str) -> None:
    write_calibration(tmp_path / "c.gguf", calibrated(directory, ggml))
    types = "q4_0,q8_0"
    choices = check_choices("q8_0", types, "auto" if policy == "paper" else "2", policy)
    planned, _ = plan_calibration(tmp_path / "c.gguf", tmp_path / "plan.json", choices)
    assert [p.layer for p in planned.layers] == [1, 3]
    assert planned.expert_bytes <= planned.budget_bytes
    assert planned.budget_bytes == 2 * N_EXPERT * 2 * N_EMBD * N_FF * 34 // 32
    assert sum(sum(p.copies) for p in planned.layers) == (2 if policy == "paper" else 4)


def test_build_says_why_there_is_no_file(directory: Path, runtime: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="switch is a Switch Transformer, and llama.cpp has no graph .*`rq-gguf plan` work on it"):
        build(str(directory), tmp_path / "out.gguf", check_choices("q8_0", None, "auto", "budget"), say=lambda line: None)
    assert list(tmp_path.iterdir()) == []
