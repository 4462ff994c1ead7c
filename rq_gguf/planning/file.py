"""plan.json: written to be read and edited by people, checked when it is read. The only module of this room that touches files."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import DEFAULT_DISPATCH_BLOCK, DISPATCHES, GROUPS, MAX_TIERS
from rq_gguf.planning.budget import ExpertShape, expert_shape, parse_budget, plan_bytes
from rq_gguf.planning.plan import Instances, LayerPlan, Plan
from rq_gguf.planning.policy import stored_types, summarize
from rq_gguf.planning.types import TYPES

VERSION = 1
_MAX_BLOCK = 2**31 - 1


def plan_text(plan: Plan) -> str:
    """The JSON text of a plan: one line per layer and group, one string per expert (`q8_0`, or `q8_0+q4_k` with a copy)."""
    head = {
        "rq_plan_version": VERSION,
        "model": plan.model,
        "policy": plan.policy,
        "budget": plan.budget,
        "budget_bytes": plan.budget_bytes,
        "expert_bytes": plan.expert_bytes,
        "types": list(plan.types),
        "dispatch": plan.dispatch,
        "dispatch_block": plan.dispatch_block,
        "calibration_sha256": plan.calibration_sha256,
        "calibration_tokens": plan.calibration_tokens,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    summary = {key: value for key, value in plan.summary.items() if key != "layers"}
    entries = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in summary.items()]
    rows = ",\n".join(f"      {json.dumps(row)}" for row in plan.summary.get("layers", ()))
    if rows:
        entries.append(f'    "layers": [\n{rows}\n    ]')
    lines.append('  "summary": {\n' + ",\n".join(entries) + "\n  }")
    layers = []
    for layer in plan.layers:
        groups = (
            f"     {json.dumps(name)}: {json.dumps(['+'.join(row) for row in group])}"
            for name, group in zip(GROUPS, layer.groups, strict=True)
        )
        layers.append(f'    {{"layer": {layer.layer},\n' + ",\n".join(groups) + "}")
    lines.append('  "layers": [\n' + ",\n".join(layers) + "\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_plan(path: Path, plan: Plan) -> None:
    """Write plan.json; it appears under its name when complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(plan_text(plan), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_plan(path: Path, calibration: Calibration, other_bytes: int | None = None) -> Plan:
    """Read a plan.json, edited or not, and check it against the calibration of its model.

    Bytes, types and summary are computed anew from the layers. other_bytes: all of the file but the experts; where the budget is a
    size and this is None, the file's own `budget_bytes` is the bound.
    Raises UserError naming the layer and expert at fault.
    """
    data = _load(path)
    shape = expert_shape(calibration)
    layers = _layers(path, data, calibration, shape)
    dispatch, block = data.get("dispatch", DISPATCHES[0]), data.get("dispatch_block", DEFAULT_DISPATCH_BLOCK)
    if dispatch not in DISPATCHES:
        raise UserError(f"{path}: dispatch {dispatch!r} is unknown; choose {' or '.join(DISPATCHES)}")
    if not _is_int(block) or not 0 < block <= _MAX_BLOCK:
        raise UserError(f"{path}: dispatch_block must be a whole number of at least 1, not {block!r}")
    budget = _field(path, data, "budget", str)
    spec = parse_budget(budget)
    if spec.kind == "size" and other_bytes is None:
        allowed = _field(path, data, "budget_bytes", int)
    else:
        allowed = spec.expert_bytes(shape, len(layers), other_bytes or 0)
    size = plan_bytes(shape, layers)
    if size > allowed:
        raise UserError(f"{path}: the experts as planned take {size} bytes, {size - allowed} more than the budget {budget} allows")
    named = data.get("types", [])
    if not isinstance(named, list) or any(t not in TYPES for t in named):
        raise UserError(f"{path}: types must be a list of {', '.join(TYPES)}")
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
        dispatch=dispatch,
        dispatch_block=block,
    )
    return replace(plan, summary=summarize(calibration, plan))


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read the plan {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is no plan: it is not text") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not valid JSON: {e.msg} in line {e.lineno}, column {e.colno}") from e
    if not isinstance(data, dict) or "rq_plan_version" not in data:
        raise UserError(f"{path} is no plan of rq-gguf: it has no rq_plan_version")
    if data["rq_plan_version"] != VERSION:
        raise UserError(f"{path} is a plan of version {data['rq_plan_version']!r}; this rq-gguf reads version {VERSION}")
    return data


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _field(path: Path, data: dict[str, Any], name: str, kind: type) -> Any:
    value = data.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "missing" if value is None else repr(value)
        raise UserError(f"{path}: {name} is {found}; it must be {'text' if kind is str else 'a whole number'}")
    return value


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
    gate_up, down = (_group(where, name, g, entry.get(name), shape) for g, name in enumerate(GROUPS))
    for e, (first, second) in enumerate(zip(gate_up, down, strict=True)):
        if len(first) != len(second):
            raise UserError(f"{where}, expert {e}: {len(first)} instances in {GROUPS[0]} and {len(second)} in {GROUPS[1]}; make them equal")
    return LayerPlan(entry["layer"], gate_up, down)


def _group(where: str, name: str, g: int, listed: Any, shape: ExpertShape) -> Instances:
    if not isinstance(listed, list) or len(listed) != shape.n_expert:
        count = len(listed) if isinstance(listed, list) else "no"
        raise UserError(f"{where}: {name} lists {count} experts; the model has {shape.n_expert}")
    rows = []
    for e, text in enumerate(listed):
        if not isinstance(text, str):
            raise UserError(f'{where}, expert {e}: {name} is {text!r} instead of types such as "q8_0+q4_k"')
        row = tuple(t.strip().lower() for t in text.split("+"))
        for t in row:
            if t not in TYPES:
                raise UserError(f"{where}, expert {e}: {name} has the unknown type {t!r}; allowed are {', '.join(TYPES)}")
            stored = shape.stored_type(g, t)
            if stored != t:
                raise UserError(f"{where}, expert {e}: rows of {shape.columns(g)} weights in {name} cannot be {t}; take {stored}")
        rows.append(row)
    kinds = {t for row in rows for t in row}
    if len(kinds) > MAX_TIERS:
        raise UserError(f"{where}: {name} has {len(kinds)} types; a layer can hold at most {MAX_TIERS}")
    return tuple(rows)
