"""plan.json: written to be read and edited by people, checked when it is read. The only module of this room that touches files."""

import json
import math
import os
import re
import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import DEFAULT_DISPATCH_BLOCK, DISPATCHES, GROUPS, MAX_TIERS
from rq_gguf.planning.budget import ExpertShape, expert_shape, parse_budget, plan_bytes
from rq_gguf.planning.error import error_model
from rq_gguf.planning.plan import LayerPlan, Optimum, Plan
from rq_gguf.planning.policy import stored_types
from rq_gguf.planning.stored import stored_errors
from rq_gguf.planning.summary import plan_errors, summarize
from rq_gguf.types import TYPES

VERSION = 2
_MAX_BLOCK = 2**31 - 1
_LARGEST = 1e300
_SURROGATE = re.compile("[\ud800-\udfff]")


def plan_text(plan: Plan, calibration: Calibration) -> str:
    """The JSON text of a plan: a line per expert with its instances' types in both groups (`q8_0`, or `q8_0+q4_k` with a copy) and why:
    its share of the layer's selections, and what it would add to the KL divergence in each of the types that were looked at."""
    summary = _short({key: value for key, value in plan.summary.items() if key != "layers"})
    optimum = plan.optimum
    head = {
        "rq_plan_version": VERSION,
        "model": plan.model,
        "policy": plan.policy,
        "budget": plan.budget,
        "budget_bytes": plan.budget_bytes,
        "expert_bytes": plan.expert_bytes,
        "target_kld": plan.target_kld,
        "types": list(plan.types),
        "max_tiers": plan.max_tiers,
        "balance_weight": plan.balance_weight,
        "predicted_kld": summary.pop("predicted_kld", None),
        "gap": summary.pop("gap", None),
        "kld_per_byte": None if optimum is None else optimum.price,
        "kld_per_log_lis": None if optimum is None else optimum.balance_price,
        "bound": None if optimum is None else optimum.bound,
        "feedback": plan.feedback,
        "dispatch": plan.dispatch,
        "dispatch_block": plan.dispatch_block,
        "calibration_sha256": plan.calibration_sha256,
        "calibration_tokens": plan.calibration_tokens,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    entries = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in summary.items()]
    lines.append('  "summary": {\n' + ",\n".join(entries) + "\n  }")
    klds = _klds(plan, calibration)
    layers = []
    for i, (layer, known) in enumerate(zip(plan.layers, calibration.layers, strict=True)):
        figures = _short(plan.summary["layers"][i]) if "layers" in plan.summary else {"layer": layer.layer}
        selections = known.selections / max(int(known.selections.sum()), 1)
        experts = []
        for e, share in enumerate(selections.tolist()):
            types = ", ".join(f'"{name}": "{"+".join(group[e])}"' for name, group in zip(GROUPS, layer.groups, strict=True))
            experts.append(f'      {{"expert": {e}, "share": {share:.3g}, {types}, "kld": {klds[i][e]}}}')
        layers.append("    " + json.dumps(figures)[:-1] + ', "experts": [\n' + ",\n".join(experts) + "\n    ]}")
    lines.append('  "layers": [\n' + ",\n".join(layers) + "\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _short(value: Any) -> Any:
    """Plain data with numbers for people."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _klds(plan: Plan, calibration: Calibration) -> list[list[str]]:
    """[layers][n_expert] JSON of the KL divergence by group and type: the error times the error model's slope at this plan."""
    shape = expert_shape(calibration)
    errors = stored_errors(calibration, shape, calibration.types or plan.types)
    at = plan_errors(calibration, shape, plan.layers)
    if at is None:  # a type that was not measured
        at = np.stack([by_type[list(by_type)[len(by_type) // 2]].sum(axis=1) for by_type in errors], axis=1)
    slope, _ = error_model(calibration).tangent(at)
    text: list[list[list[str]]] = []  # [group][layers][n_expert]
    for g, by_type in enumerate(errors):
        named = [(t, (values * slope[:, g, None]).tolist()) for t, values in by_type.items() if t in plan.types]
        text.append([
            [", ".join(f'"{t}": {values[i][e]:.3g}' for t, values in named) for e in range(layer.n_expert)]
            for i, layer in enumerate(calibration.layers)
        ])  # fmt: skip
    return [
        [f'{{"{GROUPS[0]}": {{{first}}}, "{GROUPS[1]}": {{{second}}}}}' for first, second in zip(*layer, strict=True)]
        for layer in zip(*text, strict=True)
    ]


def write_plan(path: Path, plan: Plan, calibration: Calibration) -> None:
    """Write plan.json; it appears under its name when complete. calibration: the one that it was made from."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(plan_text(plan, calibration), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_plan(path: Path, calibration: Calibration, other_bytes: int | None = None) -> Plan:
    """Read a plan.json, edited or not, and check it against the calibration of its model.

    Bytes, types and all figures are computed anew from the layers' instances; what explains them is not looked at, but for the
    optimizer's prices and bound, which hold for every plan and tell how much an edit costs.
    other_bytes: all of the file but the experts; where the budget is a size and this is None, the file's own `budget_bytes` is the bound.
    A plan for a target has no bound on its bytes, but on its predicted KL divergence.
    Raises UserError naming the layer and expert at fault.
    """
    data = read_json(path)
    shape = expert_shape(calibration)
    layers = _layers(path, data, calibration, shape)
    dispatch, block = data.get("dispatch", DISPATCHES[0]), data.get("dispatch_block", DEFAULT_DISPATCH_BLOCK)
    if dispatch not in DISPATCHES:
        raise UserError(f"{path}: dispatch {dispatch!r} is unknown; choose {' or '.join(DISPATCHES)}")
    if not _is_int(block) or not 0 < block <= _MAX_BLOCK:
        raise UserError(f"{path}: dispatch_block must be a whole number of at least 1, not {block!r}")
    named = data.get("types", [])
    if not isinstance(named, list) or any(t not in TYPES for t in named):
        raise UserError(f"{path}: types must be a list of {', '.join(TYPES)}")
    feedback = data.get("feedback", False)
    if not isinstance(feedback, bool):
        raise UserError(f"{path}: feedback must be true or false, not {feedback!r}")
    max_tiers = data.get("max_tiers", MAX_TIERS)
    if not _is_int(max_tiers) or not 1 <= max_tiers <= MAX_TIERS:
        raise UserError(f"{path}: max_tiers must be a whole number from 1 to {MAX_TIERS}, not {max_tiers!r}")
    budget, size, target = _field(path, data, "budget", str), plan_bytes(shape, layers), _number(path, data, "target_kld")
    allowed = size if target is not None else _allowed(path, data, budget, shape, len(layers), other_bytes)
    if size > allowed:
        raise UserError(f"{path}: the experts as planned take {size} bytes, {size - allowed} more than the budget {budget} allows")
    prices = [_number(path, data, name) for name in ("kld_per_byte", "kld_per_log_lis", "bound")]
    plan = Plan(
        policy=_field(path, data, "policy", str),
        budget=budget,
        budget_bytes=allowed,
        expert_bytes=size,
        types=stored_types(shape, tuple(named), layers),
        layers=layers,
        calibration_sha256=_field(path, data, "calibration_sha256", str),
        calibration_tokens=_field(path, data, "calibration_tokens", int),
        model=_field(path, data, "model", str),
        feedback=feedback,
        dispatch=dispatch,
        dispatch_block=block,
        max_tiers=max_tiers,
        balance_weight=_number(path, data, "balance_weight"),
        target_kld=target,
        optimum=None if None in prices else Optimum(*(p for p in prices if p is not None)),
    )
    plan = replace(plan, summary=summarize(calibration, plan))
    kld = plan.summary["predicted_kld"]
    if target is not None and kld is not None and kld > target * (1 + 1e-6):
        raise UserError(
            f"{path}: the experts as planned have a predicted KL divergence of {kld:.4g}, above the target_kld of {target:.4g}; raise some "
            "types, or the target"
        )
    return plan


def _allowed(path: Path, data: dict[str, Any], budget: str, shape: ExpertShape, n_layers: int, other_bytes: int | None) -> int:
    """Most bytes that a plan's experts may take."""
    spec = parse_budget(budget)
    if spec.kind == "size" and other_bytes is None:
        return int(_field(path, data, "budget_bytes", int))
    return spec.expert_bytes(shape, n_layers, other_bytes or 0)


def read_json(path: Path) -> dict[str, Any]:
    """A plan's JSON, not looked at beyond its version. Raises UserError for what is no plan."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read the plan {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is no plan: it is not text") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not valid JSON: {e.msg} in line {e.lineno}, column {e.colno}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is no plan: it holds a number of thousands of digits, or is nested without end") from e
    if not isinstance(data, dict) or "rq_plan_version" not in data:
        raise UserError(f"{path} is no plan of rq-gguf: it has no rq_plan_version")
    if data["rq_plan_version"] != VERSION:
        raise UserError(f"{path} is a plan of version {data['rq_plan_version']!r}; this rq-gguf reads version {VERSION}")
    return data


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _field(path: Path, data: dict[str, Any], name: str, kind: type) -> Any:
    value = data.get(name)
    # What is written to a GGUF: 64 bits, and text that has an encoding.
    fits = not _SURROGATE.search(value) if isinstance(value, str) else isinstance(value, int) and 0 <= value < 1 << 63
    if not isinstance(value, kind) or isinstance(value, bool) or not fits:
        found = "missing" if value is None else reprlib.repr(value)
        raise UserError(f"{path}: {name} is {found}; it must be {'text' if kind is str else 'a whole number, from 0'}")
    return value


def _number(path: Path, data: dict[str, Any], name: str) -> float | None:
    """A number that may be missing or null."""
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf or abs(value) > _LARGEST:
        raise UserError(f"{path}: {name} is {reprlib.repr(value)}; it must be a number or null")
    return float(value)


def _layers(path: Path, data: dict[str, Any], calibration: Calibration, shape: ExpertShape) -> tuple[LayerPlan, ...]:
    listed = data.get("layers")
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise UserError(f"{path}: layers must be a list of objects")
    expected = [layer.layer for layer in calibration.layers]
    found = [entry.get("layer") for entry in listed]
    if found != expected:
        raise UserError(f"{path}: the plan is for layers {found}, the calibration of {calibration.model} for {expected}")
    return tuple(_layer(path, entry, shape) for entry in listed)


def _layer(path: Path, entry: dict[str, Any], shape: ExpertShape) -> LayerPlan:
    where = f"{path}, layer {entry['layer']}"
    experts = entry.get("experts")
    if not isinstance(experts, list) or len(experts) != shape.n_expert:
        count = len(experts) if isinstance(experts, list) else "no"
        raise UserError(f"{where} lists {count} experts; the model has {shape.n_expert}")
    rows: tuple[list[tuple[str, ...]], ...] = tuple([] for _ in GROUPS)
    for e, expert in enumerate(experts):
        number = expert.get("expert") if isinstance(expert, dict) else None
        if not _is_int(number) or number != e:
            raise UserError(f"{where}: the entry of expert {e} is missing or says {number!r}; experts are listed in order, from 0")
        for g, name in enumerate(GROUPS):
            rows[g].append(_instances(f"{where}, expert {e}", name, g, expert.get(name), shape))
        if len(rows[0][e]) != len(rows[1][e]):
            raise UserError(
                f"{where}, expert {e}: {len(rows[0][e])} instances in {GROUPS[0]} and {len(rows[1][e])} in {GROUPS[1]}; make them equal"
            )
    for name, group in zip(GROUPS, rows, strict=True):
        kinds = {t for row in group for t in row}
        if len(kinds) > MAX_TIERS:
            raise UserError(f"{where}: {name} has {len(kinds)} types; a layer can hold at most {MAX_TIERS}")
    return LayerPlan(entry["layer"], tuple(rows[0]), tuple(rows[1]))


def _instances(where: str, name: str, g: int, text: Any, shape: ExpertShape) -> tuple[str, ...]:
    """An expert's types in a group from text such as `q8_0+q4_k`."""
    if not isinstance(text, str):
        raise UserError(f'{where}: {name} is {text!r} instead of types such as "q8_0+q4_k"')
    row = tuple(t.strip().lower() for t in text.split("+"))
    for t in row:
        if t not in TYPES:
            raise UserError(f"{where}: {name} has the unknown type {t!r}; allowed are {', '.join(TYPES)}")
        stored = shape.stored_type(g, t)
        if stored != t:
            raise UserError(f"{where}: rows of {shape.columns(g)} weights in {name} cannot be {t}; take {stored}")
    return row
