"""How long a step takes: a roofline of bandwidth and arithmetic on the busiest device, and the exchange between devices. Pure.

Counted: the routed experts of all layers, and what is sent for them. Not counted: attention, routers, shared experts, launches, and
anything that overlaps. A layer takes

    max over devices of max(distinct experts x bytes of one / bandwidth, tokens x operations / compute) + exchange

Exchange `all-to-all` (experts' inputs go to where the experts are, outputs come back, as DeepEP does it): twice the latency, and twice
what the busiest device takes from others over its link: its tokens x (D - 1) / D x n_embd x 2 bytes. `partial-sums` (every device has all
inputs and adds its part of the outputs, as llama.cpp and tensor parallelism do it): twice the latency, and 2 (D - 1) / D x batch x n_embd
x 2 bytes (a ring's all-reduce).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXCHANGES = ("all-to-all", "partial-sums")
_ACTIVATION = 2  # bytes
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
    n_devices = tokens.shape[-1]
    work = np.maximum(distinct * (size.bytes / machine.bandwidth), tokens * (size.operations / machine.compute)).max(axis=-1)
    if n_devices == 1:
        return np.asarray(work)
    others = (n_devices - 1) / n_devices * size.n_embd * _ACTIVATION / machine.link
    sent = tokens.max(axis=-1) if machine.exchange == EXCHANGES[0] else np.full(tokens.shape[:-1], float(batch))
    return np.asarray(work + 2 * machine.latency + 2 * others * sent)
