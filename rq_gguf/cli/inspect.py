"""Show a file."""

import json
from pathlib import Path

import click

from rq_gguf.cli.options import INPUT


@click.command()
@click.argument("file", type=INPUT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """Validate FILE and show its tiers, copies, bytes, maps and provenance."""
    from rq_gguf.writing import inspect as room

    found = room.inspect(file)
    click.echo(json.dumps(room.to_json(found), indent=2) if as_json else room.describe(found))
