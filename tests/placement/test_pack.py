"""Packings computed by hand, and what holds for any."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf.placement.pack import (
    Placement,
    add_copies,
    even_copies,
    location_map,
    pack,
    packed,
    packed_with_copies,
    paper_copy,
    split_over_instances,
    stock_order,
)


def sums(p: Placement, load: list[int]) -> list[float]:
    return p.sums(np.repeat(np.array(load) / p.instances, p.instances)).tolist()


def test_stock_order_is_contiguous() -> None:
    assert stock_order(8, 4).devices.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert stock_order(7, 3).devices.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert stock_order(2, 4).devices.tolist() == [0, 1]


def test_greedy_by_hand() -> None:
    # Two slots each: 9 -> 0, 7 -> 1, 6 -> 2; then 5 -> 2 (6 is least), 2 -> 1, and 1 to the last free slot.
    load = [9, 7, 6, 5, 2, 1]
    p = packed(np.array(load), 3)
    assert p.devices.tolist() == [0, 1, 2, 2, 1, 0]
    assert sums(p, load) == [10, 9, 11]


def test_full_devices_get_no_more() -> None:
    # Two devices of two slots: after 10 | 3, 3 the second is full, so the last goes to the heavy one.
    p = packed(np.array([10, 3, 3, 1]), 2)
    assert p.devices.tolist() == [0, 1, 1, 0]


def test_copies_by_hand() -> None:
    # 12 -> 6, 6; then 8 -> 4, 4: loads 6 6 4 4 3 1 on two devices of three slots.
    load = [12, 8, 3, 1]
    p = packed_with_copies(np.array(load), 2, 2)
    assert p.instances.tolist() == [2, 2, 1, 1]
    assert sums(p, load) == [13, 11]
    assert sorted(p.devices[:2]) == sorted(p.devices[2:4]) == [0, 1]


def test_an_expert_has_at_most_one_instance_per_device() -> None:
    assert add_copies(np.array([100, 1, 1]), np.ones(3, dtype=np.int64), 3, 2).tolist() == [2, 2, 2]


def test_even_copies() -> None:
    assert [even_copies(32, n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert even_copies(60, 0, 8) == 4
    assert even_copies(8, 0, 64) == 56


def test_paper_copy_goes_to_the_least_loaded_other_device() -> None:
    p = paper_copy(np.array([1, 9, 4, 4, 0, 2]), 3)
    assert p.instances.tolist() == [1, 2, 1, 1, 1, 1]
    assert p.devices.tolist() == [0, 0, 2, 1, 1, 2, 2]


def test_location_map_lists_devices_in_order() -> None:
    p = Placement(np.array([2, 1, 1]), np.array([1, 0, 0, 1]), 2)
    assert location_map([p]).tolist() == [[0, 1, 0, 2]]
    with pytest.raises(ValueError):
        location_map([paper_copy(np.array([3, 1]), 2)])


@pytest.mark.parametrize("block", [1, 3, 16])
def test_dispatch_is_the_runtimes(block: int) -> None:
    """Against the rule itself, token by token."""
    rng = np.random.default_rng(block)
    instances = np.array([1, 3, 2, 5])
    counts = rng.integers(0, 100, (20, 4))
    got = split_over_instances(counts, instances, block)
    for row, served in zip(counts, got, strict=True):
        expected = [0] * instances.sum()
        for e, n in enumerate(row):
            for r in range(n):
                expected[instances[:e].sum() + (r // block) % instances[e]] += 1
        assert served.tolist() == expected


loads = st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)


@given(loads, st.integers(1, 12), st.integers(0, 30))
def test_any_packing(load: list[int], n_devices: int, wanted: int) -> None:
    copies = even_copies(len(load), min(wanted, len(load) * (n_devices - 1)), n_devices)
    p = packed_with_copies(np.array(load), copies, n_devices)
    assert p.instances.sum() == len(load) + copies and p.instances.min() >= 1 and p.instances.max() <= n_devices
    held = np.bincount(p.devices, minlength=n_devices)
    assert set(held.tolist()) == {len(p.devices) // n_devices}
    weight = np.repeat(np.array(load) / p.instances, p.instances)
    by_device = p.sums(weight)
    assert by_device.max() - by_device.min() <= (weight.max() - weight.min()) * (1 + 1e-9)
    assert by_device.max() <= by_device.mean() + (1 - 1 / n_devices) * (weight.max() - weight.min()) + 1e-6
    row = location_map([p])[0]
    assert set(row.tolist()) == set(range(len(load)))


@given(loads, st.integers(1, 12))
def test_any_packing_without_copies(load: list[int], n_devices: int) -> None:
    p = packed(np.array(load), n_devices)
    assert p.instances.tolist() == [1] * len(load)
    slots = -(-len(load) // n_devices)
    assert np.bincount(p.devices, minlength=n_devices).max() <= slots
    by_device = p.sums(np.array(load))
    lightest = min(load) if slots * n_devices == len(load) else 0
    assert by_device.max() - by_device.min() <= max(load) - lightest
    assert by_device.max() >= max(load)


def test_instances_of_an_expert_lie_apart() -> None:
    # By load alone both halves of 6 would go to device 1: 10 against 3, then 6.
    p = pack(np.array([10, 6, 1]), np.array([1, 2, 1]), 2)
    assert p.devices.tolist() == [0, 1, 0, 1]


def test_heavy_experts_of_a_large_layer_lie_apart() -> None:
    rng = np.random.default_rng(0)
    for n_devices in (2, 8, 32):
        p = packed_with_copies(np.exp(rng.standard_normal(256)), 64, n_devices)
        assert len(set(zip(p.experts.tolist(), p.devices.tolist(), strict=True))) == len(p.devices)


@given(st.lists(st.integers(0, 200), min_size=2, max_size=10), st.lists(st.integers(1, 6), min_size=2, max_size=10), st.integers(1, 40))
def test_any_dispatch_serves_all(counts: list[int], instances: list[int], block: int) -> None:
    n = min(len(counts), len(instances))
    per = np.array(instances[:n])
    served = split_over_instances(np.array(counts[:n]), per, block)
    start = np.cumsum(per) - per
    assert np.add.reduceat(served, start).tolist() == counts[:n]
    for e in range(n):
        mine = served[start[e] : start[e] + per[e]]
        assert mine.max() - mine.min() <= block


def test_pack_keeps_given_instances() -> None:
    instances = np.array([1, 2, 1])
    assert pack(np.array([1, 1, 1]), instances, 2).instances is instances
