"""`build`, `calibrate` and `plan`: the steps in order, cheap checks first. Every step leaves a file; see job.Job for reruns."""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import read_any, write_calibration
from rq_gguf.errors import UserError
from rq_gguf.format import MAX_TIERS
from rq_gguf.ggml import Ggml
from rq_gguf.job import Job, file_hash, input_key, key
from rq_gguf.planning.budget import Budget, parse_budget
from rq_gguf.planning.file import read_plan, write_plan
from rq_gguf.planning.plan import Plan
from rq_gguf.planning.policy import POLICIES, make_plan, parse_replicas
from rq_gguf.planning.types import bits_per_weight, parse_types
from rq_gguf.runtime.tools import library_path, tool_path
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.others import fixed_bytes, stored_types
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import WriteReport, check_calibration, write_model

log = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data"
DEMO = "demo"
DEFAULT_BUDGET = "q8_0"
DEFAULT_TYPES = "q4_k,q8_0"
DEFAULT_TOKENS = 65536
_GB = 1e9


@dataclass(frozen=True)
class Choices:
    """A user's choices for a plan, checked. Make one with `check_choices`."""

    budget: Budget
    types: tuple[str, ...]
    replicas: str | int
    policy: str


def check_choices(budget: str, types: str, replicas: str, policy: str) -> Choices:
    """Raises UserError for a choice that cannot be understood."""
    if policy not in POLICIES:
        raise UserError(f"--policy {policy} is unknown; choose {' or '.join(POLICIES)}")
    return Choices(parse_budget(budget), parse_types(types), parse_replicas(replicas, policy), policy)


@dataclass(frozen=True)
class BuildReport:
    """What a build made, or with `written` None what it would make."""

    plan: Plan
    out: Path
    job: Path
    """The directory of the steps' files."""
    written: WriteReport | None
    """None after --dry-run, and where the file was up to date."""
    file_bytes: int | None
    """Of the whole file; None in a dry run that did not need the base model."""
    seconds: dict[str, float]
    """Step -> time, for the steps that were done in this run; `total` is the whole run."""


def build(
    model: str,
    out: Path,
    choices: Choices,
    *,
    calibration: Path | None = None,
    plan: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    say: Callable[[str], None],
) -> BuildReport:
    """Model in, tiered GGUF out: convert, calibrate, plan, write, skipping what an earlier run with the same inputs has done.

    model: `demo`, a Hugging Face directory or hub id, or an F16, BF16, F32 or Q8_0 GGUF with `calibration`.
    calibration: a text, or a file of `calibrate` or llama-imatrix. plan: a plan.json to use instead of planning.
    say: gets a line per step. Raises UserError; nothing half-made lies under a final name then.
    """
    start = time.perf_counter()
    given = _given(calibration)
    for path, what in ((calibration, "--calibration"), (plan, "--plan")):
        if path is not None and not path.is_file():
            raise UserError(f"{what} {path} does not exist")
    source_file = _gguf(model)
    if source_file is not None and given != "gguf":
        what = "a calibration file" if given is None else "a calibration file instead of a text"
        raise UserError(f"{model} is a GGUF, which this tool cannot pass text through: give {what} (--calibration, an imatrix will do)")
    library, _ = library_path("ggml-base"), tool_path("llama-quantize")
    job = Job(out, force=force, say=say)
    with job.locked():
        ggml = Ggml(library)
        directory = None if source_file is not None else model_directory(model)
        _check_space(job, directory or source_file, choices, convert=directory is not None)
        if directory is not None and given != "gguf" and not (job.directory / "calibration.gguf").exists():
            _check_family(directory)  # importing torch takes seconds: not for what was calibrated before

        needs_base = not dry_run or given == "gguf" or choices.budget.kind == "size" or plan is not None
        base, base_key = source_file, key(input_key(source_file)) if source_file is not None else ""
        if directory is not None:
            base_key = key(input_key(directory))
            if needs_base:
                base = job.directory / "base.gguf"
                job.step("convert", base, base_key, lambda: convert_base(directory, job.directory / "base.gguf"))

        path = _calibrate(job, _model_name(model), directory, base, base_key, calibration, choices.types, ggml)
        measured = read_any(path)
        other_bytes = 0
        if base is not None:
            with Source(base) as source:
                _check_same_model(source, measured, path)
                measured = replace(measured, merged_gate_up=source.shape.merged_gate_up)
                other_bytes = fixed_bytes(source, stored_types(source), tiers=MAX_TIERS if plan is not None else len(choices.types))
        planned, plan_key = _plan(job, choices, measured, path, plan, other_bytes)

        file_bytes = planned.expert_bytes + other_bytes if base is not None else None
        written: list[WriteReport] = []
        if not dry_run:
            assert base is not None
            write_key = key([base_key, plan_key, file_hash(path)])
            if not job.is_done("write", out, write_key):
                _need_space(out.parent, planned.expert_bytes + other_bytes, f"writing {out.name}")
            name = calibration.name if calibration is not None and given == "gguf" else path.name
            job.step(
                "write",
                out,
                write_key,
                lambda: written.append(write_model(base, planned, measured, out, ggml=ggml, calibration_file=name)),
            )
            file_bytes = out.stat().st_size
    seconds = job.seconds | {"total": time.perf_counter() - start}
    return BuildReport(planned, out, job.directory, written[0] if written else None, file_bytes, seconds)


def calibrate_model(model: str, out: Path, *, text: Path | None, tokens: int, device: str, types: str) -> Calibration:
    """`rq-gguf calibrate`: measure a Hugging Face model on a text and write the calibration file. Raises UserError."""
    names = parse_types(types)
    content = read_text(text)
    if _gguf(model) is not None:
        raise UserError(
            f"{model} is a GGUF; calibration needs the Hugging Face model (or use llama-imatrix, whose file build takes as well)"
        )
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be written: {'it is a directory' if out.is_dir() else 'its directory does not exist'}")
    ggml = Ggml(library_path("ggml-base"))
    directory = model_directory(model)
    from rq_gguf.calibration.run import calibrate

    result = replace(calibrate(directory, content, tokens=tokens, device=device, types=names, ggml=ggml), model=_model_name(model))
    write_calibration(out, result)
    return result


def plan_calibration(calibration: Path, out: Path, choices: Choices) -> Plan:
    """`rq-gguf plan`: plan for a calibration file and write plan.json. Raises UserError."""
    if choices.budget.kind == "size":
        raise UserError(
            f"--budget {choices.budget.text} bounds a whole file, and a calibration knows only its experts; give a type such as q8_0 "
            "or bits such as 5.0bpw, or use `rq-gguf build --dry-run`"
        )
    measured = read_any(calibration)
    if not measured.types:
        log.warning("%s measured no errors (it is a plain imatrix): typical ones stand in for them; `rq-gguf build` measures", calibration)
    planned = _make(choices, measured, file_hash(calibration), 0)
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be written: its directory does not exist")
    write_plan(out, planned)
    return planned


def read_text(path: Path | None) -> str:
    """A calibration text: the user's, or without one the project's own, with a warning. Raises UserError."""
    if path is None:
        log.warning(
            "no calibration text given: using the project's own (public-domain prose). Which experts are busy depends on the subject, so a "
            "text of your own kind is better"
        )
        return "\n\n".join(p.read_text(encoding="utf-8") for p in sorted((DATA / "calibration").glob("*.txt")))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text; convert it, or give a calibration GGUF") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e


def model_directory(model: str) -> Path:
    """The directory of `demo`, of a Hugging Face directory, or of a hub id (downloaded where needed). Raises UserError."""
    from rq_gguf.calibration.checkpoint import resolve_model

    return DATA / DEMO if model == DEMO else resolve_model(model)


def _model_name(model: str) -> str:
    """A model's name for people: demo, the directory's or file's name, or the hub id."""
    path = Path(model)
    if model == DEMO or not path.exists():
        return model
    return path.resolve().name if path.is_dir() else path.stem


def _given(calibration: Path | None) -> str | None:
    """`gguf`, `text`, or None without --calibration."""
    if calibration is None or not calibration.is_file():
        return None
    with calibration.open("rb") as f:
        head = f.read(8)
    # The old imatrix format begins with small integers: the reader says what to do about it.
    return "gguf" if head[:4] == b"GGUF" or calibration.suffix in (".gguf", ".dat", ".imatrix") else "text"


def _gguf(model: str) -> Path | None:
    """The path of a model that is a file, None for directories and hub ids; UserError for what can be neither."""
    path = Path(model)
    if path.is_file():
        return path
    if not path.exists() and model != DEMO and (path.suffix == ".gguf" or model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UserError(f"{model} does not exist; MODEL is demo, a directory, a hub id (owner/name), or a GGUF")
    return None


def _check_family(directory: Path) -> None:
    """Refuse a dense or unknown model before anything long."""
    from rq_gguf.calibration.checkpoint import read_config
    from rq_gguf.calibration.families import family_of

    family_of(read_config(directory), str(directory))


def _check_same_model(source: Source, calibration: Calibration, path: Path) -> None:
    shapes = [shape.layer for shape in source.shape.layers]
    known = [layer.layer for layer in calibration.layers]
    if known != shapes:
        raise UserError(f"{path} is a calibration of another model: it has blocks {known}, {source.path} has {shapes}")
    check_calibration(source, calibration, shapes)


def _weights(source: Source, ggml: Ggml) -> Callable[[int, str, int], NDArray[np.float32]]:
    """(block, gate/up/down, expert) -> [rows, columns]; a merged tensor holds gate's rows before up's."""

    def weights(layer: int, matrix: str, expert: int) -> NDArray[np.float32]:
        if matrix in source.experts[layer]:
            return source.expert(layer, matrix, expert, ggml)
        gate, up = np.split(source.expert(layer, "gate_up", expert, ggml), 2)
        return gate if matrix == "gate" else up

    return weights


def _calibrate(
    job: Job,
    name: str,
    directory: Path | None,
    base: Path | None,
    base_key: str,
    given: Path | None,
    types: tuple[str, ...],
    ggml: Ggml,
) -> Path:
    """The calibration file to use: the user's, one completed from the user's imatrix, or one made from a text."""
    path = job.directory / "calibration.gguf"
    if given is not None and _given(given) == "gguf":
        measured = read_any(given)
        if measured.types:
            return given
        assert base is not None  # a given file is checked against the base, so the base is there
        job.step(
            "calibrate", path, key([base_key, file_hash(given), types]), lambda: _measure(base, measured, given, name, types, ggml, path)
        )
        return path
    assert directory is not None
    text = read_text(given)

    def make() -> None:
        from rq_gguf.calibration.run import calibrate

        write_calibration(path, replace(calibrate(directory, text, tokens=DEFAULT_TOKENS, types=types, ggml=ggml), model=name))

    job.step("calibrate", path, key([base_key, hashlib.sha256(text.encode()).hexdigest(), DEFAULT_TOKENS, types]), make)
    return path


def _measure(base: Path, imatrix: Calibration, given: Path, name: str, types: tuple[str, ...], ggml: Ggml, path: Path) -> None:
    """Complete a plain imatrix with the errors that follow from it and the base's weights."""
    from tqdm import tqdm

    from rq_gguf.calibration.moments import measure_from_imatrix

    with Source(base) as source:
        _check_same_model(source, imatrix, given)
        with tqdm(total=sum(layer.n_expert for layer in imatrix.layers), desc="measuring", unit="expert") as bar:
            measured = measure_from_imatrix(replace(imatrix, model=name), _weights(source, ggml), types, ggml, tick=bar.update)
    write_calibration(path, measured)


def _plan(job: Job, choices: Choices, measured: Calibration, path: Path, given: Path | None, other_bytes: int) -> tuple[Plan, str]:
    """The plan to write and the key of its content."""
    if given is not None:
        planned = read_plan(given, measured, other_bytes)
        if planned.calibration_sha256 != file_hash(path):
            log.warning("%s was made from another calibration than %s", given, path)
        return planned, file_hash(given)
    plan_path = job.directory / "plan.json"
    settings = [choices.budget.text, choices.types, choices.replicas, choices.policy]
    other = other_bytes if choices.budget.kind == "size" else 0
    job.step(
        "plan",
        plan_path,
        key([file_hash(path), settings, other, measured.merged_gate_up]),
        lambda: write_plan(plan_path, _make(choices, measured, file_hash(path), other_bytes)),
        editable=True,
    )
    return read_plan(plan_path, measured, other_bytes), file_hash(plan_path)


def _make(choices: Choices, measured: Calibration, sha256: str, other_bytes: int) -> Plan:
    return make_plan(
        measured,
        budget=choices.budget.text,
        types=choices.types,
        replicas=choices.replicas,
        policy=choices.policy,
        other_bytes=other_bytes,
        calibration_sha256=sha256,
    )


def _check_space(job: Job, model: Path | None, choices: Choices, *, convert: bool) -> None:
    """Refuse a disk that cannot hold what a build surely writes, before the long work."""
    assert model is not None
    files = [p for p in model.iterdir() if p.suffix in (".safetensors", ".bin")] if model.is_dir() else [model]
    size = sum(p.stat().st_size for p in files)
    need = size if convert and not (job.directory / "base.gguf").exists() else 0
    if not job.out.exists() and choices.budget.kind != "size":
        # Checkpoints hold 16 bits per weight or more; a Q8_0 base shrinks by less than this.
        bits = bits_per_weight(str(choices.budget.value)) if choices.budget.kind == "type" else float(choices.budget.value)
        need += int(size * min(bits, 8.0) / 32)
    _need_space(job.directory, need, "this build")


def _need_space(directory: Path, need: int, what: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < need:
        raise UserError(f"{what} needs {need / _GB:.2f} GB and {directory} has {free / _GB:.2f} GB free; free some or choose another disk")
