"""Approaching a measured divergence: what is predicted and what comes out differ."""

import pytest

from rq_gguf.errors import UserError
from rq_gguf.target import CLOSE, MOST_TRIES, Attempt, approach


class Files:
    """Files whose experts cause what was planned for times `factor`, everything else `rest`; fewer nats take more bytes."""

    def __init__(self, target: float, rest: float, factor: float) -> None:
        self.target, self.rest, self.factor = target, rest, factor
        self.lines: list[str] = []
        self.tries = 0

    def attempt(self, other: float) -> Attempt[int]:
        self.tries += 1
        predicted = max(self.target - other, 1e-5)
        return Attempt(self.tries, int(1 / predicted), predicted, self.factor * predicted + self.rest)


@pytest.mark.parametrize("rest", [0.0, 0.0007, 0.002])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_ends_within_the_target_and_near_it(rest: float, factor: float) -> None:
    files = Files(0.005, rest, factor)
    found = approach(0.005, files.attempt, files.lines.append)
    assert (1 - 2 * CLOSE) * 0.005 <= found.measured <= 0.005
    assert files.tries <= MOST_TRIES and len(files.lines) == files.tries


def test_what_cannot_be_met_says_how_near_it_came() -> None:
    files = Files(0.001, 0.0015, 1.0)
    with pytest.raises(UserError, match=r"0\.001 was not met in 6 tries \(the least measured is 0\.0015"):
        approach(0.001, files.attempt, files.lines.append)


def test_the_smallest_that_keeps_the_target_wins() -> None:
    answers = iter([Attempt("a", 900, 0.004, 0.004), Attempt("b", 800, 0.005, 0.0051), Attempt("c", 850, 0.0047, 0.00499)])
    found = approach(0.005, lambda other: next(answers), lambda line: None)
    assert found.made == "c"
