"""Run other programs: into a log, or with their output kept. An exception (Ctrl-C included) ends the child."""

import logging
import os
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rq_gguf.errors import UserError
from rq_gguf.runtime.cache import say

commands = logging.getLogger(__name__)

Arguments = Sequence[str | Path]


def find_program(name: str) -> str | None:
    """A program's path, from PATH or from beside this Python, where pip puts programs; None where there is none."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


@contextmanager
def child(args: Arguments, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A running program with no input, ended when the block is left by an exception.

    Raises UserError if the program cannot be started.
    """
    try:
        process: subprocess.Popen[bytes] = subprocess.Popen([str(a) for a in args], stdin=subprocess.DEVNULL, **options)
    except OSError as e:
        raise UserError(f"cannot run {args[0]}: {e.strerror}") from e
    start = time.perf_counter()
    commands.debug("$ %s", shlex.join(map(str, args)))
    try:
        yield process
    except BaseException:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        commands.debug("%s: %.1f s", Path(args[0]).name, time.perf_counter() - start)


def run_logged(
    args: Arguments,
    log: IO[bytes],
    what: str,
    *,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run a program with its output in an open log file.

    what: names the step for the error. on_line: gets each line of the output.
    Raises UserError that names the log, after the log's tail was shown.
    """
    log.write(f"$ {' '.join(str(a) for a in args)}\n".encode())
    log.flush()
    tail: list[str] = []
    with child(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env) as process:
        assert process.stdout is not None
        for raw in process.stdout:
            log.write(raw)
            line = raw.decode(errors="replace").rstrip()
            tail = [*tail[-29:], line]
            if on_line:
                on_line(line)
        code = process.wait()
    log.flush()
    if code != 0:
        say("\n".join(f"  | {line}" for line in tail), always=True)
        raise UserError(f"{what} failed ({exit_reason(code)}); the end of its log is above, the whole of it in {log.name}")


def exit_reason(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit status {code}"
    guess = {9: ", perhaps for lack of memory", 4: ", perhaps built for another processor"}
    return f"ended by signal {-code}{guess.get(-code, '')}"


def git_environment(ceiling: Path) -> dict[str, str]:
    """Environment in which git looks at no repository at or above `ceiling` and at no configuration but its own.

    Inside another repository `git apply` skips files without a word, and hooks export variables that redirect git.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {"GIT_CEILING_DIRECTORIES": str(ceiling.resolve()), "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    return {**env, "LC_ALL": "C"}
