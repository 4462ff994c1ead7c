"""The simulator beside what two GPUs took: figures of docs/measurements/cuda_h200.md. `pytest -s` prints the table."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from rq_gguf.placement.machine import ExpertSize, Machine
from rq_gguf.placement.simulate import Workload, simulate

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "measurements" / "cuda_h200.md"
H200 = Machine(bandwidth=3200e9, compute=80e12, link=300e9, latency=10e-6, exchange="home", launch=12.8e-6, rereads=8)
"""Stated before the measurement. Bandwidth, launches, rereads and compute fit kernels that were timed on one GPU, one by one; latency and
link are guesses."""
MATRICES = replace(H200, bandwidth=1630e9, compute=195e12, launch=0.0, tile=128)
"""Of MUL_MAT_ID's kernel for matrices, which stock files' experts run on one GPU with 9 sequences and more: it computes an expert for a
tile of up to 128 tokens. Fits PROFILED. Stated after the measurement; no figure of two GPUs went into it."""
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
PROFILED = {32: 460e-6, 128: 1058e-6}
"""Sequences -> seconds of one of the three multiplications of "qwen3-235b, stock Q8_0" on one GPU, by stock's kernel (traced)."""


def measured() -> dict[str, dict[str, float]]:
    """[file; way][test] -> seconds of a step."""
    blocks = MEASURED.read_text(encoding="utf-8").split("```json\n")[1:]
    speeds = next(b for b in map(json.loads, (block.split("```")[0] for block in blocks)) if "olmoe, stock Q8_0; one" in b)
    return {name: {test: n / np.median(samples[test]) for test, n in BATCHES.items()} for name, samples in speeds.items()}


def machine(name: str, n: int) -> Machine:
    """For a step of n tokens of a file. Prompts fit H200 as it was stated."""
    return MATRICES if "stock" in name and n in PROFILED else H200


def experts(name: str, file: File, n: int) -> dict[int, float]:
    """Number of devices -> seconds of all experts, for n tokens."""
    work = Workload(np.ones((file.layers, file.n_expert)), 8, None)
    points = simulate(work, (1, 2), (n,), file.copies, machine(name, n), file.size)
    return {p.devices: p.of("copies").seconds for p in points}


@pytest.mark.parametrize("n", PROFILED)
def test_the_kernel_for_matrices_fits_its_profile(n: int) -> None:
    name = "qwen3-235b, stock Q8_0"
    file = FILES[name]
    assert experts(name, file, n)[1] == pytest.approx(3 * file.layers * PROFILED[n], rel=0.03)


def test_predicted_steps_are_near_the_measured() -> None:
    """What one GPU took, less what the experts take on it, and what they take on two. The two ways, which differ in where attention is,
    are taken together: the simulator knows experts only."""
    took, off = measured(), []
    for name, file in FILES.items():
        for test, n in BATCHES.items():
            one, seconds = took[f"{name}; one"][test], experts(name, file, n)
            two = one - seconds[1] + seconds[2]
            both = [took[f"{name}; {way}"][test] for way in WAYS]
            off.append(two / np.mean(both) - 1)
            told = f"{one * 1e6:.0f} us on one, predicted {two * 1e6:.0f}, took " + ", ".join(f"{x * 1e6:.0f}" for x in both)
            print(f"{name}, {test}: {told} ({100 * off[-1]:+.0f} %)")
    assert max(map(abs, off)) < MOST_OFF
    assert np.median(np.abs(off)) < MOST_OFF / 2
