"""GGUF headers, read and written without touching tensor data.

Values stay raw bytes until somebody asks for them and go to a new file as they came: a vocabulary of 100,000 entries costs
milliseconds here and seconds where each entry becomes an object. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from rq_gguf.atomic import reason
from rq_gguf.errors import UserError
from rq_gguf.types import name_of, number, row_bytes

_MAGIC = b"GGUF"
_VERSION = 3
_READABLE = (2, 3)
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


def pad(n: int, alignment: int = GGUF_DEFAULT_ALIGNMENT) -> int:
    """n rounded up to the alignment; files written here have the default one."""
    return -(-n // alignment) * alignment


@dataclass(frozen=True)
class Value:
    """A value of the header: its GGUF type and the bytes behind that type."""

    type: int
    raw: bytes

    def decode(self) -> Any:
        """The value as Python sees it: a number, a string, a numpy array of numbers or a list of strings."""
        if self.type == GGUFValueType.STRING:
            return self.raw[8:].decode("utf-8", errors="replace")
        if self.type != GGUFValueType.ARRAY:
            return struct.unpack("<" + _SCALARS[self.type], self.raw)[0]
        kind, count = struct.unpack_from("<IQ", self.raw)
        if kind in _SCALARS:
            return np.frombuffer(self.raw, dtype="<" + _SCALARS[kind], offset=12, count=count)
        if kind != GGUFValueType.STRING:
            raise UserError("arrays of arrays in a GGUF header are not supported")
        strings, at = [], 12
        for _ in range(count):
            (n,) = struct.unpack_from("<Q", self.raw, at)
            strings.append(self.raw[at + 8 : at + 8 + n].decode("utf-8", errors="replace"))
            at += 8 + n
        return strings


def scalar(kind: GGUFValueType, value: int | float | bool) -> Value:
    return Value(kind, struct.pack("<" + _SCALARS[kind], value))


def string(text: str) -> Value:
    return Value(GGUFValueType.STRING, _string(text))


def strings(texts: Iterable[str]) -> Value:
    items = [_string(t) for t in texts]
    return Value(GGUFValueType.ARRAY, struct.pack("<IQ", GGUFValueType.STRING, len(items)) + b"".join(items))


def numbers(kind: GGUFValueType, values: Iterable[int | float]) -> Value:
    array = np.array(list(values), dtype="<" + _SCALARS[kind])
    return Value(GGUFValueType.ARRAY, struct.pack("<IQ", kind, len(array)) + array.tobytes())


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry in the header."""

    name: str
    type: str
    """ggml type name in lower case."""
    ne: tuple[int, ...]
    """Sizes in ggml's order: columns first."""
    offset: int = 0
    """From the start of the file."""
    file: int = 0
    """Number of the file in a split model."""

    @property
    def cols(self) -> int:
        return self.ne[0]

    @property
    def n_rows(self) -> int:
        """Rows in all, over every further dimension."""
        n = 1
        for size in self.ne[1:]:
            n *= size
        return n

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.cols)

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes


@dataclass(frozen=True)
class Header:
    """What stands before the data of a GGUF file."""

    path: Path
    size: int
    """Bytes of the whole file."""
    values: dict[str, Value]
    tensors: dict[str, Tensor]
    """In the file's order."""
    alignment: int

    def get(self, key: str, default: Any = None) -> Any:
        """A decoded value."""
        value = self.values.get(key)
        return default if value is None else value.decode()

    def integer(self, key: str, default: int, block: int = 0) -> int:
        """A whole number; of an array with a number per block, the block's. Raises UserError for a value of another kind."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and block < len(value):
            value = value[block].item()
        if not isinstance(value, int):
            raise UserError(f"{self.path} is damaged: {key} is no whole number")
        return value


def read_header(path: Path, file: int = 0) -> Header:
    """Read and check a GGUF header; `file` is kept in the tensors.

    Raises UserError for what is no GGUF, is damaged, or ends before its data does.
    """
    try:
        with open(path, "rb") as f:
            if f.read(4) != _MAGIC:
                raise UserError(f"{path} is not a GGUF file")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse(path, data, file)
    except OSError as e:
        raise UserError(f"cannot read {path}: {reason(e)}") from e
    except (struct.error, OverflowError) as e:
        raise UserError(f"{path} is truncated: its header ends early; get the file again") from e
    except RecursionError as e:
        raise UserError(f"{path} is damaged: its header nests arrays without end") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is damaged: a name in its header is not UTF-8") from e
    _check_data(header)
    return header


def split_name(stem: str, number: int, count: int) -> str:
    """Of file `number`, from 0, of a model in several (llama.cpp's llama_split_path). SPLIT_NAME reads it."""
    return f"{stem}-{number + 1:05}-of-{count:05}.gguf"


def read_headers(path: Path) -> list[Header]:
    """Headers of all files of a model that may be split, the first one's first. Raises UserError where a file is missing or another's."""
    first = read_header(path)
    count = first.integer("split.count", 0)
    if count < 2:
        return [first]
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise UserError(f"{path} is part of a model in {count} files, whose names must end in {split_name('', 0, count)}")
    if first.integer("split.no", 0) != 0 or int(name[2]) != 1:
        raise UserError(f"{path} is not the first file of its model; give {split_name(name[1], 0, count)}")
    headers = [first]
    for i in range(1, count):
        header = read_header(path.with_name(split_name(name[1], i, count)), i)
        if header.integer("split.no", -1) != i or header.integer("split.count", 0) != count:
            raise UserError(f"{header.path} is not file {i + 1} of {count} of {path.name}; get the model's files again")
        headers.append(header)
    return headers


def total_size(path: Path) -> int:
    """Bytes of a model's file, or of all its files. Raises UserError as read_headers does."""
    return sum(header.size for header in read_headers(path))


def _parse(path: Path, data: mmap.mmap, file: int) -> Header:
    (version,) = struct.unpack_from("<I", data, 4)
    if version not in _READABLE:
        raise UserError(f"{path} is a GGUF of version {version}; versions {_READABLE[0]} and {_READABLE[1]} can be read")
    n_tensors, n_values = struct.unpack_from("<QQ", data, 8)
    at = 24

    def text() -> str:
        nonlocal at
        (n,) = struct.unpack_from("<Q", data, at)
        start, at = at + 8, at + 8 + n
        if at > len(data):
            raise struct.error
        return data[start:at].decode()

    values: dict[str, Value] = {}
    for _ in range(n_values):
        key = text()
        (kind,) = struct.unpack_from("<I", data, at)
        end = _end_of_value(path, key, data, kind, at + 4)
        if key in values:
            raise UserError(f"{path} is damaged: its header has {key} twice")
        values[key] = Value(kind, data[at + 4 : end])
        at = end

    alignment = values["general.alignment"].decode() if "general.alignment" in values else GGUF_DEFAULT_ALIGNMENT
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise UserError(f"{path} is damaged: general.alignment is {str(alignment)!r}, no power of two of 8 or more")

    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    for _ in range(n_tensors):
        name = text()
        (n_dims,) = struct.unpack_from("<I", data, at)
        if not 1 <= n_dims <= 4:
            raise UserError(f"{path} is damaged: tensor {name} has {n_dims} dimensions")
        *ne, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, at + 4)
        at += 4 + 8 * n_dims + 12
        if 0 in ne:  # empty rows would let a file of no size claim any number of experts
            raise UserError(f"{path} is damaged: tensor {name} has a size of 0")
        type_name = name_of(kind)
        if type_name is None:
            raise UserError(f"{path}: tensor {name} has ggml type {kind}, which this rq-gguf does not know; get a newer one")
        entries.append((name, type_name, tuple(ne), offset))

    start = pad(at, alignment)
    tensors: dict[str, Tensor] = {}
    for name, type_name, ne_, offset in entries:
        if name in tensors:
            raise UserError(f"{path} is damaged: its header has tensor {name} twice")
        tensors[name] = Tensor(name, type_name, ne_, start + offset, file)
    return Header(path, len(data), values, tensors, alignment)


def _end_of_value(path: Path, key: str, data: mmap.mmap, kind: int, at: int) -> int:
    if kind in _SCALARS:
        end = at + struct.calcsize("<" + _SCALARS[kind])
    elif kind == GGUFValueType.STRING:
        end = at + 8 + struct.unpack_from("<Q", data, at)[0]
    elif kind == GGUFValueType.ARRAY:
        item, count = struct.unpack_from("<IQ", data, at)
        end = at + 12
        if item in _SCALARS:
            end += count * struct.calcsize("<" + _SCALARS[item])
        elif item == GGUFValueType.STRING:
            length = struct.Struct("<Q").unpack_from
            for _ in range(count):
                end += 8 + length(data, end)[0]
        else:
            for _ in range(count):
                end = _end_of_value(path, key, data, item, end)
    else:
        raise UserError(f"{path} is damaged: {key} has the unknown value type {kind}")
    if end > len(data):
        raise struct.error
    return end


def _check_data(header: Header) -> None:
    """ggml's own rule: tensors lie one behind the other, each padded to the alignment."""
    expected = None
    for t in header.tensors.values():
        try:
            size = t.n_bytes
        except UserError as e:
            raise UserError(f"{header.path} is damaged: tensor {t.name}: {e}") from e
        if expected is not None and t.offset != expected:
            raise UserError(f"{header.path} is damaged: the data of tensor {t.name} starts at byte {t.offset} instead of {expected}")
        if t.offset + size > header.size:
            raise UserError(
                f"{header.path} is truncated: tensor {t.name} ends at byte {t.offset + size}, the file at {header.size}; get the file again"
            )
        expected = t.offset + pad(size, header.alignment)


def build_header(values: Mapping[str, Value], tensors: Iterable[Tensor]) -> tuple[bytes, list[Tensor]]:
    """The header of a new file, padded, and the tensors with their offsets, in the given order. `values` must not set an alignment."""
    placed: list[Tensor] = []
    infos: list[bytes] = []
    offset = 0
    for t in tensors:
        infos.append(_string(t.name) + struct.pack(f"<I{len(t.ne)}QIQ", len(t.ne), *t.ne, number(t.type), offset))
        placed.append(Tensor(t.name, t.type, t.ne, offset))
        offset += pad(t.n_bytes)
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(placed), len(values))]
    parts += [_string(key) + struct.pack("<I", v.type) + v.raw for key, v in values.items()]
    header = b"".join(parts + infos)
    header += bytes(pad(len(header)) - len(header))
    return header, [Tensor(t.name, t.type, t.ne, len(header) + t.offset) for t in placed]
