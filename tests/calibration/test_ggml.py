"""The bytes are ggml's, and what would abort the process is refused before."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest

from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.types import QUANTIZABLE, row_bytes

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((6, 512)).astype(np.float32)
# ggml builds tables for these, which takes seconds.
SLOW = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s"}
ALL = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(QUANTIZABLE)]
IMPORTANCE = RNG.uniform(0.1, 2, 512).astype(np.float32)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_same_bytes_as_gguf_package(ggml: Ggml, name: str) -> None:
    expected = gguf.quants.quantize(ROWS, gguf.GGMLQuantizationType[name.upper()])
    got = ggml.quantize(name, ROWS)
    assert got.shape == (6, row_bytes(name, 512))
    assert np.array_equal(got, expected.view(np.uint8).reshape(got.shape))


@pytest.mark.parametrize("name", ALL)
def test_roundtrip_of_every_type(ggml: Ggml, name: str) -> None:
    data = ggml.quantize(name, ROWS, IMPORTANCE)
    back = ggml.dequantize(name, data, 512)
    if name not in ("q1_0", "q2_0"):  # the gguf package cannot read them
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name.upper()])
        assert np.allclose(back, expected.reshape(back.shape), rtol=1e-6, atol=1e-6)
    bits = 8 * data.size / ROWS.size
    error = np.square(back - ROWS).mean()
    assert error <= (0.7 if bits < 3 else 0.05 if bits < 4 else 0.02), (bits, error)
    assert ggml.validate(name, data)


@pytest.mark.parametrize("name", ALL)
def test_dead_columns_do_not_abort(ggml: Ggml, name: str) -> None:
    importance = IMPORTANCE.copy()
    importance[:300] = 0
    rows = ROWS.copy()
    rows[0] = 0
    assert np.isfinite(ggml.dequantize(name, ggml.quantize(name, rows, importance), 512)).all()


def test_importance_changes_the_bytes(ggml: Ggml) -> None:
    assert not np.array_equal(ggml.quantize("q4_k", ROWS), ggml.quantize("q4_k", ROWS, IMPORTANCE))


@pytest.mark.parametrize("most", [0.5, 1.0, 2.0, 3.0, 4.0, 6.0])
def test_mxfp4_keeps_weights_that_come_in_mxfp4(ggml: Ggml, most: float) -> None:
    """Whatever scale their block had: every value of the grid up to `most` is one at the scale that ggml takes."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    rng = np.random.default_rng(1)
    rows = rng.choice(grid[grid <= most], (4, 16, 32)) * rng.choice([-1, 1], (4, 16, 32)) * 2.0 ** rng.integers(-12, 4, (4, 16, 1))
    rows = rows.reshape(4, 512).astype(np.float32)
    assert np.array_equal(ggml.dequantize("mxfp4", ggml.quantize("mxfp4", rows, IMPORTANCE), 512), rows)


def test_threads_agree(ggml: Ggml) -> None:
    expected = ggml.quantize("iq3_s", ROWS, IMPORTANCE)
    fresh = Ggml(ggml._lib._name)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: fresh.quantize("iq3_s", ROWS, IMPORTANCE), range(8)):
            assert np.array_equal(got, expected)


def test_validate_sees_broken_scales(ggml: Ggml) -> None:
    data = ggml.quantize("q8_0", ROWS)
    data[0, :2] = (0, 0x7E)  # the first block's scale becomes a NaN
    assert not ggml.validate("q8_0", data)


def test_refusals(ggml: Ggml, tmp_path: Path) -> None:
    nan = ROWS.copy()
    nan[3, 5] = np.nan
    for call, words in (
        (lambda: ggml.quantize("q4_k", ROWS[:, :96]), "blocks hold 256"),
        (lambda: ggml.quantize("q9_9", ROWS), "not a ggml type"),
        (lambda: ggml.quantize("q8_1", ROWS), "not a ggml type"),  # ggml has it for activations only
        (lambda: ggml.quantize("q4_k", nan), "not finite"),
        (lambda: ggml.quantize("iq2_xxs", ROWS), "importance matrix"),
        (lambda: ggml.quantize("q4_k", ROWS, IMPORTANCE[:256]), "512 finite numbers"),
        (lambda: ggml.quantize("q4_k", ROWS, IMPORTANCE * np.nan), "512 finite numbers"),
        (lambda: Ggml(tmp_path / "libggml-base.so"), "rq-gguf runtime install"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    with pytest.raises(ValueError):
        ggml.dequantize("q8_0", ggml.quantize("q8_0", ROWS), 256)
