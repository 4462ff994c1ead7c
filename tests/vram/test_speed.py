"""How fast a layout decodes: by hand, against what was measured, and what must hold of every model and machine."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf.planning.budget import ExpertShape
from rq_gguf.vram.machine import MACHINES, Machine
from rq_gguf.vram.model import uniform_experts
from rq_gguf.vram.plans import TYPICAL, Setting, measure
from rq_gguf.vram.speed import (
    Experts,
    Layout,
    Missed,
    Rest,
    chances,
    decode_table,
    held,
    longer,
    missed,
    prompt_table,
    reads,
)

HAND = Machine("hand", ram_bandwidth=10, vram_bandwidth=100, handover=1, pcie_bandwidth=20, compute=1000, gpu_layer=0.5, gpu_experts=0)


def two_layers() -> tuple[Experts, Rest]:
    """Two layers of 3 experts, one per token; an expert is 60 bytes: 6 s in RAM, 0.6 s in VRAM."""
    shares = np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
    size = np.full((2, 3), 60.0)
    return Experts(size, size / 10, size / 100, shares, 1), Rest(200, 3, 400.0)


def test_a_step_by_hand() -> None:
    """Besides the experts: 200 / 100 + 3 x 0.5 = 3.5 s."""
    table = decode_table(*two_layers(), HAND, power=1.0)
    assert table.at(Layout(0, 0)) == pytest.approx(3.5 + 2 * (1 + 6))
    assert table.at(Layout(0, 1)) == pytest.approx(3.5 + 2 * (1 + 0.5 * 0.6 + 0.5 * 6))
    assert table.at(Layout(1, 0)) == pytest.approx(3.5 + 7 + 0.6)
    assert table.at(Layout(2, 0)) == table.at(Layout(0, 3)) == pytest.approx(3.5 + 2 * 0.6)
    assert [table.bytes_of(Layout(w, s)) for w, s in ((0, 0), (0, 1), (1, 0), (1, 2), (2, 1))] == [0, 120, 180, 300, 360]
    assert table.best(100) == Layout(0, 0) and table.best(120) == Layout(0, 1) and table.best(1e9).whole * 60 * 3 in (0, 360)
    assert table.stock(359) == Layout(1, 0) and table.stock(360) == Layout(2, 0)
    # A layer that is all the CPU's may take a longer hand-over.
    longest = decode_table(*two_layers(), replace(HAND, whole_handover=3.0), power=1.0)
    assert longest.at(Layout(0, 0)) == pytest.approx(3.5 + 2 * (3 + 6)) and longest.at(Layout(1, 0)) == pytest.approx(3.5 + 9 + 0.6)
    assert longest.seconds[:, 1:] == pytest.approx(table.seconds[:, 1:])
    # A set that follows the text misses a quarter instead of a half.
    assert decode_table(*two_layers(), HAND, power=2.0).at(Layout(0, 1)) == pytest.approx(3.5 + 2 * (1 + 0.75 * 0.6 + 0.25 * 6))
    assert missed(two_layers()[0])[0].tolist() == [1, 0.5, 0.25, 0]
    # With one expert per token the CPU and the GPU never have something to do at the same time.
    apart = decode_table(*two_layers(), replace(HAND, overlap=False), power=2.0)
    assert apart.seconds == pytest.approx(decode_table(*two_layers(), HAND, power=2.0).seconds)


def test_two_parts_at_the_same_time_by_hand() -> None:
    """Of two experts per token neither, one or both are in RAM, with 1/4, 1/2 and 1/4; each takes 6 s there, 1 s in VRAM."""
    assert longer(np.array([6.0]), np.array([1.0]), np.array([0.5]), 2) == pytest.approx([(2 + 2 * 6 + 12) / 4])
    ends = longer(np.array([12.0, 0.0]), np.array([0.0, 2.0]), np.array([1.0, 0.0]), 2)
    assert ends.tolist() == [12, 2]
    many = longer(np.array([6.0]), np.array([1.0]), np.array([0.5]), 1000)
    assert many == pytest.approx([6], rel=1e-6)  # nothing of the shorter part remains


@given(st.floats(0, 1), st.floats(0, 9), st.floats(0, 9), st.integers(1, 12))
def test_the_longer_part_is_no_less_than_both_and_no_more_than_their_sum(chance: float, slow: float, fast: float, n: int) -> None:
    slow, fast = slow * (chance > 0), fast * (chance < 1)  # a part that nothing falls to takes no time
    mean = float(longer(np.array(slow), np.array(fast), np.array(chance), n))
    assert max(slow, fast) - 1e-9 <= mean <= slow + fast + 1e-9


def test_what_the_gpus_experts_always_take_by_hand() -> None:
    """A second per layer, which the CPU's 6 s hide where its one expert is not held."""
    experts, rest = two_layers()
    machine = replace(HAND, gpu_experts=1.0)
    table = decode_table(experts, rest, machine, power=1.0)
    assert table.at(Layout(0, 0)) == pytest.approx(3.5 + 2 * (1 + 6))  # the GPU has none
    assert table.at(Layout(0, 1)) == pytest.approx(3.5 + 2 * (1 + 0.5 * 1.6 + 0.5 * 6))
    assert table.at(Layout(1, 0)) == pytest.approx(3.5 + 7 + 1.6)
    apart = decode_table(experts, rest, replace(machine, overlap=False), power=1.0)
    assert apart.at(Layout(0, 1)) == pytest.approx(3.5 + 2 * (1 + 1 + 0.5 * 0.6 + 0.5 * 6))
    together = decode_table(experts, rest, machine, power=1.0, sequences=2)
    assert together.at(Layout(0, 1)) == pytest.approx(3.5 + 2 * (1 + 0.875 * 6))
    assert prompt_table(experts, rest, machine, tokens=2).at(Layout(2, 0)) == pytest.approx(3.5 + 2)
    assert longer(np.array([6.0]), np.array([1.0]), np.array([0.5]), 2, 3.0) == pytest.approx([(5 + 2 * 6 + 12) / 4])


def test_several_sequences_by_hand() -> None:
    """Two tokens pick an expert of share 0.5 with 0.75, one of 0.25 with 0.4375."""
    experts, rest = two_layers()
    assert chances(experts, 2)[0].tolist() == [0.75, 0.4375, 0.4375]
    apart = decode_table(experts, rest, replace(HAND, overlap=False), power=2.0, sequences=2)
    assert apart.at(Layout(0, 1)) == pytest.approx(3.5 + 2 * (1 + 0.75 * 0.6 + 0.875 * 6))
    table = decode_table(experts, rest, HAND, power=2.0, sequences=2)
    assert table.at(Layout(0, 1)) == pytest.approx(3.5 + 2 * (1 + 0.875 * 6))


def test_a_prompt_by_hand() -> None:
    """Two tokens: 2 x 400 x 2 / 1000 s of arithmetic, less than the 2 s that reading the rest takes; 60 bytes go up in 3 s."""
    table = prompt_table(*two_layers(), HAND, tokens=2)
    assert table.at(Layout(0, 1)) == pytest.approx(3.5 + 2 * (1 + 0.875 * 3))
    assert table.at(Layout(2, 0)) == pytest.approx(3.5)


def test_where_experts_are() -> None:
    experts, _ = two_layers()
    assert held(experts, Layout(1, 1)).tolist() == [[True, False, False], [True, True, True]]
    assert held(experts, Layout(0, 2)).tolist() == [[True, True, False], [True, False, True]]
    assert reads(experts, Layout(1, 1), 2.0).tolist() == [pytest.approx([0.75, 0.125, 0.125]), [0.25, 0.25, 0.5]]


@st.composite
def models(draw: st.DrawFn) -> tuple[Experts, Rest, Machine]:
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n_layers, n_expert = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    machine = Machine("m", *(10 ** rng.uniform(-2, 2, 2)), rng.uniform(0, 2), *(10 ** rng.uniform(-1, 2, 2)), rng.uniform(0, 1))
    shares = rng.dirichlet(np.full(n_expert, draw(st.sampled_from([0.1, 1.0, 100.0]))), n_layers)
    size = rng.uniform(1, 5, shares.shape)
    experts = Experts(size, size / machine.ram_bandwidth, size / machine.vram_bandwidth, shares, draw(st.integers(1, 2)))
    return experts, Rest(int(rng.integers(0, 100)), n_layers, 10.0), machine


@given(model=models(), power=st.floats(0.5, 2), sequences=st.sampled_from([1, 4]))
def test_more_vram_is_never_slower_and_stock_never_faster(model: tuple[Experts, Rest, Machine], power: float, sequences: int) -> None:
    experts, rest, machine = model
    table = decode_table(experts, rest, machine, power, sequences)
    assert np.isfinite(table.seconds).all() and (table.seconds > 0).all()
    before = np.inf
    for part in np.linspace(0, 1, 9):
        room = part * experts.bytes.sum() * (1 + 1e-12)
        best, stock = table.best(room), table.stock(room)
        assert table.bytes_of(best) <= room and stock.slots == 0
        assert table.at(best) <= table.at(stock) and table.at(best) <= before
        before = table.at(best)


@given(model=models())
def test_a_set_that_follows_the_text_is_never_slower(model: tuple[Experts, Rest, Machine]) -> None:
    """Where VRAM is the faster memory and experts are equally large."""
    experts, rest, machine = model
    same = np.ones_like(experts.bytes)
    experts = replace(experts, bytes=same, ram_seconds=same, vram_seconds=same / 2)
    machine = replace(machine, overlap=False)  # else the CPU waits for the GPU where nearly all is held
    static, adapted = (decode_table(experts, rest, machine, power).seconds for power in (TYPICAL.static, TYPICAL.adapted))
    assert (adapted <= static * (1 + 1e-12)).all()


def test_evenly_picked_experts_gain_nothing() -> None:
    shape, machine = ExpertShape(32, 2048, 1024, False), MACHINES["12gb"]
    even = uniform_experts(shape, "q4_k", np.full((8, 32), 1 / 32), 4, machine)
    rest = Rest(10**9, 8, 1e9)
    speed = measure(even, Setting(machine, rest, Missed(1.0, 1.0)), 0.5 * even.bytes.sum())
    assert speed.decode == speed.stock_decode and speed.layout.slots == 0  # whole layers save hand-overs
    share = 0.75 ** np.arange(32)
    skewed = uniform_experts(shape, "q4_k", np.tile(share / share.sum(), (8, 1)), 4, machine)
    speed = measure(skewed, Setting(machine, rest, TYPICAL), 0.5 * even.bytes.sum())
    assert speed.decode > 1.2 * speed.stock_decode and speed.adapted_hits > speed.hits > 0.85
