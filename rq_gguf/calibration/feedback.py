"""Quantizing with error feedback: what one block of a row loses, the columns behind it make up for as far as their inputs are correlated.

Inputs of an expert's gate and up, the normalized residual stream, are far from independent: on a 32-expert model 30 % (last layer) to 97 %
(first) of what half of the columns carry follows from the other half. So after a block of columns is quantized, with error E, the columns
still to come are moved by  E H[block, rest] H[rest, rest]^-1,  the least squares answer to what E does on inputs of second moments H.
This is GPTQ's update (arXiv 2210.17323), taken between ggml's blocks instead of columns, so that all arithmetic within a block stays
ggml's own, its scales included. The file's format does not change, nor does anything at run time. On held-out tokens the error of gate and
up falls by 15 % (last layer) to 50 % (first), in all types from Q2_K to Q6_K. down gets none: its inputs are an expert's own, and moments
of every expert's would take too much room.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import LayerCalibration
from rq_gguf.ggml import Ggml
from rq_gguf.types import block

Matrix = NDArray[np.float32]
Factor = Callable[[NDArray[np.float64]], NDArray[np.float64]]

DAMPING = 0.01
"""Of the mean diagonal, added to it: GPTQ's choice."""
PRECISE = frozenset(("q8_0", "f16", "bf16", "f32"))
"""Types that lose too little to be worth the arithmetic."""


class Feedback:
    """One layer's update for rows that are multiplied with its inputs. Safe to use from several threads."""

    def __init__(self, moments: Matrix, factor: Factor | None = None) -> None:
        """moments: [columns, columns] second moments of the inputs, at any scale. factor: instead of inverse_factor, the same elsewhere."""
        damped = moments.astype(np.float64)
        damped[np.diag_indices_from(damped)] += DAMPING * float(np.trace(damped)) / len(damped) or 1.0
        # U upper triangular with U^T U = H^-1: its blocks give the update of every block given that all before it are done.
        self._u = (factor or inverse_factor)(damped).T
        self._update: dict[int, Matrix] = {}

    def update(self, step: int) -> Matrix:
        """[columns, columns]: what errors in a block of `step` columns (its rows) take from the columns behind it; zero elsewhere."""
        if step not in self._update:
            u = self._u
            update = np.zeros(u.shape, dtype=np.float32)
            for a in range(0, len(u) - step, step):
                update[a : a + step, a + step :] = np.linalg.solve(u[a : a + step, a : a + step], u[a : a + step, a + step :])
            self._update[step] = update
        return self._update[step]

    def quantize(self, ggml: Ggml, kind: str, weights: Matrix, importance: Matrix | None) -> NDArray[np.uint8]:
        """Rows [n, columns] as stored in a type, uint8 [n, row_bytes].

        kind: a type whose blocks fit the rows. importance: [columns], None for none.
        """
        step, columns = block(kind)[0], weights.shape[1]
        if kind in PRECISE or step >= columns:
            return ggml.quantize(kind, weights, importance)
        update, errors, parts = self.update(step), np.empty_like(weights), []
        for start in range(0, columns, step):
            here = slice(start, start + step)
            wanted = weights[:, here] - errors[:, :start] @ update[:start, here]
            parts.append(ggml.quantize(kind, wanted, None if importance is None else np.ascontiguousarray(importance[here])))
            errors[:, here] = wanted - ggml.dequantize(kind, parts[-1], step)
        return np.concatenate(parts, axis=1)


def inverse_factor(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """L, lower triangular, with L L^T the inverse of a positive definite matrix."""
    return np.linalg.cholesky(np.linalg.inv(matrix))


def layer_feedback(layer: LayerCalibration, factor: Factor | None = None) -> Feedback | None:
    """The update for a layer's gate and up; None where the calibration has no moments of its inputs. factor: see Feedback."""
    return None if layer.moments is None else Feedback(layer.moments(), factor)
