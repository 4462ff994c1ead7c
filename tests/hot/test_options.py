"""What is refused, and what the log says where there is nothing to place."""

from pathlib import Path

import pytest
from golden.llama_lib import Job, run
from hot.conftest import Reader, reading

pytestmark = pytest.mark.runtime


@pytest.mark.parametrize("size", ["", "6 apples", "-1GiB", "101%", "GiB", "nan", "1e400"])
def test_no_amount_of_memory(size: str, stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"rq\.vram: '.*' is no amount of memory, expected for example 6GiB, 50% or auto"):
        read(stock_demo, reading(tokens[:4], 3), {"rq.vram": size})


def test_not_a_string(stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"rq\.vram must be given as a string"):
        read(stock_demo, reading(tokens[:4], 3), {"rq.vram": 6})


def test_no_device(runtime: Path, stock_demo: Path, tokens: list[int], tmp_path: Path) -> None:
    result = run(Job(runtime / "libllama.so", stock_demo, reading(tokens[:8], 6), {"rq.vram": "50%"}, threads=1), tmp_path)
    assert "rq.vram has nothing to place: no layer with experts is on a device" in result.log


@pytest.mark.parametrize(("size", "experts"), [("1MiB", "2 to 3 of 16"), ("3.4 MB", "7 to 8 of 16"), ("auto", "all, nothing is left")])
def test_sizes(size: str, experts: str, stock_demo: Path, read: Reader, tokens: list[int]) -> None:
    assert f"experts in fast memory: {experts}" in read(stock_demo, reading(tokens[:20], 18), {"rq.vram": size}).log
