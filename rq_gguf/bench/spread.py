"""What many measurements of the same come to."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """values: one at least."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(statistics.median(values), low, high)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """Of the two speeds of each round: machines drift, and neighbours in time drift together. None where no round has both.

    ours, theirs: a value per round, from the first on; a last round that was not finished may lack in one.
    """
    pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
    return spread(pairs) if pairs else None
