"""Mixing texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf.errors import UserError
from rq_gguf.evaluation.text import mix, read_text

TEXTS = st.lists(st.text("ab \n", min_size=1, max_size=60), min_size=1, max_size=4)


def test_takes_blocks_in_turn():
    assert mix(["a1\na2\na3\na4\n", "b1\nb2\n", "c1\n"], 6) == "a1\na2\nb1\nb2\nc1\na3\na4\n"


def test_cuts_at_line_ends_then_spaces_then_anywhere():
    assert mix(["one two\nthree", "x"], 10) == "one two\nx\nthree\n"
    assert mix(["one two three", "x"], 9) == "one two \nx\nthree\n"
    assert mix(["abcdefgh", "x"], 4) == "abcd\nx\nefgh\n"


def test_one_text_is_unchanged():
    assert mix(["no line end"], 3) == "no line end"


def test_a_beginning_covers_all_texts_evenly():
    texts = [letter * 79 + "\n" for letter in "abc"]
    mixed = mix([t * 1000 for t in texts], 800)
    start = mixed[: 3 * 8000]
    assert {letter: start.count(letter) for letter in "abc"} == dict.fromkeys("abc", 7900)


@given(TEXTS, st.integers(1, 20))
def test_nothing_is_lost(texts, block):
    kept = sorted(c for c in mix(texts, block) if c in "ab ")
    assert kept == sorted(c for text in texts for c in text if c in "ab ")


@given(TEXTS, st.integers(1, 20))
def test_no_text_gets_far_ahead(texts, block):
    marked = ["".join(chr(0x100 + i) for _ in text) for i, text in enumerate(texts)]
    mixed = mix(marked, block).replace("\n", "")
    if len(texts) == 1:
        return
    for end in range(len(mixed)):
        taken = [mixed[:end].count(chr(0x100 + i)) for i in range(len(texts))]
        open_ones = [n for n, text in zip(taken, texts, strict=True) if n < len(text)]
        assert not open_ones or max(taken) - min(open_ones) <= block


def test_unreadable_texts(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_text(tmp_path / "none.txt")
    binary, empty = tmp_path / "binary.txt", tmp_path / "empty.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text(" \n")
    with pytest.raises(UserError, match=r"binary.txt is not UTF-8"):
        read_text(binary)
    with pytest.raises(UserError, match=r"empty.txt is empty"):
        read_text(empty)
