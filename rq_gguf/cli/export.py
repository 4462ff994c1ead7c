"""Placements for serving engines."""

from pathlib import Path

import click

from rq_gguf.cli.options import INPUT, JSON, emit, examples, path_type


@click.command(epilog=examples("rq-gguf export plan.json --for sglang --devices 4 -o location.json"))
@click.argument("source", type=INPUT, metavar="PLAN_OR_CALIBRATION")
@click.option("--for", "engine", type=click.Choice(["sglang", "vllm"]), required=True, help="The engine that is to place experts.")
@click.option("--devices", type=click.IntRange(min=2, max=1024), required=True, metavar="D", help="Its expert-parallel size.")
@click.option("--copies", type=click.IntRange(min=0), metavar="N", help="Copies per layer, rounded up to equal slots.  [default: a plan's, "
              "or none]")  # fmt: skip
@click.option("--layers", type=click.IntRange(min=1), metavar="N", help="Decoder layers of the model, with those that have no experts.  "
              "[default: up to the last that has some]")  # fmt: skip
@click.option("-o", "--output", "out", type=path_type(dir_okay=False), required=True, metavar="FILE.json", help="The file to write.")
@JSON
def export(source: Path, engine: str, devices: int, copies: int | None, layers: int | None, out: Path, json_file: Path | None) -> None:
    """Pack experts and copies onto devices, by load, for an engine that serves the original model.

    Takes a plan (its copies; its types are for GGUFs), a calibration, a trace, or SGLang's recorded expert distribution.
    """
    from rq_gguf.placement import make
    from rq_gguf.placement.location import describe, to_json

    made = make.make_export(source, out, engine, devices, copies, layers)
    emit(describe(made, str(out)), json_file, to_json(made))
