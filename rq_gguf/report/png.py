"""Drawings as PNG, through matplotlib where it is installed (extra `report`)."""

from pathlib import Path

from rq_gguf.extras import has
from rq_gguf.report.shapes import Cells, Dots, Drawing, Line, Text

_DPI = 100  # a pixel of the drawing is 1/100 inch
_MARKERS = {"circle": "o", "square": "s", "diamond": "D"}
_ALIGN = {"start": "left", "middle": "center", "end": "right"}


def available() -> bool:
    return has("matplotlib")


def write_png(drawing: Drawing, palette: dict[str, str], path: Path, scale: float = 2.0) -> None:
    """Write a drawing; `scale` pixels of the image per pixel of the drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(drawing.width / _DPI, drawing.height / _DPI), dpi=_DPI * scale, facecolor=palette["card"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.axis("off")
    points = 72 / _DPI  # of a pixel
    for order, shape in enumerate(drawing.shapes):
        match shape:
            case Cells():
                corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in shape.boxes]
                axes.add_collection(PolyCollection(corners, facecolor=palette[shape.fill], linewidth=0, zorder=order), autolim=False)
            case Line():
                xs, ys = zip(*shape.points, strict=True)
                style = (0, (4, 3)) if shape.dash else "-"
                axes.plot(xs, ys, color=palette[shape.stroke], linewidth=shape.width * points, linestyle=style, zorder=order)
            case Dots():
                xs, ys = zip(*shape.centres, strict=True)
                size = (2 * shape.radius * points / (2**0.5 if shape.kind == "diamond" else 1)) ** 2
                edge = palette[shape.outline] if shape.outline else "none"
                axes.scatter(xs, ys, s=size, marker=_MARKERS[shape.kind], color=palette[shape.fill], alpha=shape.opacity,
                             edgecolors=edge, linewidths=points, zorder=order)  # fmt: skip
            case Text():
                axes.text(shape.x, shape.y, shape.words, color=palette[shape.fill], fontsize=shape.size * points, family="DejaVu Sans",
                          ha=_ALIGN[shape.anchor], va="baseline", rotation=90 if shape.turned else 0, rotation_mode="anchor",
                          weight="bold" if shape.bold else "normal", zorder=order, parse_math=False)  # fmt: skip
    figure.savefig(path, format="png", facecolor=palette["card"])
