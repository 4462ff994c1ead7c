"""`build`, `calibrate` and `plan`: the steps in order, cheap checks first. Every step leaves a file; see job.Job for reruns."""

import hashlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import KEY_TYPES, write_calibration
from rq_gguf.calibration.trace import Recorder, write_trace
from rq_gguf.choices import Choices
from rq_gguf.defaults import TOKENS
from rq_gguf.errors import UserError
from rq_gguf.evaluation.quality import compare, save_logits
from rq_gguf.evaluation.text import CHARACTERS_PER_CHUNK, hold_out
from rq_gguf.extras import need
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import read_header
from rq_gguf.inputs import (
    check_family,
    check_space,
    gguf_of,
    is_finished,
    model_directory,
    model_name,
    need_space,
    prepare,
    read_finished,
    read_text,
    without_copies,
)
from rq_gguf.job import Job, file_hash, input_key, key
from rq_gguf.planning.file import read_plan, write_plan
from rq_gguf.planning.plan import Plan
from rq_gguf.planning.policy import make_plan
from rq_gguf.runtime.tools import library_path, tool_path
from rq_gguf.target import OTHER_KLD, Attempt, approach
from rq_gguf.types import LADDER, fallback_note, parse_types
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.dialect import check_convertible
from rq_gguf.writing.others import Others
from rq_gguf.writing.source import Source
from rq_gguf.writing.split import existing_parts
from rq_gguf.writing.write import WriteReport, write_model

log = logging.getLogger(__name__)

_MOST_CHUNKS = 120  # of 512 tokens, that a target is measured on


@dataclass(frozen=True)
class Remarks:
    """What a user should know of a plan besides its figures. Make one with `remarks_on`."""

    notes: tuple[str, ...]
    """A line each."""
    load_known: bool
    """False where the figures of balance mean nothing."""


@dataclass(frozen=True)
class BuildReport:
    """What a build made, or with `written` None what it would make."""

    plan: Plan
    out: Path
    """What to load: the file, or the first of several."""
    files: int
    """Of which the model consists."""
    job: Path
    """The directory of the steps' files."""
    written: WriteReport | None
    """None after --dry-run, and where the file was up to date."""
    file_bytes: int | None
    """Of the whole file; None in a dry run that did not need the base model."""
    seconds: dict[str, float]
    """Step -> time, for the steps that were done in this run; `total` is the whole run."""
    remarks: Remarks


def build(
    model: str,
    out: Path,
    choices: Choices,
    *,
    calibration: Path | None = None,
    imatrix: Path | None = None,
    plan: Path | None = None,
    others: Others | None = None,
    verify: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    max_memory: int | None = None,
    allow_pickle: bool = False,
    split_bytes: int | None = None,
    say: Callable[[str], None],
) -> BuildReport:
    """Model in, tiered GGUF out: convert, calibrate, plan, write, skipping what an earlier run with the same inputs has done.

    model: `demo`, a Hugging Face directory or hub id, or an F16, BF16, F32, Q8_0 or MXFP4 GGUF with `calibration` or `imatrix`.
    calibration: a text, or a file of `calibrate` or llama-imatrix. imatrix: the same, but no text.
    plan: a plan.json to use instead of planning. others: types of what is no routed expert. verify: the text that a target is measured
    on; without it a fifth of the calibration text is held out for that.
    max_memory: bytes that calibrating may take. allow_pickle: convert .bin weights too. split_bytes: most bytes of a file, see
    write_model. say: gets a line per step.
    Raises UserError; nothing half-made lies under a final name then.
    """
    start = time.perf_counter()
    others = others or Others()
    for path, what in ((calibration, "--calibration"), (imatrix, "--imatrix"), (plan, "--plan"), (verify, "--verify")):
        if path is not None and not path.is_file():
            raise UserError(f"{what} {path} does not exist")
    if imatrix is not None and calibration is not None:
        raise UserError("--calibration and --imatrix exclude each other: give the text or the finished statistics")
    if imatrix is not None and not is_finished(imatrix):
        raise UserError(f"--imatrix {imatrix} is no imatrix; a text to calibrate on goes with --calibration")
    finished = imatrix or (calibration if calibration is not None and is_finished(calibration) else None)
    source_file = gguf_of(model)
    if source_file is not None and finished is None:
        what = "a calibration file" if calibration is None else "a calibration file instead of a text"
        raise UserError(f"{model} is a GGUF, which this tool cannot pass text through: give {what} (--calibration, or --imatrix)")
    aimed = choices.target_kld is not None and plan is None and not dry_run
    if aimed and verify is None and finished is not None:
        raise UserError("--target-kld is measured on text, and finished statistics hold none; name one with --verify")
    text, held_out = None if finished is not None else read_text(calibration), None
    if aimed:
        text, held_out = (text, read_text(verify)) if verify is not None else hold_out(text or "")
    library, _ = library_path("ggml-base"), tool_path("llama-quantize")
    directory = None if source_file is not None else model_directory(model)
    if directory is not None:
        from rq_gguf.calibration.checkpoint import read_config

        check_convertible(read_config(directory), str(directory))
    job = Job(out, force=force, parts=existing_parts(out) if split_bytes else (), say=say)
    with job.locked():
        ggml = Ggml(library)
        check_space(job, directory or source_file, choices, convert=directory is not None)
        if directory is not None and finished is None and not (job.directory / "calibration.gguf").exists():
            check_family(directory)  # importing torch takes seconds: not for what was calibrated before

        needs_base = (
            not dry_run or finished is not None or (choices.budget.kind == "size" and choices.target_kld is None) or plan is not None
        )
        base, base_key = source_file, key(input_key(source_file)) if source_file is not None else ""
        if directory is not None:
            base_key = key(input_key(directory))
            if needs_base:
                base = job.directory / "base.gguf"
                job.step("convert", base, base_key, lambda: convert_base(directory, job.directory / "base.gguf", allow_pickle=allow_pickle))

        known = read_finished(finished, base) if finished is not None else None
        choices, other_bytes = prepare(choices, known, base, others, plan)
        if finished is not None and known is not None and known.types:
            path, measured = finished, known
        else:
            path = job.directory / "calibration.gguf"
            if finished is not None and known is not None:
                assert base is not None  # needs_base
                _measure_once(job, path, model_name(model), base, [base_key, file_hash(finished)], known, choices.types, ggml)
            else:
                assert directory is not None and text is not None
                _calibrate_once(job, path, model_name(model), directory, base_key, text, choices.types, ggml, max_memory)
            measured = read_finished(path, base)
        if not measured.load_known and plan is None:
            choices = without_copies(choices, finished or path)
        if aimed:
            assert base is not None and held_out is not None  # needs_base
            planned, files, written = build_to_target(
                job, base, base_key, choices, measured, path, others, held_out, other_bytes, split_bytes, ggml
            )
            seconds = job.seconds | {"total": time.perf_counter() - start}
            remarks = remarks_on(measured, choices.types)
            return BuildReport(planned, files[0], len(files), job.directory, written, _total(files), seconds, remarks)
        planned, plan_key = _plan(job, choices, measured, path, plan, other_bytes)

        file_bytes = planned.expert_bytes + other_bytes if base is not None else None
        reports: list[WriteReport] = []
        files = (out,)
        if not dry_run:
            assert base is not None
            write_key = key([base_key, plan_key, file_hash(path), others.file_type, others.texts, split_bytes])
            if not job.is_done("write", write_key):
                need_space(out.parent, planned.expert_bytes + other_bytes, f"writing {out.name}")
            name = (finished or path).name

            def write() -> tuple[Path, ...]:
                reports.append(
                    write_model(base, planned, measured, out, ggml=ggml, others=others, calibration_file=name, split_bytes=split_bytes)
                )
                return reports[0].paths

            files = job.step("write", out, write_key, write)
            file_bytes = _total(files)
    seconds = job.seconds | {"total": time.perf_counter() - start}
    remarks = remarks_on(measured, choices.types)
    return BuildReport(planned, files[0], len(files), job.directory, reports[0] if reports else None, file_bytes, seconds, remarks)


def _total(files: tuple[Path, ...]) -> int:
    return sum(file.stat().st_size for file in files)


def calibrate_model(
    model: str,
    out: Path,
    *,
    text: Path | None,
    tokens: int,
    device: str,
    types: str | None,
    max_memory: int | None = None,
    trace: Path | None = None,
) -> Calibration:
    """`rq-gguf calibrate`: measure a Hugging Face model on a text and write the calibration file. max_memory: bytes.

    trace: where to write which experts each token picked, too. Raises UserError.
    """
    names = parse_types(types) if types else LADDER
    content = read_text(text)
    if gguf_of(model) is not None:
        raise UserError(
            f"{model} is a GGUF; calibration needs the Hugging Face model (or use llama-imatrix, whose file build takes as well)"
        )
    for path in (out, *([] if trace is None else [trace])):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: {'it is a directory' if path.is_dir() else 'its directory does not exist'}")
    need("calibrate", f"calibrating {model}")
    ggml = Ggml(library_path("ggml-base"))
    directory = model_directory(model)
    from rq_gguf.calibration.run import calibrate

    work = out.absolute().parent
    recorder = Recorder() if trace is not None else None
    made = calibrate(
        directory,
        content,
        tokens=tokens,
        device=device,
        types=names,
        ggml=ggml,
        work=work,
        max_memory=max_memory,
        recorder=recorder,
    )
    result = replace(made, model=model_name(model))
    if trace is not None and recorder is not None:
        write_trace(trace, recorder.trace(result.model, result.layers[0].n_expert, result.n_embd, result.n_ff))
    write_calibration(out, result)
    return result


def plan_calibration(
    calibration: Path, out: Path, choices: Choices, *, base: Path | None = None, others: Others | None = None
) -> tuple[Plan, Remarks]:
    """`rq-gguf plan`: plan for a calibration file and write plan.json.

    base: the model's GGUF, needed where the budget bounds the whole file. others: types of what is no routed expert in it.
    Raises UserError.
    """
    measured, choices, other_bytes = read_for_plan(calibration, out, choices, base, others)
    planned = plan_measured(choices, measured, file_hash(calibration), other_bytes)
    write_plan(out, planned, measured)
    return planned, remarks_on(measured, choices.types)


def read_for_plan(
    calibration: Path, out: Path, choices: Choices, base: Path | None, others: Others | None
) -> tuple[Calibration, Choices, int]:
    """(calibration, the choices with their types, bytes of the file without its experts or 0 where the base is unknown) of
    `plan_calibration`, whose arguments these are."""
    if choices.budget.kind == "size" and choices.target_kld is None and base is None:
        raise UserError(
            f"--budget {choices.budget.text} bounds a whole file, and a calibration knows only its experts; give the model too "
            "(--base MODEL.gguf), or a type such as q8_0 or bits such as 5.0bpw"
        )
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be written: its directory does not exist")
    measured = read_finished(calibration, base)
    choices, other_bytes = prepare(choices, measured, base, others or Others(), None)
    if not measured.types:
        log.warning("%s measured no errors (it is a plain imatrix): typical ones stand in for them; `rq-gguf build` measures", calibration)
    if not measured.load_known:
        choices = without_copies(choices, calibration)
    return measured, choices, other_bytes


def remarks_on(measured: Calibration, types: tuple[str, ...]) -> Remarks:
    """Types that rows cannot hold, balance that could not be planned. types: those that experts may take."""
    groups = (("gate and up", measured.n_embd), ("down", measured.n_ff))
    notes = [fallback_note(types, columns, where) for where, columns in groups]
    if not measured.load_known:
        notes.append("the calibration does not say how often each expert is picked: balance is unknown, and nothing was copied for it")
    return Remarks(tuple(note for note in notes if note is not None), measured.load_known)


def _weights(source: Source, ggml: Ggml) -> Callable[[int, str, int], NDArray[np.float32]]:
    """(block, gate/up/down, expert) -> [rows, columns]; a merged tensor holds gate's rows before up's."""

    def weights(layer: int, matrix: str, expert: int) -> NDArray[np.float32]:
        if matrix in source.experts[layer]:
            return source.expert(layer, matrix, expert, ggml)
        gate, up = np.split(source.expert(layer, "gate_up", expert, ggml), 2)
        return gate if matrix == "gate" else up

    return weights


def _calibrate_once(
    job: Job, path: Path, name: str, directory: Path, base_key: str, text: str, types: tuple[str, ...], ggml: Ggml, max_memory: int | None
) -> None:
    """Calibrate a Hugging Face model on a text, unless an earlier run did."""

    def make(types: tuple[str, ...]) -> None:
        from rq_gguf.calibration.run import calibrate

        made = calibrate(directory, text, tokens=TOKENS, types=types, ggml=ggml, work=job.directory, max_memory=max_memory)
        write_calibration(path, replace(made, model=name))

    _step_for_types(job, path, [base_key, hashlib.sha256(text.encode()).hexdigest(), TOKENS], types, make)


def _measure_once(
    job: Job, path: Path, name: str, base: Path, inputs: list[object], imatrix: Calibration, types: tuple[str, ...], ggml: Ggml
) -> None:
    """Complete a plain imatrix with the errors that follow from it and the base's weights, unless an earlier run did."""
    from rq_gguf.calibration.moments import measure_from_imatrix

    def make(types: tuple[str, ...]) -> None:
        from rq_gguf.progress import Bar

        with Source(base) as source, Bar(total=sum(layer.n_expert for layer in imatrix.layers), desc="measuring", unit="expert") as bar:
            measured = measure_from_imatrix(replace(imatrix, model=name), _weights(source, ggml), types, ggml, tick=bar.update)
        write_calibration(path, measured)

    _step_for_types(job, path, inputs, types, make)


def _step_for_types(job: Job, path: Path, inputs: list[object], types: tuple[str, ...], make: Callable[[tuple[str, ...]], None]) -> None:
    """The calibration step, unless an earlier one measured these types, and perhaps more, on the same inputs."""
    known = _measured_types(path)
    if set(types) <= set(known) and job.is_done("calibrate", key([*inputs, known])):
        types = known
    job.step("calibrate", path, key([*inputs, types]), lambda: make(types))


def _measured_types(path: Path) -> tuple[str, ...]:
    """Types that a calibration file measured; none where it is missing or damaged."""
    try:
        return tuple(str(read_header(path).get(KEY_TYPES, "")).split(","))
    except UserError:
        return ()


def _plan(job: Job, choices: Choices, measured: Calibration, path: Path, given: Path | None, other_bytes: int) -> tuple[Plan, str]:
    """The plan to write and the key of its content."""
    if given is not None:
        planned = read_plan(given, measured, other_bytes)
        if planned.calibration_sha256 != file_hash(path):
            log.warning("%s was made from another calibration than %s", given, path)
        return planned, file_hash(given)
    plan_path = job.directory / "plan.json"
    settings: list[object] = [choices.budget.text, choices.types, choices.replicas, choices.policy, choices.max_tiers]
    settings += [choices.balance_weight, choices.target_kld]
    other = other_bytes if choices.budget.kind == "size" else 0
    job.step(
        "plan",
        plan_path,
        key([file_hash(path), settings, other, measured.merged_gate_up]),
        lambda: write_plan(plan_path, plan_measured(choices, measured, file_hash(path), other_bytes), measured),
        editable=True,
    )
    return read_plan(plan_path, measured, other_bytes), file_hash(plan_path)


def build_to_target(
    job: Job,
    base: Path,
    base_key: str,
    choices: Choices,
    measured: Calibration,
    path: Path,
    others: Others,
    held_out: str,
    other_bytes: int,
    split_bytes: int | None,
    ggml: Ggml,
) -> tuple[Plan, tuple[Path, ...], WriteReport | None]:
    """The smallest file that keeps `--target-kld` on the held-out text (see target.approach), its plan in plan.json, and its files."""
    out, plan_path, candidate = job.out, job.directory / "plan.json", job.directory / "candidate.gguf"
    assert choices.target_kld is not None
    target, chunks = choices.target_kld, min(_MOST_CHUNKS, max(1, len(held_out) // CHARACTERS_PER_CHUNK))
    settings = [
        target,
        choices.types,
        choices.replicas,
        choices.max_tiers,
        choices.balance_weight,
        others.file_type,
        others.texts,
        split_bytes,
    ]
    sha256, best = file_hash(path), job.directory / "best.gguf"
    write_key = key([base_key, sha256, hashlib.sha256(held_out.encode()).hexdigest(), settings])
    reports: list[WriteReport] = []

    def make() -> tuple[Path, ...]:
        with tempfile.TemporaryDirectory(dir=job.directory, prefix="verify-") as name:
            text, logits = Path(name) / "held-out.txt", Path(name) / "base-logits.bin"
            text.write_text(held_out, encoding="utf-8")
            save_logits(base, text, logits, chunks=chunks)
            least = math.inf

            def attempt(other_kld: float) -> Attempt[Plan]:
                nonlocal least
                planned = plan_measured(choices, measured, sha256, other_bytes, other_kld)
                need_space(out.parent, planned.expert_bytes + other_bytes, f"writing {out.name}")
                report = write_model(base, planned, measured, candidate, ggml=ggml, others=others, calibration_file=path.name)
                kld = compare(candidate, text, logits, chunks=chunks).kld.value
                if kld <= target and report.total_bytes < least:
                    least = report.total_bytes
                    os.replace(candidate, best)
                    reports[:] = [replace(report, paths=(out,))]
                return Attempt(planned, report.total_bytes, planned.summary["predicted_kld"], kld)

            found = approach(target, attempt, job.say)
        write_plan(plan_path, found.made, measured)
        if split_bytes is None:
            os.replace(best, out)
            return (out,)
        best.unlink()
        reports[:] = [
            write_model(base, found.made, measured, out, ggml=ggml, others=others, calibration_file=path.name, split_bytes=split_bytes)
        ]
        return reports[0].paths

    try:
        files = job.step("write", out, write_key, make)
    finally:
        candidate.unlink(missing_ok=True)
        best.unlink(missing_ok=True)
    return read_plan(plan_path, measured, other_bytes), files, reports[0] if reports else None


def plan_measured(choices: Choices, measured: Calibration, sha256: str, other_bytes: int, other_kld: float | None = None) -> Plan:
    """Plan a calibration. other_bytes: as `read_for_plan` gives it. other_kld: nats of a target that are not the experts'."""
    aim: dict[str, float] = {}
    if choices.target_kld is not None:
        aim = {"target_kld": choices.target_kld, "other_kld": min(OTHER_KLD, choices.target_kld / 2) if other_kld is None else other_kld}
    start = time.perf_counter()
    plan = make_plan(
        measured,
        budget=choices.budget.text,
        types=choices.types,
        replicas=choices.replicas,
        policy=choices.policy,
        other_bytes=other_bytes,
        calibration_sha256=sha256,
        max_tiers=choices.max_tiers,
        balance_weight=choices.balance_weight,
        **aim,
    )
    log.debug("planned %d layers and %d types in %.2f s", len(plan.layers), len(plan.types), time.perf_counter() - start)
    return plan
