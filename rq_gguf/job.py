"""A build's working directory: what each step made, from which inputs, so that a rerun does only what is missing or has changed."""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

import rq_gguf
from rq_gguf.errors import UserError

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


class Job:
    """The directory `OUT.gguf.rq` beside an output, and its record `job.json`: step -> key and the file's size and time of change."""

    def __init__(self, out: Path, *, force: bool, say: Callable[[str], None]) -> None:
        """Creates the directory. Raises UserError where that is impossible or `out` must not be replaced."""
        self.out = out
        self.directory = out.with_name(out.name + ".rq")
        self.seconds: dict[str, float] = {}
        """Time per step that was done in this run."""
        self._force, self.say = force, say
        self._record = self.directory / "job.json"
        if out.is_dir():
            raise UserError(f"{out} is a directory; name the file to write")
        if not out.parent.is_dir():
            raise UserError(f"the output directory {out.parent} does not exist; create it first")
        if out.exists() and not force and not self._is_untouched("write", out) and not self._steps().get("write", {}).get("pending"):
            raise UserError(f"{out} exists and is not the file that this job wrote; use --force to replace it, or choose another name")
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

    def step(self, name: str, path: Path, step_key: str, make: Callable[[], None], *, editable: bool = False) -> bool:
        """Have `make` write `path` unless it was made before from the same inputs. True if it was made now.

        editable: the file is one that people edit; then a changed file is refused rather than made anew.
        """
        known = self._steps().get(name, {})
        untouched = self._is_untouched(name, path)
        if untouched and known.get("key") == step_key and not self._force:
            self.say(f"{name}: done before, {path}")
            return False
        if editable and path.exists() and known and not untouched and not known.get("pending") and not self._force:
            raise UserError(f"{path} was edited; use it with --plan, or --force to make it anew")
        # Interrupted between the file and its record, the file is still known to be ours.
        self._save(self._steps() | {name: {**known, "pending": True}})
        start = time.perf_counter()
        make()
        self.seconds[name] = time.perf_counter() - start
        self._remember(name, step_key, path)
        return True

    def is_done(self, name: str, path: Path, step_key: str) -> bool:
        """True if `step` would skip."""
        return not self._force and self._steps().get(name, {}).get("key") == step_key and self._is_untouched(name, path)

    def _steps(self) -> dict[str, Any]:
        try:
            steps = json.loads(self._record.read_text(encoding="utf-8"))["steps"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # the work that a damaged record vouches for is done again
        return steps if isinstance(steps, dict) else {}

    def _is_untouched(self, name: str, path: Path) -> bool:
        known = self._steps().get(name, {})
        if not path.is_file():
            return False
        stat = path.stat()
        return bool(known.get("size") == stat.st_size and known.get("mtime_ns") == stat.st_mtime_ns)

    def _remember(self, name: str, step_key: str, path: Path) -> None:
        stat = path.stat()
        entry = {"key": step_key, "file": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        self._save(self._steps() | {name: entry})

    def _save(self, steps: dict[str, Any]) -> None:
        temporary = self._record.with_name(".job.json.partial")
        try:
            temporary.write_text(json.dumps({"tool_version": rq_gguf.__version__, "steps": steps}, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self._record)
        finally:
            temporary.unlink(missing_ok=True)


def _reason(e: OSError) -> str:
    return "the disk is full" if e.errno == errno.ENOSPC else (e.strerror or str(e))
