"""Every family, from a checkpoint of random weights to logits: docs/families.md says what this finds.

The slow ones run where RQ_GGUF_ALL_FAMILIES is set.
"""

from pathlib import Path

import pytest
from families.cases import CASES, Case
from families.check import MOST_CHANGED, MOST_DIFFERENT, check
from families.marks import SLOW
from families.table import OTHERS, is_of, page, row

from rq_gguf.calibration.families import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def parameter(case: Case) -> object:
    return pytest.param(case, id=case.model_type, marks=SLOW if case.slow else [])


@pytest.mark.e2e
@pytest.mark.runtime
@pytest.mark.parametrize("case", [parameter(case) for case in CASES])
def test_family(case: Case, tmp_path: Path, runtime: Path, stock_runtime: Path) -> None:
    found = check(case, tmp_path, runtime, stock_runtime)
    assert found.same_as_stock
    assert found.copies > 0
    assert found.from_f32 < MOST_CHANGED
    assert (found.from_transformers < MOST_DIFFERENT) == (not case.differs)
    assert row(case, found) in PAGE.read_text(encoding="utf-8").splitlines()


def test_every_family_that_calibration_knows_is_tried() -> None:
    assert {case.model_type for case in CASES} | {"switch_transformers", "deepseek", "llama_moe"} >= set(FAMILIES)
    assert len({case.seed for case in CASES}) == len(CASES)


def test_the_page_is_whole() -> None:
    """Nothing but the rows depends on what was found, and there is one for each case."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [[line for line in text.splitlines() if is_of(line, case)] for case in CASES]
    assert all(len(found) == 1 for found in rows)
    assert text == page([found[0] for found in rows])
    assert text.endswith(OTHERS)
