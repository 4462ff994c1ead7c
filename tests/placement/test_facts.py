"""Published figures of the two test models, by the simulator. Prints ours beside them (pytest -s).

The figures were measured apart from this code, on the same calibration text and held-out texts, with other tokens of them drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rq_gguf.calibration.record import record
from rq_gguf.calibration.trace import Trace
from rq_gguf.evaluation.text import mix
from rq_gguf.placement.batches import counts_of, draw, whole
from rq_gguf.placement.machine import ExpertSize, Machine
from rq_gguf.placement.pack import add_copies, split_over_instances
from rq_gguf.placement.simulate import Workload, simulate

TOKENS = 65536
TOLERANCE = 0.03
"""Of a busiest device over the mean, relative."""
EXTRA_TOLERANCE = 0.02
"""Of extra experts read, absolute: the figures are whole per cents."""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Routing:
    model: str
    calibration: Trace
    held_out: Trace


@pytest.fixture(scope="module", params=["lab", "demo"])
def routing(request: pytest.FixtureRequest, shared: Path) -> Iterator[Routing]:
    model = shared / "models" / request.param
    texts = [p.read_text(encoding="utf-8") for p in sorted((shared / "data" / "heldout").glob("*.txt"))]
    calibration = (shared / "data" / "calibration.txt").read_text(encoding="utf-8")
    yield Routing(request.param, *(record(model, text, tokens=TOKENS, progress=False) for text in (calibration, mix(texts))))


# Tokens of the busiest device over the mean, 128 sequences, 8 copies: (devices, arrangement) -> figure.
BUSIEST = {
    "lab": {
        (4, "stock"): 1.26, (4, "packed"): 1.10, (4, "copies"): 1.09,
        (8, "stock"): 1.59, (8, "packed"): 1.22, (8, "copies"): 1.18, (8, "uniform"): 1.17,
    },
    "demo": {(8, "stock"): 2.23, (8, "packed"): 2.01, (8, "copies"): 1.25},
}  # fmt: skip


def test_busiest_device(routing: Routing) -> None:
    work = Workload(routing.calibration.selections().astype(float), routing.calibration.n_expert_used, whole(routing.held_out))
    size = ExpertSize(routing.calibration.n_embd, routing.calibration.n_ff)
    points = {p.devices: p for p in simulate(work, (4, 8), (128,), 8, Machine(), size)}
    print(f"\n{routing.model}: busiest device over the mean, 128 sequences\ndevices arrangement  ours  published")
    wrong = []
    for (devices, name), figure in BUSIEST[routing.model].items():
        ours = points[devices].uniform if name == "uniform" else points[devices].of(name).tokens
        print(f"{devices:7d} {name:11s} {ours:5.2f}  {figure:9.2f}")
        if ours != pytest.approx(figure, rel=TOLERANCE):
            wrong.append((devices, name, ours, figure))
    assert not wrong
    # Experts read hardly change with packing and grow with copies.
    for p in points.values():
        assert p.of("packed").distinct == pytest.approx(p.of("stock").distinct, rel=0.01)
        assert p.of("copies").distinct > 1.1 * p.of("stock").distinct


# Experts read beyond those of a layer without copies, 8 copies, sequences that decode together: (block, sequences) -> share.
EXTRA = {
    "lab": {
        (1, 2): 0.07, (1, 4): 0.17, (1, 8): 0.27, (1, 16): 0.30, (1, 32): 0.27,
        (8, 2): 0.0, (8, 8): 0.0, (8, 32): 0.11, (16, 8): 0.0, (16, 32): 0.0, (16, 64): 0.10,
    },
    "demo": {(1, 8): 0.63},
}  # fmt: skip


def test_experts_read_by_dispatch_block(routing: Routing) -> None:
    calibration, held = routing.calibration, whole(routing.held_out)
    one = np.ones(calibration.n_expert, dtype=np.int64)
    instances = [add_copies(load, one, 8, calibration.n_expert) for load in calibration.selections()]
    print(f"\n{routing.model}: extra experts read with 8 copies\nblock sequences  ours  published")
    wrong = []
    for (block, batch), figure in EXTRA[routing.model].items():
        tokens = draw(held, batch, 256, np.random.default_rng(0))
        read = np.zeros(2)
        for layer, per in enumerate(instances):
            counts = counts_of(held, tokens, layer)
            read += [(split_over_instances(counts, per, block) > 0).sum(), (counts > 0).sum()]
        ours = float(read[0] / read[1] - 1)
        print(f"{block:5d} {batch:9d} {ours:6.1%} {figure:9.0%}")
        if ours != pytest.approx(figure, abs=EXTRA_TOLERANCE):
            wrong.append((block, batch, ours, figure))
    assert not wrong
