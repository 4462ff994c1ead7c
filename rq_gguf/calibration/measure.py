"""How much the layer's output changes when an expert's matrices take a type: measured on sampled tokens with ggml's own quantizers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rq_gguf.calibration.data import LayerCalibration
from rq_gguf.calibration.imatrix import NEVER_HIT_SELECTIONS, matrix_rows
from rq_gguf.calibration.observe import expert_hidden
from rq_gguf.calibration.requantize import Matrix, Tick, Weights, in_threads, requantize
from rq_gguf.calibration.wanda import wanda_importance
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml

MIN_TOKENS = 32
"""Tokens below which an expert's error is completed with tokens that were routed elsewhere."""


def expert_error(
    x: Tensor, gate_weight: Tensor, weights: dict[str, Matrix], importance: dict[str, Matrix], types: tuple[str, ...], ggml: Ggml
) -> NDArray[np.float64]:
    """[group, type] mean over tokens of |gate weight x change of the expert's output|^2, each group quantized alone.

    x: [n, n_embd]. gate_weight: [n]. weights: gate, up [n_ff, n_embd] and down [n_embd, n_ff]. importance: [cols] per matrix.
    """
    before = {m: torch.from_numpy(w) for m, w in weights.items()}
    hidden = expert_hidden(x, before["gate"], before["up"])
    error = np.zeros((len(GROUPS), len(types)))
    for t, type_name in enumerate(types):
        after = {m: torch.from_numpy(requantize(ggml, type_name, w, importance[m])) for m, w in weights.items()}
        of_gate_up = (expert_hidden(x, after["gate"], after["up"]) - hidden) @ before["down"].T
        of_down = hidden @ (after["down"] - before["down"]).T
        for g, change in enumerate((of_gate_up, of_down)):
            error[g, t] = (change * gate_weight[:, None]).square().sum(dtype=torch.float64).item() / len(x)
    return error


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
) -> LayerCalibration:
    """The layer with `error` and `wanda` filled in.

    tokens: expert -> (block inputs [n, n_embd], gate weights [n]) to measure it on. tick: called per expert.
    The mean error per token is scaled to all tokens that picked the expert and divided by the layer's residual energy.
    """
    n_expert = layer.n_expert
    importance = {m: matrix_rows(layer, m) for m in ("gate", "up", "down")}
    error = np.zeros((n_expert, len(GROUPS), len(types)))
    wanda = np.zeros(n_expert)

    def one(e: int) -> None:
        w = {m: weights(layer.layer, m, e) for m in ("gate", "up", "down")}
        x, gate_weight = tokens(e)
        error[e] = expert_error(x, gate_weight, w, {m: importance[m][e] for m in w}, types, ggml)
        wanda[e] = wanda_importance(w, {m: layer.in_sum2[m][e] for m in w})

    in_threads(one, n_expert, threads, tick)
    scale = np.maximum(layer.selections, NEVER_HIT_SELECTIONS) / layer.residual_energy
    return replace(layer, error=error * scale[:, None, None], wanda=wanda)
