"""The patched llama.cpp."""

import shlex
from pathlib import Path

import click

from rq_gguf.cli.doctor import doctor
from rq_gguf.cli.options import JSON, emit, examples, path_type


@click.group()
def runtime() -> None:
    """The patched llama.cpp that runs the files."""


@runtime.command(
    epilog=examples("rq-gguf runtime install", "rq-gguf runtime install --backend cuda", "rq-gguf runtime install --unpatched")
)
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


@runtime.command(
    epilog=examples(
        'eval "$(rq-gguf runtime path --export)" && llama-completion -m demo-rq.gguf -no-cnv -p "Once upon a time" -n 16',
        'eval "$(rq-gguf runtime path --lib --export)"',
    )
)
@click.argument("tool", required=False)
@click.option("--lib", is_flag=True, help="The shared libraries, for llama-cpp-python's LLAMA_CPP_LIB_PATH, instead of the programs.")
@click.option("--export", is_flag=True, help="Print a line for the shell to eval: it puts the programs on PATH, or names the libraries.")
@JSON
def path(tool: str | None, lib: bool, export: bool, json_file: Path | None) -> None:
    """Print where the programs are, or where TOOL is.

    A stock llama-cpp-python of the version that `rq-gguf runtime wheel` makes runs the files too, where the environment names the
    libraries: --lib --export.
    """
    from rq_gguf.runtime.tools import bin_dir, library_path, programs, tool_path

    if tool and (lib or export):
        raise click.UsageError("--lib and --export are about all programs: leave TOOL out")
    directory = library_path("llama").parent if lib else bin_dir()
    found = tool_path(tool) if tool else directory
    line = str(found)
    if export:
        quoted = shlex.quote(line)
        line = f"export LLAMA_CPP_LIB_PATH={quoted} MTMD_CPP_LIB={quoted}" if lib else f'export PATH={quoted}:"$PATH"'
    emit([line], json_file, {"directory": str(directory), "programs": programs(directory), "tool": str(found) if tool else None})


@runtime.command(epilog=examples("rq-gguf runtime wheel", 'pip install "$(rq-gguf runtime wheel)"'))
@click.option("--backend", default="cpu", show_default=True, help="What it computes on.")
@click.option("-o", "--output", "directory", type=path_type(file_okay=False), metavar="DIR", help="Copy the wheel there.")
@JSON
def wheel(backend: str, directory: Path | None, json_file: Path | None) -> None:
    """Make a llama-cpp-python that runs the files, for `pip install`, and print the wheel's path.

    It is llama-cpp-python with the patched llama.cpp inside, for this machine's processor; compiles only what `runtime install` has not.
    """
    from rq_gguf.runtime.wheel import make_wheel

    version, made = make_wheel(backend, directory)
    emit([str(made)], json_file, {"wheel": str(made), "version": version, "backend": backend})


runtime.add_command(doctor)
