"""The commands: parse, call one function per step, print. Rooms are imported inside the commands, so that --help is quick."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from rq_gguf import __version__, defaults
from rq_gguf.atomic import FULL
from rq_gguf.errors import UserError
from rq_gguf.types import LADDER, PAPER_TYPES

DEBUG = "RQ_GGUF_DEBUG"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Failure(click.ClickException):
    """`Error: one sentence` on stderr."""

    exit_code = 2


class Bug(click.ClickException):
    exit_code = 1


class Commands(click.Group):
    """Turns exceptions into one line and an exit status: 2 for a bad input, 130 for Ctrl-C, 1 for a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted: finished steps are kept, nothing half-made was left behind", err=True)
            ctx.exit(130)
        except Exception as e:
            if os.environ.get(DEBUG) == "1":
                raise
            raise _failure(e) from e


def _failure(e: Exception) -> click.ClickException:
    if isinstance(e, UserError):
        return Failure(str(e))
    if isinstance(e, OSError) and e.errno in FULL:
        return Failure(f"the disk is full{f' ({e.filename})' if e.filename else ''}; free some space and run the command again")
    if isinstance(e, FileNotFoundError) and "temporary directory" in str(e):  # tempfile's own words
        return Failure("no temporary file can be written: the disk is full, or TMPDIR names no directory that can be written")
    if isinstance(e, OSError) and e.filename:
        return Failure(f"{e.filename}: {e.strerror}")
    if isinstance(e, MemoryError):
        return Failure("out of memory; close other programs or use a machine with more")
    text = " ".join(str(e).split()) or "no message"
    return Bug(f"unexpected {type(e).__name__}: {text} ({DEBUG}=1 shows where)")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="rq-gguf")
def main() -> None:
    """Copies of busy experts and per-expert types for mixture-of-experts GGUFs, under one byte budget."""
    logger = logging.getLogger("rq_gguf")
    logger.handlers = [_Stderr()]
    logger.propagate = False


class _Stderr(logging.Handler):
    """Warnings as `Warning: ...` on stderr, whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.capitalize()}: {record.getMessage()}", err=True)


def _path(**checks: Any) -> click.Path:
    return click.Path(path_type=Path, **checks)


_INPUT = _path(exists=True, dir_okay=False)
_JSON = click.option(
    "--json", "json_file", type=_path(dir_okay=False, allow_dash=True), metavar="FILE", help="Write the figures as JSON (- for stdout)."
)


_TARGET = click.option("--target-kld", metavar="NATS", help="Instead of a budget: the smallest file whose mean KL divergence from the "
                       "model, predicted and then measured, is at most this.")  # fmt: skip


_MEMORY = click.option("--max-memory", metavar="SIZE", help="Memory that calibrating may take (4GB): hidden states go to disk, "
                       "fewer sequences pass at a time; a layer too large is refused.  [default: one layer, and a little]")  # fmt: skip


def _plan_options(command: _Function) -> _Function:
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


def _other_options(command: _Function) -> _Function:
    for option in (
        click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE",
                     help="A type of its own for tensors that are no routed experts, as in llama-quantize; may be repeated."),
        click.option("--other", default=defaults.OTHER, show_default=True, metavar="TYPE",
                     help="Type of all that is no routed expert, as llama-quantize lays it out (Q8_0, Q4_K_M, BF16, ...)."),
    ):  # fmt: skip
        command = option(command)
    return command


def _emit(lines: list[str], json_file: Path | None, data: dict[str, Any]) -> None:
    """Print a report; with `--json -` the data has stdout and the lines go to stderr."""
    to_stdout = json_file is not None and str(json_file) == "-"
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


def _say(line: str) -> None:
    click.echo(line, err=True)


@main.command()
@click.argument("model")
@click.argument("out", type=_path())
@_plan_options
@_other_options
@click.option("--calibration", type=_path(), metavar="TEXT_OR_FILE", help="Text to calibrate on, a calibration file, or an imatrix.")
@click.option("--imatrix", type=_path(), metavar="FILE", help="An imatrix (GGUF, or the older .dat) instead: no torch is needed then.")
@click.option("--plan", type=_path(), metavar="FILE", help="Use this plan.json (edited, perhaps) instead of planning.")
@_TARGET
@click.option(
    "--verify",
    type=_path(),
    metavar="TEXT",
    help="With --target-kld: the text to measure on; if not given, a fifth of the calibration text is held out for it.",
)
@_MEMORY
@click.option("--allow-pickle", is_flag=True, help="Convert weights in .bin files too, which can run code when they are read.")
@click.option("--dry-run", is_flag=True, help="Stop after the plan and print what to expect.")
@_JSON
@click.option("--force", is_flag=True, help="Redo every step, and replace OUT whatever it is.")
@click.pass_context
def build(
    ctx: click.Context,
    model: str,
    out: Path,
    budget: str,
    types: str | None,
    max_tiers: str | None,
    replicas: str,
    balance_weight: str | None,
    policy: str,
    other: str,
    tensor_types: tuple[str, ...],
    calibration: Path | None,
    imatrix: Path | None,
    plan: Path | None,
    target_kld: str | None,
    verify: Path | None,
    max_memory: str | None,
    allow_pickle: bool,
    dry_run: bool,
    json_file: Path | None,
    force: bool,
) -> None:
    """Build OUT from MODEL: calibrate, plan, write.

    MODEL is `demo`, a Hugging Face directory or hub id, or an F16, BF16, F32, Q8_0 or MXFP4 GGUF together with --calibration or
    --imatrix. Steps that an earlier run finished with the same inputs are skipped; their files are in OUT.rq beside OUT.
    """
    if plan is not None:
        _refuse_beside_plan(ctx)
    _check_target(ctx)
    from rq_gguf import build as steps
    from rq_gguf import verdict
    from rq_gguf.runtime.tools import tool_path
    from rq_gguf.writing.others import parse_others

    choices = steps.check_choices(budget, types, replicas, policy, max_tiers, balance_weight, target_kld)
    report = steps.build(
        model,
        out,
        choices,
        calibration=calibration,
        imatrix=imatrix,
        plan=plan,
        others=parse_others(other, tensor_types),
        verify=verify,
        dry_run=dry_run,
        force=force,
        max_memory=steps.parse_memory(max_memory),
        allow_pickle=allow_pickle,
        say=_say,
    )
    lines, command = verdict.build_lines(report, dry_run), None
    if not dry_run:
        command = verdict.run_command(tool_path("llama-cli"), out)
        lines += ["", "run it:", f"  {command}"]
    _emit(lines, json_file, verdict.build_json(report, command))


def _check_target(ctx: click.Context) -> None:
    """A target takes the place of the budget, and needs no other."""
    given = {name: ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT for name in ("budget", "target_kld")}
    if all(given.values()):
        raise Failure("--target-kld and --budget exclude each other: one bounds the error, the other the bytes")
    if ctx.params.get("verify") is not None and not given["target_kld"]:
        raise Failure("--verify names the text to measure a target on; give --target-kld too")


def _refuse_beside_plan(ctx: click.Context) -> None:
    """A plan brings its own choices: others beside it would be ignored silently."""
    for name in ("budget", "target_kld", "types", "max_tiers", "replicas", "balance_weight", "policy"):
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise Failure(f"--{name.replace('_', '-')} and --plan exclude each other: the plan says it already; edit the plan instead")


@main.command()
@click.argument("model")
@click.option("-o", "--output", "out", type=_path(dir_okay=False), required=True, metavar="FILE", help="The calibration file to write.")
@click.option("--text", type=_INPUT, metavar="FILE", help="Text to calibrate on; the project's own by default.")
@click.option("--tokens", type=click.IntRange(min=1), default=defaults.TOKENS, show_default=True, metavar="N", help="Tokens of it to use.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--types", default=",".join(LADDER), show_default=True, metavar="LIST", help="ggml types to measure.")
@_MEMORY
def calibrate(model: str, out: Path, text: Path | None, tokens: int, device: str, types: str, max_memory: str | None) -> None:
    """Measure MODEL's experts: how busy they are, and what each type does to them.

    The file is also an imatrix for llama-quantize.
    """
    from rq_gguf.build import calibrate_model, parse_memory

    c = calibrate_model(model, out, text=text, tokens=tokens, device=device, types=types, max_memory=parse_memory(max_memory))
    click.echo(f"{out}: {len(c.layers)} layers of {c.layers[0].n_expert} experts on {c.n_tokens} tokens, types {', '.join(c.types)}")


@main.command()
@click.argument("calibration", type=_INPUT)
@click.option("-o", "--output", "out", type=_path(dir_okay=False), required=True, metavar="FILE", help="The plan.json to write.")
@_plan_options
@click.option("--base", type=_INPUT, metavar="GGUF", help="The model, where the budget bounds the whole file.")
@_other_options
@_TARGET
@_JSON
@click.pass_context
def plan(
    ctx: click.Context,
    calibration: Path,
    out: Path,
    budget: str,
    types: str | None,
    max_tiers: str | None,
    replicas: str,
    balance_weight: str | None,
    policy: str,
    base: Path | None,
    other: str,
    tensor_types: tuple[str, ...],
    target_kld: str | None,
    json_file: Path | None,
) -> None:
    """Plan copies and types from a CALIBRATION file; the plan can be edited and given to build."""
    _check_target(ctx)
    from rq_gguf import build as steps
    from rq_gguf import verdict
    from rq_gguf.writing.others import parse_others

    choices = steps.check_choices(budget, types, replicas, policy, max_tiers, balance_weight, target_kld)
    planned, remarks = steps.plan_calibration(calibration, out, choices, base=base, others=parse_others(other, tensor_types))
    _emit([*verdict.plan_lines(planned, remarks), f"plan      {out}"], json_file, verdict.plan_json(planned, remarks))


@main.command()
@click.argument("file", type=_INPUT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """Validate FILE and show its tiers, copies, bytes, maps and provenance."""
    from rq_gguf.writing import inspect as room

    found = room.inspect(file)
    click.echo(json.dumps(room.to_json(found), indent=2) if as_json else room.describe(found))


@main.command()
@click.argument("source", type=_INPUT, metavar="CALIBRATION_OR_GGUF")
@click.option("-o", "--output", "out", type=_path(dir_okay=False), required=True, metavar="FILE.html", help="The page to write.")
@click.option("--calibration", type=_INPUT, metavar="FILE", help="What a GGUF was built with; found by itself where build left it.")
@click.option("--budget", metavar="TYPE|BPW", help=f"For a calibration: what to plan for.  [default: {defaults.BUDGET}]")
@click.option("--plan", type=_INPUT, metavar="FILE", help="For a calibration: show this plan.json instead.")
@click.option("--vram", metavar="SIZE", help="Memory that a GPU has left for experts (6GB): what share of the selections it catches.")
@click.option("--figures", type=_path(file_okay=False), metavar="DIR", help="Write each figure as SVG, and as PNG with matplotlib.")
@_JSON
def report(
    source: Path,
    out: Path,
    calibration: Path | None,
    budget: str | None,
    plan: Path | None,
    vram: str | None,
    figures: Path | None,
    json_file: Path | None,
) -> None:
    """A page about a model's experts: load, balance, types, error, and whether copies are worth their bytes.

    Takes a calibration (and plans for it), or a GGUF that build wrote.
    """
    from rq_gguf.report import make
    from rq_gguf.report.data import to_json
    from rq_gguf.report.words import verdict

    make.check_output(out, source, calibration, plan)
    found = make.make_report(source, make.Options(budget, plan, calibration, vram))
    make.write_page(found, out)
    written = [] if figures is None else make.write_figures(found, figures)
    lines = [f"{v.heading}. {v.sentences[0]}" for v in verdict(found)] + [f"report    {out}"]
    _emit(lines + ([f"figures   {len(written)} files in {figures}"] if written else []), json_file, to_json(found))


@main.command("eval")
@click.argument("out", type=_INPUT)
@click.argument("more", type=_INPUT, nargs=-1, metavar="")
@click.option("--base", type=_INPUT, required=True, metavar="GGUF", help="The model that OUT was made from, to compare with.")
@click.option("--text", "texts", type=_INPUT, multiple=True, metavar="FILE...", help="Texts to evaluate on.")
@click.option(
    "--tasks", type=_INPUT, multiple=True, metavar="FILE.jsonl...", help="Questions to answer, as JSON lines with context, choices, label "
    "(PIQA, ARC), with context and target, or with text, whose last word is asked for (LAMBADA)."
)  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), default=80, show_default=True, help="Chunks of 512 tokens, of all texts mixed.")
@click.option("--items", type=click.IntRange(min=2), metavar="N", help="Items of each task, evenly spaced; all if not given.")
@click.option("--threads", type=click.IntRange(min=1), help="llama.cpp's default if not given.")
@_JSON
def evaluate(
    out: Path,
    more: tuple[Path, ...],
    base: Path,
    texts: tuple[Path, ...],
    tasks: tuple[Path, ...],
    chunks: int,
    items: int | None,
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Compare OUT with its base: perplexity, KL divergence, the balance of the experts' load, and accuracy on tasks."""
    from rq_gguf.evaluation import evaluate as room

    # An option takes one value: what follows in `--text a.txt b.txt` arrives as further arguments behind OUT. With both options the
    # name tells which they belong to.
    more_tasks = tuple(path for path in more if tasks and (not texts or path.suffix == ".jsonl"))
    texts += tuple(path for path in more if path not in more_tasks)
    found = room.evaluate(out, base, texts, tasks + more_tasks, chunks=chunks, items=items, threads=threads)
    _emit(room.describe(found).splitlines(), json_file, room.to_json(found))


@main.group()
def runtime() -> None:
    """The patched llama.cpp that runs the files."""


@runtime.command()
@click.option("--backend", default="cpu", show_default=True, help="What it computes on.")
@click.option(
    "--llama-cpp", "checkout", type=_path(exists=True, file_okay=False), metavar="DIR", help="Your own checkout instead of the pinned one."
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
