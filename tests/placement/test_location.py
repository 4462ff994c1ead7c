"""What engines are given."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf.errors import UserError
from rq_gguf.placement.files import write_location
from rq_gguf.placement.loads import Loads
from rq_gguf.placement.location import export, full_map


def loads(*rows: list[int], layers: tuple[int, ...] | None = None, instances: list[list[int]] | None = None) -> Loads:
    planned = None if instances is None else np.array(instances)
    return Loads("m", layers or tuple(range(len(rows))), np.array(rows, dtype=float), instances=planned)


def rows_of(e: object) -> list[list[int]]:
    return e.content["physical_to_logical_map"]  # type: ignore[attr-defined]


def test_by_hand() -> None:
    # Layer 1: 8 -> 0, 5 -> 1, 4 -> 1, 1 -> 0. Layer 0 has no experts.
    e = export(loads([8, 5, 1, 4], layers=(1,)), "sglang", 2, None, None)
    assert rows_of(e) == [[0, 1, 2, 3], [0, 2, 1, 3]]
    assert (e.n_redundant, e.n_layers) == (0, 2)
    assert e.before == pytest.approx([13 / 9]) and e.after == pytest.approx([9 / 9])
    assert e.command == "--ep-size 2 --ep-num-redundant-experts 0 --init-expert-location"


def test_a_plan_keeps_its_copies_and_layers_get_equally_many() -> None:
    planned = loads([8, 4, 2, 2], [4, 4, 4, 4], instances=[[2, 1, 2, 1], [1, 1, 1, 1]])
    e = export(planned, "sglang", 2, None, 3)
    counts = np.stack([np.bincount(r, minlength=4) for r in rows_of(e)])
    # The second layer gets two by load; the third, which the plan does not know, SGLang's trivial ones.
    assert counts.tolist() == [[2, 1, 2, 1], [2, 2, 1, 1], [2, 2, 1, 1]]
    # --copies: by load alone.
    assert np.bincount(rows_of(export(planned, "sglang", 2, 2, None))[0]).tolist() == [2, 2, 1, 1]


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="more than one of each"):
        export(loads([1, 2]), "sglang", 2, 3, None)
    with pytest.raises(UserError, match="--layers 2"):
        export(loads([1, 2], layers=(5,)), "sglang", 2, None, 2)


def test_files(tmp_path: Path) -> None:
    e = export(loads([8, 5, 1, 4], [1, 2, 3, 4]), "sglang", 4, None, None)
    write_location(tmp_path / "l.json", e)
    # SGLang hands every key on as an argument: there must be no other.
    assert json.loads((tmp_path / "l.json").read_text()) == e.content and list(e.content) == ["physical_to_logical_map"]
    with pytest.raises(UserError, match="ends in .json"):
        write_location(tmp_path / "l.txt", e)
    v = export(loads([8, 5, 1, 4]), "vllm", 4, 2, None)
    write_location(tmp_path / "v.txt", v)
    assert json.loads((tmp_path / "v.txt").read_text()) == {"num_redundant_experts": 4}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.json", "v.txt"]


@given(
    st.integers(1, 20).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 99), min_size=n, max_size=n).filter(any), min_size=1, max_size=4)
    ),
    st.integers(2, 9),
    st.integers(0, 12),
)
def test_any_map(rows: list[list[int]], n_devices: int, copies: int) -> None:
    n_expert = len(rows[0])
    copies = min(copies, n_expert * (n_devices - 1))
    e = export(loads(*rows), "sglang", n_devices, copies, len(rows) + 1)
    made = np.array(rows_of(e))
    assert made.shape == (len(rows) + 1, n_expert + e.n_redundant) and made.shape[1] % n_devices == 0
    assert e.n_redundant >= copies
    for row in made:
        assert set(row.tolist()) == set(range(n_expert))


def test_dense_layers_get_the_trivial_order() -> None:
    assert full_map(np.array([[2, 1, 0, 2]]), (1,), 3, 3).tolist() == [[0, 1, 2, 0], [2, 1, 0, 2], [0, 1, 2, 0]]
