"""Files of this room: what says how busy experts are (traces, calibrations, plans, SGLang's recorded expert distribution), and what
engines read. The only module here that touches them."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.atomic import replacing
from rq_gguf.calibration.file import read_any
from rq_gguf.calibration.trace import is_json, is_trace, is_zip, read_trace
from rq_gguf.errors import UserError
from rq_gguf.extras import need
from rq_gguf.placement.loads import Loads, loads_of_trace
from rq_gguf.placement.location import Exported
from rq_gguf.planning.file import read_json

SGLANG_KEY = "logical_count"


def read_loads(path: Path) -> Loads:
    """Loads from any file that has them. Raises UserError naming the file for anything else, and for one that is damaged."""
    if is_zip(path):
        if is_trace(path):
            return loads_of_trace(read_trace(path))
        return _recorded(path, _torch_content(path))
    if is_json(path):
        counts = _counts_in_json(path)
        return _plan(path, read_json(path)) if counts is None else _recorded(path, counts)
    c = read_any(path)
    if not c.load_known:
        raise UserError(f"{path} does not say how often each expert is picked (the .dat form of an imatrix has no counts)")
    if not c.layers:
        raise UserError(f"{path} holds no layer with routed experts: there is nothing to place")
    load = _checked(path, [layer.selections for layer in c.layers], tuple(layer.layer for layer in c.layers))
    return Loads(c.model, tuple(x.layer for x in c.layers), load, c.n_expert_used or None, c.n_embd, c.n_ff)


def _counts_in_json(path: Path) -> dict[str, Any] | None:
    """A JSON of SGLang's counts; None for any other."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and SGLANG_KEY in data else None


def _torch_content(path: Path) -> dict[str, Any]:
    """What torch.save put into a file: tensors and plain values only, so that nothing in it can run."""
    need("calibrate", f"reading {path}")
    import torch

    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is neither a trace of rq-gguf nor a file of SGLang's expert distribution recorder") from e
    if not isinstance(data, dict) or SGLANG_KEY not in data:
        per_pass = isinstance(data, dict) and "records" in data
        hint = "; record with --expert-distribution-recorder-mode stat instead of one that keeps every pass" if per_pass else ""
        raise UserError(f"{path} holds no {SGLANG_KEY}: it is not what SGLang's expert distribution recorder writes{hint}")
    return data


def _recorded(path: Path, data: dict[str, Any]) -> Loads:
    """SGLang's `logical_count`: [layers, n_expert], or [steps, layers, n_expert] as the recorder writes it."""
    try:
        counts = np.asarray(data[SGLANG_KEY], dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: {SGLANG_KEY} is no array of numbers") from e
    if counts.ndim == 3:
        counts = counts.sum(axis=0)
    if counts.ndim != 2 or 0 in counts.shape:
        raise UserError(f"{path}: {SGLANG_KEY} has shape {list(counts.shape)}, expected [layers, experts], or one of these per step")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise UserError(f"{path}: {SGLANG_KEY} holds negative or non-finite values")
    # The recorder has a row for every layer; those without experts stay empty.
    layers = tuple(np.flatnonzero(counts.sum(axis=1) > 0).tolist())
    if not layers:
        raise UserError(f"{path}: {SGLANG_KEY} counts nothing; record while requests are served")
    return Loads(path.stem, layers, counts[list(layers)])


def _plan(path: Path, data: dict[str, Any]) -> Loads:
    """A plan.json's shares and copies; its types do not matter here."""
    listed, model = data.get("layers"), data.get("model")
    if not isinstance(listed, list) or not listed or not isinstance(model, str):
        raise UserError(f"{path} is no whole plan: it lacks its layers or its model")
    layers, shares, instances = [], [], []
    for entry in listed:
        try:
            layers.append(int(entry["layer"]))
            shares.append([float(e["share"]) for e in entry["experts"]])
            instances.append([len(e["gate_up"].split("+")) for e in entry["experts"]])
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            where = f"layer {layers[-1]}" if layers else "its first layer"
            raise UserError(f"{path}, {where}: an expert has no share or no gate_up; make the plan again (rq-gguf plan)") from e
    if len(set(layers)) != len(layers) or min(layers) < 0:
        raise UserError(f"{path} lists a layer twice, or one below 0")
    load = _checked(path, [np.array(s) for s in shares], tuple(layers))
    return Loads(model, tuple(layers), load, instances=np.array(instances, dtype=np.int64))


def _checked(path: Path, loads: list[NDArray[Any]], layers: tuple[int, ...]) -> NDArray[np.float64]:
    """[layers, n_expert]"""
    for layer, load in zip(layers, loads, strict=True):
        if len(load) != len(loads[0]) or not len(load):
            raise UserError(
                f"{path}: layer {layer} has {len(load)} experts and layer {layers[0]} {len(loads[0])}; they cannot be placed alike"
            )
        if not np.isfinite(load).all() or (load < 0).any() or not load.any():
            raise UserError(f"{path}: layer {layer} has no load, or one that is negative or not finite")
    return np.stack(loads).astype(np.float64)


def write_location(path: Path, exported: Exported) -> None:
    """The engine's file; it appears under its name only when complete. A line per layer, to be read by people too.

    Raises UserError where it cannot be written, and for a name that SGLang would not read.
    """
    if exported.engine == "sglang" and path.suffix != ".json":
        raise UserError(f"{path}: SGLang reads a placement from a file whose name ends in .json; name it so")
    (key, value), *more = exported.content.items()
    assert not more  # SGLang passes every key of the file on as an argument
    rows = (
        "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in value) + "\n]"
        if isinstance(value, list)
        else json.dumps(value)
    )
    with replacing(path) as temporary:
        temporary.write_text(f"{{{json.dumps(key)}: {rows}}}\n", encoding="utf-8")
