"""Plan from a calibration."""

from pathlib import Path

import click

from rq_gguf.cli.options import INPUT, JSON, TARGET, check_target, emit, examples, other_options, path_type, plan_options

EXAMPLES = examples(
    "rq-gguf plan calibration.gguf -o plan.json --budget 6.0bpw --replicas 2",
    "rq-gguf plan calibration.gguf -o plan.json --target-kld 0.05 --json",
)


@click.command(epilog=EXAMPLES)
@click.argument("calibration", type=INPUT)
@click.option("-o", "--output", "out", type=path_type(dir_okay=False), required=True, metavar="FILE", help="The plan.json to write.")
@plan_options
@click.option("--base", type=INPUT, metavar="GGUF", help="The model, where the budget bounds the whole file.")
@other_options
@TARGET
@JSON
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
    check_target(ctx)
    from rq_gguf import build as steps
    from rq_gguf import verdict
    from rq_gguf.choices import check_choices
    from rq_gguf.writing.others import parse_others

    choices = check_choices(budget, types, replicas, policy, max_tiers, balance_weight, target_kld)
    planned, remarks = steps.plan_calibration(calibration, out, choices, base=base, others=parse_others(other, tensor_types))
    emit([*verdict.plan_lines(planned, remarks), f"plan      {out}"], json_file, verdict.plan_json(planned, remarks))
