"""The whole way from a model to a file."""

from pathlib import Path

import click

from rq_gguf.cli.failures import Failure
from rq_gguf.cli.options import JSON, MEMORY, TARGET, check_target, emit, examples, other_options, path_type, plan_options

EXAMPLES = examples(
    "rq-gguf build demo demo-rq.gguf",
    "rq-gguf build demo-rq.gguf.rq/base.gguf demo-4bit.gguf --budget q4_k --replicas 0 --calibration demo-rq.gguf.rq/calibration.gguf",
    "rq-gguf build demo-rq.gguf.rq/base.gguf demo-kld.gguf --target-kld 0.05 --imatrix demo-rq.gguf.rq/calibration.gguf --dry-run",
)


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.argument("out", type=path_type())
@plan_options
@other_options
@click.option("--calibration", type=path_type(), metavar="TEXT_OR_FILE", help="Text to calibrate on, a calibration file, or an imatrix.")
@click.option("--imatrix", type=path_type(), metavar="FILE", help="An imatrix (GGUF, or the older .dat) instead: no torch is needed then.")
@click.option("--plan", type=path_type(), metavar="FILE", help="Use this plan.json (edited, perhaps) instead of planning.")
@TARGET
@click.option(
    "--verify",
    type=path_type(),
    metavar="TEXT",
    help="With --target-kld: the text to measure on; if not given, a fifth of the calibration text is held out for it.",
)
@MEMORY
@click.option("--allow-pickle", is_flag=True, help="Convert weights in .bin files too, which can run code when they are read.")
@click.option("--split-max-size", metavar="SIZE", help="Several files of at most this size (4GB, or 4G as in llama-gguf-split); give "
              "llama.cpp the first.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Stop after the plan and print what to expect.")
@JSON
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
    split_max_size: str | None,
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
    check_target(ctx)
    from rq_gguf import build as steps
    from rq_gguf import verdict
    from rq_gguf.card.naming import name_for
    from rq_gguf.choices import check_choices, parse_memory
    from rq_gguf.verbosity import say
    from rq_gguf.writing.others import parse_others
    from rq_gguf.writing.split import parse_split_size

    choices = check_choices(budget, types, replicas, policy, max_tiers, balance_weight, target_kld)
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
        max_memory=parse_memory(max_memory),
        allow_pickle=allow_pickle,
        split_bytes=parse_split_size(split_max_size),
        say=say,
    )
    lines, commands = verdict.build_lines(report, dry_run), None
    if not dry_run:
        commands = verdict.run_commands(report.out)
        lines += [f"name      {name_for(report.out)}, if you publish it: rq-gguf card", "", "run it:", *(f"  {c}" for c in commands)]
    emit(lines, json_file, verdict.build_json(report, commands))


def _refuse_beside_plan(ctx: click.Context) -> None:
    """A plan brings its own choices: others beside it would be ignored silently."""
    for name in ("budget", "target_kld", "types", "max_tiers", "replicas", "balance_weight", "policy"):
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise Failure(f"--{name.replace('_', '-')} and --plan exclude each other: the plan says it already; edit the plan instead")
