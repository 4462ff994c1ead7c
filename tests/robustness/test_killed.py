"""Builds that are killed, run out of disk, or meet another build: the output's name never holds half a file, and a rerun finishes it.

RQ_GGUF_KILLS=50 python -m pytest tests/robustness/test_killed.py
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from writing.samples import base_model, calibration_of

from rq_gguf.atomic import replacing
from rq_gguf.calibration.file import write_calibration
from rq_gguf.writing.source import Source

pytestmark = pytest.mark.runtime

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("RQ_GGUF_KILLS", "4"))
CHARACTERS = 5_000
"""Of the calibration text: about a thousand tokens."""


@pytest.fixture(scope="module")
def model(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a build of a small GGUF with its calibration."""
    folder = tmp_path_factory.mktemp("model")
    base_model(folder / "base.gguf", n_expert=16)
    with Source(folder / "base.gguf") as source:
        write_calibration(folder / "calibration.gguf", calibration_of(source))
    return [str(folder / "base.gguf"), "--calibration", str(folder / "calibration.gguf")]


@pytest.fixture(scope="module")
def demo(runtime: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a build of the demo model with all its steps, on a short text."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    source = ROOT / "rq_gguf" / "data" / "calibration" / "stories.txt"
    text.write_text(source.read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    return [str(demo_model), "--calibration", str(text), "--types", "q4_k,q8_0"]


def command(arguments: list[str], out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "rq_gguf", "build", arguments[0], str(out), *arguments[1:], "--budget", "q4_k", *more]


def start(arguments: list[str], out: Path) -> "subprocess.Popen[bytes]":
    # A session of its own: SIGKILL is to hit what it started too, as a machine that goes down would.
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command(arguments, out), cwd=ROOT, start_new_session=True, **quiet)


def run(arguments: list[str], out: Path, *more: str, file_size: int | None = None) -> "subprocess.CompletedProcess[str]":
    """A whole build. file_size: most bytes that it may write to one file, as on a disk that is full."""

    def limit() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.run(command(arguments, out, *more), cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit)


def beside(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir())


@pytest.fixture(scope="module")
def undisturbed(demo: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[bytes, float]]:
    """(the file that an undisturbed build writes, seconds that it takes)."""
    out = tmp_path_factory.mktemp("undisturbed") / "out.gguf"
    begin = time.monotonic()
    done = run(demo, out)
    assert done.returncode == 0, done.stderr[-2000:]
    yield out.read_bytes(), time.monotonic() - begin


@pytest.mark.slow
def test_killed_at_random_moments(demo: list[str], undisturbed: tuple[bytes, float], tmp_path: Path) -> None:
    """Every few kills the build is left to finish, from whatever is there, and must come to the same bytes."""
    expected, seconds = undisturbed
    moments = random.Random(20938)
    out = tmp_path / "out.gguf"
    kills = 0
    while kills < KILLS:
        process = start(demo, out)
        try:
            process.wait(timeout=moments.uniform(0.05, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        if out.exists():
            assert out.read_bytes() == expected
        if process.returncode == 0 or kills % 5 == 0:
            done = run(demo, out)
            assert done.returncode == 0, done.stderr[-2000:]
            assert out.read_bytes() == expected
            assert beside(out) == ["out.gguf", "out.gguf.rq"], kills
            assert not list(out.with_name("out.gguf.rq").glob("**/*.partial"))
            out.unlink()
            for path in out.with_name("out.gguf.rq").iterdir():
                path.unlink()


@pytest.mark.parametrize("size", [0, 100, 3000, 50_000, 1_000_000])
def test_full_disk_while_writing(model: list[str], tmp_path: Path, size: int) -> None:
    out = tmp_path / "out.gguf"
    done = run(model, out, file_size=size)
    check_full(done, out)
    done = run(model, out)
    assert done.returncode == 0 and beside(out) == ["out.gguf", "out.gguf.rq"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1000, 100_000, 1_000_000, 20_000_000])
def test_full_disk_in_every_step(demo: list[str], tmp_path: Path, size: int) -> None:
    out = tmp_path / "out.gguf"
    check_full(run(demo, out, file_size=size), out)


def check_full(done: "subprocess.CompletedProcess[str]", out: Path) -> None:
    """One sentence, and nothing but the job's directory, in which nothing is half-made."""
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and ("file too large" in last.lower() or "disk is full" in last), done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "unexpected" not in last
    assert beside(out) in ([], ["out.gguf.rq"])
    assert not [p for p in out.parent.glob("**/*") if ".partial" in p.name or p.name.startswith("tmp")]


def test_a_second_build_is_refused(model: list[str], tmp_path: Path) -> None:
    """Both start at once, several times over: one is refused, or comes after the other and finds all done."""
    for i in range(3):
        out = tmp_path / f"out{i}.gguf"
        processes = [
            subprocess.Popen(command(model, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]
        errors = [process.communicate()[1] for process in processes]
        codes = [process.returncode for process in processes]
        assert 0 in codes and set(codes) <= {0, 2}, errors
        assert all("another build of" in error for code, error in zip(codes, errors, strict=True) if code)
        assert run(model, out).returncode == 0
        with Source(Path(model[0])) as source:
            assert out.stat().st_size < source.header.size
    sizes = {(tmp_path / f"out{i}.gguf").read_bytes() for i in range(3)}
    assert len(sizes) == 1


def test_what_a_killed_program_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    out = tmp_path / "out.gguf"
    (tmp_path / f".out.gguf.{gone.pid}.partial").touch()
    others = [tmp_path / f".out.gguf.{os.getppid()}.partial", tmp_path / f".out.ggu.{gone.pid}.partial", tmp_path / ".out.gguf.x.partial"]
    for path in others:
        path.touch()
    with replacing(out) as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([out, *others]) and out.read_text() == "whole"
