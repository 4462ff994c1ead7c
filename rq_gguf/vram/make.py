"""`rq-gguf plan --vram`: read the calibration, plan, lay out, plan again for the machine, write the plan."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rq_gguf.build import Remarks, plan_measured, read_for_plan, remarks_on
from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.trace import is_trace, is_zip, read_trace
from rq_gguf.choices import Choices
from rq_gguf.errors import UserError
from rq_gguf.job import file_hash
from rq_gguf.planning.budget import expert_shape, parse_size
from rq_gguf.planning.file import write_plan
from rq_gguf.planning.plan import Plan
from rq_gguf.planning.policy import AUTO
from rq_gguf.progress import Bar
from rq_gguf.vram.files import find_machine
from rq_gguf.vram.hits import fitted, study
from rq_gguf.vram.machine import DEFAULT
from rq_gguf.vram.model import rest_of
from rq_gguf.vram.plans import FACTORS, TYPICAL, Choice, Setting, choose, shares
from rq_gguf.vram.speed import Missed, Rest
from rq_gguf.writing.others import Others
from rq_gguf.writing.source import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A user's choices for the machine, as text."""

    vram: str
    ram: str | None = None
    machine: str | None = None
    trace: Path | None = None


@dataclass(frozen=True)
class Planned:
    """All plans that were looked at."""

    written: Plan
    choices: list[Choice]
    setting: Setting
    vram: float
    """Bytes for experts."""
    ram: int | None
    """Most bytes of experts; None for no limit."""
    remarks: Remarks


def parse_vram(text: str) -> Callable[[int], float]:
    """A user's `--vram`: bytes of all experts -> bytes of them that VRAM has room for. Raises UserError."""
    number = text.strip().removesuffix("%")
    if number != text.strip():
        try:
            part = float(number) / 100
        except ValueError:
            part = -1.0
        if 0 <= part <= 1:
            return lambda expert_bytes: part * expert_bytes
    elif (size := parse_size(text)) is not None:
        return lambda expert_bytes: float(size)
    raise UserError(f"--vram {text} is not understood; give what is left for experts, such as 6GiB, or a part of them, such as 50%")


def plan_for_machine(
    calibration: Path, out: Path, choices: Choices, wanted: Wanted, *, base: Path | None = None, others: Others | None = None
) -> Planned:
    """Plan as build.plan_calibration does, then for the machine: the fastest plan whose predicted error is that of the plain one.

    base: the model's GGUF, for the time of what is no routed expert. Raises UserError.
    """
    room, ram = parse_vram(wanted.vram), None
    if wanted.ram is not None and (ram := parse_size(wanted.ram)) is None:
        raise UserError(f"--ram {wanted.ram} is not understood; give what the RAM has for experts, such as 24GiB")
    if choices.policy == "paper" or choices.replicas not in (AUTO, 0):
        what = "--policy paper" if choices.policy == "paper" else f"--replicas {choices.replicas}"
        raise UserError(f"--vram and {what} exclude each other: experts of one machine need no copies beside those that VRAM holds")
    machine = find_machine(DEFAULT if wanted.machine is None else wanted.machine)
    measured, choices, other_bytes = read_for_plan(calibration, out, replace(choices, replicas=0), base, others)
    if not measured.load_known:
        raise UserError(f"--vram: {calibration} does not say how often each expert is picked (the .dat form of an imatrix has no counts)")
    if not measured.n_expert_used:
        raise UserError(f"--vram: {calibration} does not say how many experts a token takes; give the model too (--base MODEL.gguf)")
    ram = ram if ram is not None else machine.ram or None
    setting = Setting(machine, _rest(measured, base, other_bytes), _missed(measured, wanted.trace))
    plain = plan_measured(choices, measured, file_hash(calibration), other_bytes)
    if plain.summary["predicted_kld"] is None:
        raise UserError(f"--vram: {calibration} measured no error for some of the types; choose others with --types")
    if ram is not None and plain.expert_bytes > ram:
        raise UserError(f"the experts within the budget take {plain.expert_bytes} bytes, and the RAM has {ram} for them; lower --budget")
    vram = room(plain.expert_bytes)
    with Bar(total=len(FACTORS), desc="planning", unit="plan", leave=False, disable=None, delay=1) as bar:
        found = choose(measured, plain, setting, vram, math.inf if ram is None else ram, bar.update)
    written = max((c for c in found if c.kld <= found[0].kld * (1 + 1e-6)), key=lambda c: c.speed.decode).plan
    write_plan(out, written, measured)
    return Planned(written, found, setting, vram, ram, remarks_on(measured, choices.types))


def _rest(c: Calibration, base: Path | None, other_bytes: int) -> Rest:
    """What a token reads besides routed experts; nothing where the model is not at hand."""
    active = float(len(c.layers) * c.n_expert_used * expert_shape(c).weights)
    if base is None:
        log.warning("without the model (--base MODEL.gguf) only routed experts and hand-overs are reckoned with: real speeds are lower")
        return Rest(0, len(c.layers), active)
    with Source(base) as source:
        weights = {name: t.cols * t.n_rows for name, t in source.tensors.items() if not source.is_routed(name)}
        layers = source.header.integer(f"{source.shape.arch}.block_count", len(c.layers))
    per_weight = other_bytes / max(sum(weights.values()), 1)
    return rest_of({name: (per_weight * n, n) for name, n in weights.items()}, layers, active)


def _missed(c: Calibration, path: Path | None) -> Missed:
    """How sets do on recorded routing, or on that of other models."""
    if path is None:
        return TYPICAL
    if not (is_zip(path) and is_trace(path)):
        raise UserError(f"--trace {path} is no trace; record one (rq-gguf trace MODEL -o {path.stem}.npz --text TEXT)")
    trace = read_trace(path)
    load = shares(c)
    if trace.layers != tuple(layer.layer for layer in c.layers) or trace.n_expert != load.shape[1]:
        raise UserError(
            f"--trace {path} is of another model: layers {list(trace.layers)} of {trace.n_expert} experts, and the calibration has "
            f"{[layer.layer for layer in c.layers]} of {load.shape[1]}"
        )
    try:
        return fitted(load, study(load, trace))
    except ValueError as e:
        raise UserError(f"--trace {path} holds no sequence of two tokens; record one of a longer text") from e
