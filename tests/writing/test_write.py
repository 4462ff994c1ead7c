"""Writing: bytes equal llama-quantize's, any plan comes back as planned, failures leave nothing."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from writing.samples import base_model, calibration_of, plan_of, random_plan, uniform_plan

from rq_gguf import format as fmt
from rq_gguf.calibration.file import write_calibration
from rq_gguf.calibration.imatrix import matrix_rows
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import read_header
from rq_gguf.planning.budget import expert_shape, plan_bytes
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.runtime import tools
from rq_gguf.types import fallback
from rq_gguf.writing import write
from rq_gguf.writing.inspect import inspect
from rq_gguf.writing.others import fixed_bytes, stored_types
from rq_gguf.writing.readback import expert_weight, weight
from rq_gguf.writing.source import Source
from rq_gguf.writing.tiered import open_tiered
from rq_gguf.writing.write import write_model

LADDER = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_nl")


@pytest.fixture(scope="module")
def ggml(runtime) -> Ggml:
    return Ggml(tools.library_path())


@pytest.fixture(scope="module")
def base(runtime, tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "base.gguf", n_expert=6, dense_block=True, layers=(1, 2), bias=True)


def llama_quantize(base: Path, out: Path, expert_type: str, imatrix: Path) -> None:
    tools.run_tool(["llama-quantize", "--imatrix", imatrix, "--tensor-type", f"exps={expert_type}", base, out, "Q8_0", "2"])


def tensor_bytes(path: Path, name: str) -> bytes:
    t = read_header(path).tensors[name]
    return path.read_bytes()[t.offset : t.offset + t.n_bytes]


def names_left(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.runtime
@pytest.mark.golden
@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("expert_type", ["q8_0", "q4_k", "q2_k", "iq4_nl"])
def test_same_bytes_as_llama_quantize(tmp_path, ggml, stored, expert_type):
    """Without copies and with one type every tensor is llama-quantize's, byte for byte."""
    base = base_model(tmp_path / "base.gguf", stored=stored, bias=True)
    with Source(base) as source:
        calibration, plan = calibration_of(source), uniform_plan(source, expert_type)
    write_calibration(tmp_path / "imatrix.gguf", calibration)
    llama_quantize(base, tmp_path / "theirs.gguf", expert_type, tmp_path / "imatrix.gguf")
    write_model(base, plan, calibration, tmp_path / "ours.gguf", ggml=ggml, threads=2)
    theirs, ours = read_header(tmp_path / "theirs.gguf"), read_header(tmp_path / "ours.gguf")
    assert len(theirs.tensors) == len(ours.tensors)
    for name, tensor in theirs.tensors.items():
        expert = fmt.parse_expert_name(name)
        mine = ours.tensors[name if expert is None else fmt.tier_name(expert[0], expert[1], 0)]
        assert (mine.type, mine.ne) == (tensor.type, tensor.ne), name
        assert tensor_bytes(ours.path, mine.name) == tensor_bytes(theirs.path, name), name


@pytest.mark.runtime
def test_general_values(tmp_path, ggml):
    """Those of the model stay, those of the source file's making do not."""
    kept = {"general.basename": "Sample", "general.license": "mit", "general.base_model.0.name": "Mother", "general.source.repo_url": "x"}
    base = base_model(tmp_path / "base.gguf", values={**kept, "general.quantized_by": "somebody else"})
    with Source(base) as source:
        calibration = replace(calibration_of(source), text_sha256="ab" * 32)
        rows = tuple(("q4_k",) for _ in range(source.shape.layers[0].n_expert))
        plan = plan_of(tuple(LayerPlan(s.layer, rows, rows) for s in source.shape.layers))
    write_model(base, plan, calibration, tmp_path / "out.gguf", ggml=ggml, threads=2)
    new = read_header(tmp_path / "out.gguf")
    assert {key: new.get(key) for key in kept} == kept
    assert "general.quantized_by" not in new.values
    assert new.get("general.file_type") == 15  # mostly Q4_K, though all other tensors are Q8_0
    assert new.get("quantize.imatrix.dataset") == "text of sha256 " + "ab" * 32


@pytest.mark.runtime
def test_values_and_order(tmp_path, ggml, base):
    """The source's values stay, llama-quantize's and rq's are set; tensors keep their order."""
    with Source(base) as source:
        calibration = calibration_of(source)
        mix = (("q8_0", "q4_k"), ("q4_k",), ("q8_0",), ("q4_k", "q4_k"), ("q8_0",), ("q8_0",))
        plan = plan_of(tuple(LayerPlan(i, mix, mix) for i in (1, 2)))
        types = stored_types(source)
        other = fixed_bytes(source, types)
    report = write_model(base, plan, calibration, tmp_path / "out.gguf", ggml=ggml, threads=2, calibration_file="calibration.gguf")
    old, new = read_header(base), read_header(tmp_path / "out.gguf")
    changed = {"general.file_type", "general.quantization_version", "quantize.imatrix.file"}  # of those that the source has
    for key, value in old.values.items():
        if key not in changed:
            assert new.values[key] == value
    assert new.get("general.file_type") == 7
    assert new.get("general.quantization_version") == 2
    assert new.get("general.size_label") == "4x1M"
    assert new.get("quantize.imatrix.file") == "calibration.gguf"
    assert new.get("quantize.imatrix.entries_count") == 6
    assert new.get(fmt.KEY_REPLICAS).tolist() == [0, 2, 2]
    assert new.get(fmt.KEY_TYPES) == ["q4_k", "q8_0"]
    assert new.get(fmt.KEY_EXPERT_BYTES) == report.expert_bytes
    assert new.get("rq.blk.1.load").sum() == pytest.approx(1)
    assert new.get("rq.blk.0.load") is None
    assert list(new.tensors)[:3] == ["token_embd.weight", "output_norm.weight", "blk.0.ffn_up.weight"]
    block = [n for n in new.tensors if n.startswith("blk.2.")]
    assert block == [
        "blk.2.attn_norm.weight", "blk.2.attn_q.weight", "blk.2.ffn_gate_inp.weight", "blk.2.ffn_log2phy",
        "blk.2.ffn_gate_exps.0.weight", "blk.2.ffn_gate_exps.1.weight", "blk.2.ffn_down_exps.0.weight", "blk.2.ffn_down_exps.1.weight",
        "blk.2.ffn_up_exps.0.weight", "blk.2.ffn_up_exps.1.weight", "blk.2.ffn_down_exps.bias",
    ]  # fmt: skip
    assert tensor_bytes(new.path, "blk.2.ffn_down_exps.bias") == tensor_bytes(base, "blk.2.ffn_down_exps.bias")
    assert [new.tensors[f"blk.2.ffn_up_exps.{i}.weight"].type for i in (0, 1)] == ["q8_0", "q4_k"]
    assert report.total_bytes == new.path.stat().st_size == report.expert_bytes + report.other_bytes
    assert report.expert_bytes == plan_bytes(expert_shape(calibration), plan.layers)
    assert report.other_bytes <= other <= report.other_bytes + (1 << 16)


@pytest.mark.runtime
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), n_types=st.integers(1, 7), most_copies=st.integers(0, 16), merged=st.booleans())
def test_random_plans_come_back(tmp_path, ggml, seed, n_types, most_copies, merged):
    """Every instance of every expert is what ggml makes of the source's weights with that expert's importance row."""
    rng = np.random.default_rng(seed)
    base = base_model(tmp_path / "base.gguf", layers=(0,), n_expert=5, merged=merged)
    out = tmp_path / "out.gguf"
    with Source(base) as source:
        calibration = calibration_of(source)
        plan = random_plan(source, rng, LADDER[:n_types], most_copies)
        report = write_model(base, plan, calibration, out, ggml=ggml, threads=2)
        file, p = open_tiered(out), plan.layers[0]
        assert report.expert_bytes == plan_bytes(expert_shape(calibration), plan.layers)
        assert inspect(out).layers[0].copies == p.copies
        for matrix in source.shape.layers[0].matrices:
            types = p.groups[fmt.MATRICES[matrix]]
            rows = matrix_rows(calibration.layers[0], matrix)
            for e in range(5):
                original = source.expert(0, matrix, e, ggml)
                for copy, type_name in enumerate(types[e]):
                    wanted = ggml.dequantize(type_name, ggml.quantize(type_name, original, rows[e]), original.shape[1])
                    np.testing.assert_allclose(expert_weight(file, 0, matrix, e, copy), wanted, rtol=1e-6, atol=1e-7)
                with pytest.raises(IndexError):
                    expert_weight(file, 0, matrix, e, len(types[e]))


@pytest.mark.runtime
def test_rows_that_fit_no_k_quant(tmp_path, ggml):
    """llama-quantize's fallbacks: Q4_K becomes Q5_0 in rows of 160, and F16 in rows of 48."""
    base = base_model(tmp_path / "base.gguf", n_embd=160, n_ff=48, n_expert=3)
    with Source(base) as source:
        calibration, plan = calibration_of(source), uniform_plan(source, "q4_k")
    write_model(base, plan, calibration, tmp_path / "ours.gguf", ggml=ggml)
    write_calibration(tmp_path / "imatrix.gguf", calibration)
    llama_quantize(base, tmp_path / "theirs.gguf", "q4_k", tmp_path / "imatrix.gguf")
    ours, theirs = read_header(tmp_path / "ours.gguf"), read_header(tmp_path / "theirs.gguf")
    for matrix, cols, kind in (("gate", 160, "q5_0"), ("down", 48, "f16")):
        assert fallback("q4_k", cols) == kind == ours.tensors[fmt.tier_name(0, matrix, 0)].type
        assert theirs.tensors[f"blk.0.ffn_{matrix}_exps.weight"].type == kind
        assert tensor_bytes(ours.path, fmt.tier_name(0, matrix, 0)) == tensor_bytes(theirs.path, f"blk.0.ffn_{matrix}_exps.weight")


@pytest.mark.runtime
def test_q8_0_source_is_copied(tmp_path, ggml):
    base = base_model(tmp_path / "base.gguf", stored="q8_0", n_expert=3)
    with Source(base) as source:
        calibration = calibration_of(source)
        rows = (("q8_0", "q8_0"), ("q8_0",), ("q4_k",))
        plan = plan_of(tuple(LayerPlan(s.layer, rows, rows) for s in source.shape.layers))
    write_model(base, plan, calibration, tmp_path / "out.gguf", ggml=ggml)
    expert = len(tensor_bytes(base, "blk.1.ffn_up_exps.weight")) // 3
    original, written = tensor_bytes(base, "blk.1.ffn_up_exps.weight"), tensor_bytes(tmp_path / "out.gguf", "blk.1.ffn_up_exps.0.weight")
    assert written == original[: 2 * expert] + original[:expert]
    assert tensor_bytes(tmp_path / "out.gguf", "token_embd.weight") == tensor_bytes(base, "token_embd.weight")
    assert weight(open_tiered(tmp_path / "out.gguf"), "token_embd.weight").shape == (64, 256)


@pytest.mark.runtime
def test_matrix_larger_than_a_piece(tmp_path, ggml, monkeypatch):
    """Cut at any row, the bytes are the same."""
    base = base_model(tmp_path / "base.gguf", layers=(0,))
    with Source(base) as source:
        calibration, plan = calibration_of(source), uniform_plan(source, "q5_k")
    write_model(base, plan, calibration, tmp_path / "whole.gguf", ggml=ggml, threads=1)
    monkeypatch.setattr("rq_gguf.writing.layout.PIECE_WEIGHTS", 256 * 7)
    write_model(base, plan, calibration, tmp_path / "cut.gguf", ggml=ggml, threads=3)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "cut.gguf").read_bytes()


@pytest.mark.runtime
def test_split_source(tmp_path, ggml):
    one = base_model(tmp_path / "one.gguf")
    base_model(tmp_path / "many.gguf", split_max_tensors=4)
    first = tmp_path / "many-00001-of-00004.gguf"
    with Source(one) as source:
        calibration, plan = calibration_of(source), uniform_plan(source, "q4_k")
    write_model(one, plan, calibration, tmp_path / "a.gguf", ggml=ggml)
    write_model(first, plan, calibration, tmp_path / "b.gguf", ggml=ggml)
    a, b = read_header(tmp_path / "a.gguf"), read_header(tmp_path / "b.gguf")
    assert not any(key.startswith("split.") for key in b.values)
    assert list(a.tensors) == list(b.tensors)
    assert all(tensor_bytes(a.path, n) == tensor_bytes(b.path, n) for n in a.tensors)


@pytest.mark.runtime
def test_source_of_another_alignment(tmp_path, ggml):
    """Planning counts with GGUF's default padding, so that is what is written."""
    for name, alignment in (("a", None), ("b", 4096)):
        base = base_model(tmp_path / f"{name}.gguf", n_embd=160, n_expert=3, alignment=alignment)
        with Source(base) as source:
            calibration, plan = calibration_of(source), uniform_plan(source, "q8_0")
        write_model(base, plan, calibration, tmp_path / f"{name}.out.gguf", ggml=ggml)
    assert (tmp_path / "a.out.gguf").read_bytes() == (tmp_path / "b.out.gguf").read_bytes()


def refuse(base: Path, out: Path, ggml: Ggml, match: str, change_plan=None, change_calibration=None, **options) -> None:
    with Source(base) as source:
        calibration, plan = calibration_of(source), uniform_plan(source, "q8_0")
    before = names_left(out.parent)
    with pytest.raises(UserError, match=match):
        write_model(
            base,
            change_plan(plan) if change_plan else plan,
            change_calibration(calibration) if change_calibration else calibration,
            out,
            ggml=ggml,
            **options,
        )
    assert names_left(out.parent) == before


@pytest.mark.runtime
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("stored", ["bf16", "f32", "f16"])
def test_weights_that_are_not_finite(tmp_path, ggml, value, stored):
    bad = np.zeros((4, 256, 256), dtype=np.float32)
    bad[2, 17, 3] = value
    base = base_model(tmp_path / "base.gguf", stored=stored, change={"blk.1.ffn_up_exps.weight": bad})
    refuse(base, tmp_path / "out.gguf", ggml, r"base.gguf: expert 2 of blk.1.ffn_up_exps.weight holds NaN or infinite values")


@pytest.mark.runtime
def test_other_weights_that_are_not_finite(tmp_path, ggml):
    base = base_model(tmp_path / "base.gguf", change={"blk.1.attn_norm.weight": np.full(256, np.nan, dtype=np.float32)})
    refuse(base, tmp_path / "out.gguf", ggml, r"blk.1.attn_norm.weight holds NaN or infinite values")


@pytest.mark.runtime
def test_weights_beyond_the_type(tmp_path, ggml, monkeypatch):
    """Finite in the source, but the scale of a Q8_0 block is 16 bits wide. Of several bad experts the first is named, always."""
    base = base_model(tmp_path / "base.gguf", change={"blk.0.ffn_up_exps.weight": np.full((4, 256, 256), 1e30, dtype=np.float32)})
    real = write.convert

    def first_is_last(piece, source, ggml):
        if piece.expert == 0:
            time.sleep(0.05)
        return real(piece, source, ggml)

    monkeypatch.setattr(write, "convert", first_is_last)
    refuse(base, tmp_path / "out.gguf", ggml, r"expert 0 of blk.0.ffn_up_exps.weight holds weights too large for q8_0", threads=4)


@pytest.mark.runtime
def test_plans_that_do_not_fit(tmp_path, ggml, base):
    out = tmp_path / "out.gguf"
    refuse(base, out, ggml, "no entry for block 2", lambda p: replace(p, layers=p.layers[:1]))
    refuse(base, out, ggml, "has experts for block 3", lambda p: replace(p, layers=(*p.layers, replace(p.layers[0], layer=3))))
    refuse(base, out, ggml, "two entries", lambda p: replace(p, layers=(*p.layers, p.layers[0])))
    few = (("q8_0",),) * 5
    refuse(base, out, ggml, "5 experts in block 1", lambda p: replace(p, layers=(LayerPlan(1, few, few), p.layers[1])))
    uneven = (("q8_0", "q8_0"), *few)
    refuse(
        base, out, ggml, "expert 0 of block 1 2 instances", lambda p: replace(p, layers=(replace(p.layers[0], gate_up=uneven), p.layers[1]))
    )
    refuse(base, out, ggml, "more than its budget of 1000", lambda p: replace(p, budget_bytes=1000))
    refuse(base, out, ggml, "dispatch is 'random'", lambda p: replace(p, dispatch="random"))
    refuse(base, out, ggml, "dispatch block", lambda p: replace(p, dispatch_block=0))
    eight = tuple((t,) * 2 for t in ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"))
    eight = ((*eight[0], "iq4_nl"), (*eight[1], "iq4_xs"), *((*row, "q8_0") for row in eight[2:]))
    refuse(base, out, ggml, "uses 8 types", lambda p: replace(p, layers=(LayerPlan(1, eight, eight), p.layers[1])))
    refuse(base, base, ggml, "is the base model itself")


@pytest.mark.runtime
def test_calibrations_that_do_not_fit(tmp_path, ggml, base):
    out = tmp_path / "out.gguf"
    refuse(base, out, ggml, "made for another model", change_calibration=lambda c: replace(c, model_fingerprint="f" * 64))
    refuse(base, out, ggml, "no entry for block 1", change_calibration=lambda c: replace(c, layers=c.layers[1:]))
    small = {"down": np.ones((6, 128), dtype=np.float32)}
    refuse(
        base, out, ggml, r"down inputs of block 1 have shape \[6, 128\]",
        change_calibration=lambda c: replace(c, layers=(replace(c.layers[0], in_sum2=small), c.layers[1])),
    )  # fmt: skip
    refuse(
        base, out, ggml, "iq2_xxs needs an importance matrix",
        change_plan=lambda p: replace(p, layers=tuple(replace(x, down=(("iq2_xxs",),) * 6) for x in p.layers)),
        change_calibration=lambda c: replace(c, layers=tuple(replace(x, in_sum2={}) for x in c.layers)),
    )  # fmt: skip


@pytest.mark.runtime
def test_directories_that_cannot_be_written(tmp_path, ggml, base):
    (tmp_path / "folder").mkdir()
    refuse(base, tmp_path / "folder", ggml, "is a directory")
    with Source(base) as source:
        calibration, plan = calibration_of(source), uniform_plan(source, "q8_0")
    with pytest.raises(UserError, match="cannot write in .*no such file"):
        write_model(base, plan, calibration, tmp_path / "absent" / "out.gguf", ggml=ggml)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write in .*not a directory"):
        write_model(base, plan, calibration, tmp_path / "file" / "out.gguf", ggml=ggml)


SCRIPT = """
    import resource, sys
    from pathlib import Path
    from rq_gguf.errors import UserError
    from rq_gguf.ggml import Ggml
    from rq_gguf.runtime import tools
    from rq_gguf.writing import quantize
    from rq_gguf.writing.source import Source
    from rq_gguf.writing.write import write_model
    from writing.samples import calibration_of, uniform_plan
    {setup}
    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    with Source(base) as source:
        calibration, plan = calibration_of(source), uniform_plan(source, "q8_0")
    try:
        write_model(base, plan, calibration, out, ggml=Ggml(tools.library_path()), threads=2)
    except UserError as e:
        sys.exit(f"refused: {{e}}")
"""

SLOW = """
    import time
    from rq_gguf.writing import write
    convert = write.convert
    def slow(*args):
        print("started", flush=True)
        time.sleep(0.2)
        return convert(*args)
    write.convert = slow
"""


def start(base: Path, out: Path, setup: str) -> subprocess.Popen[str]:
    script = textwrap.dedent(SCRIPT).format(setup=textwrap.dedent(setup))
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script, base, out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.runtime
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system does not reserve space")
def test_disk_full(tmp_path, base):
    """A limit on the size of files stands for the full disk: the system refuses the file's space before any work is done."""
    out = tmp_path / "folder" / "out.gguf"
    out.parent.mkdir()
    process = start(base, out, SLOW + "    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))")
    text, errors = process.communicate(timeout=60)
    assert "refused: cannot write" in errors and "file too large; nothing was left behind" in errors
    assert text == ""  # no "started"
    assert process.returncode == 1
    assert names_left(out.parent) == set()


@pytest.mark.runtime
def test_disk_full_in_the_middle(tmp_path, ggml, base, monkeypatch):
    """Where space cannot be reserved (a file system may not know how), the write itself finds the disk full."""
    real, written = os.pwrite, []

    def full(fd: int, data: memoryview, offset: int) -> int:
        written.append(len(data))
        if sum(written) > 500_000:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(write, "_reserve", lambda fd, total: os.ftruncate(fd, total))
    monkeypatch.setattr(os, "pwrite", full)
    refuse(base, tmp_path / "out.gguf", ggml, "cannot write .*out.gguf: no space left on device; nothing was left behind")
    assert len(written) > 2


@pytest.mark.runtime
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_interrupted(tmp_path, base, number, status):
    out = tmp_path / "folder" / "out.gguf"
    out.parent.mkdir()
    out.write_text("an earlier file")
    process = start(base, out, SLOW)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("started")  # by more than one thread, perhaps
    assert len(names_left(out.parent)) == 2
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == status
    assert names_left(out.parent) == {"out.gguf"}
    assert out.read_text() == "an earlier file"


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say a process's own peak")
def test_peak_memory(tmp_path, runtime):
    """A model of 200 MB goes through a few megabytes."""
    base = base_model(tmp_path / "base.gguf", layers=(0,), n_expert=64, n_embd=1024, n_ff=512)
    # VmHWM and not ru_maxrss, which a child inherits from its parent: this one has had the whole model in memory.
    report = """
    import atexit, re
    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    before = peak()
    atexit.register(lambda: print(before // 1024, (peak() - before) // 1024))
    """
    process = start(base, tmp_path / "out.gguf", report)
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    before, more = map(int, text.split())
    assert base.stat().st_size > 190e6
    assert before > 0 and 0 < more < 32, f"{more} MiB on top of {before} MiB"


@pytest.mark.runtime
def test_a_base_that_claims_too_many_blocks(tmp_path, ggml):
    """A list with a number per block is written, so a few bytes could ask for gigabytes (llama-quantize stops at 512)."""
    base = base_model(tmp_path / "base.gguf", values={"llama.block_count": 400})
    with Source(base) as source:
        calibration, plan = calibration_of(source), plan_of(uniform_plan(source, "q8_0").layers)
    with pytest.raises(UserError, match=r"base.gguf is damaged: it claims 400 blocks"):
        write_model(base, plan, calibration, tmp_path / "out.gguf", ggml=ggml, progress=False)
