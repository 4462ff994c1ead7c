"""The files of a transformers checkpoint: found, and checked before anything heavy is loaded. No torch."""

import json
import re
import struct
from pathlib import Path
from typing import Any

from rq_gguf.errors import UserError
from rq_gguf.extras import need

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")  # which names the licence


def resolve_model(model: Path | str) -> Path:
    """The directory of a checkpoint: `model` itself, or the local snapshot of a hub id, downloaded where needed.

    Raises UserError if there is no such directory and the hub cannot give it.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(str(model)):
        raise UserError(f"{model} is neither a directory with a transformers checkpoint nor a hub id (owner/name)")
    need("calibrate", f"downloading {model}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(_PATTERNS)))
    except RepositoryNotFoundError as e:  # gated repositories too
        raise UserError(f"the hub has no model {model} that you may read; check the name, or log in with `hf auth login`") from e
    except (LocalEntryNotFoundError, ConnectionError) as e:
        raise UserError(f"{model} is no local directory, and the hub cannot be reached to download it") from e
    except (HfHubHTTPError, OSError, ValueError) as e:
        raise UserError(f"{model} could not be downloaded from the hub: {_first_line(e)}") from e


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises UserError if it is missing or no JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{directory} has no config.json: it is not a transformers checkpoint") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {_first_line(e)}") from e
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object")
    return config


def check_weights(directory: Path) -> dict[str, Path]:
    """Tensor -> its safetensors file, each of which is there and whole. Raises UserError naming the file at fault."""
    found: dict[str, Path] = {}
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, list[str]] = {}
            for tensor, file in weight_map.items():
                files.setdefault(file, []).append(tensor)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index} cannot be read as an index of weights: {_first_line(e)}") from e
        for file, tensors in sorted(files.items()):
            held = _tensors(directory / file)
            missing = [t for t in tensors if t not in held]
            if missing:
                raise UserError(f"{directory / file} lacks tensor {missing[0]}, which {index.name} says it holds; download it again")
            found |= dict.fromkeys(tensors, directory / file)
    elif single.is_file():
        found = dict.fromkeys(_tensors(single), single)
    elif any(directory.glob("*.bin")):
        raise UserError(f"{directory} holds weights as .bin files, Python pickles that can run code; save the model as safetensors first")
    else:
        raise UserError(f"{directory} has no weights (model.safetensors or model.safetensors.index.json)")
    return found


def _tensors(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file whose header and size agree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            if n > size - 8:
                raise ValueError("it ends within its header")
            header = json.loads(f.read(n))
        header.pop("__metadata__", None)
        end = 8 + n + max((t["data_offsets"][1] for t in header.values()), default=0)
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: the checkpoint is incomplete") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise UserError(f"{path} is not a whole safetensors file ({_first_line(e)}); download it again") from e
    if size < end:
        raise UserError(f"{path} is truncated: {size} bytes of {end}; download it again")
    return set(header)


def _first_line(e: BaseException) -> str:
    lines = str(e).splitlines()
    return lines[0] if lines else type(e).__name__
