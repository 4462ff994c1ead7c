"""Small base models, calibrations and plans for the tests of writing."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import Calibration
from rq_gguf.planning.plan import LayerPlan, Plan
from rq_gguf.writing.source import Source

STORED = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q6_k": gguf.GGMLQuantizationType.Q6_K,
    "mxfp4": gguf.GGMLQuantizationType.MXFP4,
}


def base_model(
    path: Path,
    *,
    layers: tuple[int, ...] = (0, 1),
    n_expert: int = 4,
    n_embd: int = 256,
    n_ff: int = 256,
    stored: str = "bf16",
    merged: bool = False,
    bias: bool = False,
    dense_block: bool = False,
    extra: dict[str, NDArray[np.float32]] | None = None,
    values: dict[str, int] | None = None,
    change: dict[str, NDArray[np.float32] | None] | None = None,
    seed: int = 0,
    split_max_tensors: int = 0,
    alignment: int | None = None,
) -> Path:
    """A GGUF of llama's architecture with random weights, small enough for a test and known to llama-quantize.

    layers: blocks with experts. dense_block: one more block in front, without. extra: further tensors. values: further uint32 values.
    change: tensors to be replaced, or left out where None.
    """
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    tensors: dict[str, NDArray[np.float32]] = {"token_embd.weight": weights(64, n_embd), "output_norm.weight": weights(n_embd)}
    if dense_block:
        tensors["blk.0.ffn_up.weight"] = weights(n_ff, n_embd)
    for i in layers:
        tensors[f"blk.{i}.attn_norm.weight"] = weights(n_embd)
        tensors[f"blk.{i}.attn_q.weight"] = weights(n_embd, n_embd)
        tensors[f"blk.{i}.ffn_gate_inp.weight"] = weights(n_expert, n_embd)
        if merged:
            tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = weights(n_expert, 2 * n_ff, n_embd)
        else:
            tensors[f"blk.{i}.ffn_gate_exps.weight"] = weights(n_expert, n_ff, n_embd)
        tensors[f"blk.{i}.ffn_down_exps.weight"] = weights(n_expert, n_embd, n_ff)
        if not merged:
            tensors[f"blk.{i}.ffn_up_exps.weight"] = weights(n_expert, n_ff, n_embd)
        if bias:
            tensors[f"blk.{i}.ffn_down_exps.bias"] = weights(n_expert, n_embd)
    tensors |= extra or {}
    for name, data in (change or {}).items():
        if data is None:
            del tensors[name]
        else:
            tensors[name] = data

    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("Sample")
    writer.add_size_label("4x1M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(max(layers, default=0) + 1)
    writer.add_context_length(128)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(n_expert)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(64)
    writer.add_token_list([f"token {i}" for i in range(64)])
    writer.add_string("quantize.imatrix.file", "of an earlier life")
    for key, value in (values or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name, data in tensors.items():
        matrix = data.ndim > 1 and "ffn_gate_inp" not in name and name.endswith(".weight")
        kind = STORED[stored] if matrix else STORED["f32"]
        if kind in (STORED["f32"], STORED["f16"]):
            writer.add_tensor(name, data.astype(np.float16 if kind == STORED["f16"] else np.float32))
        elif kind == STORED["q6_k"]:
            rows = np.zeros((*data.shape[:-1], data.shape[-1] // 256 * 210), dtype=np.uint8)
            writer.add_tensor(name, rows, raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def calibration_of(source: Source, seed: int = 0) -> Calibration:
    """A calibration that fits a base model; every expert was hit."""
    shape = source.shape.layers[0]
    made = synthetic_calibration(
        len(source.shape.layers),
        shape.n_expert,
        n_embd=shape.n_embd,
        n_ff=shape.n_ff,
        merged_gate_up=source.shape.merged_gate_up,
        seed=seed,
    )
    layers = tuple(
        replace(c, layer=s.layer, selections=np.maximum(c.selections, 1)) for c, s in zip(made.layers, source.shape.layers, strict=True)
    )
    return replace(made, layers=layers, model_fingerprint=source.fingerprint())


def plan_of(layers: tuple[LayerPlan, ...], budget_bytes: int = 1 << 40) -> Plan:
    return Plan(
        policy="budget",
        budget="q8_0",
        budget_bytes=budget_bytes,
        expert_bytes=0,
        types=("q4_k", "q8_0"),
        layers=layers,
        calibration_sha256="c" * 64,
        calibration_tokens=4096,
        model="Sample",
    )


def uniform_plan(source: Source, type_name: str) -> Plan:
    """One type, no copies."""
    rows = [((type_name,),) * s.n_expert for s in source.shape.layers]
    return plan_of(tuple(LayerPlan(s.layer, r, r) for s, r in zip(source.shape.layers, rows, strict=True)))


def random_plan(source: Source, rng: np.random.Generator, types: tuple[str, ...], most_copies: int) -> Plan:
    """Up to `most_copies` copies in every layer, a type drawn from `types` for every instance and group."""
    layers = []
    for s in source.shape.layers:
        copies = np.bincount(rng.integers(0, s.n_expert, rng.integers(0, most_copies + 1)), minlength=s.n_expert)
        groups = [tuple(tuple(rng.choice(types, 1 + n).tolist()) for n in copies.tolist()) for _ in range(2)]
        layers.append(LayerPlan(s.layer, groups[0], groups[1]))
    return plan_of(tuple(layers))
