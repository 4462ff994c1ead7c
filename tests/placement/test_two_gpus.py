"""The simulator beside what two GPUs took: figures of docs/measurements/cuda_h200.md. `pytest -s` prints the table."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rq_gguf.placement.machine import ExpertSize, Machine
from rq_gguf.placement.simulate import Workload, simulate

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "cuda_h200.md"
H200 = Machine(bandwidth=3200e9, compute=80e12, link=300e9, latency=10e-6, exchange="home", launch=12.8e-6, rereads=8)
"""Stated before the measurement. Bandwidth, launches, rereads and compute fit kernels that were timed on one GPU, one by one; latency and
link are guesses."""
BATCHES = {"tg128": 1, "2 seq": 2, "8 seq": 8, "32 seq": 32, "128 seq": 128, "pp512": 512}
WAYS = ("experts", "experts, home 0")
MOST_OFF = 0.15


@dataclass(frozen=True)
class File:
    layers: int
    n_expert: int
    size: ExpertSize
    copies: int


FILES = {
    "olmoe, stock Q8_0": File(6, 64, ExpertSize(2048, 1024, 8.5), 0),
    "olmoe, half Q8_0, half Q4_K, 4 copies": File(6, 64, ExpertSize(2048, 1024, 6.5), 4),
    "qwen3-235b, stock Q8_0": File(2, 128, ExpertSize(4096, 1536, 8.5), 0),
}
FASTER = {("qwen3-235b, stock Q8_0", "32 seq"), ("qwen3-235b, stock Q8_0", "128 seq")}
"""Than predicted, by more than that: docs/simulate.md says why this may be."""


def measured() -> dict[str, dict[str, float]]:
    """[file; way][test] -> seconds of a step."""
    blocks = MEASURED.read_text(encoding="utf-8").split("```json\n")[1:]
    speeds = next(b for b in map(json.loads, (block.split("```")[0] for block in blocks)) if "olmoe, stock Q8_0; one" in b)
    return {name: {test: n / np.median(samples[test]) for test, n in BATCHES.items()} for name, samples in speeds.items()}


def predicted(file: File, one: dict[str, float]) -> dict[str, float]:
    """Test -> seconds of a step by device: what one GPU took, less what the experts take on it, and what they take on two."""
    work = Workload(np.ones((file.layers, file.n_expert)), 8, None)
    points = simulate(work, (1, 2), tuple(BATCHES.values()), file.copies, H200, file.size)
    seconds = {(p.devices, p.batch): p.of("copies").seconds for p in points}
    return {test: one[test] - seconds[1, n] + seconds[2, n] for test, n in BATCHES.items()}


def test_predicted_steps_are_near_the_measured() -> None:
    took, off = measured(), {}
    for name, file in FILES.items():
        one = took[f"{name}; one"]
        for way in WAYS:
            for test, seconds in predicted(file, one).items():
                off[name, way, test] = seconds / took[f"{name}; {way}"][test] - 1
                told = f"{one[test] * 1e6:.0f} us on one, predicted {seconds * 1e6:.0f}, took {took[f'{name}; {way}'][test] * 1e6:.0f}"
                print(f"{name}; {way}, {test}: {told} ({100 * off[name, way, test]:+.0f} %)")
    wrong = {key: value for key, value in off.items() if abs(value) > MOST_OFF and (key[0], key[2]) not in FASTER}
    assert wrong.keys() <= {("olmoe, stock Q8_0", "experts", "2 seq")}
    assert all(value > MOST_OFF for key, value in off.items() if (key[0], key[2]) in FASTER)
    assert np.median(np.abs(list(off.values()))) < MOST_OFF / 2
