"""A server of llama.cpp's RPC backend on this machine, for as long as a measurement or a test takes."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rq_gguf.errors import UserError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """One that listens."""

    endpoint: str
    """host:port, as `--rpc` takes it."""
    process: "subprocess.Popen[bytes]"


@contextmanager
def rpc_server(
    program: Path, *options: str, threads: int = 1, host: str = LOOPBACK, before: Sequence[str] = (), cache: Path | None = None
) -> Iterator[Server]:
    """Run ggml-rpc-server; it is killed at the end.

    options: more of its own. before: words before the command, which may put it into another network. cache: the directory in which
    `-c` keeps what the server was sent. Raises UserError where it does not come up.
    """
    port = _free_port()
    command = [*before, str(program), "-H", host, "-p", str(port), "-t", str(threads), *options]
    environment = os.environ | ({"LLAMA_CACHE": str(cache)} if cache else {})
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        try:
            while not _listens(process.pid, host, port):
                if process.poll() is not None:
                    printed.seek(0)
                    said = printed.read().decode(errors="replace").strip()
                    raise UserError(f"{program} ended as it started: {said or 'it printed nothing'}")
                time.sleep(0.02)
            yield Server(f"{host}:{port}", process)
        finally:
            process.kill()
            process.wait()


def _listens(pid: int, host: str, port: int) -> bool:
    """Whether a process's network has a listener at the port: by the kernel's table where there is one, or else by knocking, which the
    server takes for a client that leaves."""
    table = Path(f"/proc/{pid}/net/tcp")
    if table.exists():
        rows = (line.split() for line in table.read_text().splitlines()[1:])
        return any(int(row[1].rpartition(":")[2], 16) == port and row[3] == "0A" for row in rows)
    with socket.socket() as s:
        return s.connect_ex((host, port)) == 0


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])
