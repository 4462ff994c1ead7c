"""GGUF headers: what the gguf package reads and writes, and damage refused by name."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from writing.samples import base_model

from rq_gguf.errors import UserError
from rq_gguf.gguf_file import Tensor, build_header, numbers, read_header, scalar, string, strings


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as e:
        read_header(path)
    assert str(path.parent) in str(e.value)


def test_header_equals_gguf_reader(tmp_path):
    """Values and tensors are what the gguf package reads."""
    path = base_model(tmp_path / "base.gguf", stored="f16", bias=True)
    theirs, ours = GGUFReader(path), read_header(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.values.keys() == fields.keys()
    for key, wanted in fields.items():
        got = ours.get(key)
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == wanted
    assert [(t.name, t.tensor_type.name.lower(), tuple(t.shape.tolist()), t.data_offset, t.n_bytes) for t in theirs.tensors] == [
        (t.name, t.type, t.ne, t.offset, t.n_bytes) for t in ours.tensors.values()
    ]


def test_built_header_is_read_by_gguf(tmp_path):
    from gguf.constants import GGUFValueType

    values = {
        "general.architecture": string("llama"),
        "a.flag": scalar(GGUFValueType.BOOL, True),
        "a.big": scalar(GGUFValueType.UINT64, 1 << 40),
        "a.names": strings(["x", "", "ä"]),
        "a.numbers": numbers(GGUFValueType.FLOAT32, [0.5, 0.25]),
    }
    header, placed = build_header(values, [Tensor("one", "q8_0", (32, 3)), Tensor("two", "i32", (2, 3, 2))])
    (tmp_path / "x.gguf").write_bytes(header + bytes(128) + np.arange(12, dtype="<i4").tobytes() + bytes(16))
    reader = GGUFReader(tmp_path / "x.gguf")
    assert {k: f.contents() for k, f in reader.fields.items() if k.startswith("a.")} == {
        "a.flag": True, "a.big": 1 << 40, "a.names": ["x", "", "ä"], "a.numbers": [0.5, 0.25],
    }  # fmt: skip
    assert [t.data_offset for t in reader.tensors] == [t.offset for t in placed]
    assert reader.tensors[1].data.tolist() == np.arange(12).reshape(2, 3, 2).tolist()


def test_truncated_at_every_byte_of_the_header(tmp_path):
    path = base_model(tmp_path / "base.gguf")
    whole = path.read_bytes()
    start = next(iter(read_header(path).tensors.values())).offset
    cut = tmp_path / "cut.gguf"
    for n in [0, 3, *range(4, start, 37)]:
        cut.write_bytes(whole[:n])
        refused(cut, "truncated|not a GGUF")
    cut.write_bytes(whole[:-33])  # the last 32 bytes may be padding
    refused(cut, r"truncated: tensor blk.1.ffn_up_exps.weight ends at byte \d+, the file at \d+")


def test_damaged_headers(tmp_path):
    path = base_model(tmp_path / "base.gguf")
    whole = path.read_bytes()
    bad = tmp_path / "bad.gguf"

    def with_bytes(at: int, data: bytes) -> Path:
        bad.write_bytes(whole[:at] + data + whole[at + len(data) :])
        return bad

    refused(with_bytes(4, struct.pack("<I", 9)), "GGUF of version 9")
    refused(with_bytes(8, struct.pack("<Q", 1 << 60)), "truncated|damaged")
    refused(with_bytes(16, struct.pack("<Q", 1 << 60)), "truncated|damaged")
    at = whole.index(b"general.architecture") + len("general.architecture")
    refused(with_bytes(at, struct.pack("<I", 77)), "general.architecture has the unknown value type 77")
    at = whole.index(b"blk.1.attn_q.weight") + len("blk.1.attn_q.weight")
    refused(with_bytes(at, struct.pack("<I", 9)), "blk.1.attn_q.weight has 9 dimensions")
    refused(with_bytes(at + 4, struct.pack("<Q", 250)), "is damaged: the data of tensor .* starts at byte")
    refused(with_bytes(at + 20, struct.pack("<I", 3000)), "blk.1.attn_q.weight has ggml type 3000")
    refused(with_bytes(at + 24, struct.pack("<Q", 32)), "the data of tensor blk.1.attn_q.weight starts at byte")
    at = whole.index(b"blk.1.attn_q.weight")
    refused(with_bytes(at, b"blk.0.attn_q.weight"), "has tensor blk.0.attn_q.weight twice")
    refused(with_bytes(at, b"\xff"), "not UTF-8")
    at = whole.index(b"general.name")
    refused(with_bytes(at, b"general.type"), "general.type twice") if b"general.type" in whole else None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1400), data=st.binary(min_size=1, max_size=12))
def test_any_damage_is_a_user_error(tmp_path, at, data):
    """Whatever bytes stand in a header, it is read or refused."""
    path = tmp_path / "base.gguf"
    if not path.exists():
        base_model(path, layers=(0,), n_expert=2, n_embd=32, n_ff=32)
    whole = path.read_bytes()
    (tmp_path / "bad.gguf").write_bytes(whole[:at] + data + whole[at + len(data) :])
    try:
        header = read_header(tmp_path / "bad.gguf")
        for key in header.values:
            header.get(key)
    except UserError as e:
        assert "bad.gguf" in str(e) or "arrays of arrays" in str(e)
