"""Calibration files: GGUFs that are valid imatrix files for llama-quantize and hold everything else under `rq.calibration.*`.

| what | where |
|---|---|
| importance | `blk.{i}.ffn_{gate|up|down|gate_up}_exps.weight.in_sum2` [cols, n_expert], `.counts` [1, n_expert], F32: as llama-imatrix |
| other matrices | `{name}.in_sum2` [cols, 1] and `.counts` [1, 1] |
| load | `blk.{i}.rq.selections` I64, `.gate_weight`, `.output_energy`, `.wanda` F64 [n_expert], `.residual_energy` F64 [1] |
| errors | `blk.{i}.rq.error` F64 [type, group, n_expert], absent where nothing was measured |
| the rest | keys `rq.calibration.*`, one per field of data.Calibration |
"""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS
from rq_gguf.writing.atomic import replacing

VERSION = 1
_PREFIX = "rq.calibration."
_CHUNK = 512  # what imatrix.chunk_size counts tokens in
_VECTORS = ("gate_weight", "output_energy", "wanda")
_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight\.in_sum2")
_SUMS, _COUNTS = ".in_sum2", ".counts"


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file; it appears under its name only when complete. The same calibration gives the same bytes.

    Raises UserError where the directory cannot be written or the disk is full.
    """
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, calibration.arch)
        # An imatrix names no architecture: with one, programs would try to load it as a model.
        writer.kv_data[0].pop("general.architecture", None)
        _add(writer, calibration)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add(w: GGUFWriter, c: Calibration) -> None:
    w.add_string("general.type", "imatrix")
    w.add_array("imatrix.datasets", [f"text of sha256 {c.text_sha256}" if c.text_sha256 else c.model])
    w.add_uint32("imatrix.chunk_count", max(1, c.n_tokens // _CHUNK))
    w.add_uint32("imatrix.chunk_size", _CHUNK)
    w.add_uint32(f"{_PREFIX}version", VERSION)
    w.add_string(f"{_PREFIX}model", c.model)
    w.add_string(f"{_PREFIX}model_fingerprint", c.model_fingerprint)
    w.add_string(f"{_PREFIX}arch", c.arch)
    w.add_string(f"{_PREFIX}types", ",".join(c.types))
    w.add_uint64(f"{_PREFIX}n_tokens", c.n_tokens)
    w.add_string(f"{_PREFIX}text_sha256", c.text_sha256)
    w.add_uint32(f"{_PREFIX}n_expert_used", c.n_expert_used)
    w.add_uint32(f"{_PREFIX}n_embd", c.n_embd)
    w.add_uint32(f"{_PREFIX}n_ff", c.n_ff)
    w.add_bool(f"{_PREFIX}merged_gate_up", c.merged_gate_up)
    w.add_array(f"{_PREFIX}layers", [layer.layer for layer in c.layers])
    for name, sums in sorted(c.dense_in_sum2.items()):
        w.add_tensor(name + _SUMS, np.ascontiguousarray(sums[None], dtype=np.float32))
        w.add_tensor(name + _COUNTS, np.full((1, 1), c.n_tokens, dtype=np.float32))
    for layer in c.layers:
        counts = layer.selections.astype(np.float32)[:, None]
        for matrix, sums in layer.in_sum2.items():
            name = f"blk.{layer.layer}.ffn_{matrix}_exps.weight"
            w.add_tensor(name + _SUMS, np.ascontiguousarray(sums, dtype=np.float32))
            w.add_tensor(name + _COUNTS, counts)
        prefix = f"blk.{layer.layer}.rq."
        w.add_tensor(prefix + "selections", layer.selections.astype(np.int64))
        for field in _VECTORS:
            w.add_tensor(prefix + field, np.asarray(getattr(layer, field), dtype=np.float64))
        w.add_tensor(prefix + "residual_energy", np.array([layer.residual_energy], dtype=np.float64))
        if c.types:
            w.add_tensor(prefix + "error", np.ascontiguousarray(layer.error, dtype=np.float64))


def read_any(path: Path) -> Calibration:
    """A calibration file or a plain imatrix of llama-imatrix. Raises UserError naming the file for anything else."""
    content = _Content(path)
    return _calibration(content) if f"{_PREFIX}version" in content.keys else _imatrix(content)


def read_calibration(path: Path) -> Calibration:
    """A file of `write_calibration`. Raises UserError naming the file if it is another, truncated, or inconsistent."""
    content = _Content(path)
    if f"{_PREFIX}version" not in content.keys:
        raise UserError(f"{path} is not a calibration of rq-gguf: it has no {_PREFIX}version")
    return _calibration(content)


def read_imatrix(path: Path) -> Calibration:
    """A GGUF imatrix of llama-imatrix, nothing measured: see moments.measure_from_imatrix.

    Fields that such a file does not hold are 0 or "". Raises UserError naming the file if it is of another kind, truncated,
    inconsistent, or without per-expert counts.
    """
    return _imatrix(_Content(path))


class _Content:
    """Keys and tensors of a GGUF, in memory, whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as f:
                head = f.read(8)
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror}") from e
        if head[:4] != b"GGUF":
            if len(head) == 8 and 0 < struct.unpack("<ii", head)[0] < 1 << 20 and 0 < struct.unpack("<ii", head)[1] < 256:
                raise UserError(
                    f"{path} is an imatrix in the old .dat format, which does not say how often each expert was picked (converting it "
                    "does not help): make it again with llama-imatrix, whose output is GGUF by default"
                )
            raise UserError(f"{path} is neither a calibration file nor an imatrix: it is not a GGUF")
        try:
            reader = GGUFReader(path)
            self.keys: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
            self.tensors: dict[str, NDArray[Any]] = {t.name: np.array(t.data) for t in reader.tensors}
        except Exception as e:  # the reader stumbles over damaged files in any way that numpy and Python have
            raise UserError(f"{path} is damaged or truncated: it cannot be read as a GGUF") from e
        kind = self.keys.get("general.type")
        if kind != "imatrix":
            raise UserError(f"{path} is a GGUF of type '{kind}', not a calibration or imatrix")

    def bad(self, why: str) -> UserError:
        return UserError(f"{self.path} is not a usable calibration: {why}")

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

    def tensor(self, name: str, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
        """A tensor of finite, non-negative numbers. A -1 in `shape` stands for any size."""
        t = self.tensors.get(name)
        if t is None:
            raise self.bad(f"tensor {name} is missing")
        if t.dtype != dtype or t.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, t.shape, strict=True)):
            raise self.bad(f"tensor {name} is {t.dtype} {list(t.shape)}, expected {np.dtype(dtype)} {list(shape)}")
        if not np.isfinite(t).all() or (t < 0).any():
            raise self.bad(f"tensor {name} holds negative or non-finite values")
        return t

    def experts(self) -> dict[int, dict[str, NDArray[np.float32]]]:
        """block -> matrix -> [n_expert, cols] sums."""
        found: dict[int, dict[str, NDArray[np.float32]]] = {}
        for name in self.tensors:
            m = _EXPERT.fullmatch(name)
            if m:
                found.setdefault(int(m[1]), {})[m[2]] = self.tensor(name, np.float32, (-1, -1))
        return {i: found[i] for i in sorted(found)}

    def dense(self) -> dict[str, NDArray[np.float32]]:
        """Name -> [cols] sums of the other matrices."""
        names = (n.removesuffix(_SUMS) for n in self.tensors if n.endswith(_SUMS) and not _EXPERT.fullmatch(n))
        return {n: self.tensor(n + _SUMS, np.float32, (1, -1))[0] for n in names if self.tensors[n + _SUMS].shape[:-1] == (1,)}


def _matrices(content: _Content, layer: int, sums: dict[str, NDArray[np.float32]], n_embd: int, n_ff: int) -> None:
    """Check that a block has one layout of matrices and that they fit the model."""
    if set(sums) not in ({"gate", "up", "down"}, {"gate_up", "down"}):
        raise content.bad(f"block {layer} has sums for {', '.join(sorted(sums))}, expected gate, up, down or gate_up, down")
    n_expert = len(sums["down"])
    for matrix, s in sums.items():
        if s.shape != (n_expert, n_ff if matrix == "down" else n_embd):
            raise content.bad(f"sums of {matrix} in block {layer} have shape {list(s.shape)}")


def _calibration(content: _Content) -> Calibration:
    version = content.key("version", int)
    if version != VERSION:
        raise UserError(f"{content.path} has calibration version {version}, this program knows {VERSION}: calibrate again")
    types = tuple(content.text("types").split(",")) if content.text("types") else ()
    n_embd, n_ff, merged = content.key("n_embd", int), content.key("n_ff", int), content.key("merged_gate_up", bool)
    experts = content.experts()
    layers = []
    for i in content.key("layers", list):
        sums = experts.get(i, {})
        _matrices(content, i, sums, n_embd, n_ff)
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
    )


def _imatrix(content: _Content) -> Calibration:
    experts = content.experts()
    if not experts:
        raise UserError(f"{content.path} is the imatrix of a dense model: it has no experts")
    first = next(iter(experts.values()))
    n_embd = next((s.shape[1] for m, s in first.items() if m != "down"), 0)
    n_ff = first["down"].shape[1] if "down" in first else 0
    dense = content.dense()
    # Every token passes a dense matrix once; a file without any says it in chunks.
    passed = [int(content.tensors[n + _COUNTS].max()) for n in dense if n + _COUNTS in content.tensors]
    chunks = content.keys.get("imatrix.chunk_count", 0) * content.keys.get("imatrix.chunk_size", 0)
    n_tokens = max(passed, default=0) or int(chunks)

    layers = []
    for i, sums in experts.items():
        _matrices(content, i, sums, n_embd, n_ff)
        n = len(sums["down"])
        counts = []
        for matrix in sums:
            name = f"blk.{i}.ffn_{matrix}_exps.weight{_COUNTS}"
            if name in content.tensors and content.tensors[name].size != n:
                raise content.bad(f"{name} has no count per expert; make the imatrix again with a recent llama-imatrix")
            counts.append(content.tensor(name, np.float32, (n, 1)))
        if any(not np.array_equal(c, counts[0]) for c in counts):
            raise content.bad(f"the matrices of block {i} were counted differently")
        selections = counts[0][:, 0].round().astype(np.int64)
        layers.append(
            LayerCalibration(
                layer=i,
                selections=selections,
                gate_weight=np.zeros(n),
                output_energy=np.zeros(n),
                residual_energy=0.0,
                in_sum2=sums,
                error=np.zeros((n, len(GROUPS), 0)),
                wanda=np.zeros(n),
            )
        )
    busiest = max(int(layer.selections.sum()) for layer in layers)
    if busiest == 0:
        raise content.bad("no expert was ever picked")
    return Calibration(
        model=content.path.stem,
        model_fingerprint="",
        arch="",
        types=(),
        n_tokens=n_tokens,
        text_sha256="",
        n_expert_used=round(busiest / n_tokens) if n_tokens else 0,
        n_embd=n_embd,
        n_ff=n_ff,
        merged_gate_up="gate_up" in first,
        layers=tuple(layers),
        dense_in_sum2=dense,
    )
