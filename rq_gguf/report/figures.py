"""The figures of a report, drawn at any width. Pure."""

import math
from collections.abc import Callable

from rq_gguf.report.colours import HEAT_STEPS
from rq_gguf.report.data import Layer, Report
from rq_gguf.report.shapes import Axis, Cells, Dots, Drawing, Line, Text, log_ticks, ticks
from rq_gguf.report.words import kld_text, percent, size_text

WIDE, NARROW = 720.0, 360.0
_LEAST_HEAT, _MOST_HEAT = 0.25, 4.0  # of the mean load: what the scale reaches at least
_FONT = 12.0
_CHARACTER = 0.58  # width of a letter over its size, about

Legend = list[tuple[str, str, str]]
"""(colour, kind of marker, words)."""


def load_map(r: Report, width: float) -> Drawing:
    """Layers x experts: load over the layer's mean, on a logarithmic scale."""
    d = Drawing("load", "Load of every expert", width, 0)
    relative = [[s * len(x.share) for s in x.share] for x in r.layers if x.share is not None]
    high = max(_MOST_HEAT, max(map(max, relative)))
    scale = Axis(_LEAST_HEAT, high, 0, HEAT_STEPS - 1, log=True)
    top = _heat_legend(d, scale, width)
    boxes = _grid(d, r, top)
    by_step: dict[int, list[tuple[float, float, float, float]]] = {}
    for row, values in enumerate(relative):
        for e, value in enumerate(values):
            step = round(min(max(scale(value), 0), HEAT_STEPS - 1))
            by_step.setdefault(step, []).append(boxes(row, e))
    d.add(*(Cells(tuple(by_step[s]), f"heat{s}") for s in sorted(by_step)))
    return d


def lis_lines(r: Report, width: float) -> Drawing:
    """Per layer: load imbalance without and with copies."""
    d = Drawing("lis", "Load imbalance per layer", width, 300)
    rows = [(x.layer, x.lis_before, x.lis_after) for x in r.layers if x.lis_before is not None and x.lis_after is not None]
    legend: Legend = [("before", "circle", "without copies"), ("after", "circle", "with copies")]
    top = _legend(d, legend if r.n_copies else legend[:1], 0)
    y = Axis(1, max(2.0, max(row[1] for row in rows) * 1.05), d.height - 42, top + 14)
    x = Axis(-0.5, len(rows) - 0.5, 44, width - 12)
    _horizontal(d, y, ticks(y.low, y.high, 6), "{:g}", (x.start, x.end))
    every = max(1, math.ceil(len(rows) / (width / 28)))
    radius = min(6.0, max(2.0, (x.end - x.start) / len(rows) / 3))
    for i, (layer, before, after) in enumerate(rows):
        tip = f"layer {layer}: LIS {before:.2f}" + (f" without copies, {after:.2f} with" if r.n_copies else "")
        if r.n_copies:
            d.add(Line(((x(i), y(before)), (x(i), y(after))), "rule", 2))
            d.add(Dots(((x(i), y(after)),), radius, "after", tip=tip))
        d.add(Dots(((x(i), y(before)),), radius, "before", tip=tip))
        if i % every == 0:
            d.add(Text(x(i), d.height - 24, str(layer), anchor="middle"))
    d.add(Text((x.start + x.end) / 2, d.height - 6, "layer", anchor="middle"))
    _turned(d, "LIS (1 is even)", y)
    return d


def importance_dots(r: Report, width: float) -> Drawing:
    """Every expert: importance over load, both over the layer's mean; the busiest of each layer stand out."""
    d = Drawing("importance", "Importance against load", width, 340)
    points: list[tuple[float, float]] = []
    busiest: list[tuple[float, float]] = []
    for layer in r.layers:
        if layer.share is None or layer.importance is None:
            continue
        here = [(s * len(layer.share), v) for s, v in zip(layer.share, layer.importance, strict=True)]
        first = max(here)
        busiest.append(first)
        points += [p for p in here if p is not first]
    top = _legend(d, [("accent", "circle", "an expert"), ("before", "circle", "the busiest of its layer")], 0)
    everything = points + busiest
    x = _log_axis([p[0] for p in everything], 52, width - 14)
    y = _log_axis([p[1] for p in everything], d.height - 46, top + 14)
    _horizontal(d, y, log_ticks(y.low, y.high, 6), "{:g}", (x.start, x.end))
    _below(d, x, log_ticks(x.low, x.high, 8 if width > 500 else 5), "{:g}", "load over the layer's mean")
    for found, colour in ((points, "accent"), (busiest, "before")):
        if found:
            centres = tuple((x(a), y(b)) for a, b in found)
            d.add(Dots(centres, 3.5 if len(found) < 2000 else 2.0, colour, opacity=0.55 if colour == "accent" else 0.95))
    _turned(d, "importance over the layer's mean", y)
    return d


def type_map(r: Report, width: float) -> Drawing:
    """Layers x experts: types of the primaries, gate and up above, down below; a dot for experts with copies."""
    d = Drawing("map", "Types and copies", width, 0)
    colour = {t: f"type{i}" for i, t in enumerate(r.types)}
    legend: Legend = [(colour[t], "square", t) for t in r.types]
    top = _legend(d, legend + ([("dot", "circle", "has copies")] if r.n_copies else []), 0)
    boxes = _grid(d, r, top, tallest=26)
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    copied: list[tuple[float, float]] = []
    size = 0.0
    for row, layer in enumerate(r.layers):
        for e, (upper, lower) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
            x, y, w, h = boxes(row, e)
            found.setdefault(upper[0], []).append((x, y, w, h / 2))
            found.setdefault(lower[0], []).append((x, y + h / 2, w, h / 2))
            if layer.copies[e]:
                copied.append((x + w / 2, y + h / 2))
            size = min(w, h)
    d.add(*(Cells(tuple(found[t]), colour[t]) for t in r.types if t in found))
    if copied:
        d.add(Dots(tuple(copied), min(4.0, max(1.0, size / 4.5)), "dot", outline="edge" if size > 6 else ""))
    return d


def bytes_bars(r: Report, width: float) -> Drawing:
    """Per layer: bytes by type."""
    d = Drawing("bytes", "Bytes by type", width, 0)
    colour = {t: f"type{i}" for i, t in enumerate(r.types)}
    legend: Legend = [(colour[t], "square", f"{t} {size_text(n)} ({percent(n / r.expert_bytes)})") for t, n in r.bytes_by_type.items()]
    if r.map_bytes:
        legend.append(("muted", "square", f"maps {size_text(r.map_bytes)}"))
    top = _legend(d, legend, 0) + 10
    height = min(20.0, max(5.0, 420 / len(r.layers)))
    d.height = top + height * len(r.layers) + 42
    x = Axis(0, max(layer.bytes for layer in r.layers), 40, width - 14)
    bottom = d.height - 42
    for value in ticks(0, x.high, 6 if width > 500 else 4):
        d.add(Line(((x(value), top), (x(value), bottom)), "grid"), Text(x(value), bottom + 16, size_text(value), anchor="middle"))
    _row_labels(d, r.layers, top, height)
    for row, layer in enumerate(r.layers):
        at, y = 0, top + row * height
        parts = [*layer.bytes_by_type.items(), ("map", layer.bytes - sum(layer.bytes_by_type.values()))]
        for name, n in parts:
            if n:
                box = (x(at), y + height * 0.1, x(at + n) - x(at), height * 0.8)
                d.add(Cells((box,), colour.get(name, "muted"), tip=f"layer {layer.layer}, {name}: {size_text(n)}"))
            at += n
    d.add(Text((x.start + x.end) / 2, d.height - 6, "bytes of a layer's experts", anchor="middle"))
    return d


def frontier_lines(r: Report, width: float) -> Drawing:
    """Predicted KL divergence over bytes: the frontier, one type for all, this plan."""
    assert r.chosen is not None  # see drawn
    d = Drawing("frontier", "Error against bytes", width, 380)
    mine = "this file" if r.written else "this plan"
    legend: Legend = [("accent", "line", "a type per expert"), ("before", "square", "one type for all"), ("ink", "diamond", mine)]
    top = _legend(d, legend, 0)
    points = [*r.frontier, *r.uniform, r.chosen]
    sizes = [p.bytes for p in points]
    span = max(sizes) - min(sizes) or max(sizes)
    x = Axis(max(0, min(sizes) - 0.05 * span), max(sizes) + 0.08 * span, 64, width - 14)
    y = _log_axis([p.kld for p in points], d.height - 46, top + 14)
    _horizontal(d, y, log_ticks(y.low, y.high, 8), "", (x.start, x.end))
    _below(d, x, ticks(x.low, x.high, 6 if width > 500 else 4), "bytes", "bytes of all experts")
    if r.frontier:
        d.add(Line(tuple((x(p.bytes), y(p.kld)) for p in r.frontier), "accent", 2.5))
    if r.plain is not None and r.n_copies:
        d.add(Line(((x(r.chosen.bytes), y(r.plain.kld)), (x(r.chosen.bytes), y(r.chosen.kld))), "ink", 1.5, dash=True))
    for p in r.frontier:
        d.add(Dots(((x(p.bytes), y(p.kld)),), 3, "accent", tip=f"{p.name}, {size_text(p.bytes)}: {kld_text(p.kld)} nats"))
    for p in r.uniform:
        d.add(Dots(((x(p.bytes), y(p.kld)),), 4.5, "before", "square", tip=f"{p.name}, {size_text(p.bytes)}: {kld_text(p.kld)} nats"))
    tip = f"{mine}, {size_text(r.chosen.bytes)}: {kld_text(r.chosen.kld)} nats"
    d.add(Dots(((x(r.chosen.bytes), y(r.chosen.kld)),), 7, "ink", "diamond", tip=tip))
    taken = [(x(p.bytes) - 4, y(p.kld) - 4, 8.0, 8.0) for p in points]
    for name, p in [(mine, r.chosen), *((p.name, p) for p in r.uniform)]:
        _beside(d, name, x(p.bytes), y(p.kld), taken, (x.start, top, x.end, y.start))
    _turned(d, "predicted KL divergence, nats", y)
    return d


def speed_lines(r: Report, width: float) -> Drawing:
    """Predicted KL divergence over predicted tokens per second, with the user's VRAM."""
    assert r.rate is not None and r.rate.kld is not None  # see drawn
    d = Drawing("speed", "Error against speed", width, 380)
    mine = "this file" if r.written else "this plan"
    legend: Legend = [
        ("accent", "line", "a type per expert, the busy ones in VRAM"),
        ("muted", "line", "the same, whole layers in VRAM"),
        ("before", "square", "one type for all, the busy ones in VRAM"),
        ("ink", "diamond", mine),
    ]
    top = _legend(d, legend, 0)
    known = [(rate, rate.kld) for rate in (*r.rates, *r.uniform_rates, r.rate) if rate.kld is not None]
    speeds = [v for rate, _ in known for v in (rate.decode, rate.stock)]
    span = max(speeds) - min(speeds) or max(speeds)
    x = Axis(max(0.0, min(speeds) - 0.05 * span), max(speeds) + 0.08 * span, 64, width - 14)
    y = _log_axis([kld for _, kld in known], d.height - 46, top + 14)
    _horizontal(d, y, log_ticks(y.low, y.high, 8), "", (x.start, x.end))
    _below(d, x, ticks(x.low, x.high, 6 if width > 500 else 4), "{:g}", "tokens per second, predicted")
    line = [(rate, rate.kld) for rate in r.rates if rate.kld is not None]
    if line:
        d.add(Line(tuple((x(rate.stock), y(kld)) for rate, kld in line), "muted", 1.5, dash=True))
        d.add(Line(tuple((x(rate.decode), y(kld)) for rate, kld in line), "accent", 2.5))
    for colour, kind, size, rates in (
        ("accent", "circle", 3.0, r.rates),
        ("before", "square", 4.5, r.uniform_rates),
        ("ink", "diamond", 7.0, (r.rate,)),
    ):
        for rate in rates:
            if rate.kld is not None:
                tip = f"{rate.name or mine}: {rate.decode:.1f} tokens/s, {rate.stock:.1f} in stock's layout; {kld_text(rate.kld)} nats"
                d.add(Dots(((x(rate.decode), y(rate.kld)),), size, colour, kind, tip=tip))
    taken = [(x(rate.decode) - 4, y(kld) - 4, 8.0, 8.0) for rate, kld in known]
    for rate in (r.rate, *r.uniform_rates):
        if rate.kld is not None:
            _beside(d, rate.name or mine, x(rate.decode), y(rate.kld), taken, (x.start, top, x.end, y.start))
    _turned(d, "predicted KL divergence, nats", y)
    return d


def coverage_lines(r: Report, width: float) -> Drawing:
    """Share of selections caught over bytes in fast memory."""
    d = Drawing("coverage", "What fast memory catches", width, 320)
    legend: Legend = [("accent", "line", "the busiest experts"), ("muted", "line", "if all were picked alike")]
    if len(r.layers) > 1:
        legend.insert(1, ("before", "line", "in the worst layer"))
    top = _legend(d, legend, 0)
    x, y = Axis(0, r.coverage[-1].bytes, 64, width - 18), Axis(0, 1, d.height - 46, top + 14)
    _horizontal(d, y, [0, 0.25, 0.5, 0.75, 1], "%", (x.start, x.end))
    _below(d, x, ticks(0, x.high, 6 if width > 500 else 4), "bytes", "bytes of experts in fast memory")
    start = (x(0), y(0))
    d.add(Line((start, *((x(c.bytes), y(c.experts / len(r.coverage))) for c in r.coverage)), "muted", 1.5, dash=True))
    if len(r.layers) > 1:
        d.add(Line((start, *((x(c.bytes), y(c.worst)) for c in r.coverage)), "before", 1.5))
    d.add(Line((start, *((x(c.bytes), y(c.mean)) for c in r.coverage)), "accent", 2.5))
    for c in r.coverage:
        tip = f"{c.experts} experts per layer, {size_text(c.bytes)}: {percent(c.mean)}, in the worst layer {percent(c.worst)}"
        d.add(Dots(((x(c.bytes), y(c.mean)),), 3 if len(r.coverage) <= 64 else 1.5, "accent", tip=tip))
    if r.vram is not None and r.vram <= x.high:
        d.add(Line(((x(r.vram), y.start), (x(r.vram), y.end)), "ink", 1.5, dash=True))
        anchor = "end" if x(r.vram) > (x.start + x.end) / 2 else "start"
        d.add(Text(x(r.vram) + (5 if anchor == "start" else -5), y.start - 8, size_text(r.vram), "ink", anchor=anchor))
    _turned(d, "share of selections caught", y)
    return d


def drawn(r: Report) -> dict[str, Callable[[Report, float], Drawing]]:
    """The figures that a report has something to show in, in the page's order."""
    found: dict[str, Callable[[Report, float], Drawing]] = {}
    loads = r.lis_before is not None
    if loads:
        found |= {"load": load_map, "lis": lis_lines}
    if loads and any(layer.importance is not None for layer in r.layers):
        found["importance"] = importance_dots
    found |= {"map": type_map, "bytes": bytes_bars}
    if r.chosen is not None:
        found["frontier"] = frontier_lines
    if r.rates and r.rate is not None and r.rate.kld is not None:
        found["speed"] = speed_lines
    if r.coverage:
        found["coverage"] = coverage_lines
    return found


def _grid(d: Drawing, r: Report, top: float, tallest: float = 18.0) -> Callable[[int, int], tuple[float, float, float, float]]:
    """Lay out rows of layers and columns of experts below `top`; gives (x, y, width, height) of a cell."""
    left, right, bottom = 40.0, 10.0, 40.0
    top += 10
    w, h = (d.width - left - right) / r.n_expert, min(tallest, max(5.0, 420 / len(r.layers)))
    d.height = top + h * len(r.layers) + bottom
    d.grid = (left, top, w, h, r.n_expert, len(r.layers))
    _row_labels(d, r.layers, top, h)
    every = 2 ** max(0, math.ceil(math.log2(24 / w)))
    for e in range(0, r.n_expert, every):
        d.add(Text(left + (e + 0.5) * w, d.height - bottom + 15, str(e), anchor="middle"))
    d.add(Text((left + d.width - right) / 2, d.height - 6, "expert", anchor="middle"))
    gap_x, gap_y = (1.0 if w > 6 else 0.0), (1.0 if h > 6 else 0.0)
    return lambda row, e: (left + e * w, top + row * h, w - gap_x, h - gap_y)


def _row_labels(d: Drawing, layers: tuple[Layer, ...], top: float, height: float) -> None:
    every = math.ceil(13 / height)
    for row in range(0, len(layers), every):
        d.add(Text(34, top + (row + 0.5) * height + 4, str(layers[row].layer), anchor="end"))
    d.add(Text(11, top + height * len(layers) / 2, "layer", anchor="middle", turned=True))


def _heat_legend(d: Drawing, scale: Axis, width: float) -> float:
    """The scale of the load; gives where it ends."""
    left, length = 40.0, min(260.0, width - 150)
    step = length / HEAT_STEPS
    for i in range(HEAT_STEPS):
        d.add(Cells(((left + i * step, 4, step + 0.3, 10),), f"heat{i}"))
    for value in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64):
        if value <= scale.high:
            label = {0.25: "¼", 0.5: "½"}.get(value, f"{value:g}")
            d.add(Text(left + scale(value) / (HEAT_STEPS - 1) * length, 28, label, anchor="middle"))
    d.add(Text(left + length + 12, 14, "x the mean load"))
    return 30.0


def _legend(d: Drawing, items: Legend, top: float) -> float:
    """Markers and words in as many lines as they need; gives where they end."""
    x, y = 40.0, top + 12
    for colour, kind, words in items:
        length = 22 + _CHARACTER * _FONT * len(words)
        if x > 40 and x + length > d.width - 8:
            x, y = 40.0, y + 18
        if kind == "line":
            d.add(Line(((x, y - 4), (x + 12, y - 4)), colour, 2.5))
        else:
            d.add(Dots(((x + 6, y - 4),), 5, colour, kind, outline="edge" if colour == "dot" else ""))
        d.add(Text(x + 17, y, words, "ink"))
        x += length + 10
    return y + 6


def _horizontal(d: Drawing, y: Axis, values: list[float], form: str, span: tuple[float, float]) -> None:
    """Lines across at the values, with labels; `form` is a format, `%`, or empty for KL divergences."""
    for value in values:
        label = percent(value) if form == "%" else kld_text(value) if not form else form.format(value)
        d.add(Line(((span[0], y(value)), (span[1], y(value))), "grid"), Text(span[0] - 6, y(value) + 4, label, anchor="end"))


def _below(d: Drawing, x: Axis, values: list[float], form: str, title: str) -> None:
    for value in values:
        label = size_text(value) if form == "bytes" else form.format(value)
        anchor = "end" if x(value) > d.width - 22 else "middle"
        d.add(Line(((x(value), d.height - 46), (x(value), d.height - 42)), "muted"))
        d.add(Text(min(x(value), d.width - 4) if anchor == "end" else x(value), d.height - 28, label, anchor=anchor))
    d.add(Text((x.start + x.end) / 2, d.height - 8, title, anchor="middle"))


def _turned(d: Drawing, words: str, y: Axis) -> None:
    d.add(Text(11, (y.start + y.end) / 2, words, anchor="middle", turned=True))


def _log_axis(values: list[float], start: float, end: float) -> Axis:
    """A logarithmic axis around positive values; those far below the others, and zeros, come to its end."""
    positive = sorted(v for v in values if v > 0) or [1.0]
    low = max(positive[0], positive[-1] * 1e-6)
    return Axis(low / 1.25, positive[-1] * 1.25, start, end, log=True)


Box = tuple[float, float, float, float]


def _beside(d: Drawing, words: str, x: float, y: float, taken: list[Box], area: Box) -> None:
    """A label near a point where it covers nothing; none where there is no room. area: (left, top, right, bottom)."""
    w, h = _CHARACTER * (_FONT - 1) * len(words), _FONT
    sides = [(dx, dy) for dy in (-5, 13, -17, 25) for dx in (9, -9 - w)]
    for dx, dy in [*sides, (-w / 2, -12), (-w / 2, 22)]:
        box = (x + dx, y + dy - h + 2, w, h)
        inside = box[0] >= area[0] and box[0] + w <= area[2] + 10 and box[1] >= area[1] and box[1] + h <= area[3]
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            d.add(Text(x + dx, y + dy, words, "ink", _FONT - 1, bold=words.startswith("this")))
            return


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
