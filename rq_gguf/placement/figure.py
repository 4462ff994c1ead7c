"""A simulation as a drawing: the busiest device over the mean, for every number of devices, over the batch. Pure."""

from rq_gguf.placement.simulate import ARRANGEMENTS
from rq_gguf.placement.table import WORDS, Simulation
from rq_gguf.report.shapes import Axis, Dots, Drawing, Line, Text, ticks

WIDTH, _PANEL, _TOP, _GAP = 720.0, 190.0, 64.0, 46.0
_LEFT, _RIGHT, _COLUMNS = 40.0, 12.0, 3
_COLOURS = {"stock": "before", "paper": "type5", "packed": "after", "copies": "type2", "uniform": "muted"}
N_COLOURS = 7
"""Colours of `report.colours.palette` beside its named ones."""


def draw(s: Simulation) -> Drawing:
    """A panel per number of devices, lines over the batch size."""
    devices = sorted({p.devices for p in s.points})
    rows = -(-len(devices) // _COLUMNS)
    d = Drawing("simulator", f"Busiest device over the mean, {s.model}", WIDTH, _TOP + rows * (_PANEL + _GAP))
    d.add(Text(_LEFT, 20, f"{s.model}: tokens of the busiest device over the mean, by batch size", "ink", 14, bold=True))
    _legend(d)
    columns = min(_COLUMNS, len(devices))
    width = (WIDTH - _LEFT - _RIGHT) / columns
    batches = sorted({p.batch for p in s.points})
    for i, n in enumerate(devices):
        x0, y0 = _LEFT + i % _COLUMNS * width, _TOP + i // _COLUMNS * (_PANEL + _GAP)
        points = sorted((p for p in s.points if p.devices == n), key=lambda p: p.batch)
        lines = {a: [p.of(a).tokens for p in points] for a in ARRANGEMENTS} | {"uniform": [p.uniform for p in points]}
        x = Axis(batches[0], batches[-1], x0 + 6, x0 + width - 30, log=True)
        y = Axis(1.0, max(max(v) for v in lines.values()) * 1.03, y0 + _PANEL, y0 + 18)
        d.add(Text(x.start, y0 + 10, f"{n} devices", "ink", bold=True))
        for value in ticks(y.low, y.high, 5):
            d.add(
                Line(((x.start, y(value)), (x.end, y(value))), "grid"), Text(x.start - 4, y(value) + 4, f"{value:g}", size=10, anchor="end")
            )
        for value in batches[:: max(1, -(-len(batches) // 5))]:
            d.add(Text(x(value), y.start + 15, str(value), size=10, anchor="middle"))
        for name, values in lines.items():
            way = tuple((x(p.batch), y(v)) for p, v in zip(points, values, strict=True))
            d.add(Line(way, _COLOURS[name], 2.0, dash=name == "uniform"))
            if name != "uniform":
                d.add(Dots(way, 2.5, _COLOURS[name]))
    d.add(Text(WIDTH / 2, d.height - 8, "sequences that decode together", anchor="middle"))
    return d


def _legend(d: Drawing) -> None:
    at = _LEFT
    for name, words in (*WORDS.items(), ("uniform", "uniform routing")):
        d.add(Line(((at, 40), (at + 16, 40)), _COLOURS[name], 2.5, dash=name == "uniform"), Text(at + 21, 44, words, "ink"))
        at += 40 + 6.6 * len(words)
