"""Benches of the demo model, and what is refused."""

import json
import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import ROOT
from writing.samples import base_model

from rq_gguf.bench import measure
from rq_gguf.bench.measure import TEXT_PROMPT, TEXT_REPLY, bench, check_options, names_of_tests, variants_of
from rq_gguf.cli import main
from rq_gguf.errors import UserError
from rq_gguf.runtime.tools import run_tool

SMALL = ["-p", "16", "-n", "4", "-b", "2", "--repetitions", "1", "--threads", "1"]


@pytest.mark.runtime
def test_the_command(tiered_demo, demo_base, tmp_path):
    """Both kinds of files, all programs, real text among them; the table is what the JSON says."""
    out = tmp_path / "bench.json"
    done = CliRunner().invoke(
        main, ["bench", str(tiered_demo), str(demo_base), *SMALL, "--rounds", "2", "--json", str(out), "--", "-ngl", "0"]
    )
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    tests = ["pp16", TEXT_PROMPT, "tg4", TEXT_REPLY, "2 sequences"]
    for file, path, is_tiered in zip(data["files"], (tiered_demo, demo_base), (True, False), strict=True):
        assert (file["file_bytes"], file["tiered"]) == (path.stat().st_size, is_tiered)
        assert list(file["tests"]) == tests
        assert all(len(t["samples"]) == 2 and min(t["samples"]) > 0 for t in file["tests"].values())
    assert 5 < data["text"][TEXT_PROMPT] <= 48 and data["text"][TEXT_REPLY] == 3  # what follows the first token
    assert data["rounds"] == 2 and not data["interrupted"] and "CPU" in data["machine"]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and "gguf" in line]
    assert len(rows) == 10
    assert f"{data['files'][1]['tests']['pp16']['ratio']['median']:.3f}" in rows[1]
    assert "with -t 1 -ngl 0" in done.stdout


@pytest.mark.runtime
def test_the_unpatched_llama_cpp_runs_stock_files_only(tiered_demo, demo_base, stock_runtime):
    variants = variants_of([tiered_demo, demo_base], unpatched=True)
    assert [(v.name, v.unpatched) for v in variants] == [
        ("tiered.gguf", False), ("demo.gguf", False), ("demo.gguf, unpatched", True)
    ]  # fmt: skip
    options = check_options("16", "0", "0", rounds=1, repetitions=1, threads=1)
    found = bench(variants, options, progress=False)
    assert set(found.samples) == {(v.name, "pp16") for v in variants}
    with pytest.raises(UserError, match="--unpatched runs stock files"):
        variants_of([tiered_demo], unpatched=True)


@pytest.mark.runtime
def test_a_file_that_llama_cpp_refuses_is_named(tmp_path, demo_base, runtime):
    """llama-bench says which argument, llama.cpp which file."""
    done = CliRunner().invoke(main, ["bench", str(demo_base), *SMALL, "--", "--nonsense"])
    assert done.exit_code == 2 and "demo.gguf: llama-bench failed" in done.stderr and "--nonsense" in done.stderr
    broken = base_model(tmp_path / "broken.gguf")  # has no tokenizer that llama.cpp knows
    done = CliRunner().invoke(main, ["bench", str(broken), *SMALL])
    assert done.exit_code == 2 and "broken.gguf: llama-bench failed" in done.stderr


@pytest.mark.runtime
def test_ctrl_c_prints_what_was_measured(demo_base, tmp_path, runtime):
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "rq_gguf", "bench", demo_base, *SMALL, "--no-text", "--rounds", "100000", "--json", out, "-v"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = 0
    while seen < 4 and (line := process.stderr.readline()):
        seen += "llama-batched-bench" in line
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "(interrupted)" in stdout and "| pp16" in stdout
    assert json.loads(out.read_text())["interrupted"] is True


@pytest.mark.runtime
def test_lost_lines_are_measured_again(demo_base, monkeypatch):
    """llama.cpp's programs may end before their last lines are printed."""
    runs = []

    def lossy(*args, **options):
        printed = run_tool(*args, **options)
        runs.append(args)
        if len(runs) > 2:
            return printed
        return type(printed)("\n".join(printed.stdout.splitlines()[:-40]), "")

    monkeypatch.setattr(measure, "run_tool", lossy)
    found = bench(variants_of([demo_base]), check_options("16", "0", "0", rounds=1, repetitions=1, threads=1), progress=False)
    assert len(runs) == 3 and len(found.samples["demo.gguf", "pp16"]) == 1
    monkeypatch.setattr(measure, "run_tool", lambda *args, **options: type(run_tool(*args, **options))("", "the last words"))
    with pytest.raises(UserError, match="llama-bench measured nothing of .*demo.gguf in 12 runs; the last said: the last words"):
        bench(variants_of([demo_base]), check_options("1", "0", "0", rounds=1, repetitions=1, threads=1), progress=False)


def test_options(tmp_path):
    options = check_options("512, 64,512", "128", "1,4", rounds=2, text=tmp_path)
    assert (options.prompt, options.generate, options.sequences) == ((512, 64), (128,), (1, 4))
    assert names_of_tests(options) == ("pp512", "pp64", TEXT_PROMPT, "tg128", TEXT_REPLY, "1 sequence", "4 sequences")
    assert check_options("0", "128", "0", text=tmp_path).text is None
    for sizes, message in [
        (("x", "1", "1"), "-p x is not understood"),
        (("1", "-1", "1"), "-n -1 is not understood"),
        (("1", "1", "2,"), "-b 2, is not understood"),
        (("0", "0", "0"), "leave nothing to measure"),
    ]:
        with pytest.raises(UserError, match=message):
            check_options(*sizes)


def test_names(tmp_path):
    """Files of one name in two folders, and one twice."""
    paths = [base_model(tmp_path / folder / "x.gguf") for folder in ("a", "b") if not (tmp_path / folder).mkdir()]
    names = [v.name for v in variants_of([*paths, paths[0], paths[0]])]
    assert names == ["x.gguf", str(paths[1]), str(paths[0]), f"{paths[0]} (2)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.gguf"], "cannot read none.gguf: no such file"),
        (["README.md"], "README.md is not a GGUF file"),
        (["--", "-ngl", "1"], "name at least one GGUF"),
        (["x.gguf", "-p", "many"], "-p many is not understood"),
    ],
)
def test_refused(arguments, message):
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 2 and message in done.stderr
