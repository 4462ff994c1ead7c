"""A model over several files as llama-gguf-split makes them: all values in the first, and the tensors in order."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from gguf.constants import GGUFValueType

from rq_gguf import gguf_file as gg
from rq_gguf.errors import UserError
from rq_gguf.gguf_file import Tensor, Value
from rq_gguf.planning.budget import parse_size

log = logging.getLogger(__name__)

MOST_FILES = 65535
"""split.count is a uint16."""


def parse_split_size(text: str | None) -> int | None:
    """Bytes of a user's `--split-max-size`, such as 4GB, or 4G and 900M as llama-gguf-split takes them. Raises UserError for others."""
    if text is None:
        return None
    size = parse_size(text + "B" if text[-1:] in ("G", "M") else text)
    if not size:
        raise UserError(f"--split-max-size {text} is not understood; give a size such as 4GB or 900M")
    return size


def part_names(out: Path, n: int) -> tuple[Path, ...]:
    """The files of a model in n: `out` itself, or out-00001-of-0000n.gguf and so on."""
    if n == 1:
        return (out,)
    return tuple(out.with_name(gg.split_name(out.name.removesuffix(".gguf"), i, n)) for i in range(n))


def existing_parts(out: Path) -> list[Path]:
    """What lies beside `out` under the name of a part of it, in any number of parts."""
    found = out.parent.glob("*-of-*.gguf")
    return sorted(p for p in found if (name := gg.SPLIT_NAME.fullmatch(p.name)) and name[1] == out.name.removesuffix(".gguf"))


def split_headers(values: Mapping[str, Value], tensors: Iterable[Tensor], most: int | None) -> list[tuple[bytes, list[Tensor]]]:
    """Header and placed tensors of each file; `Tensor.file` is its number.

    most: bytes of a file; one that holds a single tensor may be larger, which is logged. None: one file.
    Raises UserError for a size that needs more files than a model can have.
    """
    tensors = list(tensors)
    if most is None:
        return [gg.build_header(values, tensors)]
    parts = _divide(values, tensors, most)
    if len(parts) == 1:
        return [gg.build_header(values, tensors)]
    if len(parts) > MOST_FILES:
        raise UserError(f"--split-max-size makes {len(parts)} files, and a model can have {MOST_FILES}; give a larger one")
    headers = []
    for i, part in enumerate(parts):
        header, placed = gg.build_header({**(values if i == 0 else {}), **_split_values(i, len(parts), len(tensors))}, part)
        headers.append((header, [replace(t, file=i) for t in placed]))
        if len(part) == 1 and len(header) + part[0].n_bytes > most:
            log.warning("tensor %s takes %d bytes: its file is larger than --split-max-size", part[0].name, part[0].n_bytes)
    return headers


def _split_values(number: int, files: int, tensors: int) -> dict[str, Value]:
    u16 = GGUFValueType.UINT16
    return {
        "split.no": gg.scalar(u16, number),
        "split.count": gg.scalar(u16, files),
        "split.tensors.count": gg.scalar(GGUFValueType.INT32, tensors),
    }


def _divide(values: Mapping[str, Value], tensors: Iterable[Tensor], most: int) -> list[list[Tensor]]:
    """Tensors in order, a new file where the next one would not fit with its entry in the header."""
    header = len(gg.build_header({**values, **_split_values(0, 0, 0)}, ())[0])
    other = len(gg.build_header(_split_values(0, 0, 0), ())[0])
    parts: list[list[Tensor]] = [[]]
    size = header
    for t in tensors:
        entry = len(t.name.encode()) + 8 + 4 + 8 * len(t.ne) + 12
        needed = entry + gg.pad(t.n_bytes)
        if parts[-1] and size + needed > most:
            parts.append([])
            size = other
        parts[-1].append(t)
        size += needed
    return parts
