"""Task files: questions to be answered by the likelihoods of given continuations, one JSON object per line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq_gguf.atomic import reason
from rq_gguf.errors import UserError

FORMATS = '{"context", "choices", "label"}, {"context", "target"} or {"text"}'


@dataclass(frozen=True)
class Item:
    """One question. Each choice is scored as a space and the choice behind the context."""

    line: int
    """In its file, from 1."""
    context: str
    choices: tuple[str, ...]
    """One only where the item asks for a word."""
    label: int
    """Which choice is right."""


@dataclass(frozen=True)
class Task:
    """A file of items of one kind."""

    path: Path
    items: tuple[Item, ...]
    n_in_file: int

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def asks_for_a_word(self) -> bool:
        """Whether the right continuation must be the greedy one (as in LAMBADA), instead of the likeliest of several."""
        return len(self.items[0].choices) == 1


def read_task(path: Path, limit: int | None = None) -> Task:
    """Read a task file: lines of one kind, blank ones skipped.

    {"context", "choices", "label"}: the likeliest choice (PIQA, ARC, HellaSwag). {"context", "target"} or {"text"}, whose last
    space comes before the target: the target must be the greedy continuation (LAMBADA).
    limit: how many items to keep, evenly spaced over the file; all where None.
    Raises UserError that names the file and the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {reason(e)}") from e
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_parse(number, json.loads(line)))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} line {number}: {e}; a line is {FORMATS} as JSON") from e
        if (len(items[-1].choices) == 1) != (len(items[0].choices) == 1):
            raise UserError(f"{path} line {number} asks for {_kind(items[-1])}, line {items[0].line} for {_kind(items[0])}: split the file")
    if len(items) < 2:
        raise UserError(f"{path} has {len(items)} items; a standard error needs 2 or more")
    kept = items if limit is None or limit >= len(items) else [items[i * len(items) // limit] for i in range(limit)]
    return Task(path, tuple(kept), len(items))


def _kind(item: Item) -> str:
    return "a word" if len(item.choices) == 1 else "a choice"


def _parse(line: int, data: Any) -> Item:
    """Raises ValueError with what is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f"{type(data).__name__} instead of an object")
    label: Any = 0
    if "choices" in data:
        context, choices, label = _text(data, "context"), data["choices"], data.get("label")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise ValueError("'choices' must be a list of two or more strings")
        if type(label) is not int or not 0 <= label < len(choices):
            raise ValueError(f"'label' must be the right choice's number, 0 to {len(choices) - 1}, not {label!r}")
    elif "target" in data:
        context, choices = _text(data, "context"), [_text(data, "target")]
    elif "text" in data:
        context, space, target = _text(data, "text").rpartition(" ")
        if not space:
            raise ValueError("'text' has no space before a last word")
        choices = [target]
    else:
        raise ValueError(f"no 'choices', 'target' or 'text' (there: {', '.join(map(repr, data)) or 'nothing'})")
    if not all(c.strip() for c in choices):
        raise ValueError("an empty choice cannot be scored")
    for text in (context, *choices):
        text.encode()  # lone surrogates are JSON but no text: a ValueError
    return Item(line, context, tuple(choices), label)


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be a string" if key in data else f"no '{key}'")
    return value
