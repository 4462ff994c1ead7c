"""How long a step takes: a roofline of bandwidth and arithmetic on the busiest device, and the exchange between devices. Pure.

Counted: the routed experts of all layers, what is sent for them, and what is given for launches and for all else in a layer. Not counted:
anything that overlaps. A layer takes

    max over devices of max(distinct experts x bytes of one / bandwidth, tokens x operations / compute) + exchange + launch + rest

where with a tile each distinct expert counts as tile tokens at least, or as the whole batch where that is smaller.

Exchange `all-to-all` (experts' inputs go to where the experts are, outputs come back, as DeepEP does it): twice the latency, and twice
what the busiest device takes from others over its link: its tokens x (D - 1) / D x n_embd x 2 bytes. `partial-sums` (every device has all
inputs and adds its part of the outputs, as llama.cpp and tensor parallelism do it): twice the latency, and 2 (D - 1) / D x batch x n_embd
x 2 bytes (a ring's all-reduce). `home` (one device has the inputs, sends them to each other one in F32 and takes as much back from each):
twice the latency, and 2 (D - 1) x batch x n_embd x 4 bytes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXCHANGES = ("all-to-all", "partial-sums", "home")
_ACTIVATION, _F32 = 2, 4  # bytes
_MATRICES = 3


@dataclass(frozen=True)
class Machine:
    """D equal devices. The defaults are an H100 SXM's by its data sheet, and a latency as DeepEP reports it over NVLink."""

    bandwidth: float = 3350e9
    """Bytes per second of a device's memory."""
    compute: float = 989e12
    """Operations per second, dense bf16."""
    link: float = 450e9
    """Bytes per second that a device takes from all others, one direction of NVLink."""
    latency: float = 10e-6
    """Seconds that one exchange takes beyond its bytes."""
    exchange: str = EXCHANGES[0]
    launch: float = 0.0
    """Seconds that a layer's experts take on a device beyond bytes and arithmetic."""
    rest: float = 0.0
    """Seconds of all else in a layer, which no arrangement changes: attention, routers, norms."""
    rereads: int = 0
    """Sequences up to which an expert is read again for each token that takes it: kernels that multiply by vectors."""
    tile: int = 0
    """Tokens that an expert is computed for at least, up to the batch: kernels that multiply by matrices of a fixed size."""


@dataclass(frozen=True)
class ExpertSize:
    """What one expert costs."""

    n_embd: int
    n_ff: int
    bits: float = 16.0
    """Per weight."""

    @property
    def bytes(self) -> float:
        return _MATRICES * self.n_embd * self.n_ff * self.bits / 8

    @property
    def operations(self) -> float:
        """Per token."""
        return 2.0 * _MATRICES * self.n_embd * self.n_ff


def layer_seconds(
    machine: Machine, size: ExpertSize, tokens: NDArray[np.float64], distinct: NDArray[np.float64], batch: int
) -> NDArray[np.float64]:
    """[...] seconds of one layer. tokens, distinct: [..., devices] selections that each device serves, and experts that it reads."""
    reads = tokens if batch <= machine.rereads else distinct
    computed = np.maximum(tokens, distinct * min(machine.tile, batch))
    work = np.maximum(reads * (size.bytes / machine.bandwidth), computed * (size.operations / machine.compute)).max(axis=-1)
    return np.asarray(work + machine.launch + machine.rest + _exchange_seconds(machine, size, tokens, batch))


def _exchange_seconds(machine: Machine, size: ExpertSize, tokens: NDArray[np.float64], batch: int) -> NDArray[np.float64] | float:
    """[...] seconds. tokens: as for `layer_seconds`."""
    n_devices = tokens.shape[-1]
    if n_devices == 1:
        return 0.0
    others = (n_devices - 1) / n_devices * size.n_embd * _ACTIVATION / machine.link
    if machine.exchange == "all-to-all":
        return np.asarray(2 * machine.latency + 2 * others * tokens.max(axis=-1))
    if machine.exchange == "partial-sums":
        return 2 * machine.latency + 2 * others * batch
    return 2 * machine.latency + 2 * (n_devices - 1) * batch * size.n_embd * _F32 / machine.link
