"""What tests of every room share: the models, the texts and the built llama.cpp."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings
from writing.samples import calibration_of, plan_of

from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.runtime import tools
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import write_model

ROOT = Path(__file__).resolve().parents[1]

# A shell starts background jobs with SIGINT ignored and children inherit that: tests of Ctrl-C could not work there.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that a run says something about a change; RQ_GGUF_EXPLORE=1 draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)  # a busy machine is no failure
if os.environ.get("RQ_GGUF_EXPLORE") != "1":
    settings.load_profile("repeatable")


def need(present: bool, reason: str) -> None:
    """Skip a test that lacks what it needs; in CI, where everything must be there, fail it."""
    if not present:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI lacks what this test needs: {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test models and texts beside the repository; it is not part of the project."""
    folder = ROOT.parent / "shared"
    if not (folder / "models" / "lab").is_dir():
        pytest.skip(f"the test models are not there ({folder})")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded demo model, a Hugging Face directory."""
    return ROOT / "rq_gguf" / "data" / "demo"


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The bin directory of the patched llama.cpp."""
    return built(unpatched=False)


@pytest.fixture(scope="session")
def stock_runtime() -> Path:
    """The bin directory of the unpatched llama.cpp."""
    return built(unpatched=True)


@pytest.fixture(scope="session")
def demo_base(demo_model, runtime, tmp_path_factory) -> Path:
    """The demo model as a GGUF in bf16."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert_base(demo_model, path, progress=False)
    return path


@pytest.fixture(scope="session")
def stock_demo(demo_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What llama-quantize makes of the demo model."""
    path = tmp_path_factory.mktemp("stock") / "stock.gguf"
    tools.run_tool(["llama-quantize", "--tensor-type", "_exps=q4_K", demo_base, path, "Q8_0", "2"])
    return path


@pytest.fixture(scope="session")
def tokens(demo_model: Path) -> list[int]:
    """English, as the demo model's vocabulary splits it."""
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor(str(demo_model / "tokenizer.model"))
    text = (ROOT / "rq_gguf" / "data" / "heldout.txt").read_text(encoding="utf-8")
    return [1, *vocabulary.encode(text[:4000])]


@pytest.fixture(scope="session")
def tiered_demo(demo_base, tmp_path_factory) -> Path:
    """The demo model with two tiers and three copies in every layer."""
    with Source(demo_base) as source:
        calibration = calibration_of(source)
        layers = []
        for s in source.shape.layers:
            rows = tuple(("q8_0", "q4_k") if e in (0, 3, 5) else ("q4_k",) if e % 2 else ("q8_0",) for e in range(s.n_expert))
            layers.append(LayerPlan(s.layer, rows, rows))
        plan = plan_of(tuple(layers))
    out = tmp_path_factory.mktemp("tiered") / "tiered.gguf"
    return write_model(demo_base, plan, calibration, out, ggml=Ggml(tools.library_path("ggml-base")), progress=False).paths[0]


def built(unpatched: bool) -> Path:
    try:
        return tools.bin_dir(unpatched)
    except UserError as e:
        need(False, str(e))
        raise
