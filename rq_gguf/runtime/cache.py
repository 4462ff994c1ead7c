"""Where the runtime lives: the cache directory, its parts, the lock, and the small files that remember what was done."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from rq_gguf.errors import UserError
from rq_gguf.verbosity import say


def cache_dir() -> Path:
    """The cache directory: RQ_GGUF_CACHE, or the platform's (~/.cache/rq-gguf on Linux). Not created here."""
    override = os.environ.get("RQ_GGUF_CACHE")
    return Path(override).expanduser().absolute() if override else platformdirs.user_cache_path("rq-gguf", appauthor=False)


@dataclass(frozen=True)
class Tree:
    """One source tree of llama.cpp and its builds."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "src"

    @property
    def source_stamp(self) -> Path:
        """What `source` was made of; absent while it is being made."""
        return self.root / "src.json"

    def build(self, backend: str) -> Path:
        return self.root / f"build-{backend}"

    def build_stamp(self, backend: str) -> Path:
        return self.root / f"build-{backend}.json"

    def build_log(self, backend: str) -> Path:
        return self.root / f"build-{backend}.log"


def tree(kind: str, checkout: str | None = None) -> Tree:
    """The tree of a kind ("patched" or "stock"), of the pinned llama.cpp or of a user's checkout (by a short name of it)."""
    return Tree(cache_dir() / f"llama.cpp-{checkout or 'pinned'}-{kind}")


def current_file() -> Path:
    """Remembers which build of each kind was installed last: {"patched": stamp file, "stock": stamp file}."""
    return cache_dir() / "current.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where the file is absent or damaged, so that the work it vouches for is done again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object so that the file is either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def locked() -> Iterator[None]:
    """Hold the cache's lock; a second installation waits. Creates the cache directory.

    Raises UserError where the cache directory cannot be written.
    """
    directory = cache_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"waiting for another installation that holds {directory / 'lock'}")
            lock.acquire()
    except OSError as e:
        raise UserError(f"cannot write the cache directory {directory}: {e.strerror}; set RQ_GGUF_CACHE to another directory") from e
    try:
        yield
    finally:
        lock.release()
