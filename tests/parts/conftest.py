"""Servers on this machine as devices, and what llama.cpp gives with each layer's experts dealt out over them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden.llama_lib import Job, Result, Step, prompt, run
from local_servers import cpu_device
from numpy.typing import NDArray

N_DEVICES = 3
Overrides = dict[str, str | int | bool]


def divergence(a: Sequence[NDArray[np.float32]], b: Sequence[NDArray[np.float32]]) -> float:
    """The largest KL divergence of a token's distribution."""

    def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
        wide = x.astype(np.float64)
        shifted: NDArray[np.float64] = wide - np.logaddexp.reduce(wide, -1, keepdims=True)
        return shifted

    pairs = [(log_softmax(x), log_softmax(y)) for x, y in zip(a, b, strict=True)]
    return float(max((np.exp(x) * (x - y)).sum(-1).max() for x, y in pairs))


def several(tokens: Sequence[int]) -> list[Step]:
    """Prompts of eight sequences, of which 1, 2, 4 and 8 then decode together."""
    steps, lengths = [prompt(tokens[40 * s : 40 * s + 40], s) for s in range(8)], [40] * 8
    for i, n in enumerate((1, 2, 4, 8, 8)):
        steps.append(Step(tuple(tokens[400 + 10 * i : 400 + 10 * i + n]), tuple(lengths[:n]), tuple(range(n))))
        lengths[:n] = [length + 1 for length in lengths[:n]]
    return steps


@pytest.fixture(scope="session")
def servers(runtime: Path) -> Iterator[tuple[str, ...]]:
    """HOST:PORT of devices that compute on this machine's CPU."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(cpu_device(runtime)) for _ in range(N_DEVICES))


@dataclass(frozen=True)
class Reader:
    """Runs steps on a file, counts of experts included."""

    library: Path
    servers: tuple[str, ...]
    folder: Path

    def read(self, model: Path, steps: Sequence[Step], n_devices: int, overrides: Overrides | None = None, **more: bool) -> Result:
        """All layers are on the first devices. overrides: as --override-kv. RuntimeError where llama.cpp fails."""
        servers = self.servers[:n_devices]
        job = Job(self.library, model, steps, overrides or {}, threads=1, servers=servers, **more)  # type: ignore[arg-type]
        return run(job, self.folder, {"LLAMA_EXPERT_COUNTS": str(self.folder / "counts.json")})

    @property
    def counts(self) -> list[dict[str, Any]]:
        """Of the last run, by layer."""
        layers: list[dict[str, Any]] = json.loads((self.folder / "counts.json").read_text())["layers"]
        return layers


@pytest.fixture
def reader(runtime: Path, servers: tuple[str, ...], tmp_path: Path) -> Reader:
    return Reader(runtime / "libllama.so", servers, tmp_path)
