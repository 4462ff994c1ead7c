"""Tiered files: what a valid one says, and why each broken one is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from numpy.typing import NDArray
from writing.samples import base_model

from rq_gguf import format as fmt
from rq_gguf import gguf_file as gg
from rq_gguf.errors import UserError
from rq_gguf.gguf_file import Tensor, Value
from rq_gguf.writing.inspect import describe, inspect, to_json
from rq_gguf.writing.tiered import open_tiered

Tensors = dict[str, tuple[str, tuple[int, ...]]]

# Expert 0 has its primary in Q8_0 and a copy in Q4_K, experts 1 and 2 are Q4_K; the same in both groups.
TYPES = (("q8_0", "q4_k"), ("q4_k",), ("q4_k",))
LAYOUT = fmt.layout_group(TYPES, ("q8_0", "q4_k"))
TABLE = fmt.build_map((LAYOUT, LAYOUT), 3)


def tiered(
    path: Path,
    *,
    tensors: Callable[[Tensors], None] = lambda t: None,
    values: Callable[[dict[str, Value]], None] = lambda v: None,
    table: NDArray[np.int32] | None = TABLE,
) -> Path:
    """A file of one block with 3 experts of [256, 256] matrices, changed as asked; its data is zero but for the map."""
    entries: Tensors = {"blk.0.ffn_gate_inp.weight": ("f32", (256, 3))}
    if table is not None:
        entries["blk.0.ffn_log2phy"] = ("i32", tuple(reversed(table.shape)))
    for matrix in ("gate", "up", "down"):
        entries[fmt.tier_name(0, matrix, 0)] = ("q8_0", (256, 256, 1))
        entries[fmt.tier_name(0, matrix, 1)] = ("q4_k", (256, 256, 3))
    tensors(entries)
    header_values = {
        "general.architecture": gg.string("llama"),
        "llama.expert_count": gg.scalar(GGUFValueType.UINT32, 3),
        fmt.KEY_FORMAT_VERSION: gg.scalar(GGUFValueType.UINT32, 1),
        fmt.KEY_BUDGET_BYTES: gg.scalar(GGUFValueType.UINT64, 1 << 20),
        fmt.KEY_POLICY: gg.string("budget"),
        fmt.KEY_LOAD.format(layer=0): gg.numbers(GGUFValueType.FLOAT32, [0.5, 0.3, 0.2]),
    }
    values(header_values)
    header, placed = gg.build_header(header_values, [Tensor(n, t, ne) for n, (t, ne) in entries.items()])
    data = bytearray(header + bytes(sum(gg.pad(t.n_bytes, 32) for t in placed)))
    for t in placed:
        if t.type == "i32" and table is not None:
            data[t.offset : t.offset + table.nbytes] = table.astype("<i4").tobytes()
    path.write_bytes(data)
    return path


def test_valid_file(tmp_path):
    found = inspect(tiered(tmp_path / "x.gguf"))
    # Bytes of a [256, 256] matrix: 256 rows of 272 (Q8_0) or 144 (Q4_K). The map: 2 groups x 3 experts x 3 numbers x 4, padded.
    experts = 3 * (256 * 272 + 3 * 256 * 144) + 96
    assert found.expert_bytes == experts
    assert found.bytes_by_type == {"q8_0": 3 * 256 * 272, "q4_k": 9 * 256 * 144}
    assert found.expert_bpw == pytest.approx(8 * experts / (9 * 65536))
    (layer,) = found.layers
    assert layer.copies == (1, 0, 0)
    assert layer.tiers == {"gate_up": (("q8_0", 1), ("q4_k", 3)), "down": (("q8_0", 1), ("q4_k", 3))}
    # LIS: 3 x 0.5 over a total of 1; with the copy, the busiest instance is expert 1's at 0.3.
    assert layer.lis_before == pytest.approx(1.5)
    assert layer.lis_after == pytest.approx(0.9)
    assert found.provenance == {"rq.format_version": 1, "rq.budget_bytes": 1 << 20, "rq.policy": "budget"}
    assert (found.dispatch, found.dispatch_block) == ("balanced", 16)
    text = describe(found)
    assert (
        "1 q8_0 + 3 q4_k" in text
        and "LIS 1.50 -> 0.90" in text
        and "52.22 % used" in text.replace(f"{100 * experts / (1 << 20):.2f}", "52.22")
    )
    plain = to_json(found)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["layers"][0]["tiers"]["down"] == [{"type": "q8_0", "experts": 1}, {"type": "q4_k", "experts": 3}]


def test_locate(tmp_path):
    (layer,) = open_tiered(tiered(tmp_path / "x.gguf")).layers
    places = [[(t.name, i) for t, i in [layer.locate("up", e, c)]][0] for e, c in ((0, 0), (0, 1), (1, 0), (2, 0))]
    # Tier 1 holds primaries first: experts 1 and 2, then expert 0's copy.
    assert places == [("blk.0.ffn_up_exps.0.weight", 0), ("blk.0.ffn_up_exps.1.weight", 2)] + [
        ("blk.0.ffn_up_exps.1.weight", i) for i in (0, 1)
    ]
    for expert, copy in ((1, 1), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            layer.locate("up", expert, copy)


def one_tier(entries: Tensors) -> None:
    for matrix in ("gate", "up", "down"):
        del entries[fmt.tier_name(0, matrix, 0)], entries[fmt.tier_name(0, matrix, 1)]
        entries[fmt.tier_name(0, matrix, 0)] = ("q4_k", (256, 256, 3))


def test_no_map_where_none_is_needed(tmp_path):
    (layer,) = open_tiered(tiered(tmp_path / "x.gguf", tensors=one_tier, table=None)).layers
    assert layer.table is None and layer.copies.tolist() == [0, 0, 0]
    assert layer.locate("down", 2)[1] == 2
    with pytest.raises(IndexError):
        layer.locate("down", 0, 1)


def test_stock_file(tmp_path):
    path = base_model(tmp_path / "base.gguf")
    with pytest.raises(UserError, match=r"base.gguf holds no rq.format_version; it is a stock file"):
        inspect(path)


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda t: t.pop(name) and None


def put(name: str, kind: str, *ne: int) -> Callable[[Tensors], None]:
    return lambda t: t.update({name: (kind, ne)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("blk.0.ffn_up_exps.0.weight"), "up has tier 1 and no tier 0"),
        (drop("blk.0.ffn_down_exps.1.weight"), "points to physical expert 3 of 1|points to physical expert 1 of 1"),
        (put("blk.0.ffn_up_exps.7.weight", "q4_k", 256, 256, 1), "up has tier 7 and no tier 2"),
        (put("blk.0.ffn_up_exps.weight", "q4_k", 256, 256, 1), "up has a tensor without a tier number beside tiers"),
        (put("blk.0.ffn_up_exps.1.weight", "q4_k", 256, 512, 3), r"up_exps.1.weight is \[256, 512, 3\], unlike"),
        (put("blk.0.ffn_up_exps.1.weight", "q4_k", 256, 768), r"up_exps.1.weight is \[256, 768\], unlike"),
        (put("blk.0.ffn_up_exps.1.weight", "q5_k", 256, 256, 3), "tiers of gate and up differ"),
        (put("blk.0.ffn_gate_exps.1.weight", "q4_k", 256, 256, 4), "tiers of gate and up differ"),
        (put("blk.0.ffn_gate_up_exps.0.weight", "q4_k", 256, 512, 4), "has tiers of down, gate, gate_up, up"),
        (put("blk.0.ffn_gate_inp.weight", "f32", 256, 4), "block 0 has 4 by blk.0.ffn_gate_inp.weight, 3 by llama.expert_count"),
        (put("blk.0.ffn_log2phy", "f32", 3, 3, 2), "blk.0.ffn_log2phy is f32, not i32"),
        (put("blk.0.ffn_log2phy", "i32", 9, 2), "blk.0.ffn_log2phy has 2 dimensions"),
        (put("blk.7.ffn_log2phy", "i32", 3, 3, 2), "block 7 has a map and no tiers"),
        (drop("blk.0.ffn_log2phy"), "block 0 has several tiers or copies and no map blk.0.ffn_log2phy"),
        (lambda t: [t.pop(fmt.tier_name(0, "down", i)) for i in (0, 1)], "has tiers of gate, up, not"),
        (lambda t: [t.pop(fmt.tier_name(0, m, i)) for m in ("gate", "up", "down") for i in (0, 1)], "no tier tensors|a map and no tiers"),
        (lambda t: [t.update({fmt.tier_name(0, "down", i): ("q4_k", (256, 256, 1))}) for i in range(8)], "down has 8 tiers; at most 7"),
        (
            lambda t: [t.update({fmt.tier_name(0, "down", i): (k, (512, 256, n))}) for i, k, n in ((0, "q8_0", 1), (1, "q4_k", 3))],
            "does not fit down",
        ),
    ],
)
def test_broken_tensors(tmp_path, change, match):
    with pytest.raises(UserError, match=match) as e:
        inspect(tiered(tmp_path / "x.gguf", tensors=change))
    assert "x.gguf" in str(e.value)


@pytest.mark.parametrize(
    ("place", "number", "match"),
    [
        ((0, 1, 1), 4, "block 0: logical expert 1 of gate_up points to physical expert 4 of 4"),
        ((1, 1, 1), -1, "block 0: logical expert 1 of down points to physical expert -1 of 4"),
        ((0, 0, 0), 0, "logical expert 0 of gate_up has no primary"),
        ((1, 2, 0), 2, "logical expert 2 has 1 instances in gate_up and 2 in down"),
        ((0, 2, 1), 0, "physical expert 0 of gate_up is mapped twice"),
        ((0, 2, 2), 1, "has entries behind its last instance"),
        ((0, 0, 0), 9, "claims 9 instances in 2 slots"),
    ],
)
def test_broken_maps(tmp_path, place, number, match):
    table = TABLE.copy()
    table[place] = number
    with pytest.raises(UserError, match=match):
        inspect(tiered(tmp_path / "x.gguf", table=table))


def test_broken_values(tmp_path):
    def refused(match: str, key: str, value: Value) -> None:
        with pytest.raises(UserError, match=match):
            inspect(tiered(tmp_path / "x.gguf", values=lambda v: v.update({key: value})))

    refused("rq.format_version 2; this rq-gguf reads 1", fmt.KEY_FORMAT_VERSION, gg.scalar(GGUFValueType.UINT32, 2))
    refused("rq.format_version is of GGUF's type 8, not a uint32", fmt.KEY_FORMAT_VERSION, gg.string("one"))
    refused("rq.format_version is of GGUF's type 7", fmt.KEY_FORMAT_VERSION, gg.scalar(GGUFValueType.BOOL, True))
    for block in (0, 1 << 31):
        refused(f"rq.dispatch_block is {block}; it must be 1 or more", fmt.KEY_DISPATCH_BLOCK, gg.scalar(GGUFValueType.UINT32, block))
    refused("rq.dispatch is 'random'", fmt.KEY_DISPATCH, gg.string("random"))
    refused("part of a model in 3 files, whose names must end in -00001-of-00003.gguf", "split.count", gg.scalar(GGUFValueType.UINT16, 3))
    refused("rq.dispatch is", fmt.KEY_DISPATCH, gg.numbers(GGUFValueType.UINT32, [1, 2]))
    refused("rq.format_version", fmt.KEY_FORMAT_VERSION, gg.numbers(GGUFValueType.UINT32, [1, 2]))
    refused("rq.budget_bytes is no whole number", fmt.KEY_BUDGET_BYTES, gg.string("3"))
    refused("llama.expert_count is no whole number", "llama.expert_count", gg.string("3"))
    refused("llama.expert_count is no whole number", "llama.expert_count", gg.numbers(GGUFValueType.UINT32, []))
    refused("4 by llama.expert_count", "llama.expert_count", gg.scalar(GGUFValueType.UINT32, 4))
    refused("rq.blk.0.load must be 3 finite numbers", "rq.blk.0.load", gg.numbers(GGUFValueType.FLOAT32, [1.0]))
    refused("rq.blk.0.load must be 3 finite numbers", "rq.blk.0.load", gg.numbers(GGUFValueType.FLOAT32, [1.0, float("nan"), 0]))


def test_truncated(tmp_path):
    path = tiered(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(UserError, match=r"truncated: tensor blk.0.ffn_down_exps.1.weight ends at byte"):
        inspect(path)
