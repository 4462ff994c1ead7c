"""Plan from a calibration."""

from pathlib import Path

import click

from rq_gguf.cli.failures import Failure
from rq_gguf.cli.options import INPUT, JSON, TARGET, check_target, emit, examples, other_options, path_type, plan_options

EXAMPLES = examples(
    "rq-gguf plan calibration.gguf -o plan.json --budget 6.0bpw --replicas 2",
    "rq-gguf plan calibration.gguf -o plan.json --target-kld 0.05 --json",
    "rq-gguf plan calibration.gguf -o plan.json --budget 6.0bpw --vram 50% --machine 8gb",
)


@click.command(epilog=EXAMPLES)
@click.argument("calibration", type=INPUT)
@click.option("-o", "--output", "out", type=path_type(dir_okay=False), required=True, metavar="FILE", help="The plan.json to write.")
@plan_options
@click.option("--base", type=INPUT, metavar="GGUF", help="The model, where the budget bounds the whole file, and for speed.")
@other_options
@TARGET
@click.option("--vram", metavar="SIZE|PART", help="Plan for one GPU with this much memory for experts (6GiB, or 50% of them): the fastest "
              "plan of the error that the budget or target gives, and its speed.")  # fmt: skip
@click.option("--ram", metavar="SIZE", help="With --vram: the most that all experts may take.")
@click.option("--machine", metavar="NAME|FILE", help="With --vram: an example (6gb, 8gb, 12gb, 16gb, 24gb, h100-16-cores), or a JSON file "
              "with a machine's speeds.  [default: 12gb]")  # fmt: skip
@click.option("--trace", type=INPUT, metavar="FILE", help="With --vram: recorded routing, for the share of selections that VRAM catches.")
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
    vram: str | None,
    ram: str | None,
    machine: str | None,
    trace: Path | None,
    json_file: Path | None,
) -> None:
    """Plan copies and types from a CALIBRATION file; the plan can be edited and given to build."""
    check_target(ctx)
    from rq_gguf import build as steps
    from rq_gguf import verdict
    from rq_gguf.choices import check_choices
    from rq_gguf.writing.others import parse_others

    choices = check_choices(budget, types, replicas, policy, max_tiers, balance_weight, target_kld)
    others = parse_others(other, tensor_types)
    if vram is not None:
        from rq_gguf.vram import table
        from rq_gguf.vram.make import Wanted, plan_for_machine

        found = plan_for_machine(calibration, out, choices, Wanted(vram, ram, machine, trace), base=base, others=others)
        lines = verdict.plan_lines(found.written, found.remarks) + table.plans_lines(
            found.choices, found.setting, found.vram, found.written
        )
        speed = table.plans_json(found.choices, found.setting, found.vram, found.ram, found.written)
        data = verdict.plan_json(found.written, found.remarks) | {"speed": speed}
        emit([*lines, "", f"plan      {out}"], json_file, data)
        return
    for name, value in (("--ram", ram), ("--machine", machine), ("--trace", trace)):
        if value is not None:
            raise Failure(f"{name} says what a plan for a GPU needs to know; give --vram too")
    planned, remarks = steps.plan_calibration(calibration, out, choices, base=base, others=others)
    emit([*verdict.plan_lines(planned, remarks), f"plan      {out}"], json_file, verdict.plan_json(planned, remarks))
