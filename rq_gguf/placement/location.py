"""Placements as serving engines take them. Pure."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.errors import UserError
from rq_gguf.placement.loads import Loads
from rq_gguf.placement.pack import Placement, add_copies, even_copies, location_map, pack, stock_order
from rq_gguf.placement.simulate import most_copies

ENGINES = ("sglang", "vllm")


@dataclass(frozen=True)
class Exported:
    """What an engine is given, and what it is good for."""

    engine: str
    n_devices: int
    n_redundant: int
    """Copies per layer, the same in all."""
    n_layers: int
    """Rows of the map: all decoder layers, those without experts too."""
    content: dict[str, Any]
    """The file."""
    command: str
    """Options to start the engine with, but for the file's name."""
    before: tuple[float, ...]
    """Per layer with experts: the busiest device's load over the mean in stock order, on the loads that the placement is made for."""
    after: tuple[float, ...]
    """The same as packed here; vLLM packs by itself, by the same rule."""


def export(loads: Loads, engine: str, n_devices: int, copies: int | None, n_layers: int | None) -> Exported:
    """Pack a model's experts onto devices for an engine.

    copies: per layer; None: what the plan has in the layer with most, or none. Both rounded up to equal slots. Layers for which a plan
    has fewer copies get more by load, since all layers must have the same number.
    n_layers: decoder layers of the model, None: up to the last one with experts.
    Raises UserError for numbers that cannot be.
    """
    n_expert, planned = loads.n_expert, loads.instances
    base = np.ones(loads.load.shape, dtype=np.int64) if planned is None or copies is not None else np.minimum(planned, n_devices)
    held = base.sum(axis=1) - n_expert
    n_copies = even_copies(n_expert, int(held.max()) if copies is None else copies, n_devices)
    if n_copies > most_copies(n_expert, n_devices):
        raise UserError(f"{n_copies} copies of {n_expert} experts on {n_devices} devices are more than one of each expert on each device")
    total = loads.layers[-1] + 1 if n_layers is None else n_layers
    if total <= max(loads.layers):
        raise UserError(f"--layers {total}: the model has experts in layer {max(loads.layers)}, counted from 0; give all decoder layers")
    placed = [
        pack(load, add_copies(load, instances, n_copies - int(have), n_devices), n_devices)
        for load, instances, have in zip(loads.load, base, held, strict=True)
    ]
    before, after = (
        tuple(_imbalance(p, load) for p, load in zip(ps, loads.load, strict=True))
        for ps in ([stock_order(n_expert, n_devices)] * len(placed), placed)
    )
    if engine == "vllm":
        content: dict[str, Any] = {"num_redundant_experts": n_copies}
        command = f"--enable-expert-parallel --enable-eplb --eplb-config '{json.dumps(content)}'"
    else:
        content = {"physical_to_logical_map": full_map(location_map(placed), loads.layers, n_expert, total).tolist()}
        command = f"--ep-size {n_devices} --ep-num-redundant-experts {n_copies} --init-expert-location"
    return Exported(engine, n_devices, n_copies, total, content, command, before, after)


def _imbalance(placement: Placement, load: NDArray[np.float64]) -> float:
    sums = placement.sums(np.repeat(load / placement.instances, placement.instances))
    return float(sums.max() / sums.mean())


def full_map(rows: NDArray[np.int64], layers: tuple[int, ...], n_expert: int, n_layers: int) -> NDArray[np.int64]:
    """[n_layers, n_phys]: rows [layers, n_phys] where a layer has experts; elsewhere, where nobody looks, SGLang's own trivial order."""
    full = np.tile(np.arange(rows.shape[1]) % n_expert, (n_layers, 1))
    full[list(layers)] = rows
    return full


def describe(e: Exported, file: str) -> list[str]:
    """Lines for people."""
    copies = f"{e.n_redundant} copies per layer" if e.n_redundant else "no copies"
    before, after = (float(np.mean(v)) for v in (e.before, e.after))
    lines = [
        f"{e.n_devices} devices, {copies}: the busiest device's load over the mean {before:.3f} in stock order, {after:.3f} packed "
        f"(mean of {len(e.before)} layers; worst {max(e.before):.3f}, {max(e.after):.3f})",
        f"{e.engine:10s}{e.command}" + (f" {file}" if e.engine == "sglang" else ""),
        f"location  {file}",
    ]
    if e.engine == "vllm":
        lines.insert(1, "vLLM takes no placement: it starts in stock order, with these copies, and packs by itself while it serves")
    return lines


def to_json(exported: Exported) -> dict[str, Any]:
    """Figures for programs."""
    return {
        "engine": exported.engine,
        "devices": exported.n_devices,
        "redundant_experts": exported.n_redundant,
        "layers": exported.n_layers,
        "command": exported.command,
        "busiest_over_mean_before": list(exported.before),
        "busiest_over_mean_after": list(exported.after),
    }
