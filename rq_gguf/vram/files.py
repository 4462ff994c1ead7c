"""Machines in JSON files. The only module of this room that reads them."""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rq_gguf.atomic import reason
from rq_gguf.errors import UserError
from rq_gguf.planning.budget import parse_size
from rq_gguf.types import TYPES
from rq_gguf.vram.machine import MACHINES, Machine

_LARGEST = 1e18
_MAY_BE_ZERO = ("handover", "whole_handover", "gpu_layer", "gpu_experts", "vram", "ram")


def find_machine(text: str) -> Machine:
    """A user's `--machine`: the name of an example, or a JSON file with the fields of `Machine`. Raises UserError naming the field at
    fault."""
    if text in MACHINES:
        return MACHINES[text]
    path = Path(text)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"--machine {text} is neither a file nor one of {', '.join(MACHINES)}") from e
    except OSError as e:
        raise UserError(f"--machine {text} cannot be read: {reason(e)}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"--machine {text} is no JSON; see docs/vram.md for what a machine's file holds") from e
    return parse_machine(data, path)


def parse_machine(data: Any, path: Path) -> Machine:
    """The machine of a file's content, which is at `path`."""
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object with the fields of a machine")
    known = {f.name: f for f in fields(Machine)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise UserError(f"{path}: {unknown[0]} is no field of a machine; these are {', '.join(known)}")
    values: dict[str, Any] = {"name": path.stem}
    readers: dict[str, Callable[[Path, str, Any], Any]] = {
        "name": _text,
        "type_cost": _costs,
        "vram": _size,
        "ram": _size,
        "overlap": _truth,
    }
    for name, f in known.items():
        if name in data:
            values[name] = readers.get(name, _number)(path, name, data[name])
        elif name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{path}: {name} is missing; a machine needs it")
    return Machine(**values)


def _text(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 100:
        raise UserError(f"{path}: {name} must be a text of at most 100 characters")
    return value


def _truth(path: Path, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{path}: {name} must be true or false, not {json.dumps(value)[:40]}")
    return value


def _number(path: Path, name: str, value: Any) -> float:
    """Above 0, or from 0 where that can be."""
    zero = name in _MAY_BE_ZERO
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) <= _LARGEST
    if not right or value < 0 or (value == 0 and not zero):
        raise UserError(f"{path}: {name} must be a number {'of at least' if zero else 'above'} 0, not {json.dumps(value)[:40]}")
    return float(value)


def _size(path: Path, name: str, value: Any) -> int:
    """Bytes: a number, or a text such as 12GiB."""
    size = parse_size(value) if isinstance(value, str) else int(_number(path, name, value))
    if size is None:
        raise UserError(f"{path}: {name} must be bytes, or a size such as 12GiB, not {json.dumps(value)[:40]}")
    return size


def _costs(path: Path, name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise UserError(f'{path}: {name} must be an object such as {{"iq2_s": 2.0}}')
    for kind in value:
        if kind not in TYPES:
            raise UserError(f"{path}: {name} names the unknown type {kind!r}; allowed are {', '.join(TYPES)}")
    return {kind: _number(path, f"{name}.{kind}", cost) for kind, cost in value.items()}
