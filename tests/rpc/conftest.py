"""Programs with RPC in them, files, and what they give without any server."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from families.vocabulary import SIZES, save_vocabulary
from tiny_models import Size, tiny_model
from writing.samples import calibration_of, plan_of

from rq_gguf.ggml import Ggml
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.runtime.tools import library_path, run_tool
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import write_model

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "The history of the town begins with"
CHUNKS = "4"


@dataclass(frozen=True)
class Programs:
    """One build's."""

    folder: Path

    @property
    def server(self) -> Path:
        return self.folder / "ggml-rpc-server"

    def generate(self, model: Path, *options: str, before: tuple[str, ...] = (), tokens: int = 32) -> "subprocess.CompletedProcess[str]":
        """Greedy text after the prompt. before: words before the command."""
        command = [
            *before,
            str(self.folder / "llama-completion"),
            "-m",
            str(model),
            "-p",
            PROMPT,
            "-n",
            str(tokens),
            "-no-cnv",
            "-c",
            "256",
        ]
        command += ["--temp", "0", "-t", "1", "--ignore-eos", *options]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, timeout=240)


@pytest.fixture(scope="session")
def patched(runtime) -> Programs:
    return programs(runtime)


@pytest.fixture(scope="session")
def stock(stock_runtime) -> Programs:
    return programs(stock_runtime)


def programs(folder: Path) -> Programs:
    found = Programs(folder)
    if not found.server.is_file():
        pytest.skip(f"{folder} was built without RPC")
    return found


@pytest.fixture(scope="session")
def stock_demo(demo_base, tmp_path_factory) -> Path:
    """What llama-quantize makes of the demo model."""
    path = tmp_path_factory.mktemp("rpc") / "stock.gguf"
    run_tool(["llama-quantize", demo_base, path, "Q8_0", "2"])
    return path


@pytest.fixture(scope="session")
def local_text(patched) -> Callable[..., str]:
    """The text that a model gives on this machine alone, with weights as files hold them: servers repack none."""
    known: dict[tuple[object, ...], str] = {}

    def text(model: Path, *options: str) -> str:
        if (model, *options) not in known:
            done = patched.generate(model, "--no-repack", *options)
            assert done.returncode == 0, done.stderr[-2000:]
            known[(model, *options)] = done.stdout
        return known[(model, *options)]

    return text


@pytest.fixture(scope="session")
def large(runtime, tmp_path_factory) -> Path:
    """A random model with tier tensors above 10 MiB, from which on servers keep what they are sent."""
    folder = tmp_path_factory.mktemp("large")
    tiny_model("mixtral", Size(32, 2, 768, 1024, 1, SIZES["sentencepiece"]), 3).save_pretrained(folder / "model")
    save_vocabulary("sentencepiece", folder / "model")
    convert_base(folder / "model", folder / "base.gguf", progress=False)
    with Source(folder / "base.gguf") as source:
        calibration = calibration_of(source)
        rows = tuple(("q8_0",) if e % 2 else ("q4_k",) for e in range(32))
        plan = plan_of(tuple(LayerPlan(s.layer, rows, rows) for s in source.shape.layers))
    ggml = Ggml(library_path("ggml-base"))
    return write_model(folder / "base.gguf", plan, calibration, folder / "large.gguf", ggml=ggml, progress=False).paths[0]
