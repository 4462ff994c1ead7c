"""Bytes: what experts, tiers and maps take in the file, and what a user's `--budget` allows them."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain

from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.types import TYPES, fallback, row_bytes

ALIGNMENT = 32
"""A GGUF's tensors start at multiples of this."""

_UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_LONGEST = 300  # a file's name, and numbers that a float can hold
_LIKE = re.compile(r"like:.+ \((\d+) bytes\)", re.IGNORECASE)
_FORMS = (
    "a ggml type such as q8_0, a size of the whole file such as 16GiB or 900MB, bits per expert weight such as 5.0bpw, "
    "or like:FILE.gguf for the bytes of that file"
)


def padded(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@dataclass(frozen=True)
class ExpertShape:
    """The matrices of one expert. gate and up: [n_ff, n_embd] each (or stacked in one tensor), down: [n_embd, n_ff]."""

    n_expert: int
    n_embd: int
    n_ff: int
    merged_gate_up: bool
    gated: bool = True
    """False where there is up and no gate."""

    def rows(self, group: int) -> tuple[int, ...]:
        """Rows of each matrix of a group (an index into format.GROUPS)."""
        if GROUPS[group] == "down":
            return (self.n_embd,)
        if not self.gated:
            return (self.n_ff,)
        return (2 * self.n_ff,) if self.merged_gate_up else (self.n_ff, self.n_ff)

    def columns(self, group: int) -> int:
        return self.n_ff if GROUPS[group] == "down" else self.n_embd

    def stored_type(self, group: int, type_name: str) -> str:
        """The type that a group's matrices really take for `type_name` (llama-quantize's fallback)."""
        return fallback(type_name, self.columns(group))

    def expert_bytes(self, group: int, type_name: str) -> int:
        """Bytes of one physical expert's matrices of a group, unpadded."""
        return sum(self.rows(group)) * row_bytes(self.stored_type(group, type_name), self.columns(group))

    def stacked_bytes(self, group: int, type_name: str, experts: int) -> int:
        """Bytes of the tensors that stack `experts` physical experts, each tensor padded."""
        row = row_bytes(self.stored_type(group, type_name), self.columns(group))
        return sum(padded(experts * rows * row) for rows in self.rows(group))

    def map_bytes(self, most_copies: int) -> int:
        """Bytes of a layer's map tensor, int32 [group, n_expert, 1 + instances]."""
        return padded(4 * len(GROUPS) * self.n_expert * (2 + most_copies))

    @property
    def weights(self) -> int:
        """Weights of one expert."""
        return (3 if self.gated else 2) * self.n_ff * self.n_embd


def expert_shape(calibration: Calibration) -> ExpertShape:
    """The shape of a calibrated model's experts, the same in all layers."""
    counts = {layer.n_expert for layer in calibration.layers}
    if len(counts) != 1:
        raise UserError(f"the calibration of {calibration.model} holds layers of {sorted(counts)} experts; all must have the same number")
    gated = any(matrix != "up" and matrix != "down" for layer in calibration.layers for matrix in layer.in_sum2)
    return ExpertShape(counts.pop(), calibration.n_embd, calibration.n_ff, calibration.merged_gate_up, gated)


def layer_bytes(shape: ExpertShape, layer: LayerPlan) -> int:
    """What a planned layer's tier tensors, their padding and its map take in the file (one tier per type: format.layout_group)."""
    tiers = [Counter(chain.from_iterable(group)) for group in layer.groups]
    size = sum(shape.stacked_bytes(g, t, n) for g, counts in enumerate(tiers) for t, n in counts.items())
    most = max(layer.copies)
    return size if most == 0 and all(len(counts) == 1 for counts in tiers) else size + shape.map_bytes(most)


def plan_bytes(shape: ExpertShape, layers: tuple[LayerPlan, ...]) -> int:
    return sum(layer_bytes(shape, layer) for layer in layers)


def uniform_bytes(shape: ExpertShape, n_layers: int, type_name: str) -> int:
    """Bytes of all routed experts in one type without copies: stacked tensors, no map."""
    return n_layers * sum(shape.stacked_bytes(g, type_name, shape.n_expert) for g in range(len(GROUPS)))


@dataclass(frozen=True)
class Budget:
    """A parsed `--budget`."""

    text: str
    """As the user gave it."""
    kind: str
    """`type`, `size` or `bpw`."""
    value: float | int | str
    """A type's name, bytes of the whole file, or bits per logical expert weight."""

    def expert_bytes(self, shape: ExpertShape, n_layers: int, other_bytes: int) -> int:
        """Most bytes that tier tensors, padding and maps may take. other_bytes: everything else in the file."""
        if self.kind == "type":
            return uniform_bytes(shape, n_layers, str(self.value))
        if self.kind == "bpw":
            return math.floor(float(self.value) * n_layers * shape.n_expert * shape.weights / 8)
        return int(self.value) - other_bytes

    def too_small(self, least: int, shape: ExpertShape, n_layers: int, other_bytes: int, why: str) -> UserError:
        """The error for a budget below `least` bytes for the experts, in the user's own unit. why: what takes them."""
        if self.kind == "bpw":
            bits = math.ceil(8e4 * least / (n_layers * shape.n_expert * shape.weights)) / 1e4
            return UserError(f"--budget {self.text} cannot be met: the least possible is {bits:.4f}bpw ({least} bytes of experts, {why})")
        if self.kind == "size":
            parts = f"{least} of experts, {why}; {other_bytes} of all else"
            return UserError(f"--budget {self.text} cannot be met: the least possible is {least + other_bytes} bytes ({parts})")
        allowed = uniform_bytes(shape, n_layers, str(self.value))
        return UserError(f"--budget {self.text} ({allowed} bytes of experts) cannot be met: the least possible is {least} bytes ({why})")


def parse_size(text: str) -> int | None:
    """Bytes of a size that a user gives, such as 4GB or 900MiB; None for anything else."""
    try:
        budget = parse_budget(text)
    except UserError:
        return None
    return None if budget.kind != "size" or ":" in text else int(budget.value)


def parse_budget(text: str) -> Budget:
    """A user's `--budget`: a type's name, a size in bytes, kB, MB, GB, KiB, MiB, GiB, ..., `<number>bpw`, or `like:NAME (N bytes)`, which
    is a size too (who asks for `like:FILE` has looked it up). UserError otherwise."""
    name = text.strip().lower()
    if len(name) > _LONGEST:
        raise UserError(f"--budget {name[:20]}... is not understood; give {_FORMS}")
    if (like := _LIKE.fullmatch(name)) is not None:
        return Budget(text, "size", int(like[1]))
    if name in TYPES:
        return Budget(text, "type", name)
    if (match := _SIZE.fullmatch(name)) is None:
        raise UserError(f"--budget {text!r} is not understood; give {_FORMS}")
    number, unit = match[1], match[2]
    if unit == "bpw":
        if not 0 < float(number) <= 32:
            raise UserError(f"--budget {text}: bits per weight must lie between 0 and 32")
        return Budget(text, "bpw", float(number))
    if unit not in _UNITS or (unit in ("", "b") and "." in number):
        raise UserError(f"--budget {text!r} is not understood; give {_FORMS}")
    if float(number) > 1 << 63:
        raise UserError(f"--budget {text} is more than any file can have; give {_FORMS}")
    return Budget(text, "size", int(float(number) * _UNITS[unit]) if "." in number else int(number) * _UNITS[unit])
