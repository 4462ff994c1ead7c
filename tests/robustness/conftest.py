"""A valid tiered file for tests to damage."""

from pathlib import Path

import pytest
from writing.samples import calibration_of, plan_of

from rq_gguf.ggml import Ggml
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.runtime.tools import library_path
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import write_model


@pytest.fixture(scope="session")
def good(tmp_path_factory, runtime, demo_model) -> Path:
    """The demo model with two tiers and three copies in every layer."""
    folder = tmp_path_factory.mktemp("tiered")
    base = folder / "base.gguf"
    convert_base(demo_model, base, progress=False)
    with Source(base) as source:
        calibration = calibration_of(source)
        layers = []
        for s in source.shape.layers:
            rows = tuple(("q8_0", "q4_k") if e in (0, 3, 5) else ("q4_k",) if e % 2 else ("q8_0",) for e in range(s.n_expert))
            layers.append(LayerPlan(s.layer, rows, rows))
        plan = plan_of(tuple(layers))
    return write_model(base, plan, calibration, folder / "good.gguf", ggml=Ggml(library_path("ggml-base")), progress=False).path
