"""The pages: commands run as written, options exist, links lead somewhere."""

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
from docs.conftest import Workshop
from placement.engines import OPTIONS as ENGINES

from docs import pages
from rq_gguf.cli import main

ROOT = pages.ROOT
BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
WITH_COMMANDS = [page for page in pages.PAGES if any(block.reason is None for block in pages.blocks(page))]
WRITTEN = [page for page in pages.PAGES if page.parent.name != "patches"]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.e2e
@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_commands_run_as_written(page: Path, workshop: Workshop) -> None:
    """In the order of the page, in one directory, where the quick start has been followed."""
    for block in pages.blocks(page):
        if block.reason is None:
            workshop.run(block.commands)


def test_the_quick_start_is_run() -> None:
    """Pages whose commands nothing keeps from running: a mark on the wrong page would hide them."""
    assert {"docs/quickstart.md", "docs/commands.md", "docs/report.md", "docs/how_it_works.md"} <= {name(page) for page in WITH_COMMANDS}


@pytest.mark.parametrize("page", pages.PAGES, ids=name)
def test_marks_give_a_reason_and_belong_to_a_block(page: Path) -> None:
    reasons = [block.reason for block in pages.blocks(page) if block.reason is not None]
    assert reasons == pages.marks(page)
    assert all(len(reason.split()) >= 2 for reason in reasons)


def check(call: list[str]) -> None:
    """The command exists, and takes the options."""
    command: click.Command = main
    context = click.Context(main)
    words = list(call)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        assert found is not None, f"rq-gguf {' '.join(call)}: no command {words[0]}"
        command = found
        words.pop(0)
    known = {text for option in command.get_params(context) for text in (*option.opts, *option.secondary_opts)} | {"-h", "--help"}
    for word in words[: words.index("--")] if "--" in words else words:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in known, f"rq-gguf {' '.join(call)}: no option {word}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_options_of_commands_exist(block: pages.Block) -> None:
    for call in pages.rq_gguf_calls(block.commands):
        check(call)


@pytest.mark.parametrize("page", pages.PAGES, ids=name)
def test_commands_in_sentences_exist(page: Path) -> None:
    for command in pages.inline_commands(page):
        for call in pages.rq_gguf_calls(command):
            if not call[0].isupper():  # COMMAND stands for any
                check(call)


def all_options(command: click.Command) -> set[str]:
    found = {text for option in command.params for text in option.opts} | {"--help", "--version"}
    if isinstance(command, click.Group):
        found |= {text for inner in command.commands.values() for text in all_options(inner)}
    return found


@pytest.fixture(scope="module")
def options_of_others(runtime: Path) -> str:
    """What llama.cpp's programs say of their options, the project's own tools, and serving engines."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py")]
    texts += [" ".join(names) for names in ENGINES.values()]
    for program in ("llama-server", "llama-quantize", "llama-gguf-split", "llama-bench", "llama-imatrix", "llama-perplexity"):
        done = subprocess.run([runtime / program, "--help"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        texts.append(done.stdout + done.stderr)
    return "\n".join(texts)


@pytest.mark.runtime
@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_options_in_sentences_exist(page: Path, options_of_others: str) -> None:
    known = all_options(main)
    for option in pages.inline_options(page):
        assert option in known or re.search(rf"(?<![\w-]){option}(?![\w-])", options_of_others), option


@pytest.mark.parametrize("page", [*pages.PAGES, *sorted((ROOT / "docs" / "measurements").glob("*.md"))], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        if re.match(r"[a-z]+:", link):
            assert re.match(r"https://[\w.-]+/", link), link
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name(page)}: {link}"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in pages.anchors(target), f"{name(page)}: {link}"


def test_every_page_is_in_the_index() -> None:
    index = {(ROOT / "docs" / link).resolve() for link in pages.links(ROOT / "docs" / "README.md")}
    there = {page for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md"}
    assert there <= index, sorted(there - index)


def test_pictures_are_small_and_drawn() -> None:
    pictures = sorted((ROOT / "docs" / "figures").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.suffix == ".svg" and picture.stat().st_size < 60_000, picture
        assert picture.read_text(encoding="utf-8").rstrip().endswith("</svg>")
