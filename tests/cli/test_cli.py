"""The command line: help, exit statuses, one-line errors, JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from synthetic import synthetic_calibration

import rq_gguf
from rq_gguf.calibration.file import write_calibration
from rq_gguf.choices import parse_memory
from rq_gguf.cli import main
from rq_gguf.errors import UserError


def run(*args: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], env=env)


def refused(result: Result, message: str) -> None:
    """Exit status 2, one sentence on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    write_calibration(tmp_path / "calibration.gguf", synthetic_calibration(n_layers=3, n_expert=16))
    return tmp_path / "calibration.gguf"


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("build", "calibrate", "plan", "inspect", "eval", "runtime"):
        assert f"\n  {command} " in result.stdout
    for args in (["build"], ["calibrate"], ["plan"], ["inspect"], ["eval"], ["runtime"]):
        assert run(*args, "--help").exit_code == 0
    for option in ("--budget", "--types", "--replicas", "--policy", "--calibration", "--plan", "--dry-run", "--json", "--force"):
        assert option in run("build", "--help").stdout
    for command in ("install", "path", "doctor"):
        assert command in run("runtime", "--help").stdout


def test_version() -> None:
    assert run("--version").stdout == f"rq-gguf, version {rq_gguf.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    """What makes --help quick, without a clock."""
    code = "import sys; from rq_gguf.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "gguf", "tqdm", "huggingface_hub"} & set(modules)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--budget", "lots"], "--budget 'lots' is not understood"),
        (["--types", "q4_k,q9_k"], "unknown type 'q9_k'"),
        (["--replicas", "many"], "--replicas 'many' is not understood"),
        (["--max-tiers", "8"], "--max-tiers '8' is not understood; give a number of types per layer and matrix from 1 to 7"),
        (["--balance-weight", "-1"], "--balance-weight '-1' is not understood"),
        (["--balance-weight", "1", "--replicas", "2"], "--balance-weight and --replicas 2 exclude each other"),
        (["--policy", "paper", "--max-tiers", "2"], "--max-tiers needs --policy budget"),
        (["--max-tiers", "2", "--plan", "plan.json"], "--max-tiers and --plan exclude each other"),
        (["--policy", "paper", "--replicas", "3"], "exactly one copy per layer"),
        (["--policy", "other"], "'other' is not one of 'budget', 'paper'"),
        (["--budget", "q8_0", "--plan", "plan.json"], "--budget and --plan exclude each other"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_bad_choices_are_refused_before_any_work(tmp_path: Path, args: list[str], message: str) -> None:
    refused(run("build", "demo", tmp_path / "out.gguf", *args), message)
    assert list(tmp_path.iterdir()) == []


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    refused(run("build", tmp_path / "none.gguf", out), "none.gguf does not exist")
    refused(run("build", "nothing", out), "nothing does not exist; MODEL is demo, a directory")
    refused(run("build", "./owner/name", out), "does not exist; MODEL is demo, a directory")
    refused(run("build", "demo", out, "--calibration", tmp_path / "none.txt"), "--calibration")
    refused(run("build", "demo", out, "--plan", tmp_path / "none.json"), "--plan")
    refused(run("inspect", tmp_path / "none.gguf"), "does not exist")
    refused(run("plan", tmp_path / "none.gguf", "-o", tmp_path / "plan.json"), "does not exist")
    refused(run("eval", tmp_path / "none.gguf", "--base", tmp_path / "b.gguf", "--text", tmp_path / "t.txt"), "does not exist")
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_needs_a_calibration_file(tmp_path: Path) -> None:
    model, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    model.write_bytes(b"GGUF")
    text.write_text("words")
    refused(run("build", model, tmp_path / "out.gguf"), "give a calibration file")
    refused(run("build", model, tmp_path / "out.gguf", "--calibration", text), "give a calibration file instead of a text")
    refused(run("calibrate", model, "-o", tmp_path / "c.gguf"), "calibration needs the Hugging Face model")


def test_plan(calibration: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "plan.json", tmp_path / "report.json"
    result = run("plan", calibration, "-o", out, "--replicas", "2", "--json", report)
    assert result.exit_code == 0, result.output
    assert "copies    6 (2.0 per layer)" in result.stdout
    assert f"plan      {out}" in result.stdout
    data = json.loads(report.read_text())
    assert data["copies"] == 6 and data["expert_bytes"] <= data["budget_bytes"] and len(data["layers"]) == 3
    assert json.loads(out.read_text())["expert_bytes"] == data["expert_bytes"]


def test_json_to_stdout_is_nothing_but_json(calibration: Path, tmp_path: Path) -> None:
    result = run("plan", calibration, "-o", tmp_path / "plan.json", "--json", "-")
    assert json.loads(result.stdout)["policy"] == "budget"
    assert "balance   LIS" in result.stderr


def test_plan_refusals(calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    refused(run("plan", calibration, "-o", out, "--budget", "3bpw"), "the least possible is 4.5")
    refused(run("plan", calibration, "-o", out, "--budget", "1GiB"), "bounds a whole file")
    refused(run("plan", calibration, "-o", out, "--types", "q6_k"), "measured no error for q6_k")
    refused(run("plan", calibration, "-o", tmp_path / "none" / "plan.json"), "its directory does not exist")
    (tmp_path / "text.txt").write_text("words")
    refused(run("plan", tmp_path / "text.txt", "-o", out), "neither a calibration file nor an imatrix")
    assert not out.exists()


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("rq_gguf.build.build", fail)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("the model is dense"), 2, "Error: the model is dense"),
        (
            OSError(28, "No space left on device", "out.gguf"),
            2,
            "Error: the disk is full (out.gguf); free some space and run the command again",
        ),
        (PermissionError(13, "Permission denied", "dir/x"), 2, "Error: dir/x: Permission denied"),
        (MemoryError(), 2, "Error: out of memory; close other programs or use a machine with more"),
        (KeyboardInterrupt(), 130, "Interrupted: finished steps are kept, nothing half-made was left behind"),
        (ZeroDivisionError("of\nmine"), 1, "Error: unexpected ZeroDivisionError: of mine (RQ_GGUF_DEBUG=1 shows where)"),
    ],
)
def test_every_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, status: int, line: str) -> None:
    raising(monkeypatch, error)
    result = run("build", "demo", tmp_path / "out.gguf", env={"RQ_GGUF_DEBUG": ""})
    assert (result.exit_code, result.stderr.splitlines(), result.stdout) == (status, [line], "")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    raising(monkeypatch, UserError("the model is dense"))
    result = run("build", "demo", tmp_path / "out.gguf", env={"RQ_GGUF_DEBUG": "1"})
    assert isinstance(result.exception, UserError)


def test_inspect_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no GGUF at all")
    refused(run("inspect", tmp_path / "x.gguf"), "x.gguf")


def test_eval_looks_for_the_base_where_build_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no GGUF at all")
    refused(run("eval", tmp_path / "x.gguf"), "x.gguf.rq/base.gguf is not there; name the GGUF that x.gguf was made from with --base")
    (tmp_path / "x.gguf.rq").mkdir()
    (tmp_path / "x.gguf.rq" / "base.gguf").write_bytes(b"no GGUF either")
    found = run("eval", tmp_path / "x.gguf")
    assert found.exit_code == 2 and "no text given: using the project's own held-out text" in found.stderr and "x.gguf" in found.stderr


def test_runtime_that_is_not_installed(tmp_path: Path) -> None:
    env = {"RQ_GGUF_CACHE": str(tmp_path), "RQ_GGUF_RUNTIME": ""}
    refused(run("runtime", "path", env=env), "rq-gguf runtime install")
    refused(run("build", "demo", tmp_path / "out.gguf", env=env), "rq-gguf runtime install")
    assert not (tmp_path / "out.gguf.rq").exists()


def test_runtime_path(runtime: Path) -> None:
    assert run("runtime", "path").stdout.strip() == str(runtime)
    assert Path(run("runtime", "path", "llama-quantize").stdout.strip()).parent == runtime
    refused(run("runtime", "path", "llama-nothing"), "llama-nothing")


def program(*args: object, **kwargs: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rq_gguf", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_as_a_program(tmp_path: Path) -> None:
    process = program("inspect", tmp_path / "none.gguf")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "") and "Error: " in err and "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c(tmp_path: Path) -> None:
    fifo = tmp_path / "calibration.gguf"  # reading it blocks until we write
    os.mkfifo(fifo)
    out = tmp_path / "plan.json"
    code = (
        "import sys, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"from rq_gguf import build; build.plan_calibration = lambda *a, **k: open({str(fifo)!r}).read(); "
        f"from rq_gguf.cli import main; print('ready', flush=True); main(['plan', {str(fifo)!r}, '-o', {str(out)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == ["Interrupted: finished steps are kept, nothing half-made was left behind"]
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes differ")
def test_a_reader_that_leaves_is_no_error(calibration: Path, tmp_path: Path) -> None:
    process = program("plan", calibration, "-o", tmp_path / "plan.json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in err and "Error" not in err


def test_memory_is_a_size() -> None:
    assert tuple(map(parse_memory, (None, "4GB", "900MiB"))) == (None, 4 * 10**9, 900 << 20)
    for text in ("q8_0", "4.5bpw", "much", "-1GB", "like:x"):
        with pytest.raises(UserError, match=f"--max-memory {text} is not understood; give a size"):
            parse_memory(text)
