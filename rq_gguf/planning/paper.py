"""Policy `paper`: Replicate-and-Quantize as published (arXiv 2602.19938), as far as the paper says it.

Per layer the busiest expert gets one low-precision copy, and the least important experts are quantized lower in place, so that the
bytes cancel. The paper leaves open, and this module chooses:

- Types: the largest of the allowed types is the original precision, the smallest the low one (q8_0 and q4_k by default).
- How many experts are lowered: the paper lowers one. A q4_k copy costs 4.5 bits per weight and lowering q8_0 saves 4.0, so one does not
  pay for it: as few as bring the layer, with its map and padding, to the layer's equal part of the budget.
- Which matrices: gate, up and down together, both for the copy and for the lowered experts.
- Importance: the mean Wanda score of the entries that a pruner would drop (pruning ratio and matrices: see calibration.wanda).
- Busiest = least important: the busiest is never lowered, the next in the order is. Ties go to the lower expert number.
- Which token uses the copy: the runtime's balanced dispatch, so each of the two serves half.
- More than one copy: none; that is policy `budget`.
"""

import numpy as np

from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.planning.budget import ExpertShape, layer_bytes
from rq_gguf.planning.plan import LayerPlan


def paper_layers(calibration: Calibration, shape: ExpertShape, types: tuple[str, ...], budget_bytes: int) -> tuple[LayerPlan, ...] | None:
    """The layers' plans, each within an equal part of the budget; None where that is impossible.

    types: from few bits to many. Raises UserError for fewer than two sizes of type or a calibration without Wanda scores.
    """
    low, high = types[0], types[-1]
    if any(shape.expert_bytes(g, low) >= shape.expert_bytes(g, high) for g in range(len(GROUPS))):
        raise UserError(f"--policy paper needs two types of different size, got {', '.join(types)}; add one to --types")
    share = budget_bytes // len(calibration.layers)
    plans = []
    for layer in calibration.layers:
        plan = _fit(calibration, layer, shape, low, high, share)
        if plan is None:
            return None
        plans.append(plan)
    return tuple(plans)


def paper_least(calibration: Calibration, shape: ExpertShape, types: tuple[str, ...]) -> int:
    """The fewest bytes that `paper_layers` can meet."""
    sizes = (
        layer_bytes(shape, _lowered(shape, layer, lowering_order(calibration, layer), types[0], types[-1])) for layer in calibration.layers
    )
    return len(calibration.layers) * max(sizes)


def lowering_order(calibration: Calibration, layer: LayerCalibration) -> list[int]:
    """Experts from least to most important by Wanda score, without the busiest."""
    if not np.isfinite(layer.wanda).all() or not layer.wanda.any():
        raise UserError(
            f"the calibration of {calibration.model} has no Wanda scores for layer {layer.layer}, which --policy paper needs; "
            "calibrate the model instead of using a plain imatrix"
        )
    busiest = int(layer.selections.argmax())
    return [e for e in np.argsort(layer.wanda, kind="stable").tolist() if e != busiest]


def _fit(calibration: Calibration, layer: LayerCalibration, shape: ExpertShape, low: str, high: str, most: int) -> LayerPlan | None:
    """The layer's plan with as few lowered experts as `most` bytes allow."""
    order = lowering_order(calibration, layer)
    saving = sum(shape.expert_bytes(g, high) - shape.expert_bytes(g, low) for g in range(len(GROUPS)))
    excess = layer_bytes(shape, _lowered(shape, layer, [], low, high)) - most
    # Padding is less than one expert: start just below the estimate and add until it fits.
    for count in range(max(0, excess // saving - 1), len(order) + 1):
        plan = _lowered(shape, layer, order[:count], low, high)
        if layer_bytes(shape, plan) <= most:
            return plan
    return None


def _lowered(shape: ExpertShape, layer: LayerCalibration, lowered: list[int], low: str, high: str) -> LayerPlan:
    """All experts in `high` but the lowered ones, and one copy in `low` of the busiest."""
    busiest = int(layer.selections.argmax())
    groups = []
    for g in range(len(GROUPS)):
        small, large = shape.stored_type(g, low), shape.stored_type(g, high)
        group = [(large,)] * layer.n_expert
        for e in lowered:
            group[e] = (small,)
        groups.append((*group[:busiest], (large, small), *group[busiest + 1 :]))
    return LayerPlan(layer.layer, *groups)
