"""tools/rebase_patch.py on trees of a few lines: what fits, what moved, what git merges, what needs a hand."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import load_tool

from rq_gguf.errors import UserError
from rq_gguf.runtime.patch import read_series

GRAPH = "src/llama-graph.cpp"  # what a llama.cpp is known by
LINES = [f"line {i}\n" for i in range(40)]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    if shutil.which("patch") is None or shutil.which("git") is None:
        pytest.skip("git and patch are needed")
    return load_tool("rebase_patch")


def tree(root: Path, lines: list[str], other: str = "same\n") -> Path:
    for name, text in ((GRAPH, "".join(lines)), ("src/other.h", other)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: ModuleType) -> Path:
    """Two patches: a hook after line 20 and a file of its own, then a change of other.h. The pinned tree is beside them."""
    work = tree(tmp_path / "made", LINES)
    tree(tmp_path / "pinned", LINES)

    def git(*args: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@localhost", *args], cwd=work, check=True, capture_output=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "pinned")
    (work / GRAPH).write_text("".join([*LINES[:21], "hook\n", *LINES[21:]]))
    (work / "src/new.cpp").write_text("new\n")
    git("add", "-A")
    git("commit", "-qm", "one hook")
    (work / "src/other.h").write_text("same\nand more\n")
    git("commit", "-qam", "more")
    git("format-patch", "-q", "--zero-commit", "--no-signature", "-N", "-o", str(tmp_path / "series"), "HEAD~2")
    monkeypatch.setattr(tool, "series_dir", lambda: tmp_path / "series")
    return tmp_path


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rebase_patch", *map(str, args)])
    return int(tool.main())


def test_the_same_tree_gives_the_same_series(
    series: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tool, monkeypatch, series / "pinned", "--pinned", series / "pinned", "--out", series / "out") == 0
    assert [p.read_text() for p in read_series(series / "out").patches] == [p.read_text() for p in read_series(series / "series").patches]
    assert capsys.readouterr().out.count("applies as it is") == 2


def test_moved_and_merged(series: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tree(series / "moved", ["a new first line\n", *LINES])
    assert run(tool, monkeypatch, moved, "--pinned", series / "pinned", "--out", series / "out") == 0
    assert "applies, 1 hunks at other lines" in capsys.readouterr().out
    # A neighbour of the hook is another: GNU patch without fuzz for it fails, and git knows better.
    near = tree(series / "near", [*LINES[:18], "x\n", "y\n", *LINES[20:24], "z\n", *LINES[24:]])
    assert run(tool, monkeypatch, near, "--pinned", series / "pinned", "--out", series / "near-out") == 0
    assert "+hook" in read_series(series / "near-out").patches[0].read_text()


def test_what_needs_a_hand_is_named_and_left(
    series: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tree(series / "changed", [*LINES[:20], "rewritten\n", "too\n", *LINES[22:]])
    work = series / "work"
    assert run(tool, monkeypatch, changed, "--pinned", series / "pinned", "--work", work) == 1
    out = capsys.readouterr().out
    assert f"{GRAPH}: hunk 1 failed at line 19" in out and f"conflict: {GRAPH}:21" in out
    assert out.count("NEEDS A HAND") == 1 and "0002-more.patch: applies as it is" in out
    (work / GRAPH).write_text("".join([*LINES[:20], "rewritten\n", "hook\n", "too\n", *LINES[22:]]))
    for args in (("add", "-A"), ("am", "--continue"), ("format-patch", "-N", "-o", str(series / "by-hand"), tool.ONTO)):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@localhost", *args], cwd=work, check=True, capture_output=True)
    assert len(read_series(series / "by-hand").patches) == 2
    with pytest.raises(UserError, match="is not empty"):
        run(tool, monkeypatch, changed, "--pinned", series / "pinned", "--work", work)


def test_what_is_no_llama_cpp(series: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (series / "empty").mkdir()
    (series / "text.tar.gz").write_text("no archive")
    for source, words in ((series / "empty", "is not a llama.cpp source tree"), (series / "text.tar.gz", "is no source package")):
        with pytest.raises(UserError, match=words):
            run(tool, monkeypatch, source, "--pinned", series / "pinned")


def test_a_file_that_is_not_there_is_named(
    series: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tree(series / "older", LINES)
    (older / "src/other.h").unlink()
    assert run(tool, monkeypatch, older, "--pinned", series / "pinned") == 1
    assert "src/other.h: file is not there" in capsys.readouterr().out
