"""Where experts and their copies go when a layer's experts lie on several devices. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Load = NDArray[np.floating] | NDArray[np.integer]


@dataclass(frozen=True)
class Placement:
    """One layer's experts and copies on devices."""

    instances: NDArray[np.int64]
    """[n_expert] instances of each logical expert, the primary counted."""
    devices: NDArray[np.int64]
    """[n_phys] device of each instance: an expert's instances side by side, the primary first."""
    n_devices: int

    @property
    def experts(self) -> NDArray[np.int64]:
        """[n_phys] logical expert of each instance."""
        return np.repeat(np.arange(len(self.instances)), self.instances)

    def sums(self, values: Load | NDArray[np.bool_]) -> NDArray[np.float64]:
        """[..., n_devices] sums over each device's instances of values [..., n_phys]."""
        return np.asarray(values, dtype=np.float64) @ np.eye(self.n_devices)[self.devices]


def stock_order(n_expert: int, n_devices: int) -> Placement:
    """Contiguous blocks of experts, the first devices one more where it does not come out even: what engines do by themselves."""
    sizes = np.full(n_devices, n_expert // n_devices)
    sizes[: n_expert % n_devices] += 1
    return Placement(np.ones(n_expert, dtype=np.int64), np.repeat(np.arange(n_devices), sizes), n_devices)


def even_copies(n_expert: int, wanted: int, n_devices: int) -> int:
    """The least number of copies from `wanted` on with which every device holds the same number of instances."""
    return wanted + -(n_expert + wanted) % n_devices


def add_copies(load: Load, instances: NDArray[np.int64], n_copies: int, n_devices: int) -> NDArray[np.int64]:
    """[n_expert] instances after `n_copies` more, each for the expert with the most load per instance (DeepSeek EPLB), the lowest in a tie.

    An expert has at most one instance per device: another would only take memory. load, instances: [n_expert]. n_copies: at most what
    that rule leaves room for.
    """
    load, instances = np.asarray(load, dtype=np.float64), instances.copy()
    for _ in range(n_copies):
        instances[np.where(instances < n_devices, load / instances, -1.0).argmax()] += 1
    return instances


def pack(load: Load, instances: NDArray[np.int64], n_devices: int) -> Placement:
    """Greedy by load into equal slots: instances from heavy to light, each to the least loaded device that has a free slot and holds no
    other instance of the expert, or, where each of those does, to the least loaded with a free slot.

    load: [n_expert], split evenly over an expert's instances. Every device has the same number of slots; where instances do not fill
    them, some stay empty.

    Bound: the loads of two devices differ by at most the heaviest instance less the lightest (less 0 where slots stay empty).
    Proof: let E_w be a device's load less w per instance, and v what the next instance weighs. At any time E_w(a) - E_w(b) <= heaviest - w
    for all w <= v and all devices a, b, by induction over a's last instance, of weight u >= v. If a held no more instances than b before,
    the claim with u in place of w turns into one with w at no cost, and the instance adds u - w. If it held more, b had a free slot: either
    b was no lighter, so E_w(a) - E_w(b) <= -w, and u - w is added; or b had just got an instance of the same expert, and both grew alike.
    In the end both hold equally many, so E differs as the loads do.
    """
    weight = np.repeat(np.asarray(load, dtype=np.float64) / instances, instances)
    experts = np.repeat(np.arange(len(instances)), instances)
    devices = np.empty(len(weight), dtype=np.int64)
    sums, free = np.zeros(n_devices), np.full(n_devices, -(-len(weight) // n_devices))
    holds = np.zeros((n_devices, len(instances)), dtype=bool)
    for i in np.argsort(-weight, kind="stable").tolist():
        apart = (free > 0) & ~holds[:, experts[i]]
        d = int(np.where(apart if apart.any() else free > 0, sums, np.inf).argmin())
        devices[i] = d
        sums[d] += weight[i]
        free[d] -= 1
        holds[d, experts[i]] = True
    return Placement(instances, devices, n_devices)


def packed(load: Load, n_devices: int) -> Placement:
    """`pack` without copies."""
    return pack(load, np.ones(len(load), dtype=np.int64), n_devices)


def packed_with_copies(load: Load, n_copies: int, n_devices: int) -> Placement:
    """`pack` with copies of the heaviest shares. n_copies: of `even_copies`, for equal slots."""
    return pack(load, add_copies(load, np.ones(len(load), dtype=np.int64), n_copies, n_devices), n_devices)


def paper_copy(load: Load, n_devices: int) -> Placement:
    """The paper's single copy (Replicate-and-Quantize, arXiv 2602.19938): stock order, and one copy of the busiest expert.

    The paper does not speak of devices: the copy goes to the one with the least load of the others, which so holds one more instance.
    """
    stock = stock_order(len(load), n_devices)
    if n_devices == 1:
        return stock
    busiest, values = int(np.argmax(load)), np.asarray(load, dtype=np.float64)
    sums = stock.sums(values)
    sums[stock.devices[busiest]] = np.inf
    instances = stock.instances.copy()
    instances[busiest] += 1
    return Placement(instances, np.insert(stock.devices, busiest + 1, int(sums.argmin())), n_devices)


def split_over_instances(counts: NDArray[np.integer], instances: NDArray[np.int64], block: int = 1) -> NDArray[np.int64]:
    """[..., n_phys] tokens that each instance serves: of those that picked its expert, number r goes to instance (r / block) % instances.

    The runtime's dispatch (rq.dispatch_block, docs/format.md); 1 where instances lie on several devices.
    counts: [..., n_expert] tokens of a batch that picked each expert.
    """
    per = np.repeat(instances, instances)
    number = np.arange(len(per)) - np.repeat(np.cumsum(instances) - instances, instances)
    tokens = np.repeat(np.asarray(counts, dtype=np.int64), instances, axis=-1)
    rounds, rest = np.divmod(tokens, block * per)
    return rounds * block + np.clip(rest - number * block, 0, block)


def location_map(placements: list[Placement]) -> NDArray[np.int64]:
    """[layers, n_phys] logical expert of each physical one, those of device 0 first: how engines write a placement down.

    Raises ValueError unless every device of every layer holds the same number of instances.
    """
    rows = []
    for p in placements:
        if len(set(np.bincount(p.devices, minlength=p.n_devices).tolist())) != 1:
            raise ValueError("devices hold different numbers of experts")
        rows.append(p.experts[np.lexsort((p.experts, p.devices))])
    return np.stack(rows)
