"""What a card says, read from the files: nothing is in it that they do not hold or that was not measured on them."""

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rq_gguf import defaults
from rq_gguf.atomic import reason
from rq_gguf.bench.spread import Spread
from rq_gguf.card.naming import published_name, split_name
from rq_gguf.errors import UserError
from rq_gguf.evaluation.quality import LABELS, Figure
from rq_gguf.format import (
    KEY_BUDGET,
    KEY_CALIBRATION_HASH,
    KEY_CALIBRATION_TOKENS,
    KEY_EXPERT_BYTES,
    KEY_OTHER,
    KEY_POLICY,
    KEY_SOURCE_MODEL,
    KEY_TENSOR_TYPES,
    KEY_TYPES,
)
from rq_gguf.gguf_file import Header, read_headers
from rq_gguf.inputs import DATA
from rq_gguf.job import file_hash, job_directory
from rq_gguf.size import Size, model_size
from rq_gguf.types import LADDER, PAPER_TYPES
from rq_gguf.writing.inspect import Inspection, inspect

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TEXT = re.compile(r"text of sha256 ([0-9a-f]{64})")  # as writing.write says it
_HUB = "https://huggingface.co/"
_UNPATCHED = ", unpatched llama.cpp"


@dataclass(frozen=True)
class Calibrated:
    """The text that a file was calibrated on."""

    tokens: int
    """0 where the file does not say."""
    sha256: str
    """Of the calibration file."""
    text: str
    """What is known of the text, as a clause."""


@dataclass(frozen=True)
class Described:
    """One file to be published."""

    paths: tuple[Path, ...]
    """The file, or those of a model in several."""
    name: str
    """How the first is to be called."""
    size: Size
    inspection: Inspection
    calibrated: Calibrated
    command: str
    """Builds it again."""
    plan: Path | None
    """plan.json, where build left it and it is of this file."""
    calibration: Path | None
    """The same of the calibration."""

    @property
    def path(self) -> Path:
        return self.paths[0]


@dataclass(frozen=True)
class TaskFigures:
    """Accuracy on a task by one metric, in points."""

    task: str
    metric: str
    items: int
    items_in_file: int
    base: Figure
    out: Figure
    difference: Figure


@dataclass(frozen=True)
class Measured:
    """What was measured on one file: one of those to be published, or another beside them."""

    name: str
    own: bool
    file_bytes: int
    quality: Mapping[str, Figure]
    """By llama-perplexity's label (quality.LABELS); empty where none was measured."""
    chunks: int
    lis: tuple[float, float] | None
    """Without and with copies, mean over layers."""
    tasks: tuple[TaskFigures, ...]
    base: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Speed:
    """What `bench` measured on one file."""

    name: str
    own: bool
    file_bytes: int
    tests: Mapping[str, tuple[Spread, Spread | None]]
    """test -> tokens per second, and the ratio to the bench's first file."""


@dataclass(frozen=True)
class Speeds:
    """One bench."""

    files: tuple[Speed, ...]
    machine: str
    settings: str
    """Arguments that llama.cpp's programs were given."""
    text: str | None
    """Where the real prompt came from."""
    rounds: int


@dataclass(frozen=True)
class _Measurements:
    measured: tuple[Measured, ...]
    speeds: tuple[Speeds, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """All of a card."""

    title: str
    values: Header
    """Of the first file, for general.*."""
    base_model: str | None
    """Hub id."""
    license: str | None
    quantized_by: str | None
    files: tuple[Described, ...]
    measured: tuple[Measured, ...]
    speeds: tuple[Speeds, ...]
    commands: tuple[str, ...]
    """That measure again what was measured."""


def gather(
    files: Sequence[Path],
    *,
    evals: Sequence[Path] = (),
    benches: Sequence[Path] = (),
    base_model: str | None = None,
    license: str | None = None,
    quantized_by: str | None = None,
) -> Facts:
    """Read the files that build wrote and what was measured on them.

    evals: JSON of `rq-gguf eval` or `compare`. benches: of `bench`, or of `compare`.
    Raises UserError for stock files, for files of several models, and for figures that were not measured on these files.
    """
    if base_model is not None and not _HUB_ID.fullmatch(base_model):
        raise UserError(f"--base-model {base_model} is no hub id; give OWNER/NAME")
    described = tuple(_describe(path, base_model) for path in files)
    header = read_headers(files[0])[0]
    architectures = {read_headers(path)[0].get("general.architecture") for path in files}
    if len(architectures) > 1 or len({d.size.weights for d in described}) > 1:
        raise UserError(f"{', '.join(d.path.name for d in described)} are files of different models; a card describes one")
    found = _measurements(described, evals, benches)
    hub_id = base_model or hub_id_of(header)
    if hub_id is None:
        log.warning("the file does not say which model on the hub it comes from: name it with --base-model OWNER/NAME")
    license = license or _string(header, "general.license")
    if license is None:
        log.warning("the file names no licence, so the card has none: name the model's with --license, such as apache-2.0")
    title = re.sub(r"-RQ-[\d.]+bpw(-\d{5}-of-\d{5})?\.gguf$", "", described[0].name)
    return Facts(title, header, hub_id, license, quantized_by, described, found.measured, found.speeds, found.commands)


def hub_id_of(header: Header) -> str | None:
    """OWNER/NAME of the model that a file was made from, where the file says it."""
    source, url = _string(header, KEY_SOURCE_MODEL), _string(header, "general.source.repo_url")
    if url is not None and url.startswith(_HUB) and _HUB_ID.fullmatch(url.removeprefix(_HUB).strip("/")):
        return url.removeprefix(_HUB).strip("/")
    return source if source is not None and _HUB_ID.fullmatch(source) else None


def _string(header: Header, key: str) -> str | None:
    value = header.get(key)
    return value if isinstance(value, str) and value else None


#
# the files
#


def _describe(path: Path, base_model: str | None) -> Described:
    found, size, headers = inspect(path), model_size(path), read_headers(path)
    header, paths = headers[0], tuple(h.path for h in headers)
    plan, calibration = _plan_of(path, header), _calibration_of(path, header)
    name = published_name(header, size.bpw)
    model = base_model or hub_id_of(header) or _string(header, KEY_SOURCE_MODEL) or "MODEL"
    command = build_command(model, header, found, {} if plan is None else _read_json(plan), name)
    calibrated = _calibrated(header)
    return Described(paths, split_name(name, 0, len(paths)), size, found, calibrated, command, plan, calibration)


def _calibration_of(path: Path, header: Header) -> Path | None:
    beside = job_directory(path) / "calibration.gguf"
    return beside if beside.is_file() and file_hash(beside) == header.get(KEY_CALIBRATION_HASH) else None


def _plan_of(path: Path, header: Header) -> Path | None:
    """The plan that build left, where it is this file's: same calibration and bytes."""
    plan = job_directory(path) / "plan.json"
    if not plan.is_file():
        return None
    data = _read_json(plan)
    same = data.get("calibration_sha256") == header.get(KEY_CALIBRATION_HASH) and data.get("expert_bytes") == header.get(KEY_EXPERT_BYTES)
    return plan if same else None


def _calibrated(header: Header) -> Calibrated:
    tokens, sha256 = header.integer(KEY_CALIBRATION_TOKENS, 0), _string(header, KEY_CALIBRATION_HASH) or ""
    found = _TEXT.fullmatch(_string(header, "quantize.imatrix.dataset") or "")
    if found is None:
        return Calibrated(tokens, sha256, "")
    own = "\n\n".join(p.read_text(encoding="utf-8") for p in sorted((DATA / "calibration").glob("*.txt")))
    if found[1] == hashlib.sha256(own.encode()).hexdigest():
        return Calibrated(tokens, sha256, "rq-gguf's own calibration text, public-domain prose")
    return Calibrated(tokens, sha256, f"a text of sha256 `{found[1]}`")


def build_command(model: str, header: Header, found: Inspection, plan: Mapping[str, Any], name: str) -> str:
    """The `rq-gguf build` that the file's rq.* keys, and its plan.json where there is one, tell of.

    How copies were decided on is in the plan only; without it, a number that is the same in all layers is taken for what was asked for.
    """
    words = ["rq-gguf", "build", model, name]
    budget, policy = _string(header, KEY_BUDGET) or "", _string(header, KEY_POLICY) or "budget"
    if target := re.fullmatch(r"target-kld (\S+)", budget):
        words += ["--target-kld", target[1]]
    else:
        like = re.fullmatch(r"like:.+ \((\d+) bytes\)", budget, re.IGNORECASE)
        words += ["--budget", f"{like[1]}B" if like else budget]
    if policy != "budget":
        words += ["--policy", policy]
    types = header.get(KEY_TYPES)
    if types and tuple(types) != (LADDER if policy == "budget" else PAPER_TYPES):
        words += ["--types", ",".join(types)]
    if policy == "budget":
        words += _copies(found, plan)
        if isinstance(tiers := plan.get("max_tiers"), int) and tiers != defaults.MAX_TIERS:
            words += ["--max-tiers", str(tiers)]
    other = _string(header, KEY_OTHER)
    if other and other != defaults.OTHER:
        words += ["--other", other]
    for text in header.get(KEY_TENSOR_TYPES) or ():
        words += ["--tensor-type", text]
    return shlex.join([*words, "--calibration", "calibration.gguf"])


def _copies(found: Inspection, plan: Mapping[str, Any]) -> list[str]:
    weight = plan.get("balance_weight")
    if isinstance(weight, int | float):
        return [] if weight == defaults.BALANCE_WEIGHT else ["--balance-weight", f"{weight:g}"]
    counts = {sum(layer.copies) for layer in found.layers}
    return ["--replicas", str(counts.pop())] if len(counts) == 1 else []


#
# the measurements
#


def _measurements(files: Sequence[Described], evals: Sequence[Path], benches: Sequence[Path]) -> _Measurements:
    measured: list[Measured] = []
    speeds: list[Speeds] = []
    commands: list[str] = []
    for path in evals:
        data = _read_json(path)
        entries = [entry.get("evaluation") for entry in _entries(path, data)] if "rq_compare_version" in data else [data]
        found = [_measured(path, entry, files) for entry in entries]
        if not any(m.own for m in found):
            raise UserError(f"{path} says nothing of {_names(files)}; evaluate these files (rq-gguf eval --json)")
        measured += found
        commands.append(_eval_command(found, compared="rq_compare_version" in data))
        if data.get("bench") is not None:
            speeds.append(_speeds(path, data["bench"], files))
    for path in benches:
        data = _read_json(path)
        data = data.get("bench") or {} if "rq_compare_version" in data else data
        speeds.append(_speeds(path, data, files))
        commands.append(_bench_command(path, speeds[-1], data))
    return _Measurements(tuple(measured), tuple(speeds), tuple(commands))


def _eval_command(found: Sequence[Measured], compared: bool) -> str:
    first = found[0]
    words = ["rq-gguf", "compare", *(m.name for m in found)] if compared else ["rq-gguf", "eval", first.name]
    words += ["--base", first.base, *(word for text in first.texts for word in ("--text", text))]
    words += ["--chunks", str(first.chunks)] if first.chunks else []
    words += [word for name in dict.fromkeys(f"{t.task}.jsonl" for t in first.tasks) for word in ("--tasks", name)]
    words += ["--items", str(first.tasks[0].items)] if first.tasks and first.tasks[0].items < first.tasks[0].items_in_file else []
    return shlex.join([*words, "--json", "compare.json" if compared else "eval.json"])


def _bench_command(path: Path, speeds: Speeds, data: Mapping[str, Any]) -> str:
    with _well_formed(path, "bench"):
        sizes = [(name, ",".join(map(str, data[key])) or "0") for name, key in (("-p", "prompt"), ("-n", "generate"), ("-b", "sequences"))]
        words = ["rq-gguf", "bench", *dict.fromkeys(s.name.removesuffix(_UNPATCHED) for s in speeds.files)]
        words += [word for pair in sizes for word in pair] + ["--rounds", str(data["rounds"]), "--repetitions", str(data["repetitions"])]
        words += ["--threads", str(data["threads"])] if data["threads"] is not None else []
        words += ["--text", speeds.text] if speeds.text is not None else ["--no-text"]
        words += ["--unpatched"] if any(s.name.endswith(_UNPATCHED) for s in speeds.files) else []
        return shlex.join([*words, "--json", "bench.json", *(["--", *map(str, data["arguments"])] if data["arguments"] else [])])


def _names(files: Sequence[Described]) -> str:
    return " or ".join(f.path.name for f in files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {reason(e)}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is no JSON that rq-gguf wrote: {str(e).splitlines()[0]}") from e
    if not isinstance(data, dict):
        raise UserError(f"{path} is no JSON that rq-gguf wrote: it holds no object")
    return data


def _entries(path: Path, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = data.get("files")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("file"), str) for e in entries):
        raise UserError(f"{path} is no JSON of rq-gguf bench or compare: it lists no files")
    return entries


def _own(path: Path, entry: Mapping[str, Any], files: Sequence[Described]) -> Described | None:
    """Which of the files an entry was measured on: the one with as many bytes, whatever it was called then. Raises UserError where a file
    of that name has another size now."""
    name, size = Path(str(entry.get("file"))).name, entry.get("file_bytes")
    for f in sorted(files, key=lambda f: f.path.name != name):
        if f.size.file_bytes == size:
            return f
    if stale := next((f for f in files if f.path.name == name), None):
        raise UserError(f"{path} was measured on a {name} of {size} bytes, and {stale.path} has {stale.size.file_bytes}: measure it again")
    return None


@contextmanager
def _well_formed(path: Path, command: str) -> Iterator[None]:
    """What is missing or of another kind in a JSON file, as UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path} is no JSON of rq-gguf {command} or compare ({type(e).__name__}: {e})") from e


def _measured(path: Path, entry: Any, files: Sequence[Described]) -> Measured:
    with _well_formed(path, "eval"):
        own, quality = _own(path, entry, files), entry.get("quality")
        if quality is None and "tasks" not in entry:
            raise ValueError("neither quality nor tasks")
        balance = entry.get("balance")
        return Measured(
            name=own.name if own else Path(entry["file"]).name,
            own=own is not None,
            file_bytes=int(entry["file_bytes"]),
            quality={} if quality is None else {label: _figure(quality[label]) for label in LABELS.values()},
            chunks=0 if quality is None else int(quality["chunks"]),
            lis=None if balance is None else (float(balance["lis_before"]), float(balance["lis_after"])),
            tasks=tuple(
                TaskFigures(
                    t["task"], metric, int(t["items"]), int(t["items_in_file"]), *(_figure(a[key]) for key in ("base", "out", "difference"))
                )
                for t in entry.get("tasks", ())
                for metric, a in t["metrics"].items()
            ),
            base=Path(entry["base"]).name,
            texts=tuple(Path(t).name for t in entry["texts"]),
        )


def _figures(data: Mapping[str, Any]) -> tuple[Figure, Figure, Figure]:
    return _figure(data["base"]), _figure(data["out"]), _figure(data["difference"])


def _figure(data: Mapping[str, Any]) -> Figure:
    return Figure(float(data["value"]), None if data["error"] is None else float(data["error"]))


def _speeds(path: Path, data: Any, files: Sequence[Described]) -> Speeds:
    with _well_formed(path, "bench"):
        found = []
        for entry in _entries(path, data):
            own = _own(path, entry, files)
            name = (own.name if own else Path(entry["file"]).name) + (_UNPATCHED if entry["unpatched"] else "")
            tests = {test: (_spread(t), None if t["ratio"] is None else _spread(t["ratio"])) for test, t in entry["tests"].items()}
            found.append(Speed(name, own is not None, int(entry["file_bytes"]), tests))
        if not any(s.own for s in found):
            raise UserError(f"{path} says nothing of {_names(files)}; measure these files (rq-gguf bench --json)")
        threads = [] if data["threads"] is None else ["-t", str(data["threads"])]
        text = None if data["text"] is None else Path(data["text"]["file"]).name
        settings = shlex.join([*threads, *map(str, data["arguments"])])
        return Speeds(tuple(found), str(data["machine"]), settings, text, int(data["rounds"]))


def _spread(data: Mapping[str, Any]) -> Spread:
    return Spread(*(float(data[key]) for key in ("median", "low", "high")))
