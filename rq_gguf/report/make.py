"""`rq-gguf report`: read a calibration or a file, write the page and its figures. The only module of this room that touches files."""

import logging
from dataclasses import dataclass
from pathlib import Path

from rq_gguf import defaults
from rq_gguf.atomic import reason, replacing
from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import read_any
from rq_gguf.calibration.imatrix_file import is_dat
from rq_gguf.errors import UserError
from rq_gguf.format import KEY_CALIBRATION_HASH, KEY_FORMAT_VERSION, parse_expert_name
from rq_gguf.gguf_file import read_header
from rq_gguf.job import file_hash, job_directory
from rq_gguf.planning.budget import parse_budget, parse_size
from rq_gguf.planning.file import read_plan
from rq_gguf.planning.policy import AUTO, make_plan
from rq_gguf.progress import Bar
from rq_gguf.report.colours import palette
from rq_gguf.report.data import Report, Subject
from rq_gguf.report.figures import WIDE, drawn
from rq_gguf.report.gather import BUDGETS, gather, subject_of_file, subject_of_plan
from rq_gguf.report.page import page
from rq_gguf.report.png import available, write_png
from rq_gguf.report.svg import standalone
from rq_gguf.types import LADDER, rank
from rq_gguf.vram.files import find_machine
from rq_gguf.vram.machine import DEFAULT
from rq_gguf.writing.tiered import open_tiered

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """A user's choices."""

    budget: str | None = None
    plan: Path | None = None
    calibration: Path | None = None
    vram: str | None = None
    machine: str | None = None


def make_report(source: Path, options: Options) -> Report:
    """The figures of a calibration (with the plan that its budget, or a plan.json, gives) or of a file that `build` wrote.

    Raises UserError for anything else, and for options that do not fit.
    """
    vram = None if options.vram is None else _size(options.vram)
    if options.machine is not None and vram is None:
        raise UserError("--machine says how fast a machine is; give the memory that its GPU has for experts too (--vram 6GB)")
    machine = None if vram is None else find_machine(options.machine or DEFAULT)
    subject = _of_calibration(source, options) if is_dat(source) or _is_statistics(source) else _of_file(source, options)
    known = "with" if subject.calibration is not None else "without"
    log.debug("%s: %d layers, %s a calibration", source, len(subject.layers), known)
    total = BUDGETS if subject.calibration is not None else 0
    with Bar(total=total, desc="planning", unit="budget", leave=False, disable=not total or None, delay=1) as bar:
        return gather(subject, vram=vram, machine=machine, step=bar.update)


def check_output(out: Path, *inputs: Path | None) -> None:
    """Raise UserError where the page would replace what it is made of."""
    for path in inputs:
        if path is not None and out.exists() and out.samefile(path):
            raise UserError(f"--output {out} is the file to report on; name another for the page")


def write_page(report: Report, out: Path) -> None:
    """The page; it appears under its name when complete. Raises UserError where it cannot be written."""
    with replacing(out) as temporary:
        temporary.write_text(page(report), encoding="utf-8")


def write_figures(report: Report, directory: Path) -> list[Path]:
    """NAME.svg, and NAME.png where matplotlib is installed, for each figure. Raises UserError where they cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--figures {directory}: {reason(e)}; name a directory") from e
    colours, written = palette(len(report.types), dark=False), []
    if not available():
        log.warning("matplotlib is not installed, so there are no PNGs; pip install 'rq-gguf[report]' for them")
    for name, draw in drawn(report).items():
        drawing = draw(report, WIDE)
        with replacing(directory / f"{name}.svg") as temporary:
            temporary.write_text(standalone(drawing, colours), encoding="utf-8")
        written.append(directory / f"{name}.svg")
        if available():
            with replacing(directory / f"{name}.png") as temporary:
                write_png(drawing, colours, temporary)
            written.append(directory / f"{name}.png")
    return written


def _size(text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise UserError(f"--vram {text} is not understood; give what is left for experts, such as 6GB or 900MiB")
    return size


def _is_statistics(path: Path) -> bool:
    return bool(read_header(path).get("general.type") == "imatrix")


def _of_calibration(path: Path, options: Options) -> Subject:
    if options.calibration is not None:
        raise UserError(f"--calibration goes with a file that rq-gguf build wrote; {path} is a calibration itself")
    if options.plan is not None and options.budget is not None:
        raise UserError("--budget and --plan exclude each other: the plan has its budget")
    c = read_any(path)
    if not c.layers:
        raise UserError(f"{path} holds no layer with routed experts: there is nothing to report")
    if options.plan is not None:
        return subject_of_plan(path.name, c, read_plan(options.plan, c))
    budget = parse_budget(options.budget or defaults.BUDGET)
    if budget.kind == "size":
        raise UserError(
            f"--budget {budget.text} bounds a whole file, and a calibration knows only its experts; give a type such as q4_k, bits such as "
            "5.0bpw, or a plan (--plan)"
        )
    plan = make_plan(
        c,
        budget=budget.text,
        types=tuple(sorted(c.types or LADDER, key=rank)),
        replicas=AUTO if c.load_known else 0,
        policy="budget",
        other_bytes=0,
        calibration_sha256=file_hash(path),
    )
    return subject_of_plan(path.name, c, plan)


def _of_file(path: Path, options: Options) -> Subject:
    for value, name in ((options.budget, "--budget"), (options.plan, "--plan")):
        if value is not None:
            raise UserError(f"{name} goes with a calibration; {path} is a finished file, whose types and copies are what they are")
    header = read_header(path)
    if KEY_FORMAT_VERSION not in header.values:
        if not any(parse_expert_name(name) for name in header.tensors):
            raise UserError(f"{path} holds no routed experts (a dense model, perhaps): there is nothing to report")
        raise UserError(
            f"{path} is a stock file, which says nothing about its experts; give a file that rq-gguf build wrote, or a calibration "
            "(rq-gguf calibrate)"
        )
    file = open_tiered(path)
    calibration, notes = _calibration_of(path, str(header.get(KEY_CALIBRATION_HASH, "")), options.calibration)
    return subject_of_file(path.name, file, calibration, notes)


def _calibration_of(path: Path, sha256: str, given: Path | None) -> tuple[Calibration | None, tuple[str, ...]]:
    """(the calibration that a file was made with, notes for the reader): the user's, or the one in the file's job directory."""
    if given is not None:
        c = read_any(given)
        same = file_hash(given) == sha256
        return c, () if same else (f"{path.name} was not made with {given.name}: what it predicts is predicted from other measurements",)
    beside = job_directory(path) / "calibration.gguf"
    if beside.is_file() and file_hash(beside) == sha256:
        return read_any(beside), ()
    missing = "errors and importance are not known: they are in the calibration that the file was made with (--calibration)"
    return None, (missing,)
