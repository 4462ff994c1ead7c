"""Rounds of a benchmark that has a time to end by, for the programs beside this file."""

import time
from collections.abc import Iterator


def rounds_before(end: float, most: int) -> Iterator[int]:
    """0, 1, ... below `most`: the first in any case, and no other that would end after `end` (of time.monotonic).

    A round is taken to last as long as the one before it.
    """
    took = 0.0
    for n in range(most):
        began = time.monotonic()
        if n and began + took > end:
            return
        yield n
        took = time.monotonic() - began
