"""Measuring where the model is: what measure and requantize do on the CPU expert by expert, for many experts at once on a GPU.

Sixteen cores need minutes for the quantizers of a 7B model's experts in nine types, a GPU seconds (device_quants).
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rq_gguf.calibration.data import LayerCalibration
from rq_gguf.calibration.device_quants import SUPPORTED, dequantized
from rq_gguf.calibration.feedback import PRECISE, Factor, Feedback
from rq_gguf.calibration.imatrix import expected_selections, matrix_rows
from rq_gguf.calibration.measure import ROWS, Changes
from rq_gguf.calibration.observe import Expert, Hidden, expert_hidden
from rq_gguf.calibration.requantize import Matrix, Tick, in_threads, requantize
from rq_gguf.calibration.wanda import PRUNING_RATIO
from rq_gguf.format import GROUPS
from rq_gguf.ggml import Ggml
from rq_gguf.types import block, by_stored_type, fallback

MATRICES = ("gate", "up", "down")
_AT_ONCE = 1 << 27
"""Weights of a matrix, in float32, that are worked on at a time."""


def on_device(where: torch.device) -> bool:
    """Whether what runs on this device is measured there. MPS lacks float64 and was not tried."""
    return where.type == "cuda"


def factor_there(where: torch.device) -> Factor | None:
    """What factors matrices for Feedback on a device; None for the CPU's own way."""

    def factor(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        return torch.linalg.cholesky(torch.linalg.inv(torch.from_numpy(matrix).to(where))).cpu().numpy()

    return factor if on_device(where) else None


def requantized(ggml: Ggml, type_name: str, w: Tensor, importance: Tensor, feedback: Feedback | None = None, *, threads: int = 1) -> Tensor:
    """float32 [experts, rows, columns] as w comes back from a file: `requantize` of each expert, on w's device.

    importance: [experts, columns]. threads: for types that device_quants does not know, which ggml quantizes on the CPU.
    """
    kind = fallback(type_name, w.shape[2])
    if kind not in SUPPORTED:
        return _by_ggml(ggml, kind, w, importance, feedback, threads)
    rows = importance[:, None]
    step = block(kind)[0]
    if feedback is None or kind in PRECISE or step >= w.shape[2]:
        return dequantized(kind, w, rows, ggml)
    update = torch.from_numpy(feedback.update(step)).to(w.device)
    made, errors = (torch.empty(w.shape, dtype=torch.float32, device=w.device) for _ in range(2))
    for start in range(0, w.shape[2], step):
        here = slice(start, start + step)
        wanted = w[..., here].float() - errors[..., :start] @ update[:start, here]
        made[..., here] = dequantized(kind, wanted, rows[..., here], ggml)
        errors[..., here] = wanted - made[..., here]
    return made


def _by_ggml(ggml: Ggml, kind: str, w: Tensor, importance: Tensor, feedback: Feedback | None, threads: int) -> Tensor:
    host, rows = w.float().cpu().numpy(), importance.cpu().numpy()
    made = np.empty_like(host)

    def one(e: int) -> None:
        made[e] = requantize(ggml, kind, host[e], rows[e], feedback)

    in_threads(one, len(host), threads, lambda: None)
    return torch.from_numpy(made).to(w.device)


def at_once(shape: torch.Size | tuple[int, ...]) -> int:
    """Experts to work on at a time, each with a matrix of that shape."""
    return max(1, _AT_ONCE // int(np.prod(shape)))


def measure_layer_there(
    layer: LayerCalibration,
    tokens: Callable[[int], tuple[Tensor, Tensor]],
    expert: Expert,
    types: tuple[str, ...],
    ggml: Ggml,
    feedback: Feedback | None,
    *,
    threads: int,
    tick: Tick,
    hidden: Callable[[int], Hidden] = lambda e: expert_hidden,
    most_rows: int = ROWS,
) -> LayerCalibration:
    """`measure.measure_layer` on the device of the experts' weights. expert: its gate, up and down."""
    error = np.zeros((layer.n_expert, len(GROUPS), len(types)))
    wanda = np.zeros(layer.n_expert)
    some = expert(0)[0]
    importance = {m: torch.from_numpy(matrix_rows(layer, m)).to(some.device) for m in MATRICES}
    sums = {m: torch.from_numpy(layer.in_sum2[m]).to(some.device) for m in MATRICES}
    step = at_once((min(most_rows, len(some)), some.shape[1]))
    for first in range(0, layer.n_expert, step):
        here = range(first, min(first + step, layer.n_expert))
        changes = []
        for e in here:
            weights = {m: w.float() for m, w in zip(MATRICES, expert(e), strict=True)}
            wanda[e] = _wanda(weights, {m: sums[m][e] for m in weights})
            x, gate_weight = (t.to(some.device) for t in tokens(e))
            changes.append(Changes(x, gate_weight, weights, hidden(e), most_rows))
        of = slice(first, here.stop)

        def after(names: tuple[str, ...], kind: str, of: slice = of, changes: list[Changes] = changes) -> tuple[Tensor, ...]:
            """[experts, rows, columns] of each of the matrices, which have the same inputs."""
            rows = torch.stack([torch.cat([c.rows(m) for m in names]) for c in changes])
            back = requantized(ggml, kind, rows, importance[names[0]][of], None if "down" in names else feedback, threads=threads)
            return back.chunk(len(names), dim=1)

        for kind, same in by_stored_type(types, some.shape[1]).items():
            found = [c.of_gate_up(kind, gate, up) for c, gate, up in zip(changes, *after(("gate", "up"), kind), strict=True)]
            error[of, 0, same] = _fetched(found)[:, None]
        for kind, same in by_stored_type(types, expert(0)[2].shape[1]).items():
            found = [c.of_down(kind, down) for c, down in zip(changes, *after(("down",), kind), strict=True)]
            error[of, 1, same] = _fetched(found)[:, None]
        for _ in here:
            tick()
    scale = expected_selections(layer.selections) / layer.residual_energy
    return replace(layer, error=error * scale[:, None, None], wanda=wanda)


def _fetched(values: list[Tensor]) -> Matrix:
    return torch.stack(values).cpu().numpy()


def _wanda(weights: dict[str, Tensor], in_sum2: dict[str, Tensor]) -> float:
    """wanda.wanda_importance of tensors."""
    pruned = {m: n for m, w in weights.items() if (n := int(w.shape[1] * PRUNING_RATIO)) > 0}
    total = [_sum_of_smallest(weights[m].abs() * in_sum2[m].sqrt(), n) for m, n in pruned.items()]
    dropped = sum(len(weights[m]) * n for m, n in pruned.items())
    return float(torch.stack(total).sum().item()) / dropped if dropped else 0.0


def _sum_of_smallest(x: Tensor, n: int) -> Tensor:
    """Of the n smallest of each row of x [rows, columns], all rows together, float64. Selecting is several times as fast as sorting."""
    largest = x.kthvalue(n, dim=1, keepdim=True).values
    less = x < largest
    ties = n - less.sum(dim=1, keepdim=True)
    return torch.where(less, x, 0.0).sum(dtype=torch.float64) + (largest * ties).sum(dtype=torch.float64)
