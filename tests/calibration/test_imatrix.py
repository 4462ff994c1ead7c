from dataclasses import replace

import numpy as np
import pytest
from synthetic import synthetic_calibration

from rq_gguf.calibration.imatrix import imatrix_rows, matrix_rows
from rq_gguf.calibration.wanda import wanda_importance


def test_mean_square_and_prior() -> None:
    sums = np.array([[2, 4], [0, 0], [9, 3]], dtype=np.float32)
    rows = imatrix_rows(sums, np.array([2, 0, 3]))
    assert rows.dtype == np.float32
    assert rows.tolist() == [[1, 2], [2, 1.5], [3, 1]]  # the never-hit expert gets the others' mean


def test_nothing_hit() -> None:
    assert imatrix_rows(np.zeros((2, 3), dtype=np.float32), np.zeros(2, dtype=np.int64)).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_one_input_of_gate_and_up() -> None:
    layer = synthetic_calibration().layers[0]
    merged = replace(layer, in_sum2={"gate_up": layer.in_sum2["gate"], "down": layer.in_sum2["down"]})
    expected = imatrix_rows(layer.in_sum2["gate"], layer.selections)
    for matrix in ("gate", "up", "gate_up"):
        assert np.array_equal(matrix_rows(merged, matrix), expected)
    assert np.array_equal(matrix_rows(layer, "gate_up"), expected)
    assert np.array_equal(matrix_rows(merged, "down"), imatrix_rows(layer.in_sum2["down"], layer.selections))


def test_wanda_by_hand() -> None:
    weights = {
        "gate": np.array([[1, -2, 3, 4], [4, 3, 2, -1]], dtype=np.float32),
        "up": np.array([[0, 0, 1, 1]], dtype=np.float32),
        "down": np.array([[1, -6]], dtype=np.float32),
    }
    sums = {"gate": np.array([1, 1, 4, 9]), "up": np.array([1, 1, 4, 9]), "down": np.array([4, 1])}
    # scores: gate [1 2 6 12] and [4 3 4 3], up [0 0 2 3], down [2 6]; the lower half of each row is dropped
    assert wanda_importance(weights, sums) == pytest.approx((1 + 2 + 3 + 3 + 0 + 0 + 2) / 7)
    assert wanda_importance(weights, sums, ratio=0.25) == pytest.approx((1 + 3 + 0) / 3)  # down has no quarter
    assert wanda_importance(weights, {m: 0 * s for m, s in sums.items()}) == 0
