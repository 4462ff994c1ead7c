"""A simulation for people and for programs. Pure."""

from dataclasses import asdict, dataclass
from typing import Any

from rq_gguf.placement.machine import ExpertSize, Machine
from rq_gguf.placement.simulate import ARRANGEMENTS, Point

WORDS = {"stock": "stock order", "paper": "+ 1 copy (paper)", "packed": "packed", "copies": "packed + copies"}


@dataclass(frozen=True)
class Simulation:
    """All there is to show."""

    model: str
    n_layers: int
    n_expert: int
    n_used: int
    decoded: str
    """What the batches are drawn from, as a clause."""
    machine: Machine
    size: ExpertSize
    points: list[Point]


def describe(s: Simulation) -> list[str]:
    """Lines with three tables: tokens, experts read, time."""
    m = s.machine
    lines = [
        f"{s.model}: {s.n_layers} layers of {s.n_expert} experts, {s.n_used} per token; {s.decoded}",
        f"step time: routed experts of {s.size.bits:g} bits and their exchange ({m.exchange}), {m.bandwidth / 1e9:g} GB/s memory, "
        f"{m.compute / 1e12:g} TFLOPS, {m.link / 1e9:g} GB/s links, {m.latency * 1e6:g} us latency"
        + (f"; {(m.launch + m.rest) * 1e6:g} us a layer besides" if m.launch + m.rest else "")
        + (f"; experts read for each token with up to {m.rereads} sequences" if m.rereads else ""),
    ]
    copies = {p.devices: p.of("copies").copies for p in s.points}
    named = sorted(set(copies.values()))
    if len(named) == 1:
        lines.append(f"packed + copies: {named[0]} copies per layer")
    else:
        lines.append("packed + copies: " + ", ".join(f"{n} copies per layer on {d} devices" for d, n in copies.items()))
    head = ["devices", "batch", *(WORDS[a] for a in ARRANGEMENTS)]
    tokens = [[f"{p.of(a).tokens:.2f}" for a in ARRANGEMENTS] + [f"{p.uniform:.2f}"] for p in s.points]
    distinct = [[f"{p.of(a).distinct:.1f}" for a in ARRANGEMENTS] for p in s.points]
    seconds = [
        [
            f"{p.of(a).seconds * 1e6:.0f}" + ("" if a == "stock" else f" ({p.of('stock').seconds / p.of(a).seconds:.2f}x)")
            for a in ARRANGEMENTS
        ]
        for p in s.points
    ]
    places = [[str(p.devices), str(p.batch)] for p in s.points]
    for title, columns, cells in (
        ("tokens of the busiest device over the mean", [*head, "uniform routing"], tokens),
        ("experts that the device with most of them reads, mean over layers", head, distinct),
        ("us per step, all layers (stock order's time over it)", head, seconds),
    ):
        lines += ["", title, *markdown(columns, [place + row for place, row in zip(places, cells, strict=True)])]
    return lines


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table, its columns aligned to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *map(line, rows)]


def to_json(s: Simulation) -> dict[str, Any]:
    """The same for programs."""
    return {
        "model": s.model,
        "layers": s.n_layers,
        "experts": s.n_expert,
        "experts_used": s.n_used,
        "decoded": s.decoded,
        "machine": asdict(s.machine),
        "expert": asdict(s.size),
        "points": [
            {
                "devices": p.devices,
                "batch": p.batch,
                "uniform": p.uniform,
                "arrangements": {f.arrangement: {k: v for k, v in asdict(f).items() if k != "arrangement"} for f in p.figures},
            }
            for p in s.points
        ],
    }
