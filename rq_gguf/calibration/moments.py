"""Errors estimated from an imatrix alone (diagonal second moments) and the experts' weights: no torch, no tokens."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.calibration.gated import hidden_sensitivity
from rq_gguf.calibration.imatrix import expected_selections, imatrix_rows
from rq_gguf.calibration.requantize import Matrix, Tick, Weights, in_threads, requantize
from rq_gguf.calibration.wanda import wanda_importance
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml
from rq_gguf.threads import available_threads
from rq_gguf.types import by_stored_type


def measure_from_imatrix(
    calibration: Calibration,
    weights: Weights,
    types: tuple[str, ...],
    ggml: Ggml,
    *,
    threads: int | None = None,
    tick: Tick = lambda: None,
) -> Calibration:
    """A plain imatrix completed with what its diagonal second moments say about errors, given the experts' weights.

    With s[m] the sums of squared inputs of matrix m over the expert's tokens and W[m] its weights, columns taken as uncorrelated:
    - expert output energy E = sum_j s[down]_j |W[down]_:j|^2;
    - error of down          = sum_j s[down]_j |dW[down]_:j|^2;
    - error of gate and up   = sum_i |W[down]_:i|^2 c_i, c_i what their errors change hidden unit i by (see gated).
    Gate weights are unknown and taken as 1 / n_used. The residual energy is unknown too: errors are over the layer's total expert output
    energy (in which the gate weights cancel), so they compare experts and types within a layer, and layers only as far as their experts
    contribute alike to the residual stream.
    An expert that was never hit takes the mean statistics of the layer's others.

    tick: called per expert.
    Raises UserError where the imatrix does not say how many experts a token uses.
    """
    if calibration.n_expert_used < 1:
        raise UserError(f"the imatrix of {calibration.model} does not say how many experts a token uses; make it again with llama-imatrix")
    layers = (
        _measure_moments(layer, calibration.n_expert_used, weights, types, ggml, threads or available_threads(), tick)
        for layer in calibration.layers
    )
    return replace(calibration, types=types, layers=tuple(layers))


def _measure_moments(
    layer: LayerCalibration, n_used: int, weights: Weights, types: tuple[str, ...], ggml: Ggml, threads: int, tick: Tick
) -> LayerCalibration:
    # A merged gate_up has one entry for both of its halves.
    keys = {m: m if m in layer.in_sum2 else "gate_up" for m in ("gate", "up", "down")}
    tokens = expected_selections(layer.selections)
    importance = {m: imatrix_rows(layer.in_sum2[key], layer.selections) for m, key in keys.items()}
    energy = np.zeros(layer.n_expert)
    error = np.zeros((layer.n_expert, len(GROUPS), len(types)))
    wanda = np.zeros(layer.n_expert)

    def one(e: int) -> None:
        w, rows = {m: weights(layer.layer, m, e) for m in keys}, {m: importance[m][e] for m in keys}
        wanda[e] = wanda_importance(w, {m: layer.in_sum2[key][e] for m, key in keys.items()})
        hidden = rows["down"].astype(np.float64)
        columns = _column_energy(w["down"])
        energy[e] = columns @ hidden
        of_gate, of_up = hidden_sensitivity(_outputs(w["gate"], rows["gate"]), _outputs(w["up"], rows["up"]), hidden)

        def change(m: str, kind: str) -> Matrix:
            return requantize(ggml, kind, w[m], rows[m]) - w[m]

        for kind, same in by_stored_type(types, w["gate"].shape[1]).items():
            changed = of_gate * _outputs(change("gate", kind), rows["gate"]) + of_up * _outputs(change("up", kind), rows["up"])
            error[e, 0, same] = columns @ changed
        for kind, same in by_stored_type(types, w["down"].shape[1]).items():
            error[e, 1, same] = _column_energy(change("down", kind)) @ hidden

    in_threads(one, layer.n_expert, threads, tick)
    energy *= tokens
    error *= tokens[:, None, None] / (energy.sum() or 1.0)
    return replace(layer, gate_weight=layer.selections / n_used, output_energy=energy / n_used**2, error=error, wanda=wanda)


def _column_energy(w: Matrix) -> NDArray[np.float64]:
    """[cols] squared norm of each column of [rows, cols]."""
    return np.einsum("ij,ij->j", w, w, dtype=np.float64)


def _outputs(w: Matrix, mean_square: Matrix) -> NDArray[np.float64]:
    """[rows] mean squared outputs of [rows, cols] for uncorrelated inputs of mean squares [cols]."""
    return np.square(w, dtype=np.float64) @ mean_square
