"""A build's working directory: what each step made, from which inputs, so that a rerun does only what is missing or has changed."""

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

import rq_gguf
from rq_gguf.errors import UserError
from rq_gguf.gguf_file import SPLIT_NAME

log = logging.getLogger(__name__)

_WHOLE = 256 << 20  # files up to this size are hashed whole
_SAMPLES, _SAMPLE = 64, 1 << 16
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def input_key(path: Path) -> str:
    """Changes when an input's content does. A directory counts with its model files.

    Files above 256 MiB are not read whole: size, time of change and 64 samples stand for them.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _MODEL_FILES and not p.name.startswith(".") and p.is_file())
        return key([[p.name, input_key(p)] for p in files])
    stat = path.stat()
    if stat.st_size <= _WHOLE:
        return file_hash(path)
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as f:
        for i in range(_SAMPLES):
            f.seek((stat.st_size - _SAMPLE) * i // (_SAMPLES - 1))
            digest.update(f.read(_SAMPLE))
    return digest.hexdigest()


def key(parts: Any) -> str:
    """A hash of plain data and this tool's version."""
    return hashlib.sha256(json.dumps([rq_gguf.__version__, parts], sort_keys=True).encode()).hexdigest()


def job_directory(out: Path) -> Path:
    """`OUT.gguf.rq`, of a file or of a model in several."""
    part = SPLIT_NAME.fullmatch(out.name)
    return out.with_name((f"{part[1]}.gguf" if part else out.name) + ".rq")


class Job:
    """The directory `OUT.gguf.rq` beside an output, and its record `job.json`: step -> key, and size and time of change of its files."""

    def __init__(self, out: Path, *, force: bool, parts: Iterable[Path] = (), say: Callable[[str], None]) -> None:
        """Creates the directory. parts: files there that the output may be split into. Raises UserError where a directory is impossible
        or a file must not be replaced."""
        self.out = out
        self.directory = job_directory(out)
        self.seconds: dict[str, float] = {}
        """Time per step that was done in this run."""
        self._force, self.say = force, say
        self._record = self.directory / "job.json"
        if out.is_dir():
            raise UserError(f"{out} is a directory; name the file to write")
        if not out.parent.is_dir():
            raise UserError(f"the output directory {out.parent} does not exist; create it first")
        if not force and not self._steps().get("write", {}).get("pending"):
            ours = self._untouched("write")
            for path in (out, *parts):
                if path.exists() and path not in ours:
                    raise UserError(
                        f"{path} exists and is not the file that this job wrote; use --force to replace it, or choose another name"
                    )
        try:
            self.directory.mkdir(exist_ok=True)
            probe = self.directory / f".{os.getpid()}.probe"
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise UserError(f"the output directory {out.parent} cannot be written: {_reason(e)}") from e

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other builds of the same output out. Raises UserError where one is running."""
        lock = filelock.FileLock(self.directory / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as e:
            raise UserError(f"another build of {self.out} is running; wait for it or choose another name") from e
        try:
            yield
        finally:
            lock.release()

    def step(
        self, name: str, path: Path, step_key: str, make: Callable[[], Sequence[Path] | None], *, editable: bool = False
    ) -> tuple[Path, ...]:
        """Have `make` write `path`, or the files that it returns, unless they were made before from the same inputs; the files.

        Files of the step that an earlier run made and that are not among them any more are removed.
        editable: the file is one that people edit; then a changed file is refused rather than made anew.
        """
        known, before = self._steps().get(name, {}), self._untouched(name)
        if self.is_done(name, step_key):
            self.say(f"{name}: done before, {before[0]}")
            return before
        if editable and path.exists() and known and not self._is_whole(name) and not known.get("pending") and not self._force:
            raise UserError(f"{path} was edited; use it with --plan, or --force to make it anew")
        # Interrupted between the file and its record, the file is still known to be ours.
        self._save(self._steps() | {name: {**known, "pending": True}})
        log.debug("%s: making %s", name, path)
        start = time.perf_counter()
        made = tuple(make() or (path,))
        self.seconds[name] = time.perf_counter() - start
        log.debug("%s: %.1f s, %d bytes", name, self.seconds[name], sum(file.stat().st_size for file in made))
        for old in set(before) - set(made):
            old.unlink(missing_ok=True)
        self._remember(name, step_key, made)
        return made

    def is_done(self, name: str, step_key: str) -> bool:
        """True if `step` would skip."""
        return not self._force and self._steps().get(name, {}).get("key") == step_key and self._is_whole(name)

    def _steps(self) -> dict[str, Any]:
        try:
            steps = json.loads(self._record.read_text(encoding="utf-8"))["steps"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # the work that a damaged record vouches for is done again
        return steps if isinstance(steps, dict) else {}

    def _files(self, name: str) -> dict[Path, dict[str, Any]]:
        """Files of a step's record: of OUT beside it, of other steps in the directory."""
        folder = self.out.parent if name == "write" else self.directory
        files = self._steps().get(name, {}).get("files", {})
        known = files.items() if isinstance(files, dict) else ()
        return {folder / file: stat for file, stat in known if Path(file).name == file and isinstance(stat, dict)}

    def _untouched(self, name: str) -> tuple[Path, ...]:
        """The files that a step made and that nobody changed since."""
        return tuple(path for path, known in self._files(name).items() if path.is_file() and _state(path) == known)

    def _is_whole(self, name: str) -> bool:
        """True if a step made files and all of them are as it left them."""
        return 0 < len(self._files(name)) == len(self._untouched(name))

    def _remember(self, name: str, step_key: str, files: Sequence[Path]) -> None:
        self._save(self._steps() | {name: {"key": step_key, "files": {path.name: _state(path) for path in files}}})

    def _save(self, steps: dict[str, Any]) -> None:
        temporary = self._record.with_name(".job.json.partial")
        try:
            temporary.write_text(json.dumps({"tool_version": rq_gguf.__version__, "steps": steps}, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self._record)
        finally:
            temporary.unlink(missing_ok=True)


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _reason(e: OSError) -> str:
    return "the disk is full" if e.errno == errno.ENOSPC else (e.strerror or str(e))
