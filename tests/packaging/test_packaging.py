"""The wheel: what is in it, and what works from it where torch and the other extras are not installed."""

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from rq_gguf import __version__
from rq_gguf.cli.failures import failure
from rq_gguf.extras import EXTRAS
from rq_gguf.runtime.tools import run_tool

BLOCKER = f"""\
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[m for modules in EXTRAS.values() for m in modules]!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocker())
"""
"""As sitecustomize: what an environment without the extras cannot import, in child processes too."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it, with the build tool that is installed, or else with one that pip fetches."""
    out = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", str(out), str(ROOT)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture
def bare(wheel: Path, tmp_path: Path) -> Run:
    """Runs the wheel's rq-gguf in a directory away from the repository, without the extras."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "sitecustomize.py").write_text(BLOCKER)

    def run(*args: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "rq_gguf", *map(str, args)]
        env = {**os.environ, "PYTHONPATH": str(site), "RQ_GGUF_DEBUG": ""}
        return subprocess.run(command, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    return run


def succeeded(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: str, pattern: str) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).glob(pattern) if p.is_file() and "__pycache__" not in p.parts}


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"rq_gguf-{__version__}.dist-info/"
        held = {name for name in archive.namelist() if not name.startswith(info)}
        expected = files("rq_gguf", "**/*") | {f"rq_gguf/{name}" for name in files("patches", "*")}
        assert held == expected
        for name in (
            "rq_gguf/py.typed",
            "rq_gguf/data/demo/model.safetensors",
            "rq_gguf/data/heldout.txt",
            "rq_gguf/data/calibration/books.txt",
        ):
            assert name in held
        for name in files("patches", "*.patch"):
            assert archive.read(f"rq_gguf/{name}") == (ROOT / name).read_bytes()
        metadata = email.message_from_bytes(archive.read(f"{info}METADATA"))
        assert b"rq-gguf = rq_gguf.cli:main" in archive.read(f"{info}entry_points.txt")
    assert metadata["Version"] == __version__
    assert {"calibrate", "report", "runtime"} <= set(metadata.get_all("Provides-Extra", []))
    base = {str(line).partition(";")[0].strip() for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in str(line)}
    assert not any(line.startswith(("torch", "transformers", "matplotlib", "safetensors")) for line in base)


def test_help_and_doctor(bare: Run, tmp_path: Path) -> None:
    assert succeeded(bare("--version")) == f"rq-gguf, version {__version__}\n"
    assert "build" in succeeded(bare("--help"))
    checks = {check["what"]: check for check in json.loads(bare("doctor", "--json").stdout)["checks"]}
    assert checks["patch series"]["state"] == "ok", "the patches are found inside the package"
    assert checks["torch and the like"]["fix"] == "pip install 'rq-gguf[calibrate]'"


@pytest.mark.runtime
@pytest.mark.parametrize(
    "args",
    [
        ("build", "demo", "out.gguf"),
        ("build", "demo", "out.gguf", "--dry-run"),
        ("calibrate", "demo", "-o", "c.gguf"),
        ("build", "someone/else", "o.gguf"),
    ],
)
def test_what_needs_an_extra_says_so_in_one_sentence(bare: Run, runtime: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    done = bare(*args)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("Warning: no calibration text")]
    assert done.returncode == 2 and done.stdout == ""
    assert line.startswith("Error: ") and "torch" in line and line.endswith("not installed; run: pip install 'rq-gguf[calibrate]'")
    assert [p for p in (tmp_path / "work").iterdir() if p.suffix != ".rq"] == []


def test_a_module_of_an_extra_that_is_missing_is_no_bug() -> None:
    found = failure(ModuleNotFoundError("No module named 'matplotlib.figure'", name="matplotlib"))
    assert (found.exit_code, found.message) == (2, "this needs matplotlib, which is not installed; run: pip install 'rq-gguf[report]'")
    assert failure(ModuleNotFoundError("No module named 'other'", name="other")).exit_code == 1


@pytest.mark.runtime
@pytest.mark.e2e
def test_a_gguf_and_an_imatrix_need_no_extra(bare: Run, demo_base: Path, tmp_path: Path) -> None:
    """build, inspect, plan, report and eval, from the wheel."""
    work = tmp_path / "work"
    shutil.copyfile(demo_base, work / "base.gguf")
    text = ROOT / "rq_gguf" / "data" / "calibration" / "books.txt"
    run_tool(["llama-imatrix", "-m", demo_base, "-f", text, "--chunks", "2", "-o", work / "imatrix.gguf"])
    succeeded(bare("build", "base.gguf", "out.gguf", "--imatrix", "imatrix.gguf", "--types", "q4_k,q8_0", "--budget", "6bpw"))
    assert json.loads(succeeded(bare("inspect", "out.gguf", "--json", "-")))
    assert "plan" in succeeded(bare("plan", "out.gguf.rq/calibration.gguf", "-o", "plan.json", "--budget", "6bpw"))
    assert "report.html" in succeeded(bare("report", "out.gguf", "-o", "report.html", "--figures", "figures"))
    assert "KLD" in succeeded(bare("eval", "out.gguf", "--base", "base.gguf", "--chunks", "2"))
    assert not list((work / "figures").glob("*.png")) and list((work / "figures").glob("*.svg"))
