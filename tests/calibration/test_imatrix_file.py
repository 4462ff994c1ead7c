"""Imatrix files of llama-imatrix: both forms read, what is missing completed where that is safe, the rest refused by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calibration.samples import as_dat, as_llama_imatrix, equal, sample, small_model
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import read_any, read_calibration, write_calibration
from rq_gguf.calibration.imatrix import matrix_rows
from rq_gguf.calibration.imatrix_file import is_dat, read_imatrix
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.runtime import tools


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_plain_imatrix(tmp_path: Path, merged: bool, dense: bool) -> None:
    source = sample(merged_gate_up=merged)
    as_llama_imatrix(tmp_path / "i.gguf", source, dense=dense)
    got = read_any(tmp_path / "i.gguf")
    assert (got.n_tokens, got.n_expert_used, got.n_embd, got.n_ff, got.merged_gate_up) == (4096, 2, 256, 256, merged)
    assert (got.types, got.model, got.model_fingerprint, got.arch, got.load_known) == ((), "i", "", "", True)
    assert equal(got.dense_in_sum2, source.dense_in_sum2 if dense else {})
    for a, b in zip(got.layers, source.layers, strict=True):
        assert equal(a.selections, b.selections) and equal(a.in_sum2, b.in_sum2) and a.error.shape == (8, 2, 0)
    with pytest.raises(UserError, match=r"i\.gguf is not a calibration of rq-gguf"):
        read_calibration(tmp_path / "i.gguf")
    write_calibration(tmp_path / "again.gguf", got)
    assert equal(read_calibration(tmp_path / "again.gguf"), got)


def test_what_is_missing_is_completed_where_that_is_safe(tmp_path: Path) -> None:
    c, path = sample(), tmp_path / "i.gguf"
    for drop in (("up_exps.weight.counts",), ("up_exps.weight.counts", "up_exps.weight.in_sum2"), ("down_exps.weight.counts",)):
        as_llama_imatrix(path, c, drop=drop)
        got = read_imatrix(path)
        for a, b in zip(got.layers, c.layers, strict=True):
            assert equal(a.selections, b.selections) and equal(a.in_sum2["down"], b.in_sum2["down"])
            assert equal(a.in_sum2["up"], b.in_sum2["gate" if len(drop) == 2 else "up"])
    as_llama_imatrix(path, c, factor=3)  # put together from several files
    for a, b in zip(read_imatrix(path).layers, c.layers, strict=True):
        assert equal(a.selections, 3 * b.selections)
        for m in ("gate", "down"):
            np.testing.assert_allclose(matrix_rows(a, m), matrix_rows(b, m), rtol=1e-6)


def test_dense_matrices_that_fewer_tokens_passed(tmp_path: Path) -> None:
    """Their mean stays: sums count as if all tokens had passed."""
    c = replace(sample(), dense_in_sum2={"blk.0.attn_q.weight": np.full(256, 8, np.float32)})
    as_llama_imatrix(tmp_path / "a.gguf", c)
    half = replace(c, n_tokens=c.n_tokens // 2, dense_in_sum2={"blk.1.attn_q.weight": np.full(256, 8, np.float32)})
    as_llama_imatrix(tmp_path / "b.gguf", replace(half, layers=()))
    parts = [{t.name: np.array(t.data) for t in GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in "ab"]
    import gguf

    w = gguf.GGUFWriter(tmp_path / "c.gguf", "x")
    w.add_string("general.type", "imatrix")
    for name, t in (parts[0] | parts[1]).items():
        w.add_tensor(name, t)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    got = read_imatrix(tmp_path / "c.gguf")
    assert got.n_tokens == c.n_tokens
    assert {n: v[0] for n, v in got.dense_in_sum2.items()} == {"blk.0.attn_q.weight": 8, "blk.1.attn_q.weight": 16}


def test_refusals(tmp_path: Path) -> None:
    c, path = sample(), tmp_path / "i.gguf"
    zero = replace(c, layers=tuple(replace(x, selections=0 * x.selections) for x in c.layers))
    short = replace(c, layers=tuple(replace(x, selections=x.selections[:5]) for x in c.layers))
    for bad, drop, words in (
        (zero, (), "no expert was ever picked"),
        (c, ("exps.weight.counts",), "block 0 has no counts"),
        (short, (), r"blk\.0\.ffn_gate_exps\.weight\.counts has no count per expert"),
        (c, ("down_exps.weight.in_sum2",), "block 0 has sums for gate, up, expected"),
        (replace(c, layers=()), (), "imatrix of a dense model"),
    ):
        as_llama_imatrix(path, bad, drop=drop)
        with pytest.raises(UserError, match=rf"i\.gguf.*{words}"):
            read_imatrix(path)


def never_hit(c: Calibration, expert: int) -> Calibration:
    """The calibration with an expert of every layer that no token picked; all others were picked 500 times."""
    layers = []
    for layer in c.layers:
        selections = np.where(np.arange(layer.n_expert) == expert, 0, 500)
        sums = {m: s * (selections > 0)[:, None].astype(np.float32) for m, s in layer.in_sum2.items()}
        layers.append(replace(layer, selections=selections, in_sum2=sums))
    return replace(c, layers=tuple(layers))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("n_expert", [None, 8])
def test_dat(tmp_path: Path, merged: bool, n_expert: int | None) -> None:
    """Means are what they were; counts are made up and alike, but for the expert that was never picked."""
    c = never_hit(sample(n_embd=256, n_ff=128, merged_gate_up=merged), 3)
    as_dat(tmp_path / "i.dat", c)
    got = read_any(tmp_path / "i.dat", n_expert)
    assert (got.n_tokens, got.n_expert_used, got.n_embd, got.n_ff, got.merged_gate_up) == (4096, 0, 256, 128, merged)
    assert (got.load_known, got.types, got.model) == (False, (), "i")
    for a, b in zip(got.layers, c.layers, strict=True):
        assert a.selections.tolist() == [512, 512, 512, 0, 512, 512, 512, 512]
        for m in b.in_sum2:
            np.testing.assert_allclose(matrix_rows(a, m), matrix_rows(b, m), rtol=1e-6)
    np.testing.assert_allclose(got.dense_in_sum2["blk.0.attn_q.weight"], c.dense_in_sum2["blk.0.attn_q.weight"], rtol=1e-6)
    write_calibration(tmp_path / "again.gguf", got)
    assert equal(read_calibration(tmp_path / "again.gguf"), got)


def test_dat_refusals(tmp_path: Path) -> None:
    c, path = sample(), tmp_path / "i.dat"
    as_dat(path, replace(c, dense_in_sum2={}))
    with pytest.raises(UserError, match=r"i\.dat does not say how many experts a block has; give the model's GGUF too"):
        read_imatrix(path)
    with pytest.raises(UserError, match="values, which are not those of 7 experts"):
        read_imatrix(path, 7)
    assert read_imatrix(path, 8).layers[0].n_expert == 8
    as_dat(path, replace(c, layers=()))
    with pytest.raises(UserError, match="imatrix of a dense model"):
        read_imatrix(path)
    split = {"blk.0.ffn_gate.0.weight": np.ones(256, np.float32)}
    as_dat(path, replace(c, layers=(), dense_in_sum2=split))
    with pytest.raises(UserError, match="every expert in a tensor of its own"):
        read_imatrix(path)
    as_dat(path, replace(c, dense_in_sum2={"blk.0.attn_q.weight": np.full(256, np.nan, np.float32)}))
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight holds no values, or negative"):
        read_imatrix(path)
    (tmp_path / "text.txt").write_text("To be, or not to be")
    assert not is_dat(tmp_path / "text.txt")


def test_dat_truncated_anywhere(tmp_path: Path) -> None:
    """But behind the last entry: what follows is optional."""
    path, cut = tmp_path / "i.dat", tmp_path / "cut.dat"
    as_dat(path, sample(n_expert=2, n_layers=1, n_embd=32, n_ff=32))
    whole = path.read_bytes()
    for n in range(8, len(whole) - 11, 7):
        cut.write_bytes(whole[:n])
        with pytest.raises(UserError, match=r"cut\.dat is damaged or truncated"):
            read_any(cut, 2)
    cut.write_bytes(whole[:-11])
    assert read_any(cut, 2).n_expert_used == 0


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), values=st.binary(min_size=1, max_size=4), write=st.sampled_from([as_dat, as_llama_imatrix]))
def test_damage_never_crashes(tmp_path_factory: pytest.TempPathFactory, share: float, values: bytes, write: Callable[..., None]) -> None:
    path = tmp_path_factory.mktemp("d") / "i.file"
    write(path, sample(n_expert=2, n_layers=1, n_embd=32, n_ff=32))
    data = bytearray(path.read_bytes())
    at = int(share * (len(data) - len(values)))
    data[at : at + len(values)] = values
    path.write_bytes(data)
    try:
        read_any(path, 2)
    except UserError as e:
        assert "i.file" in str(e)


@pytest.mark.runtime
def test_dat_of_llama_imatrix(tmp_path: Path, ggml: Ggml) -> None:
    """What llama-imatrix itself writes, as .dat and as the GGUF that it makes of one; and llama-quantize's bytes with it."""
    c = never_hit(sample(n_layers=1, n_expert=4, n_embd=256, n_ff=512), 2)
    write_calibration(tmp_path / "c.gguf", c)
    tensors = small_model(tmp_path / "model.gguf", np.random.default_rng(3))
    for source, made, form in (("c.gguf", "i.dat", "dat"), ("i.dat", "converted.gguf", "gguf")):
        options = ["--in-file", tmp_path / source, "--output-format", form, "-o", tmp_path / made]
        tools.run_tool(["llama-imatrix", "-m", tmp_path / "model.gguf", *options])
    got = read_any(tmp_path / "i.dat")
    for m in ("gate", "up", "down"):
        np.testing.assert_allclose(matrix_rows(got.layers[0], m), matrix_rows(c.layers[0], m), rtol=1e-6)
    again = read_any(tmp_path / "converted.gguf")
    assert not again.load_known
    assert equal(replace(again, model="i"), got)
    out = tmp_path / "out.gguf"
    options = ["--imatrix", tmp_path / "i.dat", "--tensor-type", "_exps=q4_k"]
    tools.run_tool(["llama-quantize", *options, tmp_path / "model.gguf", out, "q8_0"])
    written = {t.name: np.array(t.data) for t in GGUFReader(out).tensors}
    for name, t in tensors.items():
        rows = matrix_rows(got.layers[0], name.split("_")[1])
        for e in (0, 1, 3):
            assert np.array_equal(ggml.quantize("q4_k", t[e], rows[e]), written[name][e]), (name, e)
