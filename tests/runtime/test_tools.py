"""Finding and running programs: errors are one sentence, output is kept, nothing is left running."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rq_gguf.errors import UserError
from rq_gguf.runtime import process, tools


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A bin directory with one program in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "llama-cli"
    script.write_text(f"#!{sys.executable}\nimport sys\nprint('out')\nprint('err', file=sys.stderr)\nexec(sys.argv[1])\n")
    script.chmod(0o755)
    monkeypatch.setenv("RQ_GGUF_RUNTIME", str(folder))
    return folder


def test_nothing_installed(tmp_path, monkeypatch):
    monkeypatch.delenv("RQ_GGUF_RUNTIME", raising=False)
    monkeypatch.setenv("RQ_GGUF_CACHE", str(tmp_path))
    monkeypatch.delenv("RQ_GGUF_STOCK_RUNTIME", raising=False)
    with pytest.raises(UserError, match="run `rq-gguf runtime install`$"):
        tools.tool_path("llama-cli")
    with pytest.raises(UserError, match="run `rq-gguf runtime install --unpatched`$"):
        tools.tool_path("llama-bench", unpatched=True)


def test_override(programs, tmp_path, monkeypatch):
    assert tools.tool_path("llama-cli") == programs / "llama-cli"
    with pytest.raises(UserError, match=r"no llama-bench in .*\(there: llama-cli\)"):
        tools.tool_path("llama-bench")
    with pytest.raises(UserError, match="no libggml-base"):
        tools.library_path()
    with pytest.raises(UserError, match="has no convert_hf_to_gguf.py"):
        tools.source_path()
    monkeypatch.setenv("RQ_GGUF_RUNTIME", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="RQ_GGUF_RUNTIME: .*nowhere is not a directory"):
        tools.tool_path("llama-cli")


def test_output_is_kept_and_streamed(programs):
    pieces: list[str] = []
    output = tools.run_tool(["llama-cli", "print('Δp é', flush=True)"], on_output=pieces.append, env={"PYTHONIOENCODING": "utf-8"})
    assert output == tools.Output("out\nΔp é\n", "err\n")
    assert sorted("".join(pieces)) == sorted(output.stdout + output.stderr)


def test_much_output_on_both_streams_does_not_block(programs):
    code = "for _ in range(2000): print('x' * 99); print('y' * 99, file=sys.stderr)"
    output = tools.run_tool(["llama-cli", code])
    assert (output.stdout.count("x"), output.stderr.count("y")) == (198000, 198000)


def test_a_failure_gives_the_programs_reason(programs):
    code = "print('llama_model_load: error loading model: missing tensor', file=sys.stderr); print('main: exiting'); sys.exit(3)"
    with pytest.raises(UserError, match=r"llama-cli failed \(exit status 3\): llama_model_load: error loading model: missing tensor"):
        tools.run_tool(["llama-cli", code])
    with pytest.raises(UserError, match="ended by signal 4, perhaps built for another processor"):
        tools.run_tool(["llama-cli", "import os; os.kill(os.getpid(), 4)"])


def test_a_program_that_cannot_start(tmp_path):
    with pytest.raises(UserError, match="cannot run .*nowhere"):
        tools.run_tool([tmp_path / "nowhere"])


SLEEP = "import os, time; time.sleep(0.2); print('pid', os.getpid(), flush=True); time.sleep(60)"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_exception_ends_the_child(programs):
    class Stop(Exception):
        pass

    seen = ""

    def stop(text: str) -> None:
        nonlocal seen
        seen += text
        if re.search(r"pid \d+\n", seen):
            raise Stop

    with pytest.raises(Stop):
        tools.run_tool(["llama-cli", SLEEP], on_output=stop)
    assert not is_running(int(seen.split("pid ")[1]))


def test_ctrl_c_ends_the_child(programs):
    parent = subprocess.Popen(
        [sys.executable, "-c", "import sys; from rq_gguf.runtime.tools import run_tool\n"
         f"run_tool(['llama-cli', {SLEEP!r}], on_output=lambda t: print(t, end='', flush=True))"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    pid = int(next(line for line in parent.stdout if line.startswith("pid")).split()[1])
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=20)
    assert "KeyboardInterrupt" in err and "Exception in thread" not in err
    deadline = time.time() + 5
    while is_running(pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_programs_that_pip_installed_are_found(tmp_path, monkeypatch):
    """Beside this Python, though its directory is not on PATH."""
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path) if name == "scripts" else None)
    assert process.find_program("ninja") == str(tmp_path / "ninja")
    assert process.find_program("cmake") is None


def test_last_error():
    def of(out: str, err: str) -> str:
        return tools.last_error(tools.Output(out, err))

    assert of("a\nb\n", "") == "b"
    assert of("", "") == "it printed nothing"
    assert of("x\n", "error: unknown argument: --y\nusage: z\n") == "error: unknown argument: --y"
    log = "0.00.027.123 E llama_model_load: error loading model: tensor 'x' is corrupted\n0.00.027.213 E main: error: unable to load\n"
    assert of("", log) == "llama_model_load: error loading model: tensor 'x' is corrupted"
    raised = "WARNING: Unknown RoPE type\nTraceback (most recent call last):\n  File 'x.py'\nKeyError: 'moe_topk'\n"
    assert of("", raised) == "KeyError: 'moe_topk'"
