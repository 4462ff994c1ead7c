"""What a tiered file holds, for people and for programs."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rq_gguf import format as fmt
from rq_gguf.gguf_file import pad
from rq_gguf.planning.load import lis, split_load
from rq_gguf.types import bits_per_weight
from rq_gguf.writing.tiered import Tiered, TieredLayer, open_tiered


@dataclass(frozen=True)
class LayerInspection:
    """One block."""

    layer: int
    n_expert: int
    copies: tuple[int, ...]
    """[n_expert] instances beyond the primary."""
    tiers: dict[str, tuple[tuple[str, int], ...]]
    """Group (format.GROUPS) -> (type, physical experts) of each tier."""
    bytes: int
    """Tiers, their padding and the map."""
    lis_before: float | None
    """Load imbalance on the calibration text without and with the copies; None where the file has no loads."""
    lis_after: float | None


@dataclass(frozen=True)
class Inspection:
    """A whole file."""

    path: Path
    file_bytes: int
    expert_bytes: int
    """Tier tensors, their padding, and maps."""
    budget_bytes: int | None
    expert_bpw: float
    """Bits of expert_bytes per weight of the logical experts."""
    bytes_by_type: dict[str, int]
    """Tier tensors only."""
    layers: tuple[LayerInspection, ...]
    dispatch: str
    dispatch_block: int
    provenance: dict[str, Any]
    """rq.* values by key, but loads and what has a field of its own."""


def inspect(path: Path) -> Inspection:
    """Validate a tiered file and say what it holds. Raises UserError as open_tiered does."""
    file = open_tiered(path)
    by_type: Counter[str] = Counter()
    logical_weights = 0
    for layer in file.layers:
        for tiers in layer.matrices.values():
            logical_weights += tiers[0].ne[0] * tiers[0].ne[1] * layer.n_expert
            for tier in tiers:
                by_type[tier.type] += tier.n_bytes
    layers = tuple(_layer(file, layer) for layer in file.layers)
    expert_bytes = sum(x.bytes for x in layers)
    get = file.header.get
    shown = (fmt.KEY_DISPATCH, fmt.KEY_DISPATCH_BLOCK)
    loads = {fmt.KEY_LOAD.format(layer=x.layer) for x in layers}
    return Inspection(
        path=path,
        file_bytes=file.header.size,
        expert_bytes=expert_bytes,
        budget_bytes=get(fmt.KEY_BUDGET_BYTES),
        expert_bpw=8 * expert_bytes / logical_weights,
        bytes_by_type=dict(sorted(by_type.items(), key=lambda item: -bits_per_weight(item[0]))),
        layers=layers,
        dispatch=get(fmt.KEY_DISPATCH, fmt.DISPATCHES[0]),
        dispatch_block=get(fmt.KEY_DISPATCH_BLOCK, fmt.DEFAULT_DISPATCH_BLOCK),
        provenance={
            k: v.tolist() if isinstance(v := get(k), np.ndarray) else v
            for k in file.header.values
            if k.startswith("rq.") and k not in shown and k not in loads
        },
    )


def _layer(file: Tiered, layer: TieredLayer) -> LayerInspection:
    align = file.header.alignment
    size = sum(pad(t.n_bytes, align) for tiers in layer.matrices.values() for t in tiers)
    if layer.table is not None:
        size += pad(layer.table.nbytes, align)
    before = after = None
    if layer.load is not None:
        before, after = lis(layer.load, layer.n_expert), lis(split_load(layer.load, layer.copies), layer.n_expert)
    tiers = {group: tuple((t.type, t.ne[2]) for t in layer.group(g)) for g, group in enumerate(fmt.GROUPS)}
    return LayerInspection(layer.layer, layer.n_expert, tuple(layer.copies.tolist()), tiers, size, before, after)


def to_json(i: Inspection) -> dict[str, Any]:
    """The inspection as plain data for json.dump."""
    return {
        "file": str(i.path),
        "file_bytes": i.file_bytes,
        "expert_bytes": i.expert_bytes,
        "budget_bytes": i.budget_bytes,
        "expert_bpw": i.expert_bpw,
        "bytes_by_type": i.bytes_by_type,
        "dispatch": i.dispatch,
        "dispatch_block": i.dispatch_block,
        "provenance": i.provenance,
        "layers": [
            {
                "layer": x.layer,
                "n_expert": x.n_expert,
                "copies": list(x.copies),
                "tiers": {g: [{"type": t, "experts": n} for t, n in tiers] for g, tiers in x.tiers.items()},
                "bytes": x.bytes,
                "lis_before": x.lis_before,
                "lis_after": x.lis_after,
            }
            for x in i.layers
        ],
    }


def describe(i: Inspection) -> str:
    """The inspection as text: figures of the whole file, a line per block, provenance."""
    n_copies = sum(sum(x.copies) for x in i.layers)
    lines = [
        f"{i.path}: valid, format version {fmt.FORMAT_VERSION}",
        f"  file     {_mib(i.file_bytes)}",
        f"  experts  {_mib(i.expert_bytes)}, {i.expert_bpw:.2f} bits per weight, maps included",
    ]
    if i.budget_bytes:
        lines.append(f"  budget   {_mib(i.budget_bytes)}, {100 * i.expert_bytes / i.budget_bytes:.2f} % used")
    lines += [
        "  types    " + ", ".join(f"{t} {_mib(n)}" for t, n in i.bytes_by_type.items()),
        f"  copies   {n_copies} in {len(i.layers)} blocks, dispatch {i.dispatch} in blocks of {i.dispatch_block} tokens",
    ]
    known = [(x.lis_before, x.lis_after) for x in i.layers if x.lis_before is not None and x.lis_after is not None]
    if known:
        before, after = (sum(pair[k] for pair in known) / len(known) for k in (0, 1))
        lines.append(f"  balance  LIS {before:.2f} -> {after:.2f} on the calibration text (mean over blocks, 1 is even)")
    rows: list[tuple[str, ...]] = [("block", "experts", "copies", *fmt.GROUPS, "MiB", "LIS", "->")]
    for x in i.layers:
        tiers = (" + ".join(f"{n} {t}" for t, n in x.tiers[g]) for g in fmt.GROUPS)
        balance = ["-" if v is None else f"{v:.2f}" for v in (x.lis_before, x.lis_after)]
        rows.append((str(x.layer), str(x.n_expert), str(sum(x.copies)), *tiers, f"{x.bytes / 2**20:.1f}", *balance))
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    left = (3, 4)  # the columns of words
    lines.append("")
    for row in rows:
        cells = (v.ljust(w) if c in left else v.rjust(w) for c, (v, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    lines.append("")
    lines += [f"  {k} = {_short(v)}" for k, v in i.provenance.items()]
    return "\n".join(lines)


def _mib(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else text[:97] + "..."
