"""A valid tiered file for tests to damage."""

from pathlib import Path

import pytest
from writing.samples import calibration_of, plan_of

from rq_gguf.ggml import Ggml
from rq_gguf.planning.plan import LayerPlan
from rq_gguf.runtime.tools import library_path
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import write_model


@pytest.fixture(scope="session")
def good(tmp_path_factory, demo_base) -> Path:
    """The demo model with two tiers and three copies in every layer."""
    with Source(demo_base) as source:
        calibration = calibration_of(source)
        layers = []
        for s in source.shape.layers:
            rows = tuple(("q8_0", "q4_k") if e in (0, 3, 5) else ("q4_k",) if e % 2 else ("q8_0",) for e in range(s.n_expert))
            layers.append(LayerPlan(s.layer, rows, rows))
        plan = plan_of(tuple(layers))
    out = tmp_path_factory.mktemp("tiered") / "good.gguf"
    return write_model(demo_base, plan, calibration, out, ggml=Ggml(library_path("ggml-base")), progress=False).path
