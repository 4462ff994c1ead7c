"""Checkpoints whose weights come in 8 or 4 bits: FP8 with a scale per block (DeepSeek-V3, ...) and MXFP4 (GPT-OSS), in float again.

transformers' own loaders of them need packages and devices that calibration does not. Layouts: `weight_scale_inv` beside a float8 weight,
the factor for each block of quantization_config.weight_block_size; `NAME_blocks` and `NAME_scales`, where 16 bytes and an exponent are 32
weights.
"""

from typing import Any

import torch
from torch import Tensor

from rq_gguf.errors import UserError

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_FP8_BLOCK = (128, 128)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # e2m1
KNOWN = ("fp8", "mxfp4")
"""quantization_config.quant_method of the checkpoints that can be calibrated."""


def check_quantization(config: dict[str, Any], where: str) -> None:
    """Raise UserError for a checkpoint (by its config.json) that is quantized in another way."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if settings is not None and method not in KNOWN:
        raise UserError(
            f"{where} is quantized already (quantization_config.quant_method {method} in config.json), and calibration reads "
            f"{' and '.join(KNOWN)} only: give the model it was made from, or its GGUF and a file of llama-imatrix (--imatrix)"
        )


def take_quantization(config: Any) -> tuple[int, int]:
    """Rows and columns of a block of FP8 weights; transformers' config object then says nothing of quantization any more."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return _FP8_BLOCK
    del config.quantization_config
    values = settings if isinstance(settings, dict) else settings.to_dict()
    rows, cols = values.get("weight_block_size") or _FP8_BLOCK
    return int(rows), int(cols)


def dequantized(tensors: dict[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors with float32 in the place of what was quantized; others as they are, in the same order.

    block: rows and columns that share an FP8 scale. Raises UserError where a tensor and its scales do not fit each other.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((_SCALE, _SCALES)) and _quantized(name) in tensors:
            continue
        if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in tensors:
            plain = name.removesuffix(_BLOCKS)
            made[plain] = _from_mxfp4(plain, tensor, tensors[plain + _SCALES])
        elif name + _SCALE in tensors:
            made[name] = _from_fp8(name, tensor, tensors[name + _SCALE], block)
        else:
            made[name] = tensor
    return made


def _quantized(scale: str) -> str:
    """The name of what a tensor of scales belongs to."""
    return scale.removesuffix(_SCALE) if scale.endswith(_SCALE) else scale.removesuffix(_SCALES) + _BLOCKS


def _from_fp8(name: str, weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight [..., rows, cols] of any float8, scale [..., rows / block, cols / block], or one number."""
    wide = weight.float()
    if scale.numel() == 1:
        return wide * scale.float()
    wanted = tuple(-(-n // b) for n, b in zip(weight.shape[-2:], block, strict=True))
    if tuple(scale.shape[-2:]) != wanted:
        raise UserError(f"tensor {name}{_SCALE} is {list(scale.shape)}, which does not fit {name} with {list(weight.shape)}")
    spread = scale.float().repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return wide * spread[..., : weight.shape[-2], : weight.shape[-1]]


def _from_mxfp4(name: str, blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [n_expert, rows, groups, 16] uint8, scales [n_expert, rows, groups] -> [n_expert, cols, rows], as GPT-OSS multiplies."""
    if blocks.ndim != 4 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape or blocks.dtype != torch.uint8:
        raise UserError(f"tensors {name}{_BLOCKS} and {name}{_SCALES} are {list(blocks.shape)} and {list(scales.shape)}: no MXFP4")
    values = torch.tensor(_FP4)
    pairs = torch.stack([values[(blocks & 15).int()], values[(blocks >> 4).int()]], dim=-1)  # the low half of a byte comes first
    wide = torch.ldexp(pairs.flatten(-2), (scales.int() - 127)[..., None])
    return wide.flatten(-2).transpose(1, 2).contiguous()
