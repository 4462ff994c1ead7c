"""`--help`: every command has examples, and they run as written."""

import re
from collections.abc import Iterator

import click
import pytest
from docs.conftest import Workshop
from docs.pages import rq_gguf_calls
from docs.test_docs import check

from rq_gguf.cli import main

NOT_RUN = {
    "runtime install": "builds llama.cpp",
    "runtime wheel": "builds llama-cpp-python",
    "completion fish": "fish need not be installed, and click asks it for its version",
}
"""The beginning of an example, and why it is not run."""


def leaves(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path}{name} ")
        else:
            yield path + name, command


ALL = dict(leaves(main))
COMMANDS = {name: command for name, command in ALL.items() if not any(command is ALL[n] for n in ALL if len(n) < len(name))}
"""Without the longer names of commands that have two."""


def examples(command: click.Command) -> list[str]:
    """The examples of a help page, as printed."""
    page = command.get_help(click.Context(command, info_name="x", max_content_width=200))
    _, _, text = page.partition("Examples:\n")
    return [line.strip() for line in text.split("\n\n")[0].splitlines() if line.strip()]


@pytest.mark.parametrize("name", COMMANDS)
def test_one_to_three_examples_with_options_that_exist(name: str) -> None:
    found = examples(COMMANDS[name])
    assert 1 <= len(found) <= 3
    calls = [call for example in found for call in rq_gguf_calls(example)]
    assert any(name.split() == call[: len(name.split())] for call in calls)
    for call in calls:
        check(call)


def reason(example: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if re.search(rf"rq-gguf {start}\b", example)), None)


@pytest.mark.e2e
@pytest.mark.runtime
@pytest.mark.slow
def test_examples_run_as_written(workshop: Workshop) -> None:
    """All of them, one after the other, in one directory."""
    for command in COMMANDS.values():
        for example in examples(command):
            if reason(example) is None:
                workshop.run(example)
