"""Error feedback against least squares, and what it is for: less error on correlated inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf.calibration.feedback import DAMPING, Feedback
from rq_gguf.ggml import Ggml
from rq_gguf.types import row_bytes

RNG = np.random.default_rng(8)
COLUMNS = 512


def correlated(n: int, rank: int) -> np.ndarray:
    """[n, COLUMNS] inputs that mostly lie in few dimensions."""
    mix = RNG.standard_normal((rank, COLUMNS)) / np.sqrt(rank)
    return (RNG.standard_normal((n, rank)) @ mix + 0.1 * RNG.standard_normal((n, COLUMNS))).astype(np.float32)


X = correlated(4000, 100)
W = (RNG.standard_normal((24, COLUMNS)) / 16).astype(np.float32)


def moments(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.T @ x / len(x), dtype=np.float32)


@given(st.sampled_from([32, 64, 256]), st.integers(0, 2**32 - 1))
def test_updates_are_least_squares(step: int, seed: int) -> None:
    """The columns behind a block make up for its error as far as any change of theirs could, all before it being fixed."""
    rng = np.random.default_rng(seed)
    h = moments(rng.standard_normal((600, COLUMNS)) @ rng.standard_normal((COLUMNS, COLUMNS)))
    damped = h.astype(np.float64) + DAMPING * np.trace(h) / COLUMNS * np.eye(COLUMNS)
    update, blocks = Feedback(h).update(step), COLUMNS // step
    for i in (0, blocks // 2, blocks - 1):
        here, behind = slice(i * step, (i + 1) * step), slice((i + 1) * step, COLUMNS)
        expected = damped[here, behind] @ np.linalg.inv(damped[behind, behind])
        assert np.allclose(-update[here, behind], expected, atol=1e-3 * max(1, float(np.abs(expected).max(initial=0))))
        assert not update[here, : behind.start].any()


@pytest.mark.parametrize("kind", ["q2_k", "iq3_xxs", "q4_k", "q6_k", "q4_0", "q5_1"])
def test_less_error_on_fresh_inputs(kind: str, ggml: Ggml) -> None:
    importance = np.square(X[:2000]).mean(axis=0)
    feedback = Feedback(moments(X[:2000]))
    fresh = X[2000:]

    def error(rows: np.ndarray) -> float:
        return float(np.square(fresh @ (ggml.dequantize(kind, rows, COLUMNS) - W).T).sum())

    fed = feedback.quantize(ggml, kind, W, importance)
    assert fed.shape == (24, row_bytes(kind, COLUMNS)) and ggml.validate(kind, fed)
    assert error(fed) < 0.75 * error(ggml.quantize(kind, W, importance))


def test_independent_inputs_change_nothing(ggml: Ggml) -> None:
    feedback, importance = Feedback(np.eye(COLUMNS, dtype=np.float32)), np.ones(COLUMNS, dtype=np.float32)
    for kind in ("q2_k", "q4_k"):
        assert np.array_equal(feedback.quantize(ggml, kind, W, importance), ggml.quantize(kind, W, importance))


def test_one_block_and_precise_types_are_left_alone(ggml: Ggml) -> None:
    feedback = Feedback(moments(X))
    assert np.array_equal(feedback.quantize(ggml, "q8_0", W, None), ggml.quantize("q8_0", W))
    short = Feedback(moments(X[:, :256]))
    assert np.array_equal(short.quantize(ggml, "q4_k", W[:, :256], None), ggml.quantize("q4_k", W[:, :256]))


def test_silent_inputs_do_no_harm(ggml: Ggml) -> None:
    rows = Feedback(np.zeros((COLUMNS, COLUMNS), dtype=np.float32)).quantize(ggml, "q4_k", W, np.zeros(COLUMNS, dtype=np.float32))
    assert np.isfinite(ggml.dequantize("q4_k", rows, COLUMNS)).all()
