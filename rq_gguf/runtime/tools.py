"""The installed programs of llama.cpp: where they are, and running them."""

import codecs
import contextlib
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import IO

from rq_gguf.errors import UserError
from rq_gguf.runtime import build, patch
from rq_gguf.runtime.cache import current_file, read_json
from rq_gguf.runtime.process import Arguments, child, exit_reason

INSTALL = "run `rq-gguf runtime install`"
OVERRIDES = {"patched": "RQ_GGUF_RUNTIME", "stock": "RQ_GGUF_STOCK_RUNTIME"}
"""Environment variables that name a build's bin directory to be used instead of the installed one."""


def bin_dir(unpatched: bool = False) -> Path:
    """The directory of the programs that were installed last (or that the environment names).

    Raises UserError where nothing is installed, or what is was built by another patch series or for another processor.
    """
    kind = "stock" if unpatched else "patched"
    override = os.environ.get(OVERRIDES[kind])
    if override:
        directory = Path(override).expanduser().absolute()
        if not directory.is_dir():
            raise UserError(f"{OVERRIDES[kind]}: {directory} is not a directory; it should be the bin directory of a llama.cpp build")
        return directory
    command = f"{INSTALL[:-1]} --unpatched`" if unpatched else INSTALL
    where = read_json(current_file()).get(kind)
    stamp = read_json(Path(where)) if isinstance(where, str) else {}
    if not stamp.get("complete"):
        raise UserError(f"llama.cpp ({kind}) is not installed; {command}")
    if not unpatched and stamp.get("series") != patch.read_series(patch.series_dir()).sha256:
        raise UserError(f"the installed llama.cpp was built with another patch series than this rq-gguf has; {command}")
    if stamp.get("cpu") != build.cpu_identity():
        raise UserError(f"the installed llama.cpp was built for another processor; {command}")
    return build.bin_dir(Path(str(where)).with_suffix(""))


def programs(directory: Path) -> list[str]:
    """Names of llama.cpp's programs in a directory, sorted."""
    return sorted(p.stem for p in directory.iterdir() if re.fullmatch(r"(ggml|llama|test)-[\w-]+(\.exe)?", p.name))


def tool_path(name: str, unpatched: bool = False) -> Path:
    """The path of one of llama.cpp's programs, such as "llama-cli". Raises UserError where it is not there."""
    directory = bin_dir(unpatched)
    path = directory / (f"{name}.exe" if sys.platform == "win32" else name)
    if not path.is_file():
        raise UserError(f"no {name} in {directory} (there: {', '.join(programs(directory)) or 'nothing'}); {INSTALL}")
    return path


def library_path(name: str = "ggml-base", unpatched: bool = False) -> Path:
    """The path of one of llama.cpp's shared libraries, by its name without prefix and suffix. Raises UserError where it is not there."""
    directory = bin_dir(unpatched)
    names = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}
    path = directory / names.get(sys.platform, f"lib{name}.so")
    if not path.is_file():
        raise UserError(f"no {path.name} in {directory}; {INSTALL}")
    return path


def source_path(name: str = "convert_hf_to_gguf.py", unpatched: bool = False) -> Path:
    """The path of a file in the source tree that the installed programs were built from. Raises UserError where it is not there."""
    directory = bin_dir(unpatched)
    folder = next((p for p in directory.parents if (p / "CMakeCache.txt").is_file()), directory)
    home = build.cmake_cache(folder).get("CMAKE_HOME_DIRECTORY")
    path = Path(home or "", name)
    if home is None or not path.exists():
        raise UserError(f"the llama.cpp that {directory} was built from has no {name}, or its source is gone; {INSTALL}")
    return path


@dataclass(frozen=True)
class Output:
    """What a program printed."""

    stdout: str
    stderr: str


def run_tool(
    args: Arguments,
    *,
    unpatched: bool = False,
    env: Mapping[str, str] | None = None,
    on_output: Callable[[str], None] | None = None,
) -> Output:
    """Run one of llama.cpp's programs to its end and return what it printed. An exception, Ctrl-C included, ends it.

    args: the program's name (or a path) and its arguments. env: variables on top of the present ones.
    on_output: gets text of either stream as it comes, in pieces of any size, for progress bars.
    Raises UserError with the program's last error line where it fails.
    """
    program = Path(args[0])
    if len(program.parts) == 1:
        program = tool_path(program.name, unpatched)
    pieces: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()

    def drain(number: int, stream: IO[bytes]) -> None:
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        with contextlib.suppress(OSError, ValueError):  # closed under us, on the way out of an exception
            while data := os.read(stream.fileno(), 1 << 16):
                pieces.put((number, decode(data)))
        pieces.put((number, None))

    texts: tuple[list[str], list[str]] = ([], [])
    with child([program, *args[1:]], stdout=PIPE, stderr=PIPE, env={**os.environ, **(env or {})}) as process:
        assert process.stdout is not None and process.stderr is not None
        for pair in enumerate((process.stdout, process.stderr)):
            threading.Thread(target=drain, args=pair, daemon=True).start()
        still_open = 2
        while still_open:
            number, text = pieces.get()
            if text is None:
                still_open -= 1
            else:
                texts[number].append(text)
                if on_output:
                    on_output(text)
        code = process.wait()
    output = Output("".join(texts[0]), "".join(texts[1]))
    if code != 0:
        raise UserError(f"{program.name} failed ({exit_reason(code)}): {last_error(output)}")
    return output


def last_error(output: Output) -> str:
    """The line of a failed program's output that most likely says why: the last that gives a cause, or reports an error, or is there."""
    text = re.sub(r"^[\d.]+ [A-Z] +", "", output.stdout + "\n" + output.stderr, flags=re.MULTILINE)  # the log's time and level
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if re.search(r"error loading model: |failed to quantize: |error while handling ", line)]
    raised = [line for line in lines if re.match(r"([\w.]+\.)?\w+(Error|Exception)(: |$)", line)]  # the end of a Python traceback
    errors = [line for line in lines if re.search(r"\b(error|failed|fatal|invalid|unknown|unable|cannot|assert)", line, re.IGNORECASE)]
    return (causes or raised or errors or lines or ["it printed nothing"])[-1]
