"""What is computed by torch instead of ggml where the model is on a GPU: checked on the CPU, which torch computes on alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import Size, save_tokenizer, tiny_model

from rq_gguf.calibration import on_device, response, run
from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.device_quants import SUPPORTED, dequantized
from rq_gguf.calibration.feedback import Feedback, inverse_factor
from rq_gguf.calibration.requantize import requantize
from rq_gguf.calibration.spool import Spool
from rq_gguf.ggml import Ggml
from rq_gguf.types import LADDER

COLUMNS = 512
RNG = np.random.default_rng(7)
IMPORTANCE = RNG.gamma(1.0, 1.0, COLUMNS).astype(np.float32)
TEXT = " ".join(f"w{i}" for i in RNG.integers(0, 96, 700))


def weights(kind: str) -> np.ndarray:
    """[48, COLUMNS] of a distribution."""
    shape = (48, COLUMNS)
    if kind == "normal":
        made = RNG.standard_normal(shape)
    elif kind == "heavy tails":
        made = RNG.standard_t(4, shape)
    elif kind == "shifted":
        made = RNG.standard_normal(shape) + 1.5
    else:
        made = RNG.standard_normal(shape)
        made[:, :256] = 0
        made[3] = 0
    return (made * 0.02).astype(np.float32)


@pytest.mark.parametrize("distribution", ["normal", "heavy tails", "shifted", "zeros"])
@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_weights_come_back_as_from_ggml(kind: str, distribution: str, ggml: Ggml) -> None:
    """Nearly all the same values; where a block ended at another scale, the error is the same."""
    w = weights(distribution)
    expected = requantize(ggml, kind, w, IMPORTANCE)
    made = dequantized(kind, torch.from_numpy(w), torch.from_numpy(IMPORTANCE), ggml).numpy()
    errors = [(IMPORTANCE * np.square(back.astype(np.float64) - w)).sum() for back in (made, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01, abs=1e-12)
    assert np.isclose(made, expected, rtol=1e-4, atol=1e-9).mean() > 0.85
    half = dequantized(kind, torch.from_numpy(w).bfloat16(), torch.from_numpy(IMPORTANCE), ggml)
    assert half.dtype == torch.float32 and half.shape == w.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device: recorded launches are not replayed here")
@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_on_a_gpu_recorded_or_not(kind: str, ggml: Ggml) -> None:
    """The first call of a shape runs as usual, the next ones are replayed; other values come in between."""
    importance = torch.from_numpy(IMPORTANCE).cuda()
    given = [torch.from_numpy(np.tile(weights(name), (64, 1))).cuda() for name in ("normal", "heavy tails", "shifted", "zeros")]
    on_cpu = [dequantized(kind, x.cpu(), importance.cpu(), ggml) for x in given]
    for x, expected in zip(given * 2, on_cpu * 2, strict=True):
        made = dequantized(kind, x, importance, ggml).cpu()
        errors = [(importance.cpu() * (back - x.cpu()).double().square()).sum().item() for back in (made, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.01, abs=1e-12)
        assert torch.isclose(made, expected, rtol=1e-4, atol=1e-9).double().mean() > 0.8
        assert torch.equal(made, dequantized(kind, x, importance, ggml).cpu())


def test_every_type_of_the_ladder_is_known() -> None:
    assert set(LADDER) <= SUPPORTED


def test_the_factor_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    half = RNG.standard_normal((60, 60))
    assert on_device.factor_there(torch.device("cpu")) is None
    monkeypatch.setattr(on_device, "on_device", lambda where: True)
    factor = on_device.factor_there(torch.device("cpu"))
    assert factor is not None and np.allclose(factor(half @ half.T), inverse_factor(half @ half.T), rtol=1e-6)


@pytest.mark.parametrize("kind", ["q4_k", "q8_0", "q4_0"])  # the last is ggml's work here too
def test_feedback_is_the_same_arithmetic(kind: str, ggml: Ggml) -> None:
    inputs = RNG.standard_normal((600, COLUMNS)) @ RNG.standard_normal((COLUMNS, COLUMNS))
    feedback = Feedback((inputs.T @ inputs).astype(np.float32))
    w, rows = np.stack([weights("normal") for _ in range(3)]), np.stack([IMPORTANCE, IMPORTANCE[::-1], IMPORTANCE * 2])
    expected = np.stack([requantize(ggml, kind, w[e], rows[e].copy(), feedback) for e in range(3)])
    made = on_device.requantized(ggml, kind, torch.from_numpy(w), torch.from_numpy(rows.copy()), feedback, threads=2).numpy()
    errors = [np.square((back - w).astype(np.float64) @ inputs.T).sum() for back in (made, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert np.isclose(made, expected, rtol=1e-3, atol=1e-6).mean() > 0.8


def calibrated(directory: Path, ggml: Ggml) -> Calibration:
    types = ("q4_k", "q6_k", "q4_0")  # of the last ggml takes care on any device
    return run.calibrate(directory, TEXT, types=types, ggml=ggml, device="cpu", threads=2, progress=False)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_calibration_measured_there(family: str, ggml: Ggml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors, importance and responses as those measured with ggml's quantizers; what is counted is the same to the last bit."""
    tiny_model(family, Size(n_expert=4, n_embd=256, n_ff=256)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    expected = calibrated(tmp_path, ggml)
    for module in (run, response, on_device):
        monkeypatch.setattr(module, "on_device", lambda where: True)
    monkeypatch.setattr(on_device, "_AT_ONCE", 3 * 256 * 256)  # several rounds a layer
    made = calibrated(tmp_path, ggml)
    for a, b in zip(made.layers, expected.layers, strict=True):
        assert (a.selections == b.selections).all() and a.residual_energy == b.residual_energy
        assert np.allclose(a.wanda, b.wanda, rtol=1e-4)
        assert np.allclose(a.error, b.error, rtol=0.05) and a.error.sum() == pytest.approx(b.error.sum(), rel=0.01)
    assert made.response is not None and expected.response is not None
    assert made.response.type == expected.response.type
    assert np.allclose(made.response.error, expected.response.error, rtol=0.05)


def test_hidden_states_that_may_stay_on_the_device(tmp_path: Path) -> None:
    """torch's meta device stands for one that is not the CPU: what fits there is left there."""
    with Spool(tmp_path, 0, on_device=100) as spool:
        first, second = (torch.empty(20, dtype=torch.float32, device="meta") for _ in range(2))
        spool.put(("first",), first)
        assert spool.get(("first",)).is_meta
        with pytest.raises(NotImplementedError):  # no more room there, and a meta tensor cannot be fetched
            spool.put(("second",), second)
        spool.drop(("first",))
        spool.put(("second",), second)
        assert spool.get(("second",)).is_meta
