"""What llama.cpp's converter reads in a config.json, where transformers 5 writes it otherwise or leaves it out, and what it cannot convert.

Published checkpoints come with the config.json of their makers, which the converter was written for. The same model saved again by
transformers 5, after fine-tuning say, has other spellings, and lacks what transformers takes for granted.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rq_gguf.errors import UserError
from rq_gguf.writing.linked import linked

_ARCHITECTURES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
_LAYER_TYPES = {"granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba"}}
"""model_type -> transformers' name of a layer's kind -> the converter's."""
_SIGMOID = ("deepseek_v3", "dots1", "glm4_moe", "glm4_moe_lite", "minimax_m2")
"""Families that route by sigmoid, which config.json says in `scoring_func`: without it llama.cpp takes softmax, and computes nonsense."""
_ALWAYS_MTP, _COUNTED_MTP = ("qwen3_next", "qwen3_5"), ("glm4_moe",)
"""Begin the names of families for which the converter wants heads for further tokens: always, or where config.json counts some."""
_MTP = re.compile(r"(?:^|\.)mtp\b|(?:^|\.)mtp_|(?:^|\.)layers\.(\d+)\.")


def check_convertible(config: dict[str, Any], where: str) -> None:
    """Raise UserError for the families that calibration knows and llama.cpp cannot run."""
    if config.get("model_type") == "llama_moe":
        raise UserError(
            f"{where} is a LLaMA-MoE, whose routers are networks of two layers with tanh between: llama.cpp's llama architecture has one "
            "matrix there, so there can be no GGUF file of it. `rq-gguf calibrate` and `rq-gguf plan` work on it"
        )
    if config.get("model_type") == "switch_transformers":
        raise UserError(
            f"{where} is a Switch Transformer, and llama.cpp has no graph for an encoder and a decoder with experts: there can be no GGUF "
            "file of it. `rq-gguf calibrate` and `rq-gguf plan` work on it"
        )


def adapted(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as the converter expects it; the same object where nothing is to be changed."""
    changes: dict[str, Any] = {}
    names = config.get("architectures")
    if isinstance(names, list) and any(name in _ARCHITECTURES for name in names):
        changes["architectures"] = [_ARCHITECTURES.get(name, name) for name in names]
    model_type = config.get("model_type")
    kinds, spelled = config.get("layer_types"), _LAYER_TYPES.get(str(model_type), {})
    if isinstance(kinds, list) and any(kind in spelled for kind in kinds):
        changes["layer_types"] = [spelled.get(kind, kind) for kind in kinds]
    if model_type in _SIGMOID and "scoring_func" not in config:
        changes["scoring_func"] = "sigmoid"
    return {**config, **changes} if changes else config


@contextmanager
def adapted_directory(model_dir: Path) -> Iterator[Path]:
    """The model's directory, or while inside a folder of the same name with links to its files and an adapted config.json."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {str(e).splitlines()[0]}") from e
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object")
    check_convertible(config, str(model_dir))
    wanted = adapted(config)
    if wanted is config:
        yield model_dir
        return
    with linked(model_dir, {"config.json": json.dumps(wanted, indent=2)}) as folder:
        yield folder


def lacks_mtp(config: dict[str, Any], tensors: Iterator[str]) -> bool:
    """True where the model has heads for multi-token prediction and the checkpoint does not: transformers drops them when it saves.

    tensors: names in the checkpoint.
    """
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        return False
    kind, n_layers = str(text.get("model_type")), text.get("num_hidden_layers")
    expected = kind.startswith(_ALWAYS_MTP) or (kind.startswith(_COUNTED_MTP) and text.get("num_nextn_predict_layers"))
    if not expected or not isinstance(n_layers, int):
        return False
    found = (_MTP.search(name) for name in tensors)
    return not any(m and (m[1] is None or int(m[1]) >= n_layers) for m in found)
