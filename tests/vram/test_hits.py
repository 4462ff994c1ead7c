"""What VRAM catches: routing counted by hand, and the published figures of the two test models. Prints ours beside them (pytest -s)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from placement.samples import sample_trace

from rq_gguf.calibration.record import record
from rq_gguf.calibration.trace import Trace
from rq_gguf.placement.batches import counts_of, draw, whole
from rq_gguf.vram.hits import caught, fitted, replay, shares_of, study, study_halves
from rq_gguf.vram.plans import TYPICAL
from rq_gguf.vram.speed import Experts, Floats, Layout, chances, held


def test_a_text_counted_by_hand() -> None:
    """One layer of 4 experts, one per token. The calibration likes 0; the prompt (4 tokens) and what follows it pick 3, then 1."""
    ids = np.array([[3]] * 4 + [[3], [0], [1], [3]], dtype=np.uint8)
    trace = Trace("x", 4, 8, 8, np.array([0, 8]), (0,), (ids,))
    shares = np.array([[0.31, 0.23, 0.23, 0.23]])  # x 32: 9.9 against 7.4 and nearly 4 behind the prompt
    found = replay(shares, trace, 1, prompt=4)
    assert found.static.tolist() == [0.25] and found.adapted.tolist() == [0.5] and found.exchanges == 0
    with pytest.raises(ValueError):
        replay(shares, trace, 1, prompt=8)


def test_shares_and_what_they_catch() -> None:
    shares = shares_of(np.array([[6, 2, 2], [0, 0, 0]]))
    assert shares.tolist() == [[0.6, 0.2, 0.2], [1 / 3] * 3]
    assert caught(shares, 2).tolist() == pytest.approx([0.8, 2 / 3])


def test_following_a_text_that_stays_the_same() -> None:
    """Tokens of a fixed skew: the calibration's set is the best there is, and following is hardly worse."""
    found = study_halves(sample_trace(sequences=24, length=256, skew=1.5))
    assert [h.slots for h in found] == [2, 4, 8, 12]
    for h in found:
        assert h.static.mean() - 0.04 < h.adapted.mean() <= h.static.mean() + 0.02
    with pytest.raises(ValueError):
        study_halves(sample_trace(sequences=4, length=1))


def test_powers() -> None:
    trace = sample_trace(sequences=24, length=256)
    shares = shares_of(trace.selections())
    power = fitted(shares, study(shares, trace))
    assert power.static == pytest.approx(1, abs=0.05) and power.adapted == pytest.approx(1, abs=0.1)


TOLERANCE = 0.015
"""Of shares, absolute: the published figures are whole per cents, means over other tokens of the same texts."""
# Experts in VRAM, in eighths -> (busiest on the calibration text, following the text), means over the held-out texts, in per cent.
PUBLISHED = {
    "lab": {1: (30, 39), 2: (49, 60), 4: (74, 83), 6: (89, 95)},
    "demo": {2: (61, 69), 4: (81, 88), 6: (93, 97)},
}
EXCHANGES = {"lab": {2: 3.5, 4: 6.8, 6: 7.9}, "demo": {}}
"""Per 1000 tokens and layer, of 32 experts."""


SEVERAL = {1: 1.86, 8: 1.42, 32: 1.08}
"""Sequences of one text -> experts read on the slow side by half of the layers there, over those by the less busy half of all experts."""


def _check_several_sequences(shares: Floats, held_out: list[Trace]) -> None:
    """`speed.chances` takes tokens for independent: near what was published, and what is drawn from the texts."""
    one = np.ones_like(shares)
    experts = Experts(one, one, one, shares, held_out[0].n_expert_used)
    there = held(experts, Layout(0, shares.shape[1] // 2))
    for n, figure in SEVERAL.items():
        read = chances(experts, n)
        drawn = np.zeros(2)
        for trace in held_out:
            tokens = draw(whole(trace), n, 128, np.random.default_rng(0))
            for layer in range(len(trace.layers)):
                picked = counts_of(whole(trace), tokens, layer) > 0
                drawn += [picked.sum(), (picked & ~there[layer]).sum()]
        ours, recorded = 0.5 * read.sum() / read[~there].sum(), 0.5 * drawn[0] / drawn[1]
        print(f"{n} sequences: {ours:.2f}, recorded {recorded:.2f}, published {figure:.2f}")
        assert ours == pytest.approx(figure, rel=0.08) and ours == pytest.approx(recorded, rel=0.08)


@dataclass(frozen=True)
class Routing:
    model: str
    calibration: Trace
    held_out: list[Trace]


@pytest.fixture(scope="module", params=["lab", "demo"])
def routing(request: pytest.FixtureRequest, shared: Path) -> Iterator[Routing]:
    model = shared / "models" / request.param
    texts = [p.read_text(encoding="utf-8") for p in sorted((shared / "data" / "heldout").glob("*.txt"))]
    calibration = record(model, (shared / "data" / "calibration.txt").read_text(encoding="utf-8"), tokens=65536, progress=False)
    yield Routing(request.param, calibration, [record(model, text, tokens=8192, progress=False) for text in texts])


@pytest.mark.slow
@pytest.mark.golden
def test_published_figures(routing: Routing) -> None:
    shares, n_expert = shares_of(routing.calibration.selections()), routing.calibration.n_expert
    print(f"\n{routing.model}: per cent of selections on experts in VRAM, ours and published; exchanges")
    wrong, powers = [], []
    for eighths, figures in PUBLISHED[routing.model].items():
        found = [replay(shares, trace, n_expert * eighths // 8) for trace in routing.held_out]
        ours = [float(np.mean([getattr(h, name).mean() for h in found])) for name in ("static", "adapted")]
        changes = float(np.mean([h.exchanges for h in found]))
        powers.append(fitted(shares, found))
        print(f"{eighths}/8  {100 * ours[0]:.1f} {figures[0]}  {100 * ours[1]:.1f} {figures[1]}  {changes:.1f}")
        wrong += [(eighths, o, f) for o, f in zip(ours, figures, strict=True) if abs(o - f / 100) > TOLERANCE]
        if eighths in EXCHANGES[routing.model] and changes != pytest.approx(EXCHANGES[routing.model][eighths], rel=0.25):
            wrong.append((eighths, changes, EXCHANGES[routing.model][eighths]))
    assert not wrong
    if routing.model == "lab":
        _check_several_sequences(shares, routing.held_out)
    # What stands in where nothing was recorded.
    assert np.mean([p.static for p in powers]) == pytest.approx(TYPICAL.static, abs=0.06)
    assert np.mean([p.adapted for p in powers]) == pytest.approx(TYPICAL.adapted, abs=0.1)
