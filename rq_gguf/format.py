"""The file format: `rq.*` keys, tier names and the logical -> physical map. The only module that knows it (see docs/format.md)."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
MAX_TIERS = 7
"""Sources of one tiered multiplication in ggml (GGML_MAX_SRC is 10: tiers, activations, ids and one to spare)."""

GROUPS = ("gate_up", "down")
"""Matrix groups, in the order of the map's last axis. Matrices of one group share types and physical numbering."""
MATRICES = {"gate": 0, "up": 0, "gate_up": 0, "down": 1}
"""Matrix name in GGUF tensor names -> index into GROUPS."""

KEY_FORMAT_VERSION = "rq.format_version"  # uint32
KEY_DISPATCH = "rq.dispatch"  # string, one of DISPATCHES
KEY_DISPATCH_BLOCK = "rq.dispatch_block"  # uint32
KEY_TOOL_VERSION = "rq.tool_version"  # string
KEY_POLICY = "rq.policy"  # string
KEY_BUDGET = "rq.budget"  # string, as the user gave it
KEY_BUDGET_BYTES = "rq.budget_bytes"  # uint64
KEY_EXPERT_BYTES = "rq.expert_bytes"  # uint64, what the routed experts and maps really take
KEY_TYPES = "rq.types"  # array of strings: the types that the plan chose from
KEY_OTHER = "rq.other"  # string: type of all other tensors, in llama-quantize's sense
KEY_TENSOR_TYPES = "rq.tensor_types"  # array of strings: the exceptions, REGEX=TYPE
KEY_REPLICAS = "rq.replicas"  # array of uint32, one per block: copies beyond the primaries
KEY_CALIBRATION_HASH = "rq.calibration.sha256"  # string
KEY_CALIBRATION_TOKENS = "rq.calibration.tokens"  # uint64
KEY_SOURCE_MODEL = "rq.source.model"  # string
KEY_LOAD = "rq.blk.{layer}.load"  # array of float32 [n_expert]: share of the layer's selections

DISPATCHES = ("balanced", "primary")
DEFAULT_DISPATCH_BLOCK = 16

_EXPERT_NAME = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.(?:(\d+)\.)?weight")
_MAP_NAME = re.compile(r"blk\.(\d+)\.ffn_log2phy")


def tier_name(layer: int, matrix: str, tier: int) -> str:
    """Name of the tensor that stacks the physical experts of one tier."""
    return f"blk.{layer}.ffn_{matrix}_exps.{tier}.weight"


def map_name(layer: int) -> str:
    """Name of the layer's logical -> physical map."""
    return f"blk.{layer}.ffn_log2phy"


def parse_expert_name(name: str) -> tuple[int, str, int | None] | None:
    """(layer, matrix, tier) of an expert weight's name, tier None for a stock stacked tensor; None for other tensors."""
    m = _EXPERT_NAME.fullmatch(name)
    return (int(m[1]), m[2], None if m[3] is None else int(m[3])) if m else None


def parse_map_name(name: str) -> int | None:
    """The layer of a map tensor's name; None for other tensors."""
    m = _MAP_NAME.fullmatch(name)
    return int(m[1]) if m else None


@dataclass(frozen=True)
class Tier:
    """All physical experts of a layer and matrix group that share a ggml type, in stored order."""

    type: str
    instances: tuple[tuple[int, int], ...]  # (logical expert, copy number; 0 is the primary)


@dataclass(frozen=True)
class GroupLayout:
    """The tiers of one matrix group of one layer. Physical ids count through the tiers in order."""

    tiers: tuple[Tier, ...]

    @property
    def n_phys(self) -> int:
        return sum(len(t.instances) for t in self.tiers)


def layout_group(types: tuple[tuple[str, ...], ...], order: tuple[str, ...]) -> GroupLayout:
    """Stack a group's physical experts into tiers.

    types: [n_expert][instances] ggml type names, primary first. order: type names, the first tier's first.
    Within a tier primaries come first by logical expert, then copies.
    """
    instances = sorted((copy, e) for e, row in enumerate(types) for copy in range(len(row)))
    tiers = (Tier(t, tuple((e, c) for c, e in instances if types[e][c] == t)) for t in order)
    return GroupLayout(tuple(t for t in tiers if t.instances))


def is_identity(layouts: tuple[GroupLayout, ...], n_expert: int) -> bool:
    """True if the layer is stored in logical order without copies, so that it needs no map."""
    return all(len(g.tiers) == 1 and g.n_phys == n_expert for g in layouts)


def build_map(layouts: tuple[GroupLayout, ...], n_expert: int) -> NDArray[np.int32]:
    """The map tensor of a layer, int32 [group, n_expert, 1 + max copies] (numpy order; GGUF's ne is the reverse).

    Row of a logical expert: the number of its instances, their physical ids (primary first), then -1.
    """
    counts = np.zeros((len(layouts), n_expert), dtype=np.int32)
    for g, layout in enumerate(layouts):
        for tier in layout.tiers:
            for e, _ in tier.instances:
                counts[g, e] += 1
    table = np.full((len(layouts), n_expert, 1 + int(counts.max())), -1, dtype=np.int32)
    table[:, :, 0] = counts
    for g, layout in enumerate(layouts):
        phys = 0
        for tier in layout.tiers:
            for e, copy in tier.instances:
                table[g, e, 1 + copy] = phys
                phys += 1
    return table


def check_map(table: NDArray[np.int32], n_phys: tuple[int, ...], n_expert: int) -> str | None:
    """Why a map is invalid, or None. The loader in the patch applies the same rules.

    table: int32 [group, n_expert, 1 + slots]. n_phys: physical experts stored per group.
    """
    if table.ndim != 3 or table.shape[:2] != (len(n_phys), n_expert) or table.shape[2] < 2:
        return f"map has shape {list(table.shape)}, expected [{len(n_phys)}, {n_expert}, 2 or more]"
    for g, total in enumerate(n_phys):
        seen = np.zeros(total, dtype=bool)
        for e in range(n_expert):
            count, slots = int(table[g, e, 0]), table[g, e, 1:]
            if count < 1:
                return f"logical expert {e} of {GROUPS[g]} has no primary"
            if count > len(slots):
                return f"logical expert {e} of {GROUPS[g]} claims {count} instances in {len(slots)} slots"
            if count != int(table[0, e, 0]):
                return f"logical expert {e} has {int(table[0, e, 0])} instances in {GROUPS[0]} and {count} in {GROUPS[g]}"
            for phys in slots[:count].tolist():
                if not 0 <= phys < total:
                    return f"logical expert {e} of {GROUPS[g]} points to physical expert {phys} of {total}"
                if seen[phys]:
                    return f"physical expert {phys} of {GROUPS[g]} is mapped twice"
                seen[phys] = True
            if (slots[count:] != -1).any():
                return f"logical expert {e} of {GROUPS[g]} has entries behind its last instance"
        if not seen.all():
            return f"physical expert {int(np.argmin(seen))} of {GROUPS[g]} belongs to no logical expert"
    return None
