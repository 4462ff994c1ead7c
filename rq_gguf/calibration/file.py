"""Calibration files: GGUFs that are valid imatrix files for llama-quantize and hold everything else under `rq.calibration.*`.

| what | where |
|---|---|
| importance | `blk.{i}.ffn_{gate|up|down|gate_up}_exps.weight.in_sum2` [cols, n_expert], `.counts` [1, n_expert], F32: as llama-imatrix |
| other matrices | `{name}.in_sum2` [cols, 1] and `.counts` [1, 1] |
| load | `blk.{i}.rq.selections` I64, `.gate_weight`, `.output_energy`, `.wanda` F64 [n_expert], `.residual_energy` F64 [1] |
| errors | `blk.{i}.rq.error` F64 [type, group, n_expert], absent where nothing was measured |
| the rest | keys `rq.calibration.*`, one per field of data.Calibration |
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from rq_gguf.atomic import replacing
from rq_gguf.calibration.content import COUNTS, EXPERT, LARGE, SUMS, Content, check_matrices
from rq_gguf.calibration.data import Calibration, LayerCalibration, Response
from rq_gguf.calibration.imatrix_file import imatrix_of, is_dat, read_imatrix
from rq_gguf.calibration.trace import is_json, is_zip
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.types import check_type

VERSION = 2
_PREFIX = "rq.calibration."
KEY_TYPES = f"{_PREFIX}types"  # string: the measured types, with commas between
_CHUNK = 512  # what imatrix.chunk_size counts tokens in
_VECTORS = ("gate_weight", "output_energy", "wanda")


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file; it appears under its name only when complete. The same calibration gives the same bytes.

    Raises UserError where the directory cannot be written or the disk is full.
    """
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, calibration.arch)
        # An imatrix names no architecture: with one, programs would try to load it as a model.
        writer.kv_data[0].pop("general.architecture", None)
        _add_keys(writer, calibration)
        # Twice, so that no more than one tensor need be in memory: what they are, then what they hold.
        for name, shape, dtype, _ in _tensors(calibration):
            writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, dtype, data in _tensors(calibration):
            writer.write_tensor_data(np.ascontiguousarray(data(), dtype=dtype))
        writer.close()


def _add_keys(w: GGUFWriter, c: Calibration) -> None:
    w.add_string("general.type", "imatrix")
    w.add_array("imatrix.datasets", [f"text of sha256 {c.text_sha256}" if c.text_sha256 else c.model])
    w.add_uint32("imatrix.chunk_count", max(1, c.n_tokens // _CHUNK))
    w.add_uint32("imatrix.chunk_size", _CHUNK)
    w.add_uint32(f"{_PREFIX}version", VERSION)
    w.add_string(f"{_PREFIX}model", c.model)
    w.add_string(f"{_PREFIX}model_fingerprint", c.model_fingerprint)
    w.add_string(f"{_PREFIX}arch", c.arch)
    w.add_string(KEY_TYPES, ",".join(c.types))
    w.add_uint64(f"{_PREFIX}n_tokens", c.n_tokens)
    w.add_string(f"{_PREFIX}text_sha256", c.text_sha256)
    w.add_uint32(f"{_PREFIX}n_expert_used", c.n_expert_used)
    w.add_uint32(f"{_PREFIX}n_embd", c.n_embd)
    w.add_uint32(f"{_PREFIX}n_ff", c.n_ff)
    w.add_bool(f"{_PREFIX}merged_gate_up", c.merged_gate_up)
    w.add_bool(f"{_PREFIX}load_known", c.load_known)
    w.add_array(f"{_PREFIX}layers", [layer.layer for layer in c.layers])
    if c.response is not None:
        w.add_string(f"{_PREFIX}response_type", c.response.type)


def _tensors(c: Calibration) -> Iterator[tuple[str, tuple[int, ...], "np.dtype[Any]", Callable[[], NDArray[Any]]]]:
    """(name, shape, type, data), in the file's order."""

    def tensor(
        name: str, data: NDArray[Any], kind: type[np.generic]
    ) -> tuple[str, tuple[int, ...], "np.dtype[Any]", Callable[[], NDArray[Any]]]:
        return name, data.shape, np.dtype(kind), lambda: data

    for name, sums in sorted(c.dense_in_sum2.items()):
        yield tensor(name + SUMS, sums[None], np.float32)
        yield tensor(name + COUNTS, np.full((1, 1), c.n_tokens), np.float32)
    for i, layer in enumerate(c.layers):
        for matrix, sums in layer.in_sum2.items():
            name = f"blk.{layer.layer}.ffn_{matrix}_exps.weight"
            yield tensor(name + SUMS, sums, np.float32)
            yield tensor(name + COUNTS, layer.selections[:, None], np.float32)
        prefix = f"blk.{layer.layer}.rq."
        yield tensor(prefix + "selections", layer.selections, np.int64)
        for field in _VECTORS:
            yield tensor(prefix + field, getattr(layer, field), np.float64)
        yield tensor(prefix + "residual_energy", np.array([layer.residual_energy]), np.float64)
        if layer.moments is not None:
            moments, n = layer.moments, c.n_embd
            yield prefix + "input_rms", (n,), np.dtype(np.float32), partial(_rms, moments)
            yield f"blk.{layer.layer}{LARGE}", (n, n), np.dtype(np.float16), partial(_correlation, moments)
        if c.response is not None:
            yield tensor(prefix + "response_error", c.response.error[i], np.float64)
            yield tensor(prefix + "response_kld", c.response.kld[i], np.float64)
            yield tensor(prefix + "response_flips", c.response.flips[i], np.float64)
        if c.types:
            yield tensor(prefix + "error", layer.error, np.float64)


def _rms(moments: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.sqrt(np.diagonal(moments()), dtype=np.float32)


def _correlation(moments: Callable[[], NDArray[np.float32]]) -> NDArray[np.float16]:
    """Moments over the products of the inputs' root mean squares: half precision is enough for it, far below Feedback's damping."""
    found = moments()
    rms = np.sqrt(np.diagonal(found), dtype=np.float32)
    safe = np.where(rms > 0, rms, 1)
    return (found / safe[:, None] / safe).astype(np.float16)


def read_any(path: Path, n_expert: int | None = None) -> Calibration:
    """A calibration file or a plain imatrix (see imatrix_file.read_imatrix). Raises UserError naming the file for anything else."""
    if is_zip(path) or is_json(path):
        raise UserError(
            f"{path} says at most how often experts are picked (a trace, SGLang's expert distribution, a plan) and not what types do to "
            "them: rq-gguf simulate and export take it; to plan, calibrate the model (rq-gguf calibrate)"
        )
    if is_dat(path):
        return read_imatrix(path, n_expert)
    content = _Content(path)
    return _calibration(content) if f"{_PREFIX}version" in content.keys else imatrix_of(content, n_expert)


def read_calibration(path: Path) -> Calibration:
    """A file of `write_calibration`. Raises UserError naming the file if it is another, truncated, or inconsistent."""
    content = _Content(path)
    if f"{_PREFIX}version" not in content.keys:
        raise UserError(f"{path} is not a calibration of rq-gguf: it has no {_PREFIX}version")
    return _calibration(content)


class _Content(Content):
    """A GGUF with this module's keys."""

    def key(self, name: str, kind: type) -> Any:
        value = self.keys.get(_PREFIX + name)
        if not isinstance(value, kind):
            raise self.bad(f"key {_PREFIX}{name} is missing or of the wrong kind")
        return value

    def text(self, name: str) -> str:
        """A key that holds a string; the writer leaves empty ones out."""
        value = self.keys.get(_PREFIX + name, "")
        if not isinstance(value, str):
            raise self.bad(f"key {_PREFIX}{name} is of the wrong kind")
        return value

    def experts(self) -> dict[int, dict[str, NDArray[np.float32]]]:
        """block -> matrix -> [n_expert, cols] sums."""
        found: dict[int, dict[str, NDArray[np.float32]]] = {}
        for name, sums in self.sums().items():
            if m := EXPERT.fullmatch(name):
                found.setdefault(int(m[1]), {})[m[2]] = sums
        return {i: found[i] for i in sorted(found)}

    def dense(self) -> dict[str, NDArray[np.float32]]:
        """Name -> [cols] sums of the other matrices."""
        return {n: s.reshape(-1) for n, s in self.sums().items() if not EXPERT.fullmatch(n)}


def _calibration(content: _Content) -> Calibration:
    version = content.key("version", int)
    if version != VERSION:
        raise UserError(f"{content.path} has calibration version {version}, this program knows {VERSION}: calibrate again")
    types = tuple(content.text("types").split(",")) if content.text("types") else ()
    for name in types:
        check_type(name, f"the calibration {content.path}")
    n_embd, n_ff, merged = content.key("n_embd", int), content.key("n_ff", int), content.key("merged_gate_up", bool)
    experts = content.experts()
    layers = []
    for i in content.key("layers", list):
        sums = experts.get(i, {})
        check_matrices(content.path, i, sums, n_embd, n_ff)
        if ("gate_up" in sums) != merged:
            raise content.bad(f"block {i} has the other layout of gate and up than the file says")
        n = len(sums["down"])
        prefix = f"blk.{i}.rq."
        empty = np.zeros((n, len(GROUPS), 0))
        layers.append(
            LayerCalibration(
                layer=i,
                selections=content.tensor(prefix + "selections", np.int64, (n,)),
                **{field: content.tensor(prefix + field, np.float64, (n,)) for field in _VECTORS},
                residual_energy=float(content.tensor(prefix + "residual_energy", np.float64, (1,))[0]),
                in_sum2=sums,
                error=content.tensor(prefix + "error", np.float64, (n, len(GROUPS), len(types))) if types else empty,
                moments=_moments(content, i, n_embd),
            )
        )
    if not layers or len(layers) != len(experts):
        raise content.bad(f"it lists {len(layers)} blocks and holds {len(experts)}")
    return Calibration(
        model=content.text("model"),
        model_fingerprint=content.text("model_fingerprint"),
        arch=content.text("arch"),
        types=types,
        n_tokens=content.key("n_tokens", int),
        text_sha256=content.text("text_sha256"),
        n_expert_used=content.key("n_expert_used", int),
        n_embd=n_embd,
        n_ff=n_ff,
        merged_gate_up=merged,
        layers=tuple(layers),
        dense_in_sum2=content.dense(),
        response=_response(content, [layer.layer for layer in layers], types),
        load_known=bool(content.keys.get(f"{_PREFIX}load_known", True)),
    )


def _moments(content: _Content, layer: int, n_embd: int) -> Callable[[], NDArray[np.float32]] | None:
    name = f"blk.{layer}{LARGE}"
    if name not in content:
        return None
    rms = content.tensor(f"blk.{layer}.rq.input_rms", np.float32, (n_embd,))

    def read() -> NDArray[np.float32]:
        found = content.read(name)
        if found.dtype != np.float16 or found.shape != (n_embd, n_embd) or not (np.abs(found) <= 1.01).all():  # not a NaN either
            raise content.bad(f"tensor {name} holds no correlations")
        return np.asarray(found.astype(np.float32) * rms[:, None] * rms)

    read()  # what is wrong shows now
    return read


def _response(content: _Content, layers: list[int], types: tuple[str, ...]) -> Response | None:
    kind = content.text("response_type")
    if not kind:
        return None
    if kind not in types:
        raise content.bad(f"the response was measured with {kind}, which is none of its types")

    def stacked(name: str, *shape: int) -> NDArray[np.float64]:
        return np.stack([content.tensor(f"blk.{i}.rq.response_{name}", np.float64, (len(GROUPS), *shape)) for i in layers])

    return Response(kind, stacked("error"), stacked("kld"), stacked("flips", len(layers)))
