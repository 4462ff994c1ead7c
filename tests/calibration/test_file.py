"""Calibration files: what goes in comes out, llama.cpp's tools read them, damaged ones are refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from calibration.samples import equal, sample, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import synthetic_calibration

from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import read_any, read_calibration, write_calibration
from rq_gguf.calibration.imatrix import matrix_rows
from rq_gguf.calibration.imatrix_file import read_imatrix
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.runtime import tools


@settings(max_examples=20, deadline=None)
@given(
    n_expert=st.integers(2, 9),
    n_layers=st.integers(1, 3),
    types=st.sampled_from([(), ("q8_0",), ("q2_k", "q4_k", "q8_0")]),
    merged=st.booleans(),
)
def test_roundtrip(tmp_path_factory: pytest.TempPathFactory, n_expert: int, n_layers: int, types: tuple[str, ...], merged: bool) -> None:
    path = tmp_path_factory.mktemp("c") / "c.gguf"
    calibration = sample(n_layers=n_layers, n_expert=n_expert, types=types, merged_gate_up=merged)
    write_calibration(path, calibration)
    assert equal(read_calibration(path), calibration)
    assert equal(read_any(path), calibration)
    first = path.read_bytes()
    write_calibration(path, calibration)
    assert path.read_bytes() == first and list(path.parent.iterdir()) == [path]


def test_tensors_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    write_calibration(tmp_path / "c.gguf", sample(n_expert=4))
    reader = gguf.GGUFReader(tmp_path / "c.gguf")
    shapes = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors}
    assert shapes["blk.1.ffn_gate_exps.weight.in_sum2"] == shapes["blk.1.ffn_up_exps.weight.in_sum2"] == ("F32", [256, 4])
    assert shapes["blk.1.ffn_down_exps.weight.counts"] == ("F32", [1, 4])
    assert shapes["blk.0.attn_q.weight.in_sum2"] == ("F32", [256, 1])
    assert reader.fields["general.type"].contents() == "imatrix" and "general.architecture" not in reader.fields
    write_calibration(tmp_path / "m.gguf", sample(n_expert=4, merged_gate_up=True))
    names = {t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert "blk.0.ffn_gate_up_exps.weight.in_sum2" in names and "blk.0.ffn_gate_exps.weight.in_sum2" not in names


def test_truncated_anywhere(tmp_path: Path) -> None:
    path, cut = tmp_path / "c.gguf", tmp_path / "cut.gguf"
    write_calibration(path, sample(n_expert=2, n_layers=1, n_embd=32, n_ff=32))
    whole = path.read_bytes()
    for n in [*range(0, 64), *range(64, len(whole) - 32, 97)]:
        cut.write_bytes(whole[:n])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            read_any(cut)


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 3000), value=st.integers(0, 255))
def test_damaged_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    path = tmp_path_factory.mktemp("d") / "c.gguf"
    write_calibration(path, sample(n_expert=2, n_layers=1, n_embd=32, n_ff=32))
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data)
    try:
        read_any(path)
    except UserError as e:
        assert "c.gguf" in str(e)


def changed(c: Calibration, **changes: Any) -> Calibration:
    return replace(c, layers=(replace(c.layers[0], **changes), *c.layers[1:]))


def test_inconsistent_files(tmp_path: Path) -> None:
    c, path = sample(), tmp_path / "c.gguf"
    layer = c.layers[0]
    for bad, words in (
        (changed(c, wanda=np.full(8, np.nan)), "blk.0.rq.wanda holds negative or non-finite"),
        (changed(c, selections=layer.selections[:5]), "selections is int64"),
        (changed(c, in_sum2={m: layer.in_sum2[m] for m in ("gate", "down")}), "block 0 has sums for down, gate"),
        (changed(c, in_sum2=layer.in_sum2 | {"down": layer.in_sum2["down"][:, :7]}), "sums of down in block 0"),
        (changed(c, error=-layer.error), "blk.0.rq.error holds negative"),
        (replace(c, merged_gate_up=True), "other layout"),
        (replace(c, types=("q4_k",)), "blk.0.rq.error is"),
        (replace(c, types=(*c.types[1:], "q9_k")), "the calibration .*c.gguf: unknown type 'q9_k'"),
    ):
        write_calibration(path, bad)
        with pytest.raises(UserError, match=words):
            read_calibration(path)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("To be, or not to be")
    with pytest.raises(UserError, match="neither a calibration file nor an imatrix"):
        read_any(tmp_path / "t.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_any(tmp_path / "absent.gguf")
    w = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    w.add_type("model")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    with pytest.raises(UserError, match="GGUF of type 'model'"):
        read_any(tmp_path / "model.gguf")


def test_unknown_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rq_gguf.calibration.file.VERSION", 99)
    write_calibration(tmp_path / "c.gguf", sample())
    monkeypatch.undo()
    with pytest.raises(UserError, match="calibration version 99"):
        read_calibration(tmp_path / "c.gguf")


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_calibration(tmp_path / "no" / "such" / "c.gguf", sample())


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["q4_k", "q8_0", "iq3_s"])
def test_bytes_of_llama_quantize(tmp_path: Path, ggml: Ggml, kind: str) -> None:
    """llama-quantize reads our file, and writes the bytes that our importance rows and ggml's quantizers give."""
    tensors = small_model(tmp_path / "model.gguf", np.random.default_rng(3))
    c = synthetic_calibration(1, 4, n_embd=256, n_ff=512)
    c = changed(c, selections=np.array([900, 3, 0, 121]))
    c = changed(c, in_sum2={m: s * (c.layers[0].selections > 0)[:, None] for m, s in c.layers[0].in_sum2.items()})
    write_calibration(tmp_path / "c.gguf", c)
    out = tmp_path / "out.gguf"
    options = ["--imatrix", tmp_path / "c.gguf", "--tensor-type", f"_exps={kind}"]
    done = tools.run_tool(["llama-quantize", *options, tmp_path / "model.gguf", out, "q8_0"])
    assert "loaded 3 importance matrix entries" in done.stdout
    written = {t.name: np.array(t.data) for t in gguf.GGUFReader(out).tensors}
    for name, t in tensors.items():
        rows = matrix_rows(c.layers[0], name.split("_")[1])
        for e in (0, 1, 3):  # an expert that was never hit gets a better prior than llama-quantize's
            assert np.array_equal(ggml.quantize(kind, t[e], rows[e]), written[name][e]), (name, e)


@pytest.mark.runtime
def test_llama_imatrix_reads_it(tmp_path: Path) -> None:
    """llama-imatrix combines the file with another, and the sums and counts double."""
    c = sample()
    write_calibration(tmp_path / "c.gguf", c)
    small_model(tmp_path / "model.gguf", np.random.default_rng(3))
    twice = ["--in-file", tmp_path / "c.gguf", "--in-file", tmp_path / "c.gguf"]
    tools.run_tool(["llama-imatrix", "-m", tmp_path / "model.gguf", *twice, "-o", tmp_path / "sum.gguf"])
    got = read_imatrix(tmp_path / "sum.gguf")
    assert got.n_tokens == 2 * c.n_tokens and got.n_expert_used == c.n_expert_used
    for a, b in zip(got.layers, c.layers, strict=True):
        assert equal(a.selections, 2 * b.selections)
        assert all(np.allclose(a.in_sum2[m], 2 * b.in_sum2[m]) for m in b.in_sum2)
