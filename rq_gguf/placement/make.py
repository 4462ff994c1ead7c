"""`rq-gguf simulate` and `export`: from a user's files and choices to figures and placements."""

import logging
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rq_gguf.atomic import replacing
from rq_gguf.calibration.trace import is_trace, is_zip, read_trace
from rq_gguf.errors import UserError
from rq_gguf.placement.batches import Part, halves, whole
from rq_gguf.placement.figure import N_COLOURS, draw
from rq_gguf.placement.files import read_loads, write_location
from rq_gguf.placement.loads import Loads
from rq_gguf.placement.location import Exported, export
from rq_gguf.placement.machine import ExpertSize, Machine
from rq_gguf.placement.simulate import Workload, simulate
from rq_gguf.placement.table import Simulation
from rq_gguf.progress import Bar
from rq_gguf.report.colours import palette
from rq_gguf.report.svg import standalone

log = logging.getLogger(__name__)

COPIES = 4
"""A copy for every so many experts, if the user does not say."""
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_DEVICES, MOST_SEQUENCES = 1024, 1 << 16


def parse_counts(text: str, option: str, most: int) -> tuple[int, ...]:
    """`2..64` (doubling), `2,4,12` or both -> numbers from small to large. Raises UserError."""
    found: set[int] = set()
    for part in text.split(","):
        if m := _RANGE.fullmatch(part.strip()):
            low, high = int(m[1]), int(m[2])
            found |= {low << i for i in range(max(high, 1).bit_length()) if low << i <= high}
        elif part.strip().isdecimal():
            found.add(int(part))
        else:
            raise UserError(f"{option} {text} is not understood; give numbers such as 2,4,8, or 2..64 for doubling")
    if not found or min(found) < 1 or max(found) > most:
        raise UserError(f"{option} {text}: give numbers from 1 to {most}")
    return tuple(sorted(found))


def parse_shape(text: str | None) -> tuple[int, int] | None:
    """`2048x768` -> (n_embd, n_ff). Raises UserError."""
    if text is None:
        return None
    m = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if m is None or not (int(m[1]) and int(m[2])):
        raise UserError(f"--shape {text} is not understood; give an expert's inputs and inner units, such as 2048x768")
    return int(m[1]), int(m[2])


def make_simulation(
    source: Path,
    evaluate: Path | None,
    *,
    devices: str,
    batches: str,
    copies: int | None,
    machine: Machine,
    bits: float,
    top_k: int | None,
    shape: str | None,
) -> Simulation:
    """Simulate what a file says. evaluate: a trace to draw batches from; None: the part of `source` that is not planned on.

    Raises UserError for files and choices that cannot be.
    """
    counts, sizes = parse_counts(devices, "--devices", MOST_DEVICES), parse_counts(batches, "--batch", MOST_SEQUENCES)
    given, loads = parse_shape(shape), read_loads(source)
    planned, decoded, words = _parts(source, loads, evaluate)
    n_used = loads.n_expert_used or (decoded.trace.n_expert_used if decoded is not None else top_k)
    if not n_used:
        raise UserError(f"{source} does not say how many experts a token takes; give it (--top-k 8)")
    if not 0 < n_used <= loads.n_expert:
        raise UserError(f"--top-k {n_used}: the model has {loads.n_expert} experts")
    if given is None and loads.n_embd is not None and loads.n_ff is not None:
        given = loads.n_embd, loads.n_ff
    if given is None and decoded is not None:
        given = decoded.trace.n_embd, decoded.trace.n_ff
    if given is None:
        raise UserError(f"{source} does not say how large an expert is; give its inputs and inner units (--shape 2048x768)")
    wanted = _wanted(loads, copies)
    size, work = ExpertSize(*given, bits), Workload(planned, n_used, decoded)
    with Bar(total=len(sizes) * len(loads.layers), desc="simulating", leave=False, disable=None, delay=1) as bar:
        points = simulate(work, counts, sizes, wanted, machine, size, bar.update)
    return Simulation(loads.model, len(loads.layers), loads.n_expert, n_used, words, machine, size, points)


def _parts(source: Path, loads: Loads, evaluate: Path | None) -> tuple[NDArray[np.float64], Part | None, str]:
    """(selections or shares to plan on, tokens to draw batches from, how it was done)."""
    if evaluate is not None:
        if not (is_zip(evaluate) and is_trace(evaluate)):
            raise UserError(f"--evaluate {evaluate} is no trace; record one (rq-gguf trace MODEL -o {evaluate.stem}.npz --text TEXT)")
        trace = read_trace(evaluate)
        if trace.layers != loads.layers or trace.n_expert != loads.n_expert:
            raise UserError(
                f"--evaluate {evaluate} is of another model: layers {list(trace.layers)} of {trace.n_expert} experts, and {source} has "
                f"{list(loads.layers)} of {loads.n_expert}"
            )
        return loads.load, whole(trace), f"planned on {source.name}, batches drawn from {evaluate.name} ({trace.n_tokens} tokens)"
    if loads.trace is not None:
        planned, decoded = halves(loads.trace)
        if len(loads.trace.starts) == 2:
            log.warning("%s holds one sequence: placements are planned on what they are evaluated on; record more tokens", source)
        return planned.selections, decoded, f"planned on one half of {source.name}, batches drawn from the other"
    log.warning(
        "%s holds loads and no routing: tokens are drawn independently of each other, from the loads that were planned for, which flatters "
        "every placement; record a trace of other text (rq-gguf trace) and give it with --evaluate",
        source,
    )
    return loads.load, None, f"planned on the loads of {source.name}, tokens drawn from the same loads"


def _wanted(loads: Loads, copies: int | None) -> int:
    """Copies per layer, before they are rounded up to equal slots."""
    if copies is None and loads.instances is not None:
        copies = int(loads.instances.sum(axis=1).max()) - loads.n_expert
    return -(-loads.n_expert // COPIES) if copies is None else copies


def check_plot(path: Path) -> None:
    """Raise UserError for a name that promises another format."""
    if path.suffix.lower() != ".svg":
        raise UserError(f"--plot {path}: the figure is written as SVG; name it .svg")


def write_plot(path: Path, simulation: Simulation) -> None:
    """The figure as SVG; it appears under its name when complete. Raises UserError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(standalone(draw(simulation), palette(N_COLOURS, dark=False)), encoding="utf-8")


def make_export(source: Path, out: Path, engine: str, n_devices: int, copies: int | None, n_layers: int | None) -> Exported:
    """Pack what a file says onto devices and write the engine's file. Raises UserError."""
    if out.exists() and out.samefile(source):
        raise UserError(f"--output {out} is the file that says how busy experts are; name another")
    exported = export(read_loads(source), engine, n_devices, copies, n_layers)
    write_location(out, exported)
    return exported
