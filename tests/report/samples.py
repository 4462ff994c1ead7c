"""Subjects of reports: a calibration counted by hand, and files without weights in them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType
from synthetic import synthetic_calibration

from rq_gguf import format as fmt
from rq_gguf import gguf_file as gg
from rq_gguf.calibration.data import Calibration
from rq_gguf.gguf_file import Tensor
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.planning.policy import make_plan


def planned(c: Calibration, budget: str = "q4_k", replicas: str | int = 1, types: tuple[str, ...] = ("q4_k", "q8_0")) -> Plan:
    return make_plan(c, budget=budget, types=types, replicas=replicas, policy="budget", other_bytes=0, calibration_sha256="c" * 64)


def four_experts() -> tuple[Calibration, Plan]:
    """One layer of 4 experts that took 60, 20, 15 and 5 of 100 selections; the first has a copy, and another type in `down`."""
    c = synthetic_calibration(1, 4, ("q4_k", "q8_0"), n_tokens=50)
    layer = replace(c.layers[0], selections=np.array([60, 20, 15, 5]), wanda=np.array([1.0, 2.0, 4.0, 1.0]))
    types = (("q8_0", "q4_k"), ("q4_k",), ("q4_k",), ("q4_k",))
    c = replace(c, layers=(layer,))
    return c, replace(planned(c, "q8_0"), layers=(LayerPlan(0, types, types[:1] + (("q8_0",),) * 3),))


def stored(path: Path, plan: Plan, c: Calibration, **values: gg.Value) -> Path:
    """The file that a plan asks for, its weights all zero. values: further or other keys, `__` for a dot."""
    tensors, tables = [], {}
    for layer in plan.layers:
        layouts = [fmt.layout_group(group, tuple(reversed(plan.types))) for group in layer.groups]
        matrices = {"gate": (c.n_embd, c.n_ff), "up": (c.n_embd, c.n_ff), "down": (c.n_ff, c.n_embd)}
        for matrix, ne in matrices.items():
            for number, tier in enumerate(layouts[fmt.MATRICES[matrix]].tiers):
                tensors.append(Tensor(fmt.tier_name(layer.layer, matrix, number), tier.type, (*ne, len(tier.instances))))
        if not fmt.is_identity(tuple(layouts), layer.n_expert):
            tables[fmt.map_name(layer.layer)] = fmt.build_map(tuple(layouts), layer.n_expert)
            tensors.append(Tensor(fmt.map_name(layer.layer), "i32", tuple(reversed(tables[fmt.map_name(layer.layer)].shape))))
    keys = {
        "general.architecture": gg.string("llama"),
        "llama.expert_count": gg.scalar(GGUFValueType.UINT32, c.layers[0].n_expert),
        "llama.expert_used_count": gg.scalar(GGUFValueType.UINT32, c.n_expert_used),
        fmt.KEY_FORMAT_VERSION: gg.scalar(GGUFValueType.UINT32, 1),
        fmt.KEY_CALIBRATION_HASH: gg.string(plan.calibration_sha256),
        fmt.KEY_CALIBRATION_TOKENS: gg.scalar(GGUFValueType.UINT64, c.n_tokens),
        fmt.KEY_SOURCE_MODEL: gg.string(c.model),
        fmt.KEY_BUDGET: gg.string(plan.budget),
    }
    for layer in c.layers:
        share = layer.selections / layer.selections.sum()
        keys[fmt.KEY_LOAD.format(layer=layer.layer)] = gg.numbers(GGUFValueType.FLOAT32, share.tolist())
    keys |= {name.replace("__", "."): value for name, value in values.items()}
    header, placed = gg.build_header(keys, tensors)
    data = bytearray(header + bytes(sum(gg.pad(t.n_bytes, 32) for t in placed)))
    for t in placed:
        if t.name in tables:
            data[t.offset : t.offset + t.n_bytes] = tables[t.name].astype("<i4").tobytes()
    path.write_bytes(data)
    return path
