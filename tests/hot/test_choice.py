"""The choice of a layout, compiled on its own from the series: it holds what it must, and is that of rq_gguf.vram.speed."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hot.test_policy import compiled

from rq_gguf.vram.machine import Machine
from rq_gguf.vram.plans import TYPICAL
from rq_gguf.vram.speed import Experts, Layout, Rest, Table, decode_table

FASTEST, SLOTS, LAYERS = range(3)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("choice")
    return lambda test: compiled(folder, test, ("llama-hot-choice", "llama-hot-policy"))


def test_choice(build: Callable[[str], Path]) -> None:
    done = subprocess.run([build("test_choice")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def random_case(rng: np.random.Generator) -> tuple[Experts, Machine, Table, float]:
    """A model, a machine, its layouts, bytes for experts."""
    n_layers, n_expert = int(rng.integers(1, 7)), int(rng.integers(2, 33))
    n_used = int(rng.integers(1, n_expert))
    shares = np.sort(rng.gamma(rng.uniform(0.3, 5), size=(n_layers, n_expert)).astype(np.float32) + np.float32(1e-4), axis=1)
    shares = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    size = np.repeat(rng.integers(1_000_000, 9_000_000, n_layers), n_expert).reshape(n_layers, n_expert).astype(np.float64)
    speeds = (rng.uniform(2e10, 9e10), rng.uniform(1e11, 2e12), rng.choice([0.0, 4e-5, 4e-4]), 1e10, 1e13)
    more = {"gpu_experts": rng.choice([0.0, 2e-5, 2e-4]), "whole_handover": rng.choice([0.0, 1e-4])}
    machine = Machine("random", *speeds, **more, overlap=bool(rng.integers(2)))
    experts = Experts(size, size / machine.ram_bandwidth, size / machine.vram_bandwidth, shares, n_used)
    return experts, machine, decode_table(experts, Rest(0, 0, 0.0), machine, TYPICAL.adapted), float(int(rng.uniform(0, 1.05) * size.sum()))


def test_the_same_choice_as_the_model_of_speed(build: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(7)
    cases = [random_case(rng) for _ in range(200)]
    text = []
    for experts, machine, _, room in cases:
        n_layers, n_expert = experts.shares.shape
        for mode in (FASTEST, SLOTS, LAYERS):
            seconds = (machine.handover, machine.whole_handover, machine.gpu_experts, 1 / machine.vram_bandwidth)
            speeds = " ".join(repr(float(s)) for s in seconds)
            text.append(f"{n_layers} {n_expert} {experts.n_used} {TYPICAL.adapted} {speeds}")
            text.append(f"{room} {mode} 1 {int(machine.overlap)}")
            columns = (experts.bytes, experts.ram_seconds, experts.shares)
            text += [" ".join(repr(float(c[i, e])) for c in columns) for i in range(n_layers) for e in range(n_expert)]
    done = subprocess.run([build("choose")], input="\n".join(text), capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 3 * len(cases)
    mixed = 0
    for i, (_, _, table, room) in enumerate(cases):
        slots_only = Table(table.bytes[:1], table.seconds[:1])
        expected = (table.best(room), slots_only.best(room), table.stock(room))
        for (whole, slots, size, seconds), layout in zip(rows[3 * i : 3 * i + 3], expected, strict=True):
            found = Layout(int(whole), int(slots))
            assert float(seconds) == pytest.approx(table.at(layout), rel=1e-6)
            assert int(size) == table.bytes_of(found) <= room
            assert found == layout or table.at(found) == pytest.approx(table.at(layout), rel=1e-6)
        mixed += 0 < table.best(room).whole < len(table.bytes) - 1 and table.best(room).slots > 0
    assert mixed > 20
