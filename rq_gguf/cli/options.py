"""What several commands share: options, and how figures are printed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from rq_gguf import defaults
from rq_gguf.cli.failures import Failure
from rq_gguf.cli.json_option import JSON as JSON
from rq_gguf.types import LADDER, PAPER_TYPES
from rq_gguf.verbosity import is_quiet

_Function = TypeVar("_Function", bound=Callable[..., Any])


def path_type(**checks: Any) -> click.Path:
    return click.Path(path_type=Path, **checks)


INPUT = path_type(exists=True, dir_okay=False)


def examples(*commands: str) -> str:
    """A command's epilog. Each example runs as written, in this order, in an empty directory (tests/docs runs them)."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


TARGET = click.option("--target-kld", metavar="NATS", help="Instead of a budget: the smallest file whose mean KL divergence from the "
                       "model, predicted and then measured, is at most this.")  # fmt: skip


MEMORY = click.option("--max-memory", metavar="SIZE", help="Memory that calibrating may take (4GB): hidden states go to disk, "
                       "fewer sequences pass at a time; a layer too large is refused.  [default: one layer, and a little]")  # fmt: skip


def plan_options(command: _Function) -> _Function:
    for option in (
        click.option("--policy", type=click.Choice(["budget", "paper"]), default="budget", show_default=True,
                     help="How copies and types are chosen; paper: Replicate-and-Quantize as published."),
        click.option("--balance-weight", metavar="W", help="With --replicas auto: the per cents of KL divergence that a per cent less load "
                     f"imbalance is worth; 0 for no copies.  [default: {defaults.BALANCE_WEIGHT:g}]"),
        click.option("--replicas", default="auto", show_default=True, metavar="N|auto|0", help="Copies per layer."),
        click.option("--max-tiers", metavar="N", help="Most types in a layer's gate and up, and in its down, 1 to 7.  "
                     f"[default: {defaults.MAX_TIERS}]"),
        click.option("--types", metavar="LIST", help="ggml types that experts may take; if not given, those that a finished calibration "
                     f"measured, or else {','.join(LADDER)} ({','.join(PAPER_TYPES)} with --policy paper)."),
        click.option("--budget", default=defaults.BUDGET, show_default=True, metavar="TYPE|SIZE|BPW|like:FILE",
                     help="What all experts take in a type (q8_0), the whole file's size (16GiB, or like:FILE.gguf for that file's), or "
                     "bits per expert weight (5.0bpw)."),
    ):  # fmt: skip
        command = option(command)
    return command


def other_options(command: _Function) -> _Function:
    for option in (
        click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE",
                     help="A type of its own for tensors that are no routed experts, as in llama-quantize; may be repeated."),
        click.option("--other", default=defaults.OTHER, show_default=True, metavar="TYPE",
                     help="Type of all that is no routed expert, as llama-quantize lays it out (Q8_0, Q4_K_M, BF16, ...)."),
    ):  # fmt: skip
        command = option(command)
    return command


def emit(lines: list[str], json_file: Path | None, data: dict[str, Any]) -> None:
    """Print a report; with `--json -` the data has stdout, and the lines go to stderr, or nowhere if all is to be quiet."""
    to_stdout = json_file is not None and str(json_file) == "-"
    if not (to_stdout and is_quiet()):
        click.echo("\n".join(lines), err=to_stdout)
    if json_file is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    if to_stdout:
        click.echo(text, nl=False)
        return
    from rq_gguf.atomic import replacing

    with replacing(json_file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_target(ctx: click.Context) -> None:
    """A target takes the place of the budget, and needs no other."""
    given = {name: ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT for name in ("budget", "target_kld")}
    if all(given.values()):
        raise Failure("--target-kld and --budget exclude each other: one bounds the error, the other the bytes")
    if ctx.params.get("verify") is not None and not given["target_kld"]:
        raise Failure("--verify names the text to measure a target on; give --target-kld too")
