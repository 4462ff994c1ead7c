"""Open a tiered file: every rule of docs/format.md checked, experts ready to be looked up."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from rq_gguf import format as fmt
from rq_gguf.errors import UserError
from rq_gguf.gguf_file import Header, Tensor, read_headers
from rq_gguf.types import QUANTIZABLE


@dataclass(frozen=True)
class TieredLayer:
    """One block's routed experts as stored."""

    layer: int
    n_expert: int
    """Logical experts."""
    matrices: dict[str, tuple[Tensor, ...]]
    """Matrix name -> tiers, ne = [columns, rows, physical experts]."""
    table: NDArray[np.int32] | None
    """The map, [group, n_expert, 1 + slots]; None where physical = logical."""
    load: NDArray[np.float32] | None
    """[n_expert] share of selections on the calibration text."""

    @property
    def copies(self) -> NDArray[np.int64]:
        """[n_expert] instances beyond the primary."""
        if self.table is None:
            return np.zeros(self.n_expert, dtype=np.int64)
        return self.table[0, :, 0].astype(np.int64) - 1

    def group(self, group: int) -> tuple[Tensor, ...]:
        """The tiers of one matrix that speaks for the group."""
        return next(tiers for matrix, tiers in self.matrices.items() if fmt.MATRICES[matrix] == group)

    def locate(self, matrix: str, logical: int, copy: int = 0) -> tuple[Tensor, int]:
        """(tier tensor, index in it) of an instance of a logical expert; copy 0 is the primary. Raises IndexError where there is none."""
        phys = logical
        if self.table is not None:
            row = self.table[fmt.MATRICES[matrix], logical]
            if not 0 <= copy < row[0]:
                raise IndexError(f"expert {logical} of block {self.layer} has {row[0]} instances")
            phys = int(row[1 + copy])
        elif copy:
            raise IndexError(f"expert {logical} of block {self.layer} has 1 instance")
        for tier in self.matrices[matrix]:
            if phys < tier.ne[2]:
                return tier, phys
            phys -= tier.ne[2]
        raise IndexError(f"block {self.layer} has no expert {logical}")


@dataclass(frozen=True)
class Tiered:
    """A whole file that was found valid."""

    header: Header
    """Of a model in several files: the first one's values, the tensors and the size of all."""
    layers: tuple[TieredLayer, ...]
    paths: tuple[Path, ...]
    """The files, by Tensor.file."""

    def layer(self, number: int) -> TieredLayer:
        return next(x for x in self.layers if x.layer == number)

    def read(self, tensor: Tensor, first_row: int = 0, n_rows: int | None = None) -> NDArray[np.uint8]:
        """Rows as stored, uint8 [n_rows, row_bytes]."""
        n = tensor.n_rows - first_row if n_rows is None else n_rows
        path = self.paths[tensor.file]
        data = np.fromfile(path, np.uint8, n * tensor.row_bytes, offset=tensor.offset + first_row * tensor.row_bytes)
        return data.reshape(n, tensor.row_bytes)


def open_tiered(path: Path) -> Tiered:
    """Read a file's header and maps and check them.

    path: the file, or the first of several. Raises UserError with the layer and the reason for a file that breaks the format, and for a
    stock file.
    """
    headers = read_headers(path)
    header = _joined(headers)
    if fmt.KEY_FORMAT_VERSION not in header.values:
        raise UserError(f"{path} holds no {fmt.KEY_FORMAT_VERSION}; it is a stock file")
    version = _uint32(header, fmt.KEY_FORMAT_VERSION, 0)
    if version != fmt.FORMAT_VERSION:
        raise UserError(f"{path} has {fmt.KEY_FORMAT_VERSION} {version}; this rq-gguf reads {fmt.FORMAT_VERSION}: get a newer one")
    dispatch = header.get(fmt.KEY_DISPATCH, fmt.DISPATCHES[0])
    if not isinstance(dispatch, str) or dispatch not in fmt.DISPATCHES:
        raise UserError(f"{path}: {fmt.KEY_DISPATCH} is {dispatch!r}; it can be {' or '.join(fmt.DISPATCHES)}")
    block = _uint32(header, fmt.KEY_DISPATCH_BLOCK, fmt.DEFAULT_DISPATCH_BLOCK)
    if not 0 < block < 1 << 31:
        raise UserError(f"{path}: {fmt.KEY_DISPATCH_BLOCK} is {block}; it must be 1 or more")
    header.integer(fmt.KEY_BUDGET_BYTES, 0)

    stacks: dict[int, dict[str, dict[int | None, Tensor]]] = {}
    maps: dict[int, Tensor] = {}
    for name, tensor in header.tensors.items():
        if (expert := fmt.parse_expert_name(name)) is not None:
            layer, matrix, tier = expert
            stacks.setdefault(layer, {}).setdefault(matrix, {})[tier] = tensor
        elif (layer_of_map := fmt.parse_map_name(name)) is not None:
            maps[layer_of_map] = tensor
    tiered = {layer: matrices for layer, matrices in stacks.items() if any(t is not None for tiers in matrices.values() for t in tiers)}
    if not tiered:
        raise UserError(f"{path} has {fmt.KEY_FORMAT_VERSION} and no tier tensors; write it again")
    stray = maps.keys() - tiered.keys()
    if stray:
        raise UserError(f"{path}: block {min(stray)} has a map and no tiers")
    paths = tuple(h.path for h in headers)
    layers = tuple(_layer(header, layer, tiered[layer], maps.get(layer), paths) for layer in sorted(tiered))
    return Tiered(header, layers, paths)


def _joined(headers: list[Header]) -> Header:
    """The headers of a model's files as one."""
    first = headers[0]
    tensors = {name: t for h in headers for name, t in h.tensors.items()}
    if len(tensors) != sum(len(h.tensors) for h in headers):
        raise UserError(f"{first.path} is damaged: files of the split model hold the same tensor")
    return replace(first, size=sum(h.size for h in headers), tensors=tensors)


def _uint32(header: Header, key: str, default: int) -> int:
    """A value that llama.cpp reads, and takes in no other type."""
    value = header.values.get(key)
    if value is not None and value.type != GGUFValueType.UINT32:
        raise UserError(f"{header.path}: {key} is of GGUF's type {value.type}, not a uint32")
    return header.integer(key, default)


def _layer(
    header: Header, layer: int, stacks: dict[str, dict[int | None, Tensor]], map_tensor: Tensor | None, paths: tuple[Path, ...]
) -> TieredLayer:
    where = f"{header.path}: block {layer}"
    if "down" not in stacks or len(stacks) == 1 or ("gate_up" in stacks and len(stacks) > 2):
        raise UserError(f"{where} has tiers of {', '.join(sorted(stacks))}, not of gate, up and down or gate_up and down")
    matrices: dict[str, tuple[Tensor, ...]] = {}
    for matrix, numbered in stacks.items():
        if None in numbered:
            raise UserError(f"{where}: {matrix} has a tensor without a tier number beside tiers")
        numbers = sorted(n for n in numbered if n is not None)
        if numbers != list(range(len(numbers))):
            missing = next(i for i in range(len(numbers)) if numbers[i] != i)
            raise UserError(f"{where}: {matrix} has tier {numbers[-1]} and no tier {missing}")
        if len(numbers) > fmt.MAX_TIERS:
            raise UserError(f"{where}: {matrix} has {len(numbers)} tiers; at most {fmt.MAX_TIERS} are allowed")
        matrices[matrix] = tuple(numbered[n] for n in numbers)
        first = matrices[matrix][0]
        for tier in matrices[matrix]:
            if tier.type not in QUANTIZABLE:
                raise UserError(f"{where}: {tier.name} has type {tier.type}, which is none of weights")
            if len(tier.ne) != 3 or tier.ne[:2] != first.ne[:2]:
                raise UserError(f"{where}: {tier.name} is {list(tier.ne)}, unlike {first.name} with {list(first.ne)}")
    _check_shapes(where, matrices)

    n_phys = tuple(sum(t.ne[2] for t in next(m for k, m in matrices.items() if fmt.MATRICES[k] == g)) for g in range(len(fmt.GROUPS)))
    n_expert = _expert_count(header, layer, map_tensor, n_phys)
    table = None
    if map_tensor is None:
        if any(n != n_expert for n in n_phys) or any(len(tiers) > 1 for tiers in matrices.values()):
            raise UserError(f"{where} has several tiers or copies and no map {fmt.map_name(layer)}")
    else:
        if map_tensor.type != "i32":
            raise UserError(f"{where}: {map_tensor.name} is {map_tensor.type}, not i32")
        raw = np.fromfile(paths[map_tensor.file], "<i4", map_tensor.n_bytes // 4, offset=map_tensor.offset)
        table = raw.reshape(tuple(reversed(map_tensor.ne)))
        problem = fmt.check_map(table, n_phys, n_expert)
        if problem:
            raise UserError(f"{where}: {problem}")
    load = header.get(fmt.KEY_LOAD.format(layer=layer))
    if load is not None and (not isinstance(load, np.ndarray) or load.shape != (n_expert,) or not np.isfinite(load).all()):
        raise UserError(f"{where}: {fmt.KEY_LOAD.format(layer=layer)} must be {n_expert} finite numbers")
    return TieredLayer(layer, n_expert, matrices, table, load)


def _check_shapes(where: str, matrices: dict[str, tuple[Tensor, ...]]) -> None:
    """gate and up alike; gate/up and down transposes of each other."""
    n_ff, n_embd = matrices["down"][0].ne[:2]
    for matrix, tiers in matrices.items():
        if matrix == "down":
            continue
        rows = 2 * n_ff if matrix == "gate_up" else n_ff
        if tiers[0].ne[:2] != (n_embd, rows):
            raise UserError(f"{where}: {tiers[0].name} is {list(tiers[0].ne)}, which does not fit down with {list(matrices['down'][0].ne)}")
    if "gate" in matrices and "up" in matrices:
        gate, up = ([(t.type, t.ne) for t in matrices[m]] for m in ("gate", "up"))
        if gate != up:
            raise UserError(f"{where}: the tiers of gate and up differ; they must have the same types and expert counts")


def _expert_count(header: Header, layer: int, map_tensor: Tensor | None, n_phys: tuple[int, ...]) -> int:
    """Logical experts of a block: what the router picks from; router, header and map must agree."""
    counts = {}
    router = header.tensors.get(f"blk.{layer}.ffn_gate_inp.weight")
    if router is not None:
        counts[router.name] = router.n_rows
    key = f"{header.get('general.architecture', '')}.expert_count"
    if key in header.values:
        counts[key] = header.integer(key, 0, layer)
    if map_tensor is not None:
        if len(map_tensor.ne) != 3:
            raise UserError(f"{header.path}: {map_tensor.name} has {len(map_tensor.ne)} dimensions instead of 3")
        counts[map_tensor.name] = map_tensor.ne[1]
    if not counts:
        return n_phys[0]
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{n} by {name}" for name, n in counts.items())
        raise UserError(f"{header.path}: block {layer} has {told} logical experts; they must agree")
    return next(iter(counts.values()))
