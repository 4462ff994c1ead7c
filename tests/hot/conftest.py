"""A server on this machine as a second device, and what llama.cpp gives with some of the experts on it."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from golden.llama_lib import Job, Result, Step, prompt, run

from rq_gguf.runtime.tools import run_tool

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


def same_bits(a: Result, b: Result) -> bool:
    """Every logit of every step."""
    return all(np.array_equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def reading(tokens: Sequence[int], n_prompt: int) -> list[Step]:
    """A prompt, then its continuation token by token."""
    return [prompt(tokens[:n_prompt]), *(Step((t,), (n_prompt + i,), (0,)) for i, t in enumerate(tokens[n_prompt:]))]


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


@pytest.fixture(scope="session")
def server(runtime: Path) -> Iterator[str]:
    """HOST:PORT of a device that computes on this machine's CPU."""
    port = free_port()
    with serving([runtime / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", "1"], port):
        yield f"127.0.0.1:{port}"


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


@pytest.fixture(scope="session")
def stock_demo(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What llama-quantize makes of the demo model."""
    path = tmp_path_factory.mktemp("hot") / "stock.gguf"
    run_tool(["llama-quantize", "--tensor-type", "_exps=q4_K", demo_base, path, "Q8_0", "2"])
    return path


@pytest.fixture(scope="session")
def tokens(demo_model: Path) -> list[int]:
    """English, as the demo model's vocabulary splits it."""
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor(str(demo_model / "tokenizer.model"))
    text = (Path(__file__).resolve().parents[2] / "rq_gguf" / "data" / "heldout.txt").read_text(encoding="utf-8")
    return [1, *vocabulary.encode(text[:4000])]
