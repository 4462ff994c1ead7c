"""`--json [FILE]`: the figures of a command as JSON, to stdout where no FILE is given."""

from pathlib import Path

import click

_NAME = "--json"


def _refuse_to_replace(ctx: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and is_other_file(value):
        raise click.BadParameter(f"{value} is no JSON file and will not be replaced; write --json=- for stdout", ctx, option)
    return value


JSON = click.option(
    _NAME,
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    callback=_refuse_to_replace,
    help="Write the figures as JSON, to stdout if no FILE is given; text goes to stderr then.",
)


def is_other_file(path: Path) -> bool:
    """True for a file that is there and holds no JSON (JSON lines, such as a task's questions, are none)."""
    if not path.is_file():
        return False
    if path.suffix == ".jsonl":
        return True
    with path.open("rb") as f:
        return f.read(64).lstrip()[:1] not in (b"{", b"[", b"")


def with_value(args: list[str]) -> list[str]:
    """Arguments in which `--json` before a file that is no JSON, such as a model, says that it means stdout."""
    following = [*args[1:], None]
    return [f"{_NAME}=-" if a == _NAME and b and is_other_file(Path(b)) else a for a, b in zip(args, following, strict=True)]
