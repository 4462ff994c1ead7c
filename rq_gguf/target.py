"""`--target-kld`: the smallest file whose KL divergence, measured, is at most a target. Plans are predictions: each is tried on text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rq_gguf.errors import UserError

OTHER_KLD = 0.0007
"""Nats to begin with for what a plan does not predict (other tensors in Q8_0, activations rounded to 8 bits): 0.0006 to 0.0018 on two
models."""
CLOSE = 0.03
"""A measured divergence this far under the target, relative, is near enough."""
MOST_TRIES = 6

T = TypeVar("T")


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """A file that was made and measured."""

    made: T
    bytes: int
    predicted: float
    """Nats that the plan's experts cause."""
    measured: float
    """Nats, of the whole file."""


def approach(target: float, attempt: Callable[[float], Attempt[T]], say: Callable[[str], None]) -> Attempt[T]:
    """The smallest of at most MOST_TRIES files that keeps the target.

    attempt: nats that everything but the plan's prediction causes -> a file planned for what the target leaves, measured. What a try
    measures beside its prediction is the next try's argument.
    Raises UserError where no try kept the target.
    """
    best: Attempt[T] | None = None
    other, lowest = min(OTHER_KLD, target / 2), float("inf")
    for i in range(MOST_TRIES):
        tried = attempt(other)
        kept = tried.measured <= target
        say(
            f"try {i + 1}: {tried.bytes:,} bytes, measured KL divergence {tried.measured:.5f}, "
            f"{'within' if kept else 'above'} the target of {target:g}"
        )
        lowest = min(lowest, tried.measured)
        if kept and (best is None or tried.bytes < best.bytes):
            best = tried
        if kept and tried.measured >= (1 - CLOSE) * target:
            break
        # Aim a little under the target: at it, half of all tries would land above.
        aimed = tried.measured - tried.predicted + CLOSE / 2 * target
        if abs(aimed - other) < 1e-3 * target and best is not None:
            break
        other = aimed
    if best is None:
        raise UserError(
            f"--target-kld {target:g} was not met in {MOST_TRIES} tries (the least measured is {lowest:.5f}); allow more, or finer types "
            "with --types and --other"
        )
    return best
