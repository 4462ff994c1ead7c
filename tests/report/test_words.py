"""Sentences: the verdict follows the figures."""

from dataclasses import replace

import pytest
from report.samples import four_experts

from rq_gguf.report.data import Choice, Point, Report
from rq_gguf.report.figures import drawn
from rq_gguf.report.gather import gather, subject_of_plan
from rq_gguf.report.words import caption, copies_pay, kld_text, percent, size_text, verdict


@pytest.fixture(scope="module")
def report() -> Report:
    c, plan = four_experts()
    return gather(subject_of_plan("c.gguf", c, plan))


@pytest.mark.parametrize(
    ("plain", "copied", "log_lis", "pays"),
    [
        (0.0, 0.0001, 0.2, True),  # 10 % of KLD + 0.001 for 80 % of imbalance
        (0.009, 0.0139, 0.2, True),  # 39.9 % in logarithms, the limit is 0.5 x 0.8
        (0.009, 0.0141, 0.2, False),  # 41.2 %
        (0.009, 0.0092, 1.0, False),  # no imbalance gained
    ],
)
def test_the_exchange_rate_decides(report: Report, plain: float, copied: float, log_lis: float, pays: bool) -> None:
    changed = replace(report, plain=Choice(0, plain, 2.7, 1.0), balanced=Choice(3, copied, 1.2, log_lis))
    assert copies_pay(changed) is pays
    assert (verdict(changed)[0].heading == "Copies help here") is pays


def test_copies_that_were_not_made_are_judged_too(report: Report) -> None:
    none = replace(report.layers[0], copies=(0,) * 4)
    r = replace(report, layers=(none,), plain=Choice(0, 0.01, 2.4, 0.9), balanced=Choice(2, 0.05, 2.0, 0.7))
    found = verdict(r)[0]
    assert found.heading == "Copies are not worth their bytes on this model"
    assert found.sentences[0].startswith("If there were 2 copies, they would bring the load imbalance from 2.40 to 2.00")
    assert "is 0.01 instead of 0.05 nats: the copies cost 400 % more" in found.sentences[0]


def test_even_load_needs_no_copies(report: Report) -> None:
    r = replace(report, lis_before=1.1, lis_after=1.0, plain=Choice(0, 0.01, 1.1, 0.1), balanced=Choice(1, 0.01, 1.0, 0.0))
    assert verdict(r)[0].sentences[0] == "Its experts are about equally busy already."


def test_what_is_unknown_is_said(report: Report) -> None:
    assert verdict(replace(report, lis_before=None, lis_after=None, coverage=()))[0].heading == "Whether copies help is unknown"
    alone = verdict(replace(report, plain=None, balanced=None, kld=None, uniform=()))
    assert "takes the calibration (--calibration)" in alone[0].sentences[1]
    assert [v.heading for v in alone] == ["Copies, and what they do", "What fast memory catches"]


def test_from_how_many_devices_on_copies_matter(report: Report) -> None:
    """The busiest of 4 experts has 2.4 times the mean load: more than half of it, so more than a device's share from 2 on."""
    assert "In layer 0 the busiest expert has 2.4 times the mean load: spread over 2 devices or more" in verdict(report)[0].sentences[2]


def test_types_are_compared_at_the_same_bytes(report: Report) -> None:
    size = report.expert_bytes
    uniform = (Point("q4_k", size // 2, 0.05), Point("q6_k", size + size // 500, 0.01), Point("q8_0", 2 * size, 0.001))
    paid = verdict(replace(report, kld=0.004, uniform=uniform))[1]
    assert paid.heading == "A type per expert pays" and "0.40 times that of all experts in q6_k" in paid.sentences[0]
    took = verdict(replace(report, kld=0.02, uniform=uniform, plain=Choice(0, 0.005, 2.4, 0.9)))[1]
    assert took.heading == "The copies take what a type per expert gains" and took.sentences[1] == "Without copies it would be 0.50 times."


def test_memory(report: Report) -> None:
    enough, little = report.coverage[1].bytes, report.coverage[0].bytes - 1
    assert verdict(replace(report, vram=enough))[-1].heading.endswith("catch 80 % of the selections")
    assert "hold not even one expert per layer" in verdict(replace(report, vram=little))[-1].sentences[0]


def test_every_figure_has_a_caption(report: Report) -> None:
    for name in drawn(report):
        assert caption(report, name).endswith(".")
    assert "The busiest is expert 0 of layer 0: 2.4 times the mean." in caption(report, "load")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (80_216_064, "80.2 MB"), (13e9, "13 GB"), (2.5e12, "2.5 TB")]
)
def test_sizes(size: float, text: str) -> None:
    assert size_text(size) == text


def test_numbers() -> None:
    assert [kld_text(v) for v in (0, 0.000204, 0.0136, 0.2, 3.24, 1.3e-7)] == ["0", "0.0002", "0.014", "0.2", "3.2", "1.3e-07"]
    assert [percent(v) for v in (0, 0.004, 0.08, 0.5, 1)] == ["0 %", "0.4 %", "8.0 %", "50 %", "100 %"]
