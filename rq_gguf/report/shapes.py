"""Drawings as lists of shapes, with coordinates in pixels from the upper left; svg and png put them on paper.

Colours are names (see colours): the page shows them light or dark.
"""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cells:
    """Rectangles of one colour, each (x, y, width, height)."""

    boxes: tuple[tuple[float, float, float, float], ...]
    fill: str
    tip: str = ""
    """Shown when pointed at."""


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: tuple[tuple[float, float], ...]
    stroke: str
    width: float = 1.0
    dash: bool = False


@dataclass(frozen=True)
class Dots:
    """Markers of one kind, at centres. kind: `circle`, `square` or `diamond`."""

    centres: tuple[tuple[float, float], ...]
    radius: float
    fill: str
    kind: str = "circle"
    opacity: float = 1.0
    outline: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Text:
    """A word. anchor: `start`, `middle` or `end`; y is the baseline."""

    x: float
    y: float
    words: str
    fill: str = "muted"
    size: float = 12.0
    anchor: str = "start"
    bold: bool = False
    turned: bool = False
    """Read from below."""


Shape = Cells | Line | Dots | Text


@dataclass
class Drawing:
    """A figure that grows while it is drawn."""

    name: str
    title: str
    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)
    grid: tuple[float, float, float, float, int, int] | None = None
    """(x, y, cell width, cell height, columns, rows) of a heat map: what is under the pointer."""

    def add(self, *shapes: Shape) -> None:
        self.shapes.extend(shapes)


@dataclass(frozen=True)
class Axis:
    """Values on a stretch of pixels; `start` may lie behind `end`. On a logarithmic one, values below `low` come to its start."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, v = (math.log(max(x, self.low)) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * ((v - a) / (b - a) if b > a else 0.5)


def ticks(low: float, high: float, most: int) -> list[float]:
    """One to `most` round values between two, evenly spaced; most: 4 or more."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step > most - 1:
        step *= 2.5 if f"{step:.0e}"[0] == "2" else 2
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Values of 1, 2, 5 times a power of ten between two, fewer where those are too many; evenly spaced ones where there is none."""
    a, b = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**e for e in range(a, b + 1) for s in steps if low * 0.999 <= s * 10.0**e <= high * 1.001]
        if len(found) <= most:
            return found or ticks(low, high, most)
    return found[:: math.ceil(len(found) / most)]
