"""Figures of a simulation, by hand and by what they must obey."""

import numpy as np
import pytest
from placement.samples import sample_trace

from rq_gguf.errors import UserError
from rq_gguf.placement.batches import halves
from rq_gguf.placement.figure import draw
from rq_gguf.placement.machine import ExpertSize, Machine, layer_seconds
from rq_gguf.placement.make import parse_counts, parse_shape
from rq_gguf.placement.pack import stock_order
from rq_gguf.placement.simulate import ARRANGEMENTS, Workload, arrangements, measure, simulate
from rq_gguf.placement.table import Simulation, describe, to_json

MACHINE, SIZE = Machine(), ExpertSize(64, 32)


def test_measure_by_hand() -> None:
    # Two devices of two experts; 4 tokens of 2: device 0 serves 6 and 4, device 1 2 and 4; experts read 2 | 1 and 1 | 2.
    counts = np.array([[4, 2, 2, 0], [0, 4, 2, 2]])
    tokens, distinct, over_mean, _ = measure(stock_order(4, 2), counts, 4, MACHINE, SIZE)
    assert tokens == pytest.approx((6 / 4 + 4 / 4) / 2)
    assert distinct == 2
    assert over_mean == pytest.approx(2 / 1.5)


def test_time_by_hand() -> None:
    machine = Machine(bandwidth=1e9, compute=1e12, link=1e8, latency=1e-5)
    size = ExpertSize(1000, 500, bits=8)  # 1.5 MB, 3 million operations a token
    tokens, distinct = np.array([[6.0, 2.0]]), np.array([[2.0, 1.0]])
    # 3 MB at 1 GB/s; twice 10 us; twice 6 tokens x 1/2 x 2000 bytes at 0.1 GB/s.
    assert layer_seconds(machine, size, tokens, distinct, 4) == pytest.approx([3e-3 + 2e-5 + 2 * 6 * 0.5 * 2000 / 1e8])
    # Partial sums: all 4 tokens, whoever serves them.
    sums = Machine(1e9, 1e12, 1e8, 1e-5, "partial-sums")
    assert layer_seconds(sums, size, tokens, distinct, 4) == pytest.approx([3e-3 + 2e-5 + 2 * 4 * 0.5 * 2000 / 1e8])
    # One device sends 4 tokens of 1000 F32 to the other and takes as much back.
    home = Machine(1e9, 1e12, 1e8, 1e-5, "home")
    assert layer_seconds(home, size, tokens, distinct, 4) == pytest.approx([3e-3 + 2e-5 + 2 * 4 * 4000 / 1e8])
    # 6 readings of an expert on the busiest device instead of 2; 5 us of launches and 70 us of all else, on one device too.
    again = Machine(1e9, 1e12, 1e8, 0, "home", launch=5e-6, rest=7e-5, rereads=4)
    assert layer_seconds(again, size, tokens, distinct, 4) == pytest.approx([9e-3 + 7.5e-5 + 2 * 4 * 4000 / 1e8])
    assert layer_seconds(again, size, tokens, distinct, 5) == pytest.approx([3e-3 + 7.5e-5 + 2 * 5 * 4000 / 1e8])
    assert layer_seconds(again, size, tokens[:, :1], distinct[:, :1], 4) == pytest.approx([9e-3 + 7.5e-5])
    # Two experts on the busiest device are computed for 4 tokens each, or for the batch if that is smaller: 8 times 3 million at 1 G.
    tiled = Machine(1e12, 1e9, 1e8, 0, "home", tile=4)
    assert layer_seconds(tiled, size, tokens, distinct, 8) == pytest.approx([24e-3 + 2 * 8 * 4000 / 1e8])
    assert layer_seconds(tiled, size, tokens, distinct, 3) == pytest.approx([18e-3 + 2 * 3 * 4000 / 1e8])
    # Arithmetic bounds a thousand tokens of one expert; one device exchanges nothing.
    assert layer_seconds(machine, size, np.array([[1000.0]]), np.array([[1.0]]), 1000) == pytest.approx([3e-3])


def test_arrangements_obey() -> None:
    trace = sample_trace(sequences=40)
    planned, decoded = halves(trace)
    points = simulate(Workload(planned.selections, 2, decoded), (1, 2, 4, 8), (1, 16, 256), 8, MACHINE, SIZE)
    assert [(p.devices, p.batch) for p in points] == [(d, b) for d in (1, 2, 4, 8) for b in (1, 16, 256)]
    for p in points:
        assert [f.arrangement for f in p.figures] == list(ARRANGEMENTS)
        for f in p.figures:
            assert 1 - 1e-9 <= f.tokens <= p.devices and f.seconds > 0
            assert f.distinct <= min(p.batch * 2, 16 + f.copies)
            if p.devices == 1:
                assert f.tokens == 1
        if p.batch == 256 and p.devices > 1:
            assert p.of("packed").tokens < p.of("stock").tokens
            assert p.of("copies").tokens < p.of("packed").tokens
            assert p.of("paper").tokens < p.of("stock").tokens
    assert [p.of("copies").copies for p in points[::3]] == [0, 8, 8, 8]
    again = simulate(Workload(planned.selections, 2, decoded), (4,), (256,), 8, MACHINE, SIZE)
    assert again[0] == points[8]


def test_loads_alone_agree_with_a_trace_without_structure() -> None:
    """The sample's tokens are independent, so drawing from their loads is the same in the mean."""
    trace = sample_trace(sequences=200)
    loads = trace.selections().astype(float)
    by_trace = simulate(Workload(loads, 2, halves(trace)[1]), (4,), (64,), 4, MACHINE, SIZE)[0]
    by_load = simulate(Workload(loads, 2, None), (4,), (64,), 4, MACHINE, SIZE)[0]
    for a, b in zip(by_trace.figures, by_load.figures, strict=True):
        assert a.tokens == pytest.approx(b.tokens, rel=0.04)


def test_table_and_json_say_the_same() -> None:
    trace = sample_trace()
    planned, decoded = halves(trace)
    points = simulate(Workload(planned.selections, 2, decoded), (2, 8), (8, 64), 4, MACHINE, SIZE)
    s = Simulation("sample", 3, 16, 2, "planned on one half", MACHINE, SIZE, points)
    lines, data = describe(s), to_json(s)
    row = next(line for line in lines if line.replace(" ", "").startswith("|8|64|"))
    cells = [c.strip() for c in row.strip("|").split("|")]
    figures = data["points"][3]["arrangements"]
    assert cells[2:] == [f"{figures[a]['tokens']:.2f}" for a in ARRANGEMENTS] + [f"{data['points'][3]['uniform']:.2f}"]
    # 16 + 4 instances: four more make equal slots on 8 devices.
    assert "4 copies per layer on 2 devices, 8 copies per layer on 8 devices" in " ".join(lines)
    assert draw(s).shapes


def test_counts_and_shapes() -> None:
    assert parse_counts("2..64", "--devices", 1024) == (2, 4, 8, 16, 32, 64)
    assert parse_counts("3..10", "--devices", 1024) == (3, 6)
    assert parse_counts("8, 2..4,12", "--devices", 1024) == (2, 4, 8, 12)
    for bad in ("", "0", "2..", "8..2", "a", "2-8", "4096", "-2"):
        with pytest.raises(UserError, match="--devices"):
            parse_counts(bad, "--devices", 1024)
    assert parse_shape("2048x768") == (2048, 768)
    for bad in ("2048", "0x4", "axb"):
        with pytest.raises(UserError, match="--shape"):
            parse_shape(bad)


def test_each_number_of_devices_has_the_copies_it_can_hold() -> None:
    load = np.arange(1.0, 9.0)
    assert [len(arrangements(load, d, 8)["copies"].devices) - len(load) for d in (1, 2, 4)] == [0, 8, 8]
    assert len(arrangements(load, 2, 100)["copies"].devices) == 16
