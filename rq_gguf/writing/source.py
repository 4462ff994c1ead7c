"""The base model of a write: a stock GGUF (one file or split), its routed experts found, its data read on demand."""

import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.fingerprint import router_fingerprint
from rq_gguf.errors import UserError
from rq_gguf.format import KEY_FORMAT_VERSION, MATRICES, parse_expert_name
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import Header, Tensor, read_headers

EXPERT_TYPES = ("f32", "f16", "bf16", "q8_0", "mxfp4")
"""Types that experts are read from: other coarse ones would be quantized twice, and in MXFP4 some models are published."""

_BY_LOGICAL_ID = re.compile(r"blk\.\d+\.ffn_(gate_up|gate|up|down)_exps\.(bias|scale|input_scale)|blk\.\d+\.ffn_norm_exps\.weight")
_OF_EXPERTS = re.compile(r"exps|expert|tid2eid")  # in the names of tensors that hold something for each routed expert, or their ids
_FFN = re.compile(r"blk\.(\d+)\.ffn_")
_ONE_PER_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one block."""

    layer: int
    n_expert: int
    n_embd: int
    n_ff: int
    """Rows of gate and of up, columns of down."""
    matrices: tuple[str, ...]
    """Names (keys of format.MATRICES) in the file's order."""


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a base model."""

    arch: str
    layers: tuple[LayerShape, ...]
    """Blocks with routed experts only."""

    @property
    def merged_gate_up(self) -> bool:
        return any("gate_up" in layer.matrices for layer in self.layers)


class Source:
    """A base model. Reading is safe from several threads; close it, or use it in a `with`."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for files that cannot be a base: not GGUF, damaged or truncated, dense, tiered already, coarsely quantized."""
        self.path = path
        headers = read_headers(path)
        self.header = headers[0]
        self.tensors: dict[str, Tensor] = {name: t for h in headers for name, t in h.tensors.items()}
        """All tensors in file order, over the files of a split model."""
        if sum(len(h.tensors) for h in headers) != len(self.tensors):
            raise UserError(f"{path} is damaged: files of the split model hold the same tensor")
        self.experts = _find_experts(path, self.header, self.tensors)
        """Block -> matrix -> stacked tensor, ne = [columns, rows, experts]. Blocks for multi-token prediction are not among them: nothing
        is known of the load on their experts, which stay together as all other tensors do."""
        self._files = [open(h.path, "rb", buffering=0) for h in headers]  # noqa: SIM115 (close does)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for f in self._files:
            f.close()

    @cached_property
    def shape(self) -> ModelShape:
        layers = []
        for layer, matrices in self.experts.items():
            down = matrices["down"]
            layers.append(LayerShape(layer, down.ne[2], down.ne[1], down.ne[0], tuple(matrices)))
        return ModelShape(str(self.header.get("general.architecture", "")), tuple(layers))

    def is_routed(self, name: str) -> bool:
        """True for the weights of routed experts that a plan decides on."""
        parsed = parse_expert_name(name)
        return parsed is not None and parsed[0] in self.experts

    def read(self, tensor: Tensor, first_row: int = 0, n_rows: int | None = None) -> NDArray[np.uint8]:
        """Rows as stored, uint8 [n_rows, row_bytes]; rows count over all dimensions behind the first.

        Reads into memory of its own instead of mapping the file: a file that shrinks meanwhile is an error and no crash, and a
        model larger than memory leaves no resident pages behind.
        """
        n_rows = tensor.n_rows - first_row if n_rows is None else n_rows
        out = np.empty((n_rows, tensor.row_bytes), dtype=np.uint8)
        view, at, fd = out.data.cast("B"), tensor.offset + first_row * tensor.row_bytes, self._files[tensor.file].fileno()
        while view:
            n = os.preadv(fd, [view], at)
            if n == 0:
                raise UserError(f"{self.path} was truncated while it was read")
            view, at = view[n:], at + n
        return out

    def weights(self, tensor: Tensor, ggml: Ggml, first_row: int = 0, n_rows: int | None = None) -> NDArray[np.float32]:
        """Rows as float32 [n_rows, columns]."""
        return to_float32(tensor, self.read(tensor, first_row, n_rows), ggml)

    def expert(self, layer: int, matrix: str, expert: int, ggml: Ggml) -> NDArray[np.float32]:
        """One expert's weights, float32 [rows, columns]."""
        tensor = self.experts[layer][matrix]
        rows = tensor.ne[1]
        return self.weights(tensor, ggml, expert * rows, rows)

    def fingerprint(self) -> str:
        """calibration.data.Calibration.model_fingerprint of this model; "" where a block's router is missing or not exact."""
        routers = []
        for layer in self.experts:
            router = self.tensors.get(f"blk.{layer}.ffn_gate_inp.weight")
            if router is None or router.type not in ("f32", "f16", "bf16"):
                return ""
            routers.append(_exact_float32(router, self.read(router)))
        return router_fingerprint(routers)


def to_float32(tensor: Tensor, raw: NDArray[np.uint8], ggml: Ggml) -> NDArray[np.float32]:
    """Stored rows, uint8 [n, row_bytes], as float32 [n, columns]; without a copy where they are float32 already."""
    return raw.view(np.float32) if tensor.type == "f32" else ggml.dequantize(tensor.type, raw, tensor.cols)


def _exact_float32(tensor: Tensor, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    if tensor.type == "bf16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f2" if tensor.type == "f16" else "<f4").astype(np.float32)


def _find_experts(path: Path, header: Header, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    if KEY_FORMAT_VERSION in header.values:
        raise UserError(f"{path} is an rq-gguf file already; give the F16, BF16, F32 or Q8_0 GGUF that it was made from")
    experts: dict[int, dict[str, Tensor]] = {}
    first_mtp = _first_mtp_block(header)
    for name, tensor in tensors.items():
        if _ONE_PER_EXPERT.fullmatch(name):
            raise UserError(f"{path} holds every expert in a tensor of its own ({name}); convert the model again with a current llama.cpp")
        if not _OF_EXPERTS.search(name):
            continue
        parsed = parse_expert_name(name)
        if parsed is not None and parsed[2] is None:
            if parsed[0] >= first_mtp:
                continue
            if tensor.type not in EXPERT_TYPES:
                raise UserError(f"{path}: {name} is {tensor.type} already; give an F16, BF16, F32, Q8_0 or MXFP4 GGUF of the model")
            experts.setdefault(parsed[0], {})[parsed[1]] = tensor
        elif not _BY_LOGICAL_ID.fullmatch(name):
            raise _unknown(path, name)
    if not experts:
        raise UserError(f"{path} has no routed experts: it is a dense model, and there is nothing to replicate")
    for layer, matrices in experts.items():
        _check_layer(path, layer, matrices, tensors)
    for name, tensor in tensors.items():
        block = _FFN.match(name)
        if block is None or len(tensor.ne) != 3 or parse_expert_name(name) is not None or int(block[1]) not in experts:
            continue
        if tensor.ne[2] == experts[int(block[1])]["down"].ne[2]:
            raise _unknown(path, name)
    return dict(sorted(experts.items()))


def _first_mtp_block(header: Header) -> float:
    """The block behind the model's own, from which on they predict further tokens; infinity where there is none."""
    arch = header.get("general.architecture", "")
    blocks, mtp = (header.integer(f"{arch}.{key}", 0) for key in ("block_count", "nextn_predict_layers"))
    return blocks - mtp if mtp else math.inf


def _unknown(path: Path, name: str) -> UserError:
    return UserError(
        f"{path}: {name} seems to belong to routed experts in a way that rq-gguf does not know, and with their order changed or copies of "
        "them llama.cpp might take the wrong rows of it; quantize this model with llama-quantize"
    )


def _check_layer(path: Path, layer: int, matrices: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for tensor in matrices.values():
        if len(tensor.ne) != 3:
            raise UserError(f"{path}: {tensor.name} has {len(tensor.ne)} dimensions instead of 3")
    if "down" not in matrices or len(matrices) == 1 or ("gate_up" in matrices and len(matrices) > 2):
        raise UserError(
            f"{path}: block {layer} has expert tensors {', '.join(sorted(matrices))}, not gate, up and down or gate_up and down"
        )
    down = matrices["down"]
    n_ff, n_embd, n_expert = down.ne
    for matrix, tensor in matrices.items():
        rows = 2 * n_ff if matrix == "gate_up" else n_ff
        if MATRICES[matrix] == 0 and tensor.ne != (n_embd, rows, n_expert):
            raise UserError(f"{path}: {tensor.name} is {list(tensor.ne)}, which does not fit {down.name} with {list(down.ne)}")
    router = tensors.get(f"blk.{layer}.ffn_gate_inp.weight")
    if router is not None and router.n_rows != n_expert:
        raise UserError(f"{path}: {router.name} knows {router.n_rows} experts, {down.name} holds {n_expert}")
