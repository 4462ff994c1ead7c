"""A computer with one GPU, as the speed of decoding sees it. Pure."""

from dataclasses import dataclass, field

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What reading experts costs. Speeds are those that llama.cpp gets, not those of data sheets."""

    name: str
    ram_bandwidth: float
    """Bytes per second at which the CPU gets through experts in RAM."""
    vram_bandwidth: float
    """Bytes per second at which the GPU gets through weights in its memory."""
    handover: float
    """Seconds that a layer takes longer because the CPU has a part in it: copies to it and back, waiting."""
    pcie_bandwidth: float
    """Bytes per second at which experts go up to the GPU for a prompt."""
    compute: float
    """Operations per second of the GPU in a prompt's matrix products."""
    gpu_layer: float = 45e-6
    """Seconds that a layer takes on the GPU beyond reading its weights, without its routed experts: launches, latency, attention of a short
    context."""
    gpu_experts: float = 15e-6
    """The same of a layer's routed experts, where the GPU holds any."""
    vram: int = 0
    """Bytes of the card, 0 where that does not matter."""
    ram: int = 0
    """Bytes of RAM, 0 where that does not matter."""
    overlap: bool = True
    """The CPU and the GPU compute their parts of a layer at the same time, as the runtime has it unless `rq.vram_overlap` says no."""
    whole_handover: float = 0.0
    """`handover` of a layer whose experts are all the CPU's, which copies and sums up more; 0: no more than that."""
    type_cost: dict[str, float] = field(default_factory=dict)
    """ggml type -> how many times longer a byte of it takes the CPU, where arithmetic and not memory is the limit; 1 for others."""

    def handover_with(self, slots: int) -> float:
        """Seconds of a layer with so many experts in VRAM, not all of them."""
        return max(self.whole_handover, self.handover) if slots == 0 else self.handover

    def ram_seconds(self, type_name: str, size: float) -> float:
        """Seconds for so many bytes of a type on the CPU."""
        return size * self.type_cost.get(type_name, 1.0) / self.ram_bandwidth


CORE_RATES = {
    "q1_0": 2.4, "iq1_s": 2.1, "tq1_0": 3.5, "iq1_m": 2.3, "tq2_0": 6.5, "iq2_xxs": 2.7, "q2_0": 0.5, "iq2_xs": 2.8, "iq2_s": 3.5,
    "q2_k": 6.6, "iq3_xxs": 3.0, "q3_k": 7.1, "iq3_s": 2.8, "mxfp4": 6.3, "iq4_xs": 8.0, "nvfp4": 6.2, "q4_0": 7.6, "iq4_nl": 7.5,
    "q4_k": 10.6, "q4_1": 8.8, "q5_0": 8.1, "q5_k": 9.8, "q5_1": 9.0, "q6_k": 13.5, "q8_0": 16.6,
}  # fmt: skip
"""GB of weights per second that one core gets through where memory is no limit: one of an AMD EPYC with AVX2, tools/bench_types.py."""


def type_costs(ram_bandwidth: float, cores: float) -> dict[str, float]:
    """`Machine.type_cost` of so many cores: types whose arithmetic takes longer than reading them. ram_bandwidth: bytes per second."""
    costs = {name: round(ram_bandwidth / (1e9 * rate * cores), 2) for name, rate in CORE_RATES.items()}
    return {name: cost for name, cost in costs.items() if cost > 1}


def _example(name: str, gib: int, vram: float, ram: float, pcie: float, compute: float) -> Machine:
    """From data sheets, in GB/s and 10^12 operations per second: 0.7 of the memories' bandwidths, half of PCIe's (stock llama.cpp copies
    from pageable memory), the given arithmetic, and a CPU of eight cores as in CORE_RATES. Assumptions, not measurements."""
    costs = type_costs(0.7e9 * ram, 8)
    return Machine(name, 0.7e9 * ram, 0.7e9 * vram, 90e-6, 0.5e9 * pcie, 1e12 * compute, vram=gib * GIB, type_cost=costs)


MACHINES = {
    m.name: m
    for m in (
        # RTX 2060, DDR4-3200 in two channels, PCIe 3.0 x16.
        _example("6gb", 6, 336, 51.2, 15.8, 8),
        # RTX 4060, DDR5-5600 in two channels, PCIe 4.0 x8.
        _example("8gb", 8, 272, 89.6, 15.8, 15),
        # RTX 3060, DDR4-3200 in two channels, PCIe 4.0 x16.
        _example("12gb", 12, 360, 51.2, 31.5, 12),
        # RTX 4060 Ti, DDR5-5600 in two channels, PCIe 4.0 x8.
        _example("16gb", 16, 288, 89.6, 15.8, 20),
        # RTX 4090, DDR5-6000 in two channels, PCIe 4.0 x16.
        _example("24gb", 24, 1008, 96, 31.5, 60),
        # Measured: experts of Q8_0 at 66 GB/s, of Q4_K at 50 GB/s, on 16 cores of a server.
        Machine("h100-16-cores", 66e9, 2400e9, 100e-6, 10.8e9, 56e12, 70e-6, 15e-6, 80 * GIB, 0, type_cost={"q4_k": 1.32}),
    )
}
"""Examples by name: a desktop for each size of card, and the server on which the project's figures of decoding were measured."""

DEFAULT = "12gb"
