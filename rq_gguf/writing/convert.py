"""A base GGUF from a Hugging Face model directory, by the pinned llama.cpp's own converter."""

import json
import re
import struct
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf.metadata import Metadata

from rq_gguf.atomic import replacing
from rq_gguf.errors import UserError
from rq_gguf.extras import need
from rq_gguf.progress import Bar
from rq_gguf.runtime.tools import run_tool, source_path
from rq_gguf.writing.dialect import adapted_directory, lacks_mtp
from rq_gguf.writing.untrusted import OFFLINE, without_code

_FULL = re.compile(r"\d+ requested and \d+ written|No space left on device|File too large|Disk quota exceeded")
"""numpy's and the system's words for a disk that takes no more, as the converter passes them on."""
_CACHED = re.compile(r"models--(.+?)--(.+)")
"""A repository's folder in the hub's cache (huggingface_hub.file_download.repo_folder_name)."""
_OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def convert_base(model_dir: Path, out: Path, *, allow_pickle: bool = False, progress: bool = True) -> None:
    """Convert a model directory to a GGUF whose weights keep the checkpoint's float type. `out` appears only when complete.

    allow_pickle: take weights in PyTorch's own format too, which can hold code. Code that comes with the model is not run.

    Raises UserError for what is no model directory, for families that llama.cpp cannot run, and with the converter's own last line
    where that fails.
    """
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir} is not a Hugging Face model directory: it has no config.json")
    weights = sorted(model_dir.glob("*.safetensors")) or sorted(model_dir.glob("pytorch_model*.bin"))
    if weights and weights[0].suffix == ".bin" and not allow_pickle:
        raise UserError(
            f"{model_dir} holds weights only as .bin files, which are Python pickles and can run code when they are read; save the model "
            "as safetensors, or give --allow-pickle if you trust where it comes from"
        )
    if not weights:
        raise UserError(f"{model_dir} holds no weights (*.safetensors or pytorch_model*.bin)")
    need("calibrate", f"converting {model_dir}")
    converter = source_path("convert_hf_to_gguf.py")
    total = sum(w.stat().st_size for w in weights)
    quiet = None if progress else True  # None: only where stderr is a terminal
    with (
        adapted_directory(model_dir) as adapted,
        without_code(adapted) as source_dir,
        replacing(out) as temporary,
        ExitStack() as files,
        Bar(desc="convert", total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=0.5, leave=False, disable=quiet) as bar,
    ):

        def show(_text: str) -> None:
            # The converter talks all the time; the file it writes says how far it is.
            bar.update(min(temporary.stat().st_size, total) - bar.n)

        # The converter fills in {ftype} and the like in the name it is given.
        outfile = temporary.with_name(temporary.name.replace("{", "{{").replace("}", "}}"))
        options: list[str | Path] = ["--outfile", outfile, "--outtype", _outtype(weights)]
        config = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
        if lacks_mtp(config, (name for w in weights if w.suffix == ".safetensors" for name in _safetensors_header(w))):
            options.append("--no-mtp")
        if described := hub_metadata(model_dir):
            metadata = Path(files.enter_context(TemporaryDirectory(prefix="rq-gguf-"))) / "metadata.json"
            metadata.write_text(json.dumps(described), encoding="utf-8")
            options += ["--metadata", metadata]
        try:
            run_tool([sys.executable, converter, source_dir, *options], env=OFFLINE, on_output=show)
        except UserError as e:
            if _FULL.search(str(e)):
                raise UserError(f"cannot write {out}: the disk is full; nothing was left behind") from e
            raise UserError(f"cannot convert {model_dir}: {e}") from e


def hub_metadata(model_dir: Path) -> dict[str, str]:
    """general.* of a model in the hub's cache, whose directory is named after a commit: what the converter would make of the model's own
    name, and where it comes from. Empty for other directories."""
    folder = model_dir.resolve()
    hub_id = _CACHED.fullmatch(folder.parent.parent.name)
    if hub_id is None or folder.parent.name != "snapshots":
        return {}
    owner, name = hub_id.groups()
    _, _, base, finetune, version, size = Metadata.get_model_id_components(f"{owner}/{name}")
    found = {
        "general.name": Metadata.id_to_title(name),
        "general.organization": Metadata.id_to_title(owner),
        "general.basename": base,
        "general.finetune": finetune,
        "general.version": version,
        "general.size_label": size,
        "general.source.repo_url": f"https://huggingface.co/{owner}/{name}",
    }
    return {key: value for key, value in found.items() if value}


def _outtype(weights: list[Path]) -> str:
    """The converter's name for the float type that most weights have; `auto` (a 16-bit type) where that is none it can keep."""
    bytes_by_type: Counter[str] = Counter()
    for path in weights:
        if path.suffix != ".safetensors":
            return "auto"
        for entry in _safetensors_header(path).values():
            start, end = entry.get("data_offsets", (0, 0))
            bytes_by_type[entry.get("dtype", "")] += end - start
    kind = bytes_by_type.most_common(1)[0][0] if bytes_by_type else ""
    return _OUTTYPES.get(kind, "auto")


def _safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets}. Format: https://huggingface.co/docs/safetensors"""
    try:
        with open(path, "rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            size = path.stat().st_size
            header = json.loads(f.read(n)) if n <= size else None
    except (OSError, struct.error, ValueError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is no complete safetensors file; get it again")
    header.pop("__metadata__", None)
    last = max((e["data_offsets"][1] for e in header.values()), default=0)
    if 8 + n + last > size:
        raise UserError(f"{path} is truncated: its data ends at byte {8 + n + last}, the file at {size}; get it again")
    return header
