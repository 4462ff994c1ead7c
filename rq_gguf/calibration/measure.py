"""How much the layer's output changes when an expert's matrices take a type: measured on sampled tokens with ggml's own quantizers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rq_gguf.calibration.data import LayerCalibration
from rq_gguf.calibration.feedback import Feedback, layer_feedback
from rq_gguf.calibration.imatrix import expected_selections, matrix_rows
from rq_gguf.calibration.observe import Hidden, expert_hidden
from rq_gguf.calibration.requantize import Matrix, Tick, Weights, in_threads, requantize
from rq_gguf.calibration.wanda import wanda_importance
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml
from rq_gguf.types import activation_block, by_stored_type

ROWS = 256
"""Rows of a matrix that errors are measured on, evenly spaced: in wider experts some stand for all, since what rounding does to one row is
independent of the others. tools/study_errors.py shows what that costs."""
MIN_TOKENS = 32
"""Tokens below which an expert's error is completed with tokens that were routed elsewhere."""


def expert_error(
    x: Tensor,
    gate_weight: Tensor,
    weights: dict[str, Matrix],
    importance: dict[str, Matrix],
    types: tuple[str, ...],
    ggml: Ggml,
    feedback: Feedback | None = None,
    hidden: Hidden = expert_hidden,
    most_rows: int = ROWS,
) -> NDArray[np.float64]:
    """[group, type] mean over tokens of |gate weight x change of the expert's output|^2, each group quantized alone.

    x: [n, n_embd]. gate_weight: [n]. weights: gate, up [n_ff, n_embd] and down [n_embd, n_ff]. importance: [cols] per matrix.
    A group's inputs are rounded to 8 bits as ggml's CPU kernels do for the type: with the finer types that is half of the error.
    feedback: for gate and up, where they are to be quantized with it. hidden: what the expert computes before `down`.
    most_rows: of each matrix, see ROWS.
    """
    changes = Changes(x, gate_weight, {m: torch.from_numpy(w) for m, w in weights.items()}, hidden, most_rows)
    some = {m: np.ascontiguousarray(changes.rows(m).numpy()) for m in weights}

    def after(m: str, kind: str) -> Tensor:
        return torch.from_numpy(requantize(ggml, kind, some[m], importance[m], feedback if m != "down" else None))

    error = np.zeros((len(GROUPS), len(types)))
    for kind, same in by_stored_type(types, some["gate"].shape[1]).items():
        error[0, same] = changes.of_gate_up(kind, after("gate", kind), after("up", kind)).item()
    for kind, same in by_stored_type(types, some["down"].shape[1]).items():
        error[1, same] = changes.of_down(kind, after("down", kind)).item()
    return error


class Changes:
    """One expert and tokens: what becomes of its output when rows of its matrices come back changed. All on one device, in float32."""

    def __init__(self, x: Tensor, gate_weight: Tensor, weights: dict[str, Tensor], hidden: Hidden, most_rows: int) -> None:
        """Arguments as those of expert_error."""
        self._x, self._gate_weight, self._hidden = x, gate_weight, hidden
        self._inner = hidden(x, weights["gate"], weights["up"])
        self._units, outputs = _some(len(weights["gate"]), most_rows), _some(len(weights["down"]), most_rows)
        of_unit, of_output = (torch.from_numpy(rows).to(x.device) for rows in (self._units, outputs))
        self._inner_some, self._down_some = self._inner[:, of_unit], weights["down"][:, of_unit]
        self._rows = {"gate": weights["gate"][of_unit], "up": weights["up"][of_unit], "down": weights["down"][of_output]}
        self._share = {m: len(rows) / len(weights[m]) for m, rows in self._rows.items()}
        self._exact = self._inner @ self._rows["down"].T

    def rows(self, matrix: str) -> Tensor:
        """[rows, columns] of gate, up or down that stand for all."""
        return self._rows[matrix]

    def of_gate_up(self, kind: str, gate: Tensor, up: Tensor) -> Tensor:
        """float64 [] mean over tokens of |gate weight x change of the output|^2 for these rows as a type gives them back."""
        reached = self._hidden(rounded(self._x, kind), gate, up, self._units)
        return self._mean_square((reached - self._inner_some) @ self._down_some.T, "gate")

    def of_down(self, kind: str, down: Tensor) -> Tensor:
        """The same for rows of down."""
        return self._mean_square(rounded(self._inner, kind) @ down.T - self._exact, "down")

    def _mean_square(self, change: Tensor, matrix: str) -> Tensor:
        """Of all rows, from some."""
        return (change * self._gate_weight[:, None]).square().sum(dtype=torch.float64) / len(self._x) / self._share[matrix]


def _some(n: int, most: int) -> NDArray[np.int64]:
    """At most `most` of n rows, evenly spaced."""
    k = min(n, most)
    return np.arange(k) * n // k


def rounded(x: Tensor, kind: str) -> Tensor:
    """x [n, cols] as it comes back from ggml's 8-bit activations (quantize_row_q8_0, quantize_row_q8_K): one scale per block, its
    largest value at 127."""
    block = activation_block(kind)
    if block is None:
        return x
    blocks = x.reshape(-1, block)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return ((blocks / scale).round() * scale).reshape(x.shape)


def completed(
    own: NDArray[np.int64], own_weight: Matrix, elsewhere: NDArray[np.int64], mean_weight: float, least: int = MIN_TOKENS
) -> tuple[NDArray[np.int64], Matrix]:
    """(tokens, gate weights) to measure an expert on: its own, and where they are fewer than `least`, tokens routed elsewhere up to
    that number as if it had been picked with its mean gate weight. Own and borrowed tokens then count alike: the prior for an expert
    that calibration hardly saw is that it would treat the layer's other tokens as its own."""
    borrowed = elsewhere[: max(0, least - len(own))]
    weight = np.concatenate([own_weight, np.full(len(borrowed), mean_weight, dtype=np.float32)])
    return np.concatenate([own, borrowed]), weight


def mean_gate_weights(selections: NDArray[np.int64], gate_weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n_expert] mean gate weight of the tokens that picked an expert; the layer's mean for one that none did."""
    overall = gate_weight.sum() / max(1, selections.sum())
    return np.where(selections > 0, gate_weight / np.maximum(selections, 1), overall)


def measure_layer(
    layer: LayerCalibration,
    tokens: Callable[[int], tuple[Tensor, Tensor]],
    weights: Weights,
    types: tuple[str, ...],
    ggml: Ggml,
    *,
    threads: int,
    tick: Tick,
    hidden: Callable[[int], Hidden] = lambda e: expert_hidden,
    most_rows: int = ROWS,
    feedback: Feedback | None = None,
) -> LayerCalibration:
    """The layer with `error` and `wanda` filled in.

    tokens: expert -> (expert inputs [n, n_embd], weights of its outputs [n]) to measure it on. tick: called per expert.
    feedback: of layer_feedback, where it was made already.
    hidden: expert -> what it computes before `down`, on the CPU in float32. most_rows: of each matrix, see ROWS.
    The mean error per token is scaled to the tokens expected to pick the expert and divided by the layer's residual energy.
    """
    n_expert = layer.n_expert
    importance = {m: matrix_rows(layer, m) for m in ("gate", "up", "down")}
    feedback = feedback or layer_feedback(layer)
    error = np.zeros((n_expert, len(GROUPS), len(types)))
    wanda = np.zeros(n_expert)

    def one(e: int) -> None:
        w = {m: weights(layer.layer, m, e) for m in ("gate", "up", "down")}
        wanda[e] = wanda_importance(w, {m: layer.in_sum2[m][e] for m in w})
        x, gate_weight = tokens(e)
        rows = {m: importance[m][e] for m in w}
        error[e] = expert_error(x, gate_weight, w, rows, types, ggml, feedback, hidden(e), most_rows)

    in_threads(one, n_expert, threads, tick)
    scale = expected_selections(layer.selections) / layer.residual_energy
    return replace(layer, error=error * scale[:, None, None], wanda=wanda)
