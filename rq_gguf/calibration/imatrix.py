"""Importance rows for the quantizers, by llama-quantize's rule wherever an expert was seen. Used by both measuring and writing."""

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import LayerCalibration

SPREAD = 0.1
"""Share of the selections that other texts than the calibration's are expected to spread evenly: no expert's error counts for nothing,
however rarely it was picked. On a 32-expert model's held-out texts a tenth is better than none and than three tenths."""


def expected_selections(selections: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n_expert] selections to expect on text like the calibration's: SPREAD of them spread evenly. The sum stays."""
    return (1 - SPREAD) * selections + SPREAD * selections.mean()


def imatrix_rows(in_sum2: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean squared inputs per expert, float32 [n_expert, cols]: what ggml_quantize_chunk takes as importance.

    in_sum2: [n_expert, cols] sums of squared inputs. counts: [n_expert] inputs summed.
    Experts that were hit get in_sum2 / counts in float32, as llama-quantize computes it (tools/quantize/quantize.cpp, load_imatrix).
    Experts that were never hit get the mean over the layer's other experts' rows: what reaches them is of the same residual stream.
    (llama-quantize takes 1 for every column, which throws away that the columns differ.) Without any hit expert all is 1.
    """
    rows = np.ones(in_sum2.shape, dtype=np.float32)
    hit = counts > 0
    if hit.any():
        rows[hit] = in_sum2[hit].astype(np.float32) / counts[hit, None].astype(np.float32)
        rows[~hit] = rows[hit].mean(axis=0, dtype=np.float64)
    return rows


def matrix_rows(layer: LayerCalibration, matrix: str) -> NDArray[np.float32]:
    """`imatrix_rows` for one matrix (gate, up, gate_up, down) of a layer. gate, up and gate_up have the same input: each stands in
    for the others where a calibration was made for the other layout."""
    names = (matrix,) if matrix == "down" else (matrix, "gate", "up", "gate_up")
    name = next(n for n in names if n in layer.in_sum2)
    return imatrix_rows(layer.in_sum2[name], layer.selections)
