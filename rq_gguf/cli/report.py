"""Draw a page."""

from pathlib import Path

import click

from rq_gguf import defaults
from rq_gguf.cli.options import INPUT, JSON, emit, examples, path_type

EXAMPLES = examples(
    "rq-gguf report demo-rq.gguf -o report.html",
    "rq-gguf report calibration.gguf -o report.html --budget 6.0bpw --vram 4MB --figures figures",
)


@click.command(epilog=EXAMPLES)
@click.argument("source", type=INPUT, metavar="CALIBRATION_OR_GGUF")
@click.option("-o", "--output", "out", type=path_type(dir_okay=False), required=True, metavar="FILE.html", help="The page to write.")
@click.option("--calibration", type=INPUT, metavar="FILE", help="What a GGUF was built with; found by itself where build left it.")
@click.option("--budget", metavar="TYPE|BPW", help=f"For a calibration: what to plan for.  [default: {defaults.BUDGET}]")
@click.option("--plan", type=INPUT, metavar="FILE", help="For a calibration: show this plan.json instead.")
@click.option("--vram", metavar="SIZE", help="Memory that a GPU has left for experts (6GB): what share of the selections it catches, and "
              "the speed to expect.")  # fmt: skip
@click.option("--machine", metavar="NAME|FILE", help="With --vram: whose speed to predict, as for plan.  [default: 12gb]")
@click.option("--figures", type=path_type(file_okay=False), metavar="DIR", help="Write each figure as SVG, and as PNG with matplotlib.")
@JSON
def report(
    source: Path,
    out: Path,
    calibration: Path | None,
    budget: str | None,
    plan: Path | None,
    vram: str | None,
    machine: str | None,
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
    found = make.make_report(source, make.Options(budget, plan, calibration, vram, machine))
    make.write_page(found, out)
    written = [] if figures is None else make.write_figures(found, figures)
    lines = [f"{v.heading}. {v.sentences[0]}" for v in verdict(found)] + [f"report    {out}"]
    emit(lines + ([f"figures   {len(written)} files in {figures}"] if written else []), json_file, to_json(found))
