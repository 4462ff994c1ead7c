"""What a base model may be, and what its data says."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from writing.samples import base_model

from rq_gguf.calibration.fingerprint import router_fingerprint
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.runtime import tools
from rq_gguf.writing.source import Source


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as e:
        Source(path).close()
    assert str(path.parent) in str(e.value)


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


def test_refusals(tmp_path):
    path = tmp_path / "base.gguf"
    refused(tmp_path / "absent.gguf", "cannot read .*no such file")
    path.write_bytes(b"PK\x03\x04 something else")
    refused(path, "is not a GGUF file")
    refused(base_model(path, layers=(), dense_block=True), "has no routed experts: it is a dense model")
    refused(base_model(path, values={"rq.format_version": 1}), "is an rq-gguf file already")
    refused(base_model(path, stored="q6_k"), "blk.0.ffn_gate_exps.weight is q6_k already; give an F16, BF16, F32, Q8_0 or MXFP4 GGUF")
    vector = np.ones((4, 8), dtype=np.float32)
    refused(base_model(path, extra={"blk.0.ffn_gate_exps.lora": vector}), "blk.0.ffn_gate_exps.lora seems to belong to routed experts")
    for name in ("ffn_sort_exps.weight", "ffn_up_chexps.weight", "ffn_gate_tid2eid.weight", "attn_expert_bias.weight"):
        refused(base_model(path, extra={f"blk.0.{name}": vector}), f"blk.0.{name} seems to belong")
    stack = np.ones((4, 2, 8), dtype=np.float32)
    refused(base_model(path, extra={"blk.1.ffn_mix.weight": stack}), "blk.1.ffn_mix.weight seems to belong .*; quantize this model with")
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


def test_stacks_of_other_things_are_none_of_our_business(tmp_path):
    """Heads, not experts; three matrices, not four; a dense block."""
    stacks = {"blk.0.attn_k_b.weight": (4, 2, 8), "blk.0.ffn_mix.weight": (3, 2, 8), "blk.2.ffn_mix.weight": (4, 2, 8)}
    extra = {name: np.ones(shape, dtype=np.float32) for name, shape in stacks.items()}
    with Source(base_model(tmp_path / "base.gguf", extra=extra)) as source:
        assert list(source.experts) == [0, 1] and not any(source.is_routed(name) for name in extra)


def test_blocks_for_further_tokens_are_left_alone(tmp_path):
    with Source(base_model(tmp_path / "base.gguf", layers=(0, 1, 2), values={"llama.nextn_predict_layers": 1})) as source:
        assert list(source.experts) == [0, 1] == [s.layer for s in source.shape.layers]
        assert source.is_routed("blk.1.ffn_up_exps.weight") and not source.is_routed("blk.2.ffn_up_exps.weight")
        assert "blk.2.ffn_up_exps.weight" in source.tensors


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
