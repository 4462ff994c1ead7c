"""`rq-gguf runtime install`: source, patch, build, in this order, each only where needed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rq_gguf.errors import UserError
from rq_gguf.runtime import build, fetch, patch
from rq_gguf.runtime.cache import Tree, cache_dir, current_file, locked, read_json, say, tree, write_json

DISK_NEEDED = 1_000_000_000
"""Bytes: source package, a tree, its copy while it is made, and a CPU build with their margin."""


def install(backend: str = "cpu", llama_cpp: Path | None = None, unpatched: bool = False) -> Path:
    """Make llama.cpp's programs available and return the directory they are in. Idempotent; an interrupted run is continued.

    backend: one of build.BACKENDS. llama_cpp: a user's own checkout instead of the pinned tree; it is copied, never changed.
    unpatched: without the patch series, fewer programs, for comparisons; it does not become the runtime that other commands use.
    Raises UserError.
    """
    with built(backend, llama_cpp, unpatched) as place:
        remember("stock" if unpatched else "patched", place.build_stamp(backend))
    return build.bin_dir(place.build(backend))


@contextmanager
def built(backend: str, llama_cpp: Path | None = None, unpatched: bool = False) -> Iterator[Tree]:
    """The tree in which the build that `install` describes is complete; inside, the cache's lock is held, so that it stays so."""
    source = fetch.checkout(llama_cpp) if llama_cpp else fetch.pinned()
    series = None if unpatched else patch.read_series(patch.series_dir())
    kind = "stock" if unpatched else "patched"
    place = tree(kind, source.checkout)

    def wanted() -> build.Build:
        return build.plan_build(backend, kind, source.id, series.sha256 if series else None, source.commit, place.source)

    wanted()  # refuses a wrong backend before anything is fetched
    with locked():
        try:
            if patch.is_current(place, source, series) and build.is_complete(place, wanted()):
                say(f"{source.label}, {kind}, {backend}: up to date in {build.bin_dir(place.build(backend))}")
            else:
                free = shutil.disk_usage(cache_dir()).free
                if free < DISK_NEEDED:
                    raise UserError(f"{cache_dir()} has {free / 1e9:.1f} GB free and {DISK_NEEDED / 1e9:.0f} GB are needed; "
                                    "free some or set RQ_GGUF_CACHE to another directory")  # fmt: skip
                patch.prepare(place, source, series)
                build.build(place, wanted())
                say(f"{source.label}, {kind}, {backend}: installed in {build.bin_dir(place.build(backend))}")
            yield place
        except OSError as e:
            raise UserError(f"installing llama.cpp stopped: {e.filename or cache_dir()}: {e.strerror}") from e


def remember(kind: str, stamp: Path) -> None:
    """Make a build the one that other commands use."""
    known = read_json(current_file())
    if known.get(kind) != str(stamp):
        write_json(current_file(), {**known, kind: str(stamp)})
