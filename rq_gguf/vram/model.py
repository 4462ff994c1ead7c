"""Planned layers as a machine sees them. Pure."""

from collections.abc import Mapping

import numpy as np

from rq_gguf.format import GROUPS
from rq_gguf.planning.budget import ExpertShape
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.vram.machine import Machine
from rq_gguf.vram.speed import Experts, Floats, Rest

_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"
"""A row of the embeddings is all that a token reads of them, unless they are the output matrix too."""


def experts_of(layers: tuple[LayerPlan, ...], shape: ExpertShape, shares: Floats, n_used: int, machine: Machine) -> Experts:
    """Experts as the layers store them, primaries only: on one machine copies wait in RAM. shares: [layers, n_expert]."""
    size, seconds = np.zeros(shares.shape), np.zeros(shares.shape)
    for g in range(len(GROUPS)):
        known: dict[str, tuple[int, float]] = {}
        for i, layer in enumerate(layers):
            for e, row in enumerate(layer.groups[g]):
                if row[0] not in known:
                    n = shape.expert_bytes(g, row[0])
                    known[row[0]] = n, machine.ram_seconds(row[0], n)
                n, t = known[row[0]]
                size[i, e] += n
                seconds[i, e] += t
    return Experts(size, seconds, size / machine.vram_bandwidth, shares, n_used)


def uniform_experts(shape: ExpertShape, type_name: str, shares: Floats, n_used: int, machine: Machine) -> Experts:
    """All experts in one type. shares: [layers, n_expert]."""
    stored = [shape.stored_type(g, type_name) for g in range(len(GROUPS))]
    sizes = [shape.expert_bytes(g, type_name) for g in range(len(GROUPS))]
    size = np.full(shares.shape, float(sum(sizes)))
    seconds = np.full_like(size, sum(machine.ram_seconds(t, n) for t, n in zip(stored, sizes, strict=True)))
    return Experts(size, seconds, size / machine.vram_bandwidth, shares, n_used)


def rest_of(sizes: Mapping[str, tuple[float, int]], n_layers: int, active_experts: float) -> Rest:
    """Everything but the routed experts. sizes: by tensor, bytes and weights. active_experts: weights of the experts that a token uses."""
    read = {name: size for name, size in sizes.items() if name != _EMBEDDINGS or _OUTPUT not in sizes}
    return Rest(round(sum(size for size, _ in read.values())), n_layers, active_experts + sum(weights for _, weights in read.values()))
