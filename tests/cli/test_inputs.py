"""What `build` and `plan` take: types, budgets, other tensors, imatrix files. No torch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calibration.samples import as_dat, as_llama_imatrix
from click.testing import CliRunner, Result
from writing.samples import base_model, calibration_of

from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import read_calibration, write_calibration
from rq_gguf.choices import Choices, check_choices, types_for
from rq_gguf.cli import main
from rq_gguf.errors import UserError
from rq_gguf.gguf_file import read_header
from rq_gguf.types import LADDER, PAPER_TYPES
from rq_gguf.writing.inspect import inspect
from rq_gguf.writing.source import Source

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base.gguf, its calibration.gguf (q4_k, q8_0), and plain imatrix files of it."""
    directory = tmp_path_factory.mktemp("inputs")
    base_model(directory / "base.gguf", n_expert=8)
    with Source(directory / "base.gguf") as source:
        c = with_dense(calibration_of(source), source)
    write_calibration(directory / "calibration.gguf", c)
    as_llama_imatrix(directory / "imatrix.gguf", c)
    as_dat(directory / "imatrix.dat", c)
    return directory


def with_dense(c: Calibration, source: Source) -> Calibration:
    dense = {
        f"blk.{layer.layer}.{name}.weight": np.full(source.shape.layers[0].n_embd, c.n_tokens, np.float32)
        for layer in c.layers
        for name in ("attn_q", "ffn_gate_inp")
    }
    return replace(c, dense_in_sum2=dense)


def run(*args: object) -> Result:
    return CliRunner().invoke(main, list(map(str, args)), env={"RQ_GGUF_DEBUG": ""})


def good(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and message in last, result.stderr


# types


def choices(types: str | None = None, policy: str = "budget") -> Choices:
    return check_choices("q8_0", types, "auto", policy)


def test_types_where_none_are_named(tmp_path: Path) -> None:
    assert types_for(choices("q8_0,q2_k"), ("q4_k",), None) == ("q2_k", "q8_0")
    assert types_for(choices(), (), None) == LADDER
    assert types_for(choices(), ("q4_k", "q6_k"), None) == ("q4_k", "q6_k")
    assert types_for(choices(policy="paper"), ("q2_k", "q4_k", "q6_k", "q8_0"), None) == PAPER_TYPES
    with Source(base_model(tmp_path / "mxfp4.gguf", stored="mxfp4")) as source:
        assert types_for(choices(), (), source) == ("q2_k", "iq3_xxs", "q3_k", "iq3_s", "mxfp4")
    with Source(base_model(tmp_path / "q8_0.gguf", stored="q8_0")) as source:
        assert types_for(choices(), (), source) == LADDER


def test_a_model_in_mxfp4(tmp_path: Path, runtime: Path) -> None:
    """Its experts stay as they are where the budget allows it."""
    base, out = base_model(tmp_path / "base.gguf", stored="mxfp4", n_expert=4), tmp_path / "out.gguf"
    with Source(base) as source:
        as_llama_imatrix(tmp_path / "imatrix.gguf", calibration_of(source))
    good(run("build", base, out, "--imatrix", tmp_path / "imatrix.gguf", "--replicas", 0, "--budget", "mxfp4"))
    theirs, ours = read_header(base), read_header(out)
    for name in ("gate", "down"):
        a, b = theirs.tensors[f"blk.0.ffn_{name}_exps.weight"], ours.tensors[f"blk.0.ffn_{name}_exps.0.weight"]
        assert b.type == "mxfp4"
        assert base.read_bytes()[a.offset : a.offset + a.n_bytes] == out.read_bytes()[b.offset : b.offset + b.n_bytes]


def test_rows_that_a_type_cannot_hold_are_told(tmp_path: Path, runtime: Path) -> None:
    base, out = base_model(tmp_path / "base.gguf", n_ff=96, n_expert=4), tmp_path / "out.gguf"
    with Source(base) as source:
        as_llama_imatrix(tmp_path / "imatrix.gguf", calibration_of(source))
    args = ["--imatrix", tmp_path / "imatrix.gguf", "--types", "q2_k,q3_k,q4_k,q6_k,q8_0", "--budget", "5bpw", "--json", "-"]
    result = good(run("build", base, out, *args))
    note = "rows of 96 weights in down cannot be q2_k, q3_k, q4_k, q6_k: q4_0, q4_0, q5_0, q8_0 instead"
    assert f"note      {note}\n" in result.stderr and json.loads(result.stdout)["notes"] == [note]
    for layer in inspect(out).layers:
        kinds = [kind for kind, _ in layer.tiers["down"]]
        assert len(kinds) == len(set(kinds)) and set(kinds) <= {"q4_0", "q5_0", "q8_0"}
    measured = read_calibration(tmp_path / "out.gguf.rq" / "calibration.gguf")
    for layer in measured.layers:
        assert np.array_equal(layer.error[:, 1, 0], layer.error[:, 1, 1]) and (layer.error[:, 0, 0] > layer.error[:, 0, 1]).all()
    plan = run("plan", tmp_path / "out.gguf.rq" / "calibration.gguf", "-o", tmp_path / "plan.json", "--budget", "5bpw")
    assert f"note      {note}\n" in good(plan).stdout


def test_types_measured_before_are_enough(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    args = ["build", inputs / "base.gguf", out, "--imatrix", inputs / "imatrix.gguf", "--dry-run"]
    good(run(*args, "--types", "q4_k,q6_k,q8_0"))
    fewer = good(run(*args, "--types", "q4_k,q8_0"))
    assert "calibrate: done before" in fewer.stderr and "plan: done before" not in fewer.stderr
    assert json.loads((tmp_path / "out.gguf.rq" / "plan.json").read_text())["types"] == ["q4_k", "q8_0"]
    more = good(run(*args, "--types", "q4_k,q5_k,q8_0"))
    assert "done before" not in more.stderr
    assert read_calibration(tmp_path / "out.gguf.rq" / "calibration.gguf").types == ("q4_k", "q5_k", "q8_0")
    (tmp_path / "out.gguf.rq" / "calibration.gguf").write_bytes(b"GGUF")
    assert "calibrate: done before" not in good(run(*args, "--types", "q4_k,q8_0")).stderr


# budgets


def test_a_budget_like_a_file(inputs: Path, tmp_path: Path) -> None:
    out, like = tmp_path / "out.gguf", tmp_path / "like.gguf"
    build = ["build", inputs / "base.gguf", out, "--calibration", inputs / "calibration.gguf"]
    good(run(*build, "--budget", "6bpw"))
    like.write_bytes(out.read_bytes())
    result = good(run(*build, "--budget", f"like:{like}"))
    size = like.stat().st_size
    assert size - (1 << 16) < out.stat().st_size <= size
    assert f"of the budget like:like.gguf ({size} bytes)" in result.stdout
    assert inspect(out).provenance["rq.budget"] == f"like:like.gguf ({size} bytes)"
    assert "write: done before" in good(run(*build, "--budget", f"LIKE:{like}")).stderr
    plan = tmp_path / "out.gguf.rq" / "plan.json"
    like.unlink()
    good(run(*build, "--plan", plan, "--force"))  # the plan knows the bytes, whatever became of the file

    refused(run(*build, "--budget", f"like:{like}"), f"--budget like:{like}: cannot read {like}: no such file")
    like.write_text("words")
    refused(run(*build, "--budget", f"like:{like}"), f"{like} is not a GGUF file; give a GGUF whose size is to be met")


def test_a_budget_like_a_split_file(tmp_path: Path) -> None:
    base_model(tmp_path / "m.gguf", split_max_tensors=5)
    whole = sum(p.stat().st_size for p in tmp_path.glob("m-*.gguf"))
    budget = check_choices(f"like:{tmp_path}/m-00001-of-00003.gguf", None, "auto", "budget").budget
    assert (budget.kind, budget.value) == ("size", whole)
    with pytest.raises(UserError, match="is not the first file"):
        check_choices(f"like:{tmp_path}/m-00002-of-00003.gguf", None, "auto", "budget")


def test_a_plan_for_a_whole_file(inputs: Path, tmp_path: Path) -> None:
    """`plan --base` and `build` come to the same."""
    plan, out = tmp_path / "plan.json", tmp_path / "out.gguf"
    size = 2_600_000
    args = ["plan", inputs / "calibration.gguf", "-o", plan, "--budget", size]
    refused(run(*args), "bounds a whole file, and a calibration knows only its experts; give the model too (--base MODEL.gguf)")
    good(run(*args, "--base", inputs / "base.gguf"))
    good(run("build", inputs / "base.gguf", out, "--calibration", inputs / "calibration.gguf", "--budget", size))
    assert out.stat().st_size <= size
    a, b = (json.loads(p.read_text()) for p in (plan, tmp_path / "out.gguf.rq" / "plan.json"))
    assert a == b
    good(run(*args, "--base", inputs / "base.gguf", "--other", "Q4_K_S"))
    assert json.loads(plan.read_text())["budget_bytes"] > b["budget_bytes"]
    refused(run(*args, "--base", inputs / "base.gguf", "--budget", "100kB"), "--budget 100kB cannot be met: the least possible is")
    base_model(tmp_path / "other.gguf", n_expert=8, seed=1)
    refused(run(*args, "--base", tmp_path / "other.gguf"), "was made for another model")


def test_an_impossible_budget_is_noticed_before_calibrating(inputs: Path, tmp_path: Path) -> None:
    args = ["build", inputs / "base.gguf", tmp_path / "out.gguf", "--imatrix", inputs / "imatrix.gguf"]
    for budget, words in (("100kB", "bytes (0 of experts"), ("2bpw", "the least possible is 2.625"), ("q2_k", "q4_k")):
        types = ["--types", "q4_k,q8_0"] if budget == "q2_k" else []
        result = run(*args, "--budget", budget, *types)
        assert result.exit_code == 2 and f"--budget {budget}" in result.stderr and "cannot be met: the least possible is" in result.stderr
        if "experts" not in words:
            assert words in result.stderr
    assert not (tmp_path / "out.gguf.rq" / "calibration.gguf").exists()
    refused(run(*args, "--other", "Q8_0", "--tensor-type", "nothing=q8_0"), "--tensor-type nothing=q8_0 matches no tensor")
    assert not (tmp_path / "out.gguf.rq" / "calibration.gguf").exists()


# other tensors


def test_other_tensors(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    args = ["build", inputs / "base.gguf", out, "--calibration", inputs / "calibration.gguf", "--budget", "6bpw"]
    good(run(*args))
    before, experts = out.stat().st_size, inspect(out).expert_bytes
    result = good(run(*args, "--other", "q4_k_m", "--tensor-type", "token_embd=q6_k"))
    assert "plan: done before" in result.stderr and "write: done before" not in result.stderr
    types = {name: t.type for name, t in read_header(out).tensors.items()}
    assert (types["token_embd.weight"], types["blk.0.attn_q.weight"], types["blk.0.ffn_gate_inp.weight"]) == ("q6_k", "q4_k", "f32")
    found = inspect(out)
    assert (found.provenance["rq.other"], found.provenance["rq.tensor_types"]) == ("Q4_K_M", ["token_embd=q6_k"])
    assert found.expert_bytes == experts and out.stat().st_size < before
    assert "write: done before" in good(run(*args, "--other", "Q4_K", "--tensor-type", "token_embd=q6_k")).stderr
    good(run(*args, "--other", "Q4_K_M", "--budget", before))
    assert before - (1 << 17) < out.stat().st_size <= before
    assert inspect(out).expert_bytes > experts  # what the others save the experts get
    refused(run(*args, "--other", "Q9"), "--other Q9 is unknown")
    refused(run(*args, "--tensor-type", "ffn_up=q6_k"), "the plan decides the types of routed experts")


# imatrix


BLOCKED = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
from rq_gguf.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_an_imatrix_needs_no_torch(inputs: Path, tmp_path: Path, form: str) -> None:
    """From a GGUF and an imatrix to a finished file in a Python that cannot import torch."""
    out = tmp_path / "out.gguf"
    args = ["build", inputs / "base.gguf", out, "--imatrix", inputs / f"imatrix.{form}", "--types", "q4_k,q6_k,q8_0", "--budget", "6bpw"]
    args += ["--replicas", "1"] if form == "gguf" else []
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "RQ_GGUF_DEBUG": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = inspect(out)
    assert set(found.bytes_by_type) > {"q6_k"}
    assert read_header(out).get("quantize.imatrix.file") == f"imatrix.{form}"
    copies = sum(sum(layer.copies) for layer in found.layers)
    if form == "gguf":
        assert copies == 2 and found.layers[0].lis_before is not None
        return
    assert copies == 0 and found.layers[0].lis_before is None
    assert "does not say how often each expert is picked" in done.stderr and "balance cannot be planned" in done.stderr
    assert "note      the calibration does not say how often each expert is picked" in done.stdout
    assert "balance   unknown\n" in done.stdout and "LIS" not in done.stdout


def test_both_forms_give_the_same_types_where_loads_are_even(inputs: Path, tmp_path: Path) -> None:
    """Without counts the load is taken as even; where it is, nothing is lost."""
    with Source(inputs / "base.gguf") as source:
        c = with_dense(calibration_of(source), source)
    even = tuple(
        replace(x, selections=np.full(8, 512), in_sum2={m: s / x.selections[:, None] * 512 for m, s in x.in_sum2.items()}) for x in c.layers
    )
    c = replace(c, layers=tuple(replace(x, in_sum2={m: s.astype(np.float32) for m, s in x.in_sum2.items()}) for x in even), n_tokens=2048)
    as_llama_imatrix(tmp_path / "i.gguf", c)
    as_dat(tmp_path / "i.dat", c, ncall=4)
    plans = []
    for form in ("gguf", "dat"):
        args = ["--imatrix", tmp_path / f"i.{form}", "--types", "q3_k,q4_k,q8_0", "--budget", "5bpw", "--replicas", 0, "--dry-run"]
        good(run("build", inputs / "base.gguf", tmp_path / f"{form}.gguf", *args))
        layers = json.loads((tmp_path / f"{form}.gguf.rq" / "plan.json").read_text())["layers"]
        plans.append([(e["gate_up"], e["down"]) for layer in layers for e in layer["experts"]])
    assert plans[0] == plans[1] and len(set(plans[0])) > 1


def test_what_a_dat_cannot_do(inputs: Path, tmp_path: Path) -> None:
    args = ["build", inputs / "base.gguf", tmp_path / "out.gguf", "--imatrix", inputs / "imatrix.dat"]
    refused(run(*args, "--types", "q8_0", "--replicas", 2), "--replicas 2 cannot choose what to copy")
    refused(run(*args, "--policy", "paper"), "--policy paper cannot choose what to copy")
    result = good(run("plan", inputs / "imatrix.dat", "-o", tmp_path / "plan.json", "--budget", "5bpw", "--json", tmp_path / "report.json"))
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["lis_before"] is data["layers"][0]["lis_after"] is data["worst_layer"] is None
    assert "typical ones stand in for them" in result.stderr and "copies    0 (0.0 per layer)" in result.stdout


def test_imatrix_refusals(inputs: Path, tmp_path: Path) -> None:
    base, out, text = inputs / "base.gguf", tmp_path / "out.gguf", tmp_path / "text.txt"
    text.write_text("To be, or not to be")
    refused(run("build", base, out, "--imatrix", tmp_path / "none.gguf"), "--imatrix")
    refused(run("build", base, out, "--imatrix", text), f"--imatrix {text} is no imatrix; a text to calibrate on goes with --calibration")
    both = ["--imatrix", inputs / "imatrix.gguf", "--calibration", text]
    refused(run("build", base, out, *both), "--calibration and --imatrix exclude each other")
    deep = base_model(tmp_path / "deep.gguf", n_expert=8, layers=(0, 1, 2))
    refused(run("build", deep, out, "--imatrix", inputs / "imatrix.gguf"), "is a calibration of another model: it has blocks [0, 1]")
    wide = base_model(tmp_path / "wide.gguf", n_expert=4)
    refused(run("build", wide, out, "--imatrix", inputs / "imatrix.dat"), "the calibration's gate inputs of block 0 have shape [4, 512]")
    assert not out.exists()
