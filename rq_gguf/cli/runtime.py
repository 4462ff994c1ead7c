"""The patched llama.cpp."""

from pathlib import Path

import click

from rq_gguf.cli.options import path_type


@click.group()
def runtime() -> None:
    """The patched llama.cpp that runs the files."""


@runtime.command()
@click.option("--backend", default="cpu", show_default=True, help="What it computes on.")
@click.option(
    "--llama-cpp",
    "checkout",
    type=path_type(exists=True, file_okay=False),
    metavar="DIR",
    help="Your own checkout instead of the pinned one.",
)
@click.option("--unpatched", is_flag=True, help="Build it without the patches, for comparisons.")
def install(backend: str, checkout: Path | None, unpatched: bool) -> None:
    """Fetch, patch and build llama.cpp; does only what is missing."""
    from rq_gguf.runtime.installation import install as install_runtime

    click.echo(install_runtime(backend, checkout, unpatched))


@runtime.command()
@click.argument("tool", required=False)
def path(tool: str | None) -> None:
    """Print where the programs are, or where TOOL is."""
    from rq_gguf.runtime.tools import bin_dir, tool_path

    click.echo(tool_path(tool) if tool else bin_dir())


@runtime.command()
def doctor() -> None:
    """Say what is needed, what is there, and how to get the rest."""
    from rq_gguf.runtime.doctor import doctor as run_doctor

    if not run_doctor():
        raise click.exceptions.Exit(2)
