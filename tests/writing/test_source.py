"""What a base model may be, and what its data says."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from writing.samples import STORED, base_model

from rq_gguf.calibration.fingerprint import router_fingerprint
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.runtime import tools
from rq_gguf.writing.gguf_file import Tensor, build_header, numbers, read_header, row_bytes, scalar, string, strings
from rq_gguf.writing.others import parse_dry_run, stored_types
from rq_gguf.writing.source import Source


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as e:
        Source(path).close()
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


def test_row_bytes():
    assert (row_bytes("q8_0", 64), row_bytes("q4_k", 512), row_bytes("f32", 3)) == (68, 288, 12)
    with pytest.raises(UserError, match="q4_k needs rows of a multiple of 256 weights, not 96"):
        row_bytes("q4_k", 96)


@pytest.mark.runtime
@pytest.mark.parametrize("stored", ["f32", "f16", "bf16", "q8_0"])
def test_expert_slices(tmp_path, runtime, stored):
    path = base_model(tmp_path / "base.gguf", stored=stored, n_ff=128)
    ggml = Ggml(tools.library_path())
    theirs = {t.name: t for t in GGUFReader(path).tensors}
    with Source(path) as source:
        assert [(s.layer, s.n_expert, s.n_embd, s.n_ff) for s in source.shape.layers] == [(0, 4, 256, 128), (1, 4, 256, 128)]
        assert not source.shape.merged_gate_up
        for matrix, shape in (("gate", (128, 256)), ("down", (256, 128))):
            raw = theirs[f"blk.1.ffn_{matrix}_exps.weight"].data[2]
            if stored == "bf16":
                wanted = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
            elif stored == "q8_0":
                blocks = raw.reshape(-1, 34)
                wanted = (blocks[:, :2].copy().view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8)).reshape(shape)
            else:
                wanted = raw.astype(np.float32)
            got = source.expert(1, matrix, 2, ggml)
            assert got.dtype == np.float32 and got.shape == shape
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("stored", ["f32", "q8_0"])
def test_fingerprint(tmp_path, stored):
    """Over the routers in block order, whatever the type of the other tensors."""
    path = base_model(tmp_path / "base.gguf", stored=stored, layers=(0, 10, 2))
    routers = {t.name: np.array(t.data) for t in GGUFReader(path).tensors if "gate_inp" in t.name}
    with Source(path) as source:
        assert list(source.experts) == [0, 2, 10]
        assert source.fingerprint() == router_fingerprint([routers[f"blk.{i}.ffn_gate_inp.weight"] for i in (0, 2, 10)])


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


def test_refusals(tmp_path):
    path = tmp_path / "base.gguf"
    refused(tmp_path / "absent.gguf", "cannot read .*no such file")
    path.write_bytes(b"PK\x03\x04 something else")
    refused(path, "is not a GGUF file")
    refused(base_model(path, layers=(), dense_block=True), "has no routed experts: it is a dense model")
    refused(base_model(path, values={"rq.format_version": 1}), "is an rq-gguf file already")
    refused(base_model(path, stored="q6_k"), "blk.0.ffn_gate_exps.weight is q6_k already; give an F16, BF16, F32 or Q8_0 GGUF")
    vector = np.ones((4, 8), dtype=np.float32)
    refused(base_model(path, extra={"blk.0.ffn_gate_exps.lora": vector}), "blk.0.ffn_gate_exps.lora seems to belong to routed experts")
    refused(base_model(path, extra={"blk.0.ffn_sort_exps.weight": vector}), "blk.0.ffn_sort_exps.weight seems to belong")
    refused(
        base_model(path, extra={"blk.0.ffn_gate.3.weight": vector}),
        r"holds every expert in a tensor of its own \(blk.0.ffn_gate.3.weight\)",
    )
    refused(base_model(path, change={"blk.1.ffn_down_exps.weight": None}), "block 1 has expert tensors gate, up, not")
    refused(
        base_model(path, change={"blk.1.ffn_up_exps.weight": np.ones((3, 256, 256), np.float32)}),
        r"up_exps.weight is \[256, 256, 3\], which",
    )
    refused(base_model(path, change={"blk.1.ffn_up_exps.weight": np.ones((256, 256), np.float32)}), "has 2 dimensions instead of 3")
    refused(base_model(path, change={"blk.1.ffn_gate_inp.weight": np.ones((5, 256), np.float32)}), "knows 5 experts, .* holds 4")


def test_known_tensors_by_logical_id(tmp_path):
    extra = {
        f"blk.0.ffn_{m}_exps.{what}": np.ones(4, dtype=np.float32)
        for m in ("gate", "up", "down")
        for what in ("bias", "scale", "input_scale")
    }
    with Source(base_model(tmp_path / "base.gguf", extra=extra)) as source:
        assert extra.keys() <= source.tensors.keys()
        assert list(source.experts[0]) == ["gate", "down", "up"]


def test_split_files(tmp_path):
    base_model(tmp_path / "m.gguf", split_max_tensors=5)
    first, second = tmp_path / "m-00001-of-00003.gguf", tmp_path / "m-00002-of-00003.gguf"
    one = base_model(tmp_path / "one.gguf")
    with Source(first) as split, Source(one) as whole:
        assert list(split.tensors) == list(whole.tensors)
        for name, tensor in whole.tensors.items():
            np.testing.assert_array_equal(split.read(split.tensors[name]), whole.read(tensor))
    refused(second, "is not the first file of its model; give m-00001-of-00003.gguf")
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(first.read_bytes())
    refused(renamed, "part of a model in 3 files")
    whole_second = second.read_bytes()
    second.write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    refused(first, "is not file 2 of 3")
    second.write_bytes(whole_second[: len(whole_second) // 2])
    refused(first, "00002-of-00003.gguf is truncated")
    second.unlink()
    refused(first, "cannot read .*00002-of-00003.gguf")


def test_file_that_shrinks_while_it_is_read(tmp_path):
    path = base_model(tmp_path / "base.gguf")
    with Source(path) as source:
        path.write_bytes(path.read_bytes()[:10_000])
        with pytest.raises(UserError, match="was truncated while it was read"):
            source.read(source.tensors["blk.1.ffn_up_exps.weight"])


def test_parse_dry_run():
    text = """
llama_model_loader: - type bf16:   29 tensors
[   1/  42] output_norm.weight                   - [   256,      1,      1,      1], type =    f32, size =    0.001 MiB
[   2/  42] token_embd.weight                    - [   256,  16384,      1,      1], type =   bf16, size =  8.00 MiB ->  4.25 MiB (q8_0)
[   3/  42] blk.10.a_name_that_is_wider_than_its_column.weight - [48,  1,  1,  1], type = bf16, size = 8.00 MiB -> 4.25 MiB (q4_K)
llama_model_quantize_impl: model size  =    33.57 MiB (16.02 BPW)
"""
    assert parse_dry_run(text) == {
        "output_norm.weight": "f32",
        "token_embd.weight": "q8_0",
        "blk.10.a_name_that_is_wider_than_its_column.weight": "q4_k",
    }


@pytest.mark.runtime
@pytest.mark.parametrize(("stored", "embedding"), [("bf16", "q8_0"), ("q8_0", "q8_0")])
def test_stored_types(tmp_path, runtime, stored, embedding):
    """llama-quantize's choice: matrices to Q8_0, norms and routers as they are, experts not listed."""
    with Source(base_model(tmp_path / "base.gguf", stored=stored, layers=(0,), bias=True)) as source:
        assert stored_types(source) == {
            "token_embd.weight": embedding,
            "output_norm.weight": "f32",
            "blk.0.attn_norm.weight": "f32",
            "blk.0.attn_q.weight": "q8_0",
            "blk.0.ffn_gate_inp.weight": "f32",
            "blk.0.ffn_down_exps.bias": "f32",
        }


@pytest.mark.runtime
def test_quantized_tensors_stay(tmp_path, runtime):
    """A Q6_K embedding beside Q8_0 experts is not quantized a second time."""
    import gguf

    path = base_model(tmp_path / "base.gguf", stored="q8_0", layers=(0,))
    reader = GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "mixed.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for t in reader.tensors:
        if t.name == "token_embd.weight":
            writer.add_tensor(t.name, np.zeros((64, 210), dtype=np.uint8), raw_dtype=STORED["q6_k"])
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Source(tmp_path / "mixed.gguf") as source:
        assert stored_types(source)["token_embd.weight"] == "q6_k"
