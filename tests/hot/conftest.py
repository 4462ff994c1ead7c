"""A server on this machine as a second device, and what llama.cpp gives with some of the experts on it."""

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from golden.llama_lib import Job, Result, Step, prompt, run
from local_servers import cpu_device

from rq_gguf.runtime.build import find_compiler
from rq_gguf.runtime.tools import source_path

HERE = Path(__file__).resolve().parent
HITS = re.compile(r"fast memory took ([0-9.]+|-)(?: %)? of the selections in decoding, ([0-9.]+|-)(?: %)? in prompts; (\d+) exchanged")


@dataclass(frozen=True)
class Hits:
    """What a context says when it ends."""

    decoding: float
    """Per cent; nan if there was nothing to count."""
    prompts: float
    exchanged: int


def hits(result: Result) -> Hits:
    """Raises AssertionError if the log does not say."""
    found = HITS.findall(result.log)
    assert len(found) == 1, result.log[-3000:]
    decoding, prompts, exchanged = found[0]
    return Hits(*(float("nan") if share == "-" else float(share) for share in (decoding, prompts)), int(exchanged))


def reading(tokens: Sequence[int], n_prompt: int) -> list[Step]:
    """A prompt, then its continuation token by token."""
    return [prompt(tokens[:n_prompt]), *(Step((t,), (n_prompt + i,), (0,)) for i, t in enumerate(tokens[n_prompt:]))]


def linked(name: str, runtime: Path, folder: Path) -> Path:
    """A program of cpp/ that uses the runtime's libraries, compiled. Skips without a compiler."""
    compiler = find_compiler()
    if not compiler:
        pytest.skip("needs a C++ compiler")
    source, out = source_path().parent, folder / name
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *(f"-I{source / d}" for d in ("include", "ggml/include", "ggml/src"))]
    libraries = [
        f"-L{runtime}",
        f"-Wl,-rpath,{runtime}",
        *(f"-l{n}" for n in ("llama", "ggml-rpc", "ggml", "ggml-cpu", "ggml-base", "pthread")),
    ]
    subprocess.run([*compiler, *flags, HERE / "cpp" / f"{name}.cpp", "-o", out, *libraries], check=True)
    return out


@pytest.fixture(scope="session")
def server(runtime: Path) -> Iterator[str]:
    """HOST:PORT of a device that computes on this machine's CPU."""
    with cpu_device(runtime) as endpoint:
        yield endpoint


Reader = Callable[..., Result]


@pytest.fixture
def read(runtime: Path, server: str, tmp_path: Path) -> Reader:
    """Steps on a file with all layers on the server: read(model, steps, options...); options as --override-kv.

    Every layer gets as many slots, unless rq.vram_layout says otherwise, and measured speeds are kept in the test's folder.
    """

    def made(model: Path, steps: Sequence[Step], overrides: dict[str, str | int | bool] | None = None, **options: bool) -> Result:
        settings = {"rq.vram_layout": "slots", **(overrides or {})}
        job = Job(runtime / "libllama.so", model, steps, settings, threads=1, servers=(server,), **options)  # type: ignore[arg-type]
        return run(job, tmp_path, {"LLAMA_CACHE": str(tmp_path / "cache")})

    return made
