"""Biases, scales, the selection bias and merged gate_up keep working by logical id when physical experts are reordered and copied.

Tiny random models in F32. A tiered file holds the same weights in another order and with copies: its logits are the stock file's.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
from golden.llama_lib import Job, Step, prompt, run
from numpy.typing import NDArray

from rq_gguf import format as fmt
from rq_gguf import gguf_file as gg
from rq_gguf.gguf_file import Tensor

pytestmark = [pytest.mark.golden, pytest.mark.runtime]

N_EMBD, N_FF, N_EXPERT, N_USED, N_LAYER, N_VOCAB, N_HEAD, HEAD = 64, 96, 8, 3, 2, 128, 2, 32


def common_tensors(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    def weights(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {"token_embd.weight": weights(N_VOCAB, N_EMBD), "output.weight": weights(N_VOCAB, N_EMBD)}
    tensors["output_norm.weight"] = np.ones(N_EMBD, dtype=np.float32)
    for i in range(N_LAYER):
        for name in ("q", "k", "v"):
            tensors[f"blk.{i}.attn_{name}.weight"] = weights(N_HEAD * HEAD, N_EMBD)
        tensors[f"blk.{i}.attn_output.weight"] = weights(N_EMBD, N_HEAD * HEAD)
        tensors[f"blk.{i}.attn_norm.weight"] = np.ones(N_EMBD, dtype=np.float32)
        tensors[f"blk.{i}.ffn_gate_inp.weight"] = weights(N_EXPERT, N_EMBD)
        tensors[f"blk.{i}.ffn_down_exps.weight"] = weights(N_EXPERT, N_EMBD, N_FF)
        tensors[f"blk.{i}.ffn_down_exps.scale"] = rng.uniform(0.5, 2, N_EXPERT).astype(np.float32)
    return tensors


def gpt_oss(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Separate gate and up, biases by expert."""
    tensors = common_tensors(rng)
    for i in range(N_LAYER):
        for name, n in (("gate", N_FF), ("up", N_FF), ("down", N_EMBD)):
            tensors[f"blk.{i}.ffn_{name}_exps.bias"] = rng.standard_normal((N_EXPERT, n)).astype(np.float32)
        for name in ("gate", "up"):
            tensors[f"blk.{i}.ffn_{name}_exps.weight"] = (rng.standard_normal((N_EXPERT, N_FF, N_EMBD)) / 8).astype(np.float32)
        for name in ("q", "k", "v"):
            tensors[f"blk.{i}.attn_{name}.bias"] = rng.standard_normal(N_HEAD * HEAD).astype(np.float32)
        tensors[f"blk.{i}.attn_output.bias"] = rng.standard_normal(N_EMBD).astype(np.float32)
        tensors[f"blk.{i}.attn_sinks.weight"] = rng.standard_normal(N_HEAD).astype(np.float32)
        tensors[f"blk.{i}.post_attention_norm.weight"] = np.ones(N_EMBD, dtype=np.float32)
        tensors[f"blk.{i}.ffn_gate_inp.bias"] = rng.standard_normal(N_EXPERT).astype(np.float32)
    return tensors


def hy_v3(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Merged gate_up, a bias on the selection only, a shared expert."""
    tensors = common_tensors(rng)
    for i in range(N_LAYER):
        tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = (rng.standard_normal((N_EXPERT, 2 * N_FF, N_EMBD)) / 8).astype(np.float32)
        tensors[f"blk.{i}.exp_probs_b"] = rng.standard_normal(N_EXPERT).astype(np.float32)
        tensors[f"blk.{i}.ffn_norm.weight"] = np.ones(N_EMBD, dtype=np.float32)
        for name in ("q", "k"):
            tensors[f"blk.{i}.attn_{name}_norm.weight"] = np.ones(HEAD, dtype=np.float32)
        for name, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            tensors[f"blk.{i}.ffn_{name}_shexp.weight"] = (rng.standard_normal(shape) / 8).astype(np.float32)
    return tensors


NODES = ("ffn_moe_topk-0", "ffn_moe_phys-0")
MODELS = {"gpt-oss": gpt_oss, "hy_v3": hy_v3}


def write_stock(path: Path, arch: str) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(N_LAYER)
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_expert_shared_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(128)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_USED)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for name, data in MODELS[arch](np.random.default_rng(7)).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiered(stock: Path, path: Path, tiers: int) -> Path:
    """The same weights: experts shuffled over `tiers` tiers, each with as many copies as its number modulo 3."""
    header, raw, rng = gg.read_header(stock), np.fromfile(stock, dtype=np.uint8), np.random.default_rng(11)
    tensors: list[Tensor] = []
    data: list[bytes] = []
    orders = [[rng.permutation([e for e in range(N_EXPERT) for _ in range(1 + e % 3)]) for _ in fmt.GROUPS] for _ in range(N_LAYER)]
    for name, t in header.tensors.items():
        content = raw[t.offset : t.offset + t.n_bytes]
        parsed = fmt.parse_expert_name(name)
        if parsed is None:
            tensors.append(t)
            data.append(content.tobytes())
            continue
        layer, matrix, _ = parsed
        experts = content.reshape(N_EXPERT, -1)
        for tier, part in enumerate(np.array_split(orders[layer][fmt.MATRICES[matrix]], tiers)):
            tensors.append(Tensor(fmt.tier_name(layer, matrix, tier), t.type, (*t.ne[:2], len(part))))
            data.append(experts[part].tobytes())
    for layer, groups in enumerate(orders):
        table = np.full((len(fmt.GROUPS), N_EXPERT, 4), -1, dtype="<i4")
        for g, order in enumerate(groups):
            for e in range(N_EXPERT):
                places = np.flatnonzero(order == e)
                table[g, e, 0] = len(places)
                table[g, e, 1 : 1 + len(places)] = places
        tensors.append(Tensor(fmt.map_name(layer), "i32", tuple(reversed(table.shape))))
        data.append(table.tobytes())
    values = dict(header.values)
    values[fmt.KEY_FORMAT_VERSION] = gg.scalar(gguf.GGUFValueType.UINT32, fmt.FORMAT_VERSION)
    values[fmt.KEY_DISPATCH_BLOCK] = gg.scalar(gguf.GGUFValueType.UINT32, 1)
    head, placed = gg.build_header(values, tensors)
    with path.open("wb") as f:
        f.write(head)
        for t, content in zip(placed, data, strict=True):
            f.write(content.ljust(gg.pad(t.n_bytes), b"\0"))
    return path


@pytest.mark.parametrize("tiers", [1, 3])
@pytest.mark.parametrize("arch", MODELS)
def test_logits_are_the_stock_files(arch, tiers, runtime, tmp_path):
    stock = write_stock(tmp_path / "stock.gguf", arch)
    tiered = write_tiered(stock, tmp_path / "tiered.gguf", tiers)
    tokens = np.random.default_rng(3).integers(0, N_VOCAB, 40).tolist()
    steps = [prompt(tokens[:20], 0), prompt(tokens[20:], 1), Step((5,), (20,), (0,)), Step((6, 7), (21, 20), (0, 1))]
    ours, theirs = (run(Job(runtime / "libllama.so", path, steps, n_ctx=256, capture=True), tmp_path) for path in (tiered, stock))
    assert all(np.array_equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert ours.logits[0].std() > 0.01
    logical, physical = (len({int(i) for c in ours.captured for i in c[name].ravel()[: c["ffn_moe_topk-0"].size]}) for name in NODES)
    assert physical > logical  # copies did serve
