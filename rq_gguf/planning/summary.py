"""The figures to expect of a plan, plain numbers and strings, for people."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration
from rq_gguf.format import GROUPS
from rq_gguf.planning.budget import ExpertShape, expert_shape, uniform_bytes
from rq_gguf.planning.error import error_model, measured_error
from rq_gguf.planning.load import lis, split_load
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.planning.stored import stored_errors
from rq_gguf.types import rank


def summarize(calibration: Calibration, plan: Plan) -> dict[str, Any]:
    """The figures to expect.

    `predicted_kld` is that of error.ErrorModel; a layer's `kld` is its errors times that model's slopes at this plan. `lis_before` and
    `lis_after` are means over layers, `lis_reduction` is the mean of the layers' ratios. They are those of the calibration text itself;
    another text's busy experts are others, so what is measured on it is less. `gap`: see `gap_to_bound`.
    """
    shape, model = expert_shape(calibration), error_model(calibration)
    errors = plan_errors(calibration, shape, plan.layers)
    kld = None if errors is None else model.kld(errors)
    klds = None if errors is None else (model.tangent(errors)[0] * errors).sum(axis=1)
    rows: list[dict[str, Any]] = []
    for i, (layer, planned) in enumerate(zip(calibration.layers, plan.layers, strict=True)):
        rows.append({
            "layer": layer.layer,
            "lis_before": lis(layer.selections, layer.n_expert),
            "lis_after": lis(split_load(layer.selections, np.array(planned.copies)), layer.n_expert),
            "copies": sum(planned.copies),
            "kld": None if klds is None else float(klds[i]),
        })  # fmt: skip
    worst = max(rows, key=lambda row: row["lis_after"])
    used = [Counter(t for layer in plan.layers for row in layer.groups[g] for t in row) for g in range(len(GROUPS))]
    return {
        "lis_before": float(np.mean([row["lis_before"] for row in rows])),
        "lis_after": float(np.mean([row["lis_after"] for row in rows])),
        "lis_reduction": float(np.mean([row["lis_before"] / row["lis_after"] for row in rows])),
        "worst_layer": {key: worst[key] for key in ("layer", "lis_before", "lis_after")},
        "copies": sum(row["copies"] for row in rows),
        "expert_bytes": plan.expert_bytes,
        "budget_bytes": plan.budget_bytes,
        "bits_per_expert_weight": 8 * plan.expert_bytes / (len(plan.layers) * shape.n_expert * shape.weights),
        "predicted_kld": kld,
        "kld_per_byte": None if plan.optimum is None else plan.optimum.price,
        "gap": None if kld is None else gap_to_bound(plan, kld, float(np.log([row["lis_after"] for row in rows]).sum())),
        "one_type": _one_type(calibration, shape, plan.types, plan.budget_bytes),
        "instances_by_type": {name: {t: count[t] for t in sorted(count, key=rank)} for name, count in zip(GROUPS, used, strict=True)},
        "layers": rows,
    }


def gap_to_bound(plan: Plan, kld: float, log_lis: float) -> float | None:
    """How far a plan may be from the best one, None for a plan that was not optimized.

    Under a byte budget the share of its KLD that a plan of the same budget, with as little imbalance, could at most save; for a target
    the share of its bytes, with the target met. log_lis: sum over layers of ln LIS.
    """
    if plan.optimum is None:
        return None
    least = plan.optimum.bound - plan.optimum.balance_price * log_lis  # of KLD + price x bytes
    if plan.target_kld is not None:
        return (plan.expert_bytes - (least - plan.target_kld) / plan.optimum.price) / plan.expert_bytes if plan.optimum.price > 0 else None
    return (kld - (least - plan.optimum.price * plan.budget_bytes)) / kld if kld > 0 else 0.0


def plan_errors(calibration: Calibration, shape: ExpertShape, layers: tuple[LayerPlan, ...]) -> NDArray[np.float64] | None:
    """[layers, group] errors (error.measured_error) of planned layers; None where a type of theirs was not measured."""
    used = {t for layer in layers for group in layer.groups for row in group for t in row}
    errors = stored_errors(calibration, shape, calibration.types or tuple(sorted(used, key=rank)))
    total = np.zeros((len(layers), len(GROUPS)))
    for g, by_type in enumerate(errors):
        column = {name: i for i, name in enumerate(by_type)}
        table = np.stack(list(by_type.values()))
        for i, layer in enumerate(layers):
            rows = layer.groups[g]
            chosen = [column.get(t, -1) for t in chain.from_iterable(rows)]
            if -1 in chosen:
                return None
            counts = np.array([len(row) for row in rows])
            expert = np.repeat(np.arange(len(rows)), counts)
            total[i, g] = float((table[chosen, i, expert] / counts[expert]).sum())
    return total


def _one_type(calibration: Calibration, shape: ExpertShape, types: tuple[str, ...], allowed: int) -> dict[str, Any] | None:
    """The type with which all experts alike have the least KLD in the same bytes; None where none fits."""
    known = tuple(t for t in types if not calibration.types or t in calibration.types)
    size = [uniform_bytes(shape, len(calibration.layers), t) for t in known]
    fitting = [i for i in range(len(known)) if size[i] <= allowed]
    if not fitting:
        return None
    model, errors = error_model(calibration), measured_error(calibration, known).sum(axis=1)
    kld = [model.kld(errors[:, :, i]) for i in range(len(known))]
    best = min(fitting, key=lambda i: (kld[i], size[i]))
    return {"type": known[best], "bytes": size[best], "kld": kld[best]}
