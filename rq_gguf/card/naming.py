"""What a file is called where it is published."""

import re
from pathlib import Path

from gguf.utility import naming_convention

from rq_gguf import gguf_file as gg
from rq_gguf.gguf_file import Header, read_headers
from rq_gguf.size import model_size

_NOT_IN_NAMES = re.compile(r"[^\w.\-]+", re.ASCII)


def published_name(header: Header, bpw: float) -> str:
    """Such as OLMoE-1B-7B-Instruct-RQ-4.5bpw.gguf: what GGUF's naming convention makes of general.*, then RQ and the bits per weight
    (size.Size.bpw) in the place of the encoding, which here is no single type.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#gguf-naming-convention
    """
    name, base, finetune, version, size = (_text(header, key) for key in ("name", "basename", "finetune", "version", "size_label"))
    if base is None and name is not None and size is not None and size.lower() in name.lower():
        size = None  # the name says it already
    model = naming_convention(name or header.path.stem, base, finetune, version, size, None)
    return f"{re.sub('-+', '-', _NOT_IN_NAMES.sub('-', model)).strip('-.') or 'model'}-RQ-{short_bpw(bpw)}bpw.gguf"


def split_name(name: str, i: int, n: int) -> str:
    """Of file i, from 0, of a model in n files; also from the first one's name."""
    part = gg.SPLIT_NAME.fullmatch(name)
    return name if n == 1 else gg.split_name(part[1] if part else name.removesuffix(".gguf"), i, n)


def name_for(path: Path) -> str:
    """`published_name` of a file, or of a model in several. Raises UserError for what is no GGUF."""
    return published_name(read_headers(path)[0], model_size(path).bpw)


def short_bpw(bpw: float) -> str:
    """Two decimals at most: 4.5, 8.02."""
    return f"{bpw:.2f}".rstrip("0").rstrip(".")


def _text(header: Header, key: str) -> str | None:
    value = header.get(f"general.{key}")
    return value.strip() or None if isinstance(value, str) else None
