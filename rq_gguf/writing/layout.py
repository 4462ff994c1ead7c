"""The new file's tensors: what each is made of, and the work of making them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf import format as fmt
from rq_gguf.calibration.data import LayerCalibration
from rq_gguf.calibration.feedback import Feedback, layer_feedback
from rq_gguf.calibration.imatrix import matrix_rows
from rq_gguf.errors import UserError
from rq_gguf.format import GroupLayout
from rq_gguf.gguf_file import Tensor, pad
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.types import fallback, rank
from rq_gguf.writing.quantize import PIECE_WEIGHTS, Piece
from rq_gguf.writing.source import Source


@dataclass(frozen=True)
class Tier:
    """Where a tier tensor's experts come from."""

    tensor: Tensor
    matrix: str
    layer: int
    experts: tuple[int, ...]
    """Logical experts in stored order; one may come several times."""


@dataclass(frozen=True)
class Output:
    """A tensor of the new file and what it is made of: a tensor of the source, a tier of one, or a map."""

    tensor: Tensor
    content: Tensor | Tier | NDArray[np.int32]

    @property
    def is_expert(self) -> bool:
        return not isinstance(self.content, Tensor)


def layer_layouts(plan: LayerPlan, n_embd: int, n_ff: int) -> tuple[GroupLayout, GroupLayout]:
    """Tiers of both groups, most bits first, after llama-quantize's fallback for rows that do not fit a type."""
    layouts = []
    for instances, cols in zip(plan.groups, (n_embd, n_ff), strict=True):
        types = tuple(tuple(fallback(t, cols) for t in row) for row in instances)
        used = {t for row in types for t in row}
        if len(used) > fmt.MAX_TIERS:
            raise UserError(f"the plan uses {len(used)} types in one group of block {plan.layer}; at most {fmt.MAX_TIERS} fit in a file")
        order = tuple(sorted(used, key=rank, reverse=True))
        layouts.append(fmt.layout_group(types, order))
    return layouts[0], layouts[1]


def outputs(source: Source, plan: Plan, types: Mapping[str, str]) -> Iterator[Output]:
    """All tensors of the new file in the source's order, each expert tensor replaced by its tiers, a layer's map before its first tier."""
    layouts = {}
    for p in plan.layers:
        shape = next(s for s in source.shape.layers if s.layer == p.layer)
        layouts[p.layer] = layer_layouts(p, shape.n_embd, shape.n_ff)
    mapped = set()
    for tensor in source.tensors.values():
        parsed = fmt.parse_expert_name(tensor.name)
        if parsed is None or not source.is_routed(tensor.name):
            yield Output(Tensor(tensor.name, types[tensor.name], tensor.ne), tensor)
            continue
        layer, matrix, _ = parsed
        if layer not in mapped:
            mapped.add(layer)
            if not fmt.is_identity(layouts[layer], tensor.ne[2]):
                table = fmt.build_map(layouts[layer], tensor.ne[2])
                yield Output(Tensor(fmt.map_name(layer), "i32", tuple(reversed(table.shape))), table)
        for i, tier in enumerate(layouts[layer][fmt.MATRICES[matrix]].tiers):
            experts = tuple(e for e, _ in tier.instances)
            new = Tensor(fmt.tier_name(layer, matrix, i), tier.type, (*tensor.ne[:2], len(experts)))
            yield Output(new, Tier(tensor, matrix, layer, experts))


def expert_bytes(outputs: Iterable[Output]) -> int:
    """What tier tensors, their padding and maps take."""
    return sum(pad(o.tensor.n_bytes) for o in outputs if o.is_expert)


def pieces(
    outputs: Iterable[Output],
    calibration: Mapping[int, LayerCalibration],
    others: Mapping[str, NDArray[np.float32]],
    feedback: bool,
) -> Iterator[Piece]:
    """The work, in file order, made as it is asked for: importance rows of one expert matrix at a time are in memory.

    others: importance rows of other tensors, from others.importance_rows. feedback: quantize gate and up with error feedback.
    """
    rows_for: tuple[int, str] | None = None
    imatrix: NDArray[np.float32] | None = None
    update: Feedback | None = None
    for output in outputs:
        new, content = output.tensor, output.content
        if isinstance(content, Tensor):
            rows = others.get(content.name)
            if rows is None:
                yield from _split(content, 0, content.n_rows, new, (new.offset,), None, None)
                continue
            n = content.n_rows // len(rows)
            for i, row in enumerate(rows):
                yield from _split(content, i * n, n, new, (new.offset + i * n * new.row_bytes,), row, None)
        elif isinstance(content, Tier):
            if rows_for != (content.layer, content.matrix):
                if feedback and (rows_for is None or rows_for[0] != content.layer):
                    update = layer_feedback(calibration[content.layer])
                rows_for = (content.layer, content.matrix)
                imatrix = _imatrix(calibration[content.layer], content.matrix)
            n = content.tensor.ne[1]
            size = n * new.row_bytes
            places: dict[int, list[int]] = {}
            for i, e in enumerate(content.experts):
                places.setdefault(e, []).append(new.offset + i * size)
            for e, offsets in places.items():
                importance = None if imatrix is None else imatrix[e]
                yield from _split(
                    content.tensor, e * n, n, new, tuple(offsets), importance, e, update if content.matrix != "down" else None
                )


def _imatrix(layer: LayerCalibration, matrix: str) -> NDArray[np.float32] | None:
    """Importance rows of a matrix, [n_expert, columns]; None where the calibration has no inputs of it."""
    known = {"down"} if matrix == "down" else {"gate", "up", "gate_up"}
    return matrix_rows(layer, matrix) if known & layer.in_sum2.keys() else None


def _split(
    tensor: Tensor,
    first: int,
    n: int,
    new: Tensor,
    offsets: tuple[int, ...],
    imatrix: NDArray[np.float32] | None,
    expert: int | None,
    feedback: Feedback | None = None,
) -> Iterator[Piece]:
    """Rows [first, first + n) of a tensor in pieces of about PIECE_WEIGHTS. offsets: where they begin in the new tensor's file."""
    step = max(1, PIECE_WEIGHTS // tensor.cols)
    for at in range(0, n, step):
        places = tuple(o + at * new.row_bytes for o in offsets)
        yield Piece(tensor, first + at, min(step, n - at), new.type, places, new.file, imatrix, expert, feedback)
