"""What a user gave, read and checked before anything long: the model, the text, finished statistics, the disk."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import read_any
from rq_gguf.calibration.imatrix_file import is_dat
from rq_gguf.choices import Choices, types_for
from rq_gguf.errors import UserError
from rq_gguf.extras import need
from rq_gguf.format import GROUPS, MAX_TIERS
from rq_gguf.job import Job
from rq_gguf.planning.budget import ExpertShape
from rq_gguf.planning.policy import AUTO
from rq_gguf.types import bits_per_weight
from rq_gguf.writing.others import Others, fixed_bytes, stored_types
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import check_calibration

log = logging.getLogger(__name__)

DATA = Path(__file__).parent / "data"
DEMO = "demo"
_GB = 1e9


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


def model_name(model: str) -> str:
    """A model's name for people: demo, the directory's or file's name, or the hub id."""
    path = Path(model)
    if model == DEMO or not path.exists():
        return model
    return path.resolve().name if path.is_dir() else path.stem


def is_finished(path: Path) -> bool:
    """True for statistics of any kind, False for a text."""
    with path.open("rb") as f:
        return f.read(4) == b"GGUF" or path.suffix in (".gguf", ".dat", ".imatrix") or is_dat(path)


def gguf_of(model: str) -> Path | None:
    """The path of a model that is a file, None for directories and hub ids; UserError for what can be neither."""
    path = Path(model)
    if path.is_file():
        return path
    if not path.exists() and model != DEMO and (path.suffix == ".gguf" or model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UserError(f"{model} does not exist; MODEL is demo, a directory, a hub id (owner/name), or a GGUF")
    return None


def check_family(directory: Path) -> None:
    """Refuse a dense or unknown model before anything long."""
    from rq_gguf.calibration.checkpoint import read_config

    need("calibrate", f"calibrating {directory}")
    from rq_gguf.calibration.families import family_of

    family_of(read_config(directory), str(directory))


def _check_same_model(source: Source, calibration: Calibration, path: Path) -> None:
    shapes = [shape.layer for shape in source.shape.layers]
    known = [layer.layer for layer in calibration.layers]
    if known != shapes:
        raise UserError(f"{path} is a calibration of another model: it has blocks {known}, {source.path} has {shapes}")
    check_calibration(source, calibration, shapes)


def read_finished(path: Path, base: Path | None) -> Calibration:
    """A calibration or imatrix, checked against the base model where that is known, and what it lacks taken from there."""
    if base is None:
        return read_any(path)
    with Source(base) as source:
        found = read_any(path, source.shape.layers[0].n_expert)
        _check_same_model(source, found, path)
        n_used = found.n_expert_used or source.header.integer(f"{source.shape.arch}.expert_used_count", 0)
        return replace(found, merged_gate_up=source.shape.merged_gate_up, n_expert_used=n_used)


def prepare(choices: Choices, known: Calibration | None, base: Path | None, others: Others, plan: Path | None) -> tuple[Choices, int]:
    """(the choices with their types, bytes of the file without its experts or 0 where the base is unknown), before anything long.

    known: the user's own calibration or imatrix. Raises UserError for types of other tensors that cannot be, and for a budget that
    cannot be met.
    """
    measured = known.types if known is not None else ()
    if base is None:
        return replace(choices, types=types_for(choices, measured, None)), 0
    with Source(base) as source:
        choices = replace(choices, types=types_for(choices, measured, source))
        tiers = MAX_TIERS if plan is not None else min(MAX_TIERS, len(choices.types))
        other_bytes = fixed_bytes(source, stored_types(source, others), tiers, others)
        if plan is None:
            first, n_layers = source.shape.layers[0], len(source.shape.layers)
            shape = ExpertShape(first.n_expert, first.n_embd, first.n_ff, source.shape.merged_gate_up)
            _check_budget(choices, shape, n_layers, other_bytes)
    return choices, other_bytes


def _check_budget(choices: Choices, shape: ExpertShape, n_layers: int, other_bytes: int) -> None:
    """Refuse a budget that not even the smallest types without copies can meet."""
    if choices.target_kld is not None:
        return
    size = n_layers * sum(min(shape.stacked_bytes(g, t, shape.n_expert) for t in choices.types) for g in range(len(GROUPS)))
    if size > choices.budget.expert_bytes(shape, n_layers, other_bytes):
        raise choices.budget.too_small(size, shape, n_layers, other_bytes, f"all experts in {choices.types[0]}")


def without_copies(choices: Choices, path: Path) -> Choices:
    """The choices for a calibration that does not know the load. Raises UserError for those that need it."""
    why = f"{path} does not say how often each expert is picked (the .dat form of an imatrix has no counts)"
    if choices.policy == "paper" or choices.replicas not in (AUTO, 0):
        what = "--policy paper" if choices.policy == "paper" else f"--replicas {choices.replicas}"
        raise UserError(f"{what} cannot choose what to copy: {why}; make the imatrix again with a recent llama-imatrix")
    log.warning("%s: balance cannot be planned, so nothing is copied", why)
    return replace(choices, replicas=0)


def check_space(job: Job, model: Path | None, choices: Choices, *, convert: bool) -> None:
    """Refuse a disk that cannot hold what a build surely writes, before the long work."""
    assert model is not None
    files = [p for p in model.iterdir() if p.suffix in (".safetensors", ".bin")] if model.is_dir() else [model]
    size = sum(p.stat().st_size for p in files)
    need = size if convert and not (job.directory / "base.gguf").exists() else 0
    if not job.out.exists() and choices.budget.kind != "size":
        # Checkpoints hold 16 bits per weight or more; a Q8_0 base shrinks by less than this.
        bits = bits_per_weight(str(choices.budget.value)) if choices.budget.kind == "type" else float(choices.budget.value)
        need += int(size * min(bits, 8.0) / 32)
    need_space(job.directory, need, "this build")


def need_space(directory: Path, need: int, what: str) -> None:
    free = shutil.disk_usage(directory).free
    if free < need:
        raise UserError(f"{what} needs {need / _GB:.2f} GB and {directory} has {free / _GB:.2f} GB free; free some or choose another disk")
