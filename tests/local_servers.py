"""Programs that listen on a port of this machine, such as servers that stand for devices."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str | Path], port: int, log: Path | None = None, env: dict[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that listens on a port of this machine, until the end of the `with`. env: added to this process's environment."""
    with open(log or os.devnull, "wb") as out:
        environment = {**os.environ, **(env or {})}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text(errors="replace")[-3000:] if log else command
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            process.wait()


@contextmanager
def cpu_device(runtime: Path) -> Iterator[str]:
    """HOST:PORT of an RPC server that computes on this machine's CPU. runtime: where llama.cpp's programs are."""
    port = free_port()
    with serving([runtime / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", "1"], port):
        yield f"127.0.0.1:{port}"
