"""Calibrations, and the same statistics as llama-imatrix writes them."""

import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import Calibration


def equal(a: Any, b: Any) -> bool:
    """Deep equality of dataclasses that hold arrays."""
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


def sample(**changes: Any) -> Calibration:
    dense = {"blk.0.attn_q.weight": np.arange(1, 257, dtype=np.float32)}
    return replace(synthetic_calibration(**changes), dense_in_sum2=dense)


def as_llama_imatrix(path: Path, c: Calibration, *, dense: bool = True, drop: tuple[str, ...] = (), factor: int = 1) -> None:
    """The GGUF form. drop: endings of tensors to leave out. factor: what `down` is counted times."""
    w = gguf.GGUFWriter(path, "x")
    w.kv_data[0].pop("general.architecture")
    w.add_string("general.type", "imatrix")
    w.add_array("imatrix.datasets", ["calibration.txt"])
    w.add_uint32("imatrix.chunk_count", c.n_tokens // 512)
    w.add_uint32("imatrix.chunk_size", 512)
    tensors = {}
    for layer in c.layers:
        for m, sums in layer.in_sum2.items():
            times = factor if m == "down" else 1
            name = f"blk.{layer.layer}.ffn_{m}_exps.weight"
            tensors[name + ".in_sum2"] = times * sums
            tensors[name + ".counts"] = times * layer.selections.astype(np.float32)[:, None]
    for name, sums in c.dense_in_sum2.items() if dense else ():
        tensors[name + ".in_sum2"] = sums  # llama-imatrix leaves out dimensions of 1
        tensors[name + ".counts"] = np.full(1, c.n_tokens, dtype=np.float32)
    for name, t in tensors.items():
        if not name.endswith(drop):
            w.add_tensor(name, t)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def as_dat(path: Path, c: Calibration, ncall: int = 8) -> None:
    """The .dat form."""
    entries = {}
    for layer in c.layers:
        n = layer.selections.astype(np.float32)[:, None]
        for m, sums in layer.in_sum2.items():
            entries[f"blk.{layer.layer}.ffn_{m}_exps.weight"] = np.where(n > 0, sums / np.maximum(n, 1), 1) * np.float32(ncall)
    for name, sums in c.dense_in_sum2.items():
        entries[name] = sums / np.float32(c.n_tokens) * np.float32(ncall)
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", ncall, values.size) + values.astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", ncall, 3) + b"txt")


def small_model(path: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A GGUF that llama-quantize takes as a mixture-of-experts model; returns its expert tensors [n_expert, rows, cols]."""
    w = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (w.add_context_length, 128), (w.add_embedding_length, 256), (w.add_block_count, 1), (w.add_feed_forward_length, 512),
        (w.add_head_count, 4), (w.add_layer_norm_rms_eps, 1e-5), (w.add_expert_count, 4), (w.add_expert_used_count, 2),
        (w.add_vocab_size, 32), (w.add_rope_dimension_count, 64), (w.add_file_type, 0),
    ):  # fmt: skip
        add(value)  # type: ignore[operator]
    shapes = {"gate": (4, 512, 256), "up": (4, 512, 256), "down": (4, 256, 512)}
    tensors = {f"blk.0.ffn_{m}_exps.weight": rng.standard_normal(s).astype(np.float32) for m, s in shapes.items()}
    for name, t in tensors.items():
        w.add_tensor(name, t)
    w.add_tensor("token_embd.weight", rng.standard_normal((32, 256)).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tensors
