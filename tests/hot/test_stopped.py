"""A device that is gone while experts are exchanged: a program ends as it does without them."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from local_servers import free_port, serving

pytestmark = pytest.mark.runtime

Running = tuple["subprocess.Popen[bytes]", "subprocess.Popen[bytes]"]
Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def start(runtime: Path, stock_demo: Path, tmp_path: Path) -> Start:
    """start(options...) is a context with a program that writes text, its log in tmp_path, and its device's process."""

    @contextmanager
    def started(*options: str) -> Iterator[Running]:
        port = free_port()
        command = [runtime / "llama-completion", "-m", stock_demo, "--rpc", f"127.0.0.1:{port}", "-ngl", "99", "-no-cnv", "-c", "2048"]
        command += [
            "-p",
            "The history of the town",
            "-n",
            "1900",
            "--ignore-eos",
            "--temp",
            "0",
            "-t",
            "1",
            "--override-kv",
            "rq.vram_layout=str:slots",
            *options,
        ]
        device = [runtime / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
        env = {**os.environ, "GGML_NO_BACKTRACE": "1", "LLAMA_CACHE": str(tmp_path / "cache")}
        with (
            serving(device, port) as server,
            open(tmp_path / "log", "wb") as log,
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=env) as program,
        ):
            try:
                assert program.stdout and len(program.stdout.read(100)) == 100
                yield program, server
            finally:
                program.kill()

    return started


def test_device_gone(start: Start, tmp_path: Path) -> None:
    """llama.cpp aborts without experts in fast memory, and in the same way with them."""
    ends = []
    for options in ((), ("--expert-vram", "25%")):
        with start(*options) as (program, device):
            time.sleep(0.5)
            device.kill()
            assert program.stdout
            program.stdout.read()
            ends.append((program.wait(60), re.findall(r"ggml-rpc\.cpp:\d+: (.*)", (tmp_path / "log").read_text(errors="replace"))))
    assert ends[0] == ends[1] and len(ends[0][1]) == 1
