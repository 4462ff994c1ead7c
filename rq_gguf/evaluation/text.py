"""Evaluation texts, read and mixed."""

from collections.abc import Sequence
from pathlib import Path

from rq_gguf.atomic import reason
from rq_gguf.errors import UserError

BLOCK = 8192
"""Characters taken from a text before the next one's turn."""
CHARACTERS_PER_CHUNK = 1536
"""Of a chunk of 512 tokens: a low estimate."""
HELD_OUT = 5
"""One block in so many is held out of a calibration text that a file is also to be measured on."""


def mix(texts: Sequence[str], block: int = BLOCK) -> str:
    """Blocks of about `block` characters of each text in turn, so that any beginning of the result covers all texts evenly.

    A block ends behind the last line end within it, or else behind the last space, so that no word is cut. A text that has ended
    is left out of later turns. One text comes back as it is.
    """
    if len(texts) == 1:
        return texts[0]
    at = [0] * len(texts)
    parts = []
    while any(start < len(text) for start, text in zip(at, texts, strict=True)):
        for i, text in enumerate(texts):
            end = _block_end(text, at[i], block)
            if end > at[i]:
                part = text[at[i] : end]
                parts.append(part if part.endswith("\n") else part + "\n")
                at[i] = end
    return "".join(parts)


def hold_out(text: str, every: int = HELD_OUT, block: int = BLOCK) -> tuple[str, str]:
    """(the rest, every `every`th block of about `block` characters): a part that covers all of the text and that nothing else uses."""
    parts: tuple[list[str], list[str]] = ([], [])
    start, i = 0, 0
    while start < len(text):
        end = _block_end(text, start, block)
        parts[i % every == every - 1].append(text[start:end])
        start, i = end, i + 1
    return "".join(parts[0]), "".join(parts[1])


def _block_end(text: str, start: int, block: int) -> int:
    """Where the block that starts at `start` ends."""
    end = start + block
    if end >= len(text):
        return len(text)
    for separator in ("\n", " "):
        # In the second half only: a block that ends early would give its text less than its part.
        cut = text.rfind(separator, start + block // 2, end)
        if cut >= 0:
            return cut + 1
    return end


def read_text(path: Path) -> str:
    """A text file's content. Raises UserError for a file that is not there, empty, or no UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text; convert it") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {reason(e)}") from e
    if not text.strip():
        raise UserError(f"{path} is empty; give a text to evaluate on")
    return text
