"""Imatrix files of llama-imatrix, in the GGUF form and in the older .dat form: statistics without measured errors.

The .dat form (llama.cpp, tools/imatrix/imatrix.cpp, save_imatrix_legacy; common/imatrix-loader.cpp), all little-endian:

    int32 entries
    entries times: int32 length, name; int32 ncall, int32 values, float32 [values]
    int32 chunks; int32 length, name of the text                                      (optional)

A matrix's values are its mean squared inputs times ncall, an expert's own mean where several experts lie in one tensor (one behind the
other), and ncall for every column of an expert that was never picked. How often an expert was picked is not in it.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.content import COUNTS, EXPERT, Content, check_matrices, unusable
from rq_gguf.calibration.data import Calibration, LayerCalibration
from rq_gguf.errors import UserError
from rq_gguf.format import GROUPS

_CHUNK = 512
"""Tokens of a chunk where the file does not say it: llama-imatrix's default."""
_ROUTER = ".ffn_gate_inp.weight"
_OF_N_EMBD = (_ROUTER, ".attn_q.weight", ".attn_qkv.weight", ".attn_k.weight")  # matrices whose inputs are the residual stream's
_MOST_ENTRIES, _LONGEST_NAME, _MOST_CHUNKS, _LARGEST = 1 << 20, 256, 1 << 24, 1e25  # beyond these a .dat is damaged


@dataclass(frozen=True)
class _Means:
    """What a file without counts says of a matrix, or of several in one tensor."""

    values: NDArray[np.float32]
    """[matrices x columns] mean squared inputs."""


def is_dat(path: Path) -> bool:
    """True for what begins like a .dat imatrix. Raises UserError for a file that cannot be read."""
    try:
        with path.open("rb") as f:
            head = f.read(8)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    if len(head) < 8 or head[:4] == b"GGUF":
        return False
    entries, length = struct.unpack("<ii", head)
    return 0 < entries < _MOST_ENTRIES and 0 < length < _LONGEST_NAME


def read_imatrix(path: Path, n_expert: int | None = None) -> Calibration:
    """An imatrix of llama-imatrix, nothing measured: see moments.measure_from_imatrix.

    n_expert: experts of a block, for files without counts; where not given, it follows from the inputs of other matrices.
    Fields that such a file does not hold are 0 or "", and `load_known` is False where it has no counts per expert.
    Raises UserError naming the file if it is of another kind, truncated or inconsistent.
    """
    if is_dat(path):
        means, n_tokens = _read_dat(path)
        return _from_means(path, means, n_tokens, n_expert)
    return imatrix_of(Content(path), n_expert)


def imatrix_of(content: Content, n_expert: int | None = None) -> Calibration:
    """`read_imatrix` for a GGUF that is in memory already."""
    sums = content.sums()
    if not any(EXPERT.fullmatch(name) for name in sums):
        raise UserError(f"{content.path} is the imatrix of a dense model: it has no experts")
    if _is_converted(content, sums):
        means = {
            name: _Means((s / np.maximum(_counts(content, name)[:, None], 1)).astype(np.float32).reshape(-1)) for name, s in sums.items()
        }
        return _from_means(content.path, means, round(max(float(_counts(content, name).max()) for name in sums)), n_expert)
    return _from_sums(content, sums)


def _counts(content: Content, name: str) -> NDArray[np.float32]:
    """[matrices] counts as stored."""
    stored = content.tensors.get(name + COUNTS)
    if stored is None or stored.dtype != np.float32 or stored.size == 0 or not (np.isfinite(stored).all() and (stored >= 0).all()):
        raise content.bad(f"tensor {name}{COUNTS} is missing or damaged")
    return stored.reshape(-1)


def _is_converted(content: Content, sums: dict[str, NDArray[np.float32]]) -> bool:
    """True for a GGUF that llama-imatrix made of a .dat: experts in one row, one count for all."""
    flat = [
        len(s) == 1 and (c := content.tensors.get(name + COUNTS)) is not None and c.size == 1
        for name, s in sums.items()
        if EXPERT.fullmatch(name)
    ]
    if any(flat) and not all(flat):
        raise content.bad("some of its expert tensors have a count per expert and some have not; make it again with llama-imatrix")
    return all(flat)


def _from_sums(content: Content, sums: dict[str, NDArray[np.float32]]) -> Calibration:
    """A GGUF with counts per expert."""
    dense_counts = {n: int(_counts(content, n).max()) for n in sums if not EXPERT.fullmatch(n) and n + COUNTS in content.tensors}
    chunks, size = (content.keys.get(f"imatrix.chunk_{what}") for what in ("count", "size"))
    # Every token passes a dense matrix once; a file without any says it in chunks.
    n_tokens = max(dense_counts.values(), default=0) or (chunks * size if isinstance(chunks, int) and isinstance(size, int) else 0)
    blocks: dict[int, dict[str, NDArray[np.float32]]] = {}
    for name, s in sums.items():
        if m := EXPERT.fullmatch(name):
            blocks.setdefault(int(m[1]), {})[m[2]] = s
    layers = []
    for i in sorted(blocks):
        selections, own = _one_count(content, i, blocks[i])
        layers.append(_layer(i, selections, _complete(own)))
    if all(not layer.selections.any() for layer in layers):
        raise content.bad("no expert was ever picked")
    # A matrix that another number of tokens passed counts as if all had.
    dense = {n: (sums[n] * np.float32(n_tokens / c) if c != n_tokens else sums[n]).reshape(-1) for n, c in dense_counts.items() if c > 0}
    busiest = max(int(layer.selections.sum()) for layer in layers)
    return _calibration(content.path, layers, n_tokens, round(busiest / n_tokens) if n_tokens else 0, dense, True)


def _one_count(
    content: Content, block: int, sums: dict[str, NDArray[np.float32]]
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]:
    """(selections [n_expert], sums that belong to them): all matrices of a block are picked together, so one count is enough.

    A matrix whose count is missing takes the others'. Where they differ, as in files put together from several, sums are scaled to the
    count of `down` or the first, which keeps each expert's mean.
    """
    counts: dict[str, NDArray[np.float64]] = {}
    for matrix, s in sums.items():
        name = f"blk.{block}.ffn_{matrix}_exps.weight{COUNTS}"
        if name not in content.tensors:
            continue
        if content.tensors[name].size != len(s):
            raise content.bad(f"{name} has no count per expert; make the imatrix again with a recent llama-imatrix")
        counts[matrix] = content.tensor(name, np.float32, (len(s), 1))[:, 0].round().astype(np.float64)
    if not counts:
        raise content.bad(f"block {block} has no counts; make the imatrix again with llama-imatrix")
    kept = counts.get("down", next(iter(counts.values())))
    scaled = {}
    for matrix, s in sums.items():
        own = counts.get(matrix, kept)
        if len(own) != len(kept) or ((own > 0) != (kept > 0)).any():
            raise content.bad(f"the matrices of block {block} were counted differently")
        same = np.array_equal(own, kept)
        scaled[matrix] = s if same else (s * (kept / np.maximum(own, 1))[:, None]).astype(np.float32)
    return kept.astype(np.int64), scaled


def _complete(sums: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """gate and up have the same input: where one is missing, it is the other's."""
    if "gate_up" not in sums and len({"gate", "up"} & sums.keys()) == 1:
        there = sums["gate"] if "gate" in sums else sums["up"]
        return {"gate": there, "up": there, **{m: s for m, s in sums.items() if m == "down"}}
    return sums


def _read_dat(path: Path) -> tuple[dict[str, _Means], int]:
    """(name -> means, tokens) of a .dat file. Tokens are chunks times the usual size of one."""
    data = path.read_bytes()
    means: dict[str, _Means] = {}
    most = 0
    try:
        (entries,) = struct.unpack_from("<i", data)
        at = 4
        for _ in range(entries):
            (length,) = struct.unpack_from("<i", data, at)
            if not 0 < length < _LONGEST_NAME:
                raise ValueError("a name is too long")
            name = data[at + 4 : at + 4 + length].decode()
            ncall, n = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            values = np.frombuffer(data, "<f4", n, at)
            at += 4 * n
            if n < 1 or not 0 <= ncall < _MOST_CHUNKS or not ((values >= 0) & (values < _LARGEST)).all():  # NaN compares as false
                raise unusable(path, f"{name} holds no values, or negative or non-finite ones")
            means[name] = _Means((values / np.float32(max(ncall, 1))).astype(np.float32))
            most = max(most, ncall)
    except (struct.error, ValueError) as e:  # a short buffer, a name that is no text
        raise UserError(f"{path} is damaged or truncated: it cannot be read as an imatrix in the .dat format") from e
    return means, most * _CHUNK


def _from_means(path: Path, means: dict[str, _Means], n_tokens: int, n_expert: int | None) -> Calibration:
    """A file without counts: all experts that were seen count alike, so `selections` are a scale and say nothing about load."""
    if any(part in name for name in means for part in (".ffn_gate.0.", ".ffn_up.0.", ".ffn_down.0.")):
        raise UserError(f"{path} was made of a GGUF that holds every expert in a tensor of its own; make it again with llama-imatrix")
    blocks: dict[int, dict[str, NDArray[np.float32]]] = {}
    for name, m in means.items():
        if found := EXPERT.fullmatch(name):
            blocks.setdefault(int(found[1]), {})[found[2]] = m.values
    if not blocks:
        raise UserError(f"{path} is the imatrix of a dense model: it has no experts")
    n_expert = n_expert or _expert_count(path, means, blocks)
    # A power of two, so that sums divided by it are the file's own means again, to the last bit.
    count = 2 ** max(0, round(np.log2(max(n_tokens, 1) / n_expert)))
    layers = []
    for i in sorted(blocks):
        rows = {}
        for matrix, values in blocks[i].items():
            if values.size % n_expert:
                raise unusable(path, f"{matrix} of block {i} has {values.size} values, which are not those of {n_expert} experts")
            rows[matrix] = values.reshape(n_expert, -1)
        seen = ~np.all([(r == 1).all(axis=1) for r in rows.values()], axis=0)
        selections = np.where(seen, count, 0).astype(np.int64)
        layers.append(_layer(i, selections, _complete({m: r * selections[:, None].astype(np.float32) for m, r in rows.items()})))
    if all(not layer.selections.any() for layer in layers):
        raise unusable(path, "no expert was ever picked")
    dense = {name: m.values * np.float32(n_tokens) for name, m in means.items() if not EXPERT.fullmatch(name)}
    return _calibration(path, layers, n_tokens, 0, dense, False)


def _expert_count(path: Path, means: dict[str, _Means], blocks: dict[int, dict[str, NDArray[np.float32]]]) -> int:
    """Experts of a block: an expert's inputs of gate and up are as many as the router's."""
    n_embd = next((m.values.size for suffix in _OF_N_EMBD for name, m in means.items() if name.endswith(suffix)), 0)
    first = next((v.size for matrices in blocks.values() for m, v in matrices.items() if m != "down"), 0)
    if not n_embd or not first or first % n_embd:
        raise UserError(f"{path} does not say how many experts a block has; give the model's GGUF too")
    return first // n_embd


def _layer(layer: int, selections: NDArray[np.int64], sums: dict[str, NDArray[np.float32]]) -> LayerCalibration:
    n = len(selections)
    return LayerCalibration(
        layer=layer,
        selections=selections,
        gate_weight=np.zeros(n),
        output_energy=np.zeros(n),
        residual_energy=0.0,
        in_sum2=sums,
        error=np.zeros((n, len(GROUPS), 0)),
        wanda=np.zeros(n),
    )


def _calibration(
    path: Path, layers: list[LayerCalibration], n_tokens: int, n_used: int, dense: dict[str, NDArray[np.float32]], load_known: bool
) -> Calibration:
    first = layers[0].in_sum2
    n_embd = next((s.shape[1] for m, s in first.items() if m != "down"), 0)
    n_ff = first["down"].shape[1] if "down" in first else 0
    for layer in layers:
        check_matrices(path, layer.layer, layer.in_sum2, n_embd, n_ff)
    return Calibration(
        model=path.stem,
        model_fingerprint="",
        arch="",
        types=(),
        n_tokens=n_tokens,
        text_sha256="",
        n_expert_used=n_used,
        n_embd=n_embd,
        n_ff=n_ff,
        merged_gate_up="gate_up" in first,
        layers=tuple(layers),
        dense_in_sum2=dense,
        load_known=load_known,
    )
