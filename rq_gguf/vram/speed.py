"""How fast a model decodes whose experts lie partly in VRAM and wholly in RAM: predicted, for every way to lay them out. Pure.

A step decodes one token of each of n sequences. On the GPU it takes the bytes of everything but the routed experts over the VRAM's
bandwidth, and `Machine.gpu_layer` per layer. A layer's routed experts take

    all in VRAM                 gpu_experts + the distinct experts' bytes / VRAM bandwidth
    none                        whole_handover + their bytes / RAM bandwidth
    any other number of slots   handover + (gpu_experts + those held / VRAM bandwidth) + the others / RAM bandwidth

the last two at the same time: what counts is the longer one, in the mean over tokens. A token's selections are taken to miss the slots
independently of each other, so with one expert per token nothing overlaps, and with many nearly all of the shorter part is gained. For
several sequences the longer of the two means is taken; where `Machine.overlap` is false, the sum.

Expert e is among those that n tokens pick with probability 1 - (1 - k share[e])^n (tokens that pick independently). The slots hold the
experts with the largest shares. For one sequence the runtime's set follows the text and misses less than that: `Missed` says how much.
For several at once, with a subject each, the set of the calibration's busiest is reckoned with.

A layout has the last `whole` layers' experts in VRAM altogether and `slots` experts of every other layer; stock llama.cpp's
(`--n-cpu-moe N`) is that without slots. `Table.best` looks at all that fit, so it is never slower than stock's, nor with more VRAM than
with less.

A prompt goes through the GPU in batches; experts that it needs and VRAM does not hold are sent up once per batch:

    2 x active weights x tokens / compute + per layer that is not whole: handover + bytes of its used experts without a slot / PCIe
        + per layer: gpu_layer + gpu_experts

Not counted: the KV cache's bytes (a long context) and the vocabulary's sampling.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rq_gguf.vram.machine import Machine

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PROMPT_BATCH = 512
"""Tokens of a prompt that llama.cpp takes at a time (-ub)."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of all layers that have some, as a machine sees them. All [layers, n_expert]."""

    bytes: Floats
    ram_seconds: Floats
    """To compute one token's part on the CPU."""
    vram_seconds: Floats
    shares: Floats
    """Of the layer's selections; their sum is 1."""
    n_used: int
    """Experts per token."""

    @property
    def order(self) -> Ints:
        """[layers, n_expert] from the largest share to the smallest, the lower number first in a tie."""
        return np.argsort(-self.shares, axis=1, kind="stable")


@dataclass(frozen=True)
class Rest:
    """Everything but the routed experts."""

    bytes: int
    layers: int
    """Of the whole model, those without experts too."""
    active_weights: float
    """That take part in a token, routed experts included."""


@dataclass(frozen=True)
class Missed:
    """How much of the selections falls beside the busiest experts: their part on the calibration text to a power.

    Text misses a little more than the calibration text from which the shares are (`static` below 1), and a set that follows it less
    (`adapted` above 1). A power keeps what is certain: nothing is missed with all experts, everything with none.
    """

    static: float
    adapted: float


@dataclass(frozen=True)
class Layout:
    """What VRAM holds."""

    whole: int
    """Layers, the last ones, whose experts it holds all."""
    slots: int
    """Experts of every other layer."""


@dataclass(frozen=True)
class Table:
    """Every layout: its bytes and times. All [layers + 1, n_expert + 1]: whole layers, slots of the others."""

    bytes: Floats
    seconds: Floats
    """Of a step that decodes."""

    def best(self, vram: float) -> Layout:
        """The fastest that fits; of equally fast ones the smallest."""
        fits = np.where(self.bytes <= vram, self.seconds, np.inf)
        least = np.argwhere(fits == fits.min())
        whole, slots = least[np.argmin(self.bytes[least[:, 0], least[:, 1]])]
        return Layout(int(whole), int(slots))

    def stock(self, vram: float) -> Layout:
        """The fastest of `--n-cpu-moe N` that fits."""
        return Table(self.bytes[:, :1], self.seconds[:, :1]).best(vram)

    def at(self, layout: Layout) -> float:
        return float(self.seconds[layout.whole, layout.slots])

    def bytes_of(self, layout: Layout) -> int:
        return int(self.bytes[layout.whole, layout.slots])


def chances(experts: Experts, tokens: int) -> Floats:
    """[layers, n_expert] that a batch of so many tokens picks the expert."""
    return 1 - (1 - np.minimum(experts.n_used * experts.shares, 1.0)) ** tokens


def missed(experts: Experts) -> Floats:
    """[layers, n_expert + 1] part of the calibration's selections beside the busiest 0, 1, ... experts."""
    rest = 1 - np.cumsum(np.take_along_axis(experts.shares, experts.order, axis=1), axis=1)
    return np.clip(np.concatenate([np.ones((len(rest), 1)), rest[:, :-1], np.zeros((len(rest), 1))], axis=1), 0.0, 1.0)


def held(experts: Experts, layout: Layout) -> NDArray[np.bool_]:
    """[layers, n_expert] which experts are in VRAM."""
    n_layers, n_expert = experts.shares.shape
    slots = np.where(np.arange(n_layers) < n_layers - layout.whole, layout.slots, n_expert)
    rank = np.empty((n_layers, n_expert), dtype=np.int64)
    np.put_along_axis(rank, experts.order, np.arange(n_expert)[None], axis=1)
    return np.asarray(rank < slots[:, None])


def reads(experts: Experts, layout: Layout, power: float) -> Floats:
    """[layers, n_expert] how often a token of a single sequence reads an expert. power: as in `decode_table`.

    The set follows the text and these shares do not: what is not missed any more is read in the slots, in proportion.
    """
    there = held(experts, layout)
    chance = chances(experts, 1)
    share = np.where(there, 0.0, experts.shares).sum(axis=1, keepdims=True)
    share = np.where(there.all(axis=1, keepdims=True), 0.0, np.clip(share, 0.0, 1.0))
    wanted = share**power
    return chance * np.where(there, _over(1 - wanted, 1 - share), _over(wanted, share))


def decode_table(experts: Experts, rest: Rest, machine: Machine, power: float, sequences: int = 1) -> Table:
    """Every layout's bytes and seconds per step. power: of `Missed`, either; with more than one sequence it does not count."""
    used = chances(experts, sequences)
    slow, fast = _behind(experts, used * experts.ram_seconds), _before(experts, used * experts.vram_seconds)
    if sequences == 1:
        share = missed(experts)
        wanted = share**power
        slow = slow * _over(wanted, share)
        fast = fast * _over(1 - wanted, 1 - share)
    if not machine.overlap:
        layer = slow + machine.gpu_experts + fast
    elif sequences == 1:
        layer = longer(slow, fast, wanted, experts.n_used, machine.gpu_experts)
    else:
        layer = np.maximum(slow, machine.gpu_experts + fast)
    layer[:, 0] = slow[:, 0] + machine.handover_with(0)  # the GPU has none
    layer[:, 1:-1] += machine.handover
    base = rest.bytes / machine.vram_bandwidth + rest.layers * machine.gpu_layer
    return Table(_mixed(_before(experts, experts.bytes)), base + _mixed(layer))


def longer(slow: Floats, fast: Floats, chance: Floats, n: int, always: float = 0.0) -> Floats:
    """Mean of the longer one of two parts among which n selections are dealt out, each to the slow part with this chance.

    slow, fast: means of the parts; all of one shape. always: what the fast part takes besides.
    """
    count = np.zeros((*chance.shape, n + 1))  # chance of 0, 1, ... n in the slow part
    count[..., 0] = 1.0
    p = chance[..., None]
    for _ in range(n):
        count[..., 1:] = count[..., 1:] * (1 - p) + count[..., :-1] * p
        count[..., :1] *= 1 - p
    each_slow = np.where(chance > 0, slow / np.where(chance > 0, n * chance, 1.0), 0.0)[..., None]
    each_fast = np.where(chance < 1, fast / np.where(chance < 1, n * (1 - chance), 1.0), 0.0)[..., None]
    of_slow = np.arange(n + 1)
    return np.asarray((count * np.maximum(of_slow * each_slow, always + (n - of_slow) * each_fast)).sum(axis=-1))


def prompt_table(experts: Experts, rest: Rest, machine: Machine, tokens: int = PROMPT_BATCH) -> Table:
    """The same for a batch of a prompt."""
    layer = _behind(experts, chances(experts, tokens) * experts.bytes) / machine.pcie_bandwidth + machine.handover
    layer[:, -1] = 0.0
    layer += machine.gpu_experts  # all are computed on the GPU
    base = max(2 * rest.active_weights * tokens / machine.compute, rest.bytes / machine.vram_bandwidth) + rest.layers * machine.gpu_layer
    return Table(_mixed(_before(experts, experts.bytes)), base + _mixed(layer))


def _before(experts: Experts, values: Floats) -> Floats:
    """[layers, n_expert + 1] sums over the busiest 0, 1, ... experts."""
    found = np.cumsum(np.take_along_axis(values, experts.order, axis=1), axis=1)
    return np.concatenate([np.zeros((len(found), 1)), found], axis=1)


def _behind(experts: Experts, values: Floats) -> Floats:
    """The same over all others. Summed from the end, so that nothing is left for the last but an exact 0."""
    found = np.cumsum(np.take_along_axis(values, experts.order, axis=1)[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([found, np.zeros((len(found), 1))], axis=1)


def _over(a: Floats, b: Floats) -> Floats:
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), 1.0)


def _mixed(layer: Floats) -> Floats:
    """[layers + 1, n_expert + 1] sums over layers, the last ones taken whole. layer: [layers, n_expert + 1] by slots."""
    split = np.concatenate([np.zeros((1, layer.shape[1])), np.cumsum(layer, axis=0)])[::-1]  # without the last 0, 1, ... layers
    whole = np.concatenate([[0.0], np.cumsum(layer[::-1, -1])])
    return np.asarray(split + whole[:, None])
