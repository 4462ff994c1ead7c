"""Code that comes with a model: llama.cpp's converter lets transformers run it, and nobody asked the user. So it sees none."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rq_gguf.writing.linked import linked

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Environment in which nothing is downloaded: an `auto_map` can name the code of another model on the hub."""
_KEY = "auto_map"  # of transformers' JSON files: class -> the code that defines it


@contextmanager
def without_code(model_dir: Path) -> Iterator[Path]:
    """The model's directory where there is no code in it, or while inside a folder of the same name with links to all else."""
    stripped = {path.name: data for path in sorted(model_dir.glob("*.json")) if (data := _stripped(path)) is not None}
    code = [path.name for path in model_dir.glob("*.py")]
    if not stripped and not code:
        yield model_dir
        return
    with linked(model_dir, {name: json.dumps(data, indent=2) for name, data in stripped.items()}, code) as folder:
        yield folder


def _stripped(path: Path) -> dict[str, Any] | None:
    """A JSON object without what names code; None where there is none."""
    if path.name.endswith(".index.json"):
        return None  # large, and no place for it
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or _KEY not in data:
        return None
    return {key: value for key, value in data.items() if key != _KEY}
