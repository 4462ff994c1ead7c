"""Drawings as SVG text."""

from collections.abc import Callable
from xml.sax.saxutils import escape, quoteattr

from rq_gguf.report.shapes import Cells, Dots, Drawing, Line, Shape, Text

FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def inline(drawing: Drawing, css_class: str) -> str:
    """For a page that defines `--NAME` for every colour."""
    grid = "" if drawing.grid is None else " data-grid=" + quoteattr(" ".join(_n(v) for v in drawing.grid))
    return _svg(drawing, {}, f' class="{css_class}" role="img" aria-label={quoteattr(drawing.title)}{grid}')


def standalone(drawing: Drawing, palette: dict[str, str]) -> str:
    """A file of its own, on its own background."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _svg(drawing, palette, ' xmlns="http://www.w3.org/2000/svg"')


def _svg(drawing: Drawing, palette: dict[str, str], attributes: str) -> str:
    def colour(name: str) -> str:
        return palette.get(name) or f"var(--{name})"

    w, h = _n(drawing.width), _n(drawing.height)
    size = f' width="{w}" height="{h}"' if palette else ""
    lines = [f'<svg{attributes}{size} viewBox="0 0 {w} {h}" font-family="{FONT}">']
    if palette:
        lines.append(f"<title>{escape(drawing.title)}</title>")
        lines.append(f'<path d="M0 0h{w}v{h}h-{w}z" style="fill:{palette["card"]}"/>')
    lines += [_shape(shape, colour) for shape in drawing.shapes]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _shape(shape: Shape, colour: Callable[[str], str]) -> str:
    match shape:
        case Cells():
            path = "".join(f"M{_n(x)} {_n(y)}h{_n(w)}v{_n(h)}h-{_n(w)}z" for x, y, w, h in shape.boxes)
            return f'<path d="{path}" style="fill:{colour(shape.fill)}"{_tip("path", shape.tip)}'
        case Line():
            points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
            dash = ";stroke-dasharray:4 3" if shape.dash else ""
            return f'<polyline points="{points}" style="fill:none;stroke:{colour(shape.stroke)};stroke-width:{_n(shape.width)}{dash}"/>'
        case Dots():
            r = shape.radius
            path = "".join(_MARKS[shape.kind](x, y, r) for x, y in shape.centres)
            style = f"fill:{colour(shape.fill)}"
            style += f";fill-opacity:{_n(shape.opacity)}" if shape.opacity < 1 else ""
            style += f";stroke:{colour(shape.outline)}" if shape.outline else ""
            return f'<path d="{path}" style="{style}"{_tip("path", shape.tip)}'
        case Text():
            turn = f' transform="rotate(-90 {_n(shape.x)} {_n(shape.y)})"' if shape.turned else ""
            anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
            bold = ' font-weight="600"' if shape.bold else ""
            place = f'x="{_n(shape.x)}" y="{_n(shape.y)}" font-size="{_n(shape.size)}"'
            return f'<text {place}{anchor}{bold}{turn} style="fill:{colour(shape.fill)}">{escape(shape.words)}</text>'


def _circle(x: float, y: float, r: float) -> str:
    return f"M{_n(x - r)} {_n(y)}a{_n(r)} {_n(r)} 0 1 0 {_n(2 * r)} 0a{_n(r)} {_n(r)} 0 1 0 -{_n(2 * r)} 0z"


def _square(x: float, y: float, r: float) -> str:
    return f"M{_n(x - r)} {_n(y - r)}h{_n(2 * r)}v{_n(2 * r)}h-{_n(2 * r)}z"


def _diamond(x: float, y: float, r: float) -> str:
    return f"M{_n(x)} {_n(y - r)}L{_n(x + r)} {_n(y)}L{_n(x)} {_n(y + r)}L{_n(x - r)} {_n(y)}z"


_MARKS = {"circle": _circle, "square": _square, "diamond": _diamond}


def _tip(tag: str, words: str) -> str:
    return f"><title>{escape(words)}</title></{tag}>" if words else "/>"


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"
