"""The patch series, and source trees made with it: complete or not there, and rewritten only where files changed."""

import filecmp
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rq_gguf.errors import UserError
from rq_gguf.runtime.cache import Tree, read_json, say, write_json
from rq_gguf.runtime.fetch import Source
from rq_gguf.runtime.process import git_environment


@dataclass(frozen=True)
class Series:
    """Patches in the order of their names."""

    patches: tuple[Path, ...]
    sha256: str
    """Over names and contents."""


def series_dir() -> Path:
    """The patch series: `patches/` of the repository this code runs from, or `rq_gguf/patches` of an installed package."""
    package = Path(__file__).resolve().parents[1]
    in_repository = package.parent / "patches"
    return in_repository if in_repository.is_dir() and (package.parent / "pyproject.toml").is_file() else package / "patches"


def read_series(directory: Path) -> Series:
    """Raises UserError where the directory holds no patches."""
    patches = tuple(sorted(directory.glob("*.patch")))
    if not patches:
        raise UserError(f"{directory} holds no *.patch files; reinstall rq-gguf")
    digest = hashlib.sha256()
    for patch in patches:
        content = patch.read_bytes()
        digest.update(f"{patch.name}\0{len(content)}\0".encode())
        digest.update(content)
    return Series(patches, digest.hexdigest())


def apply_series(series: Series, target: Path, label: str) -> None:
    """Apply the patches to the files below `target`, in order and without fuzz.

    label: names the tree in the error. Raises UserError that names the patch and the file that does not fit; `target` is spoilt then.
    """
    git = shutil.which("git")
    if git is None:
        raise UserError("git is needed to apply the patches; install git")
    env = git_environment(target.parent)
    for patch in series.patches:
        args = [git, "-c", "core.autocrlf=false", "apply", "--verbose", "--whitespace=nowarn", str(patch.resolve())]
        done = subprocess.run(args, cwd=target, env=env, stdin=subprocess.DEVNULL, capture_output=True)
        report = done.stderr.decode(errors="replace")
        if done.returncode != 0:
            errors = re.findall(r"^error: (.*)$", report, re.MULTILINE)
            reason = next((e for e in errors if not e.startswith("while searching for")), report.strip())
            raise UserError(f"{patch.name} does not apply to {label}: {reason}")
        if "Skipped patch" in report:  # git apply outside its own idea of the working tree: a success that did nothing
            raise UserError(f"{patch.name} was skipped by git: {report.strip()}")


def source_stamp(source: Source, series: Series | None) -> dict[str, str | None]:
    return {"source": source.id, "series": series.sha256 if series else None}


def is_current(tree: Tree, source: Source, series: Series | None) -> bool:
    """True if `tree.source` is the source with the series applied."""
    return tree.source.is_dir() and read_json(tree.source_stamp) == source_stamp(source, series)


def prepare(tree: Tree, source: Source, series: Series | None) -> None:
    """Make `tree.source` the source with the series applied (None: as it is). Does nothing where it is that already.

    The new tree is made beside the old one and then only files that differ are copied over, so a build recompiles only those.
    Raises UserError where the source cannot be had or a patch does not apply; the old tree stays then.
    """
    if is_current(tree, source, series):
        return
    if series and read_json(tree.source_stamp).get("source") == source.id:
        say("the patch series has changed since this tree was made")
    tree.root.mkdir(parents=True, exist_ok=True)
    fresh = tree.root / "src.new"
    shutil.rmtree(fresh, ignore_errors=True)  # of an interrupted run
    try:
        source.populate(fresh)
        if series:
            say(f"patching {source.label} ({len(series.patches)} patches, series {series.sha256[:12]})")
            apply_series(series, fresh, source.label)
        tree.source_stamp.unlink(missing_ok=True)
        if tree.source.is_dir():
            sync(fresh, tree.source)
        else:
            os.replace(fresh, tree.source)
        write_json(tree.source_stamp, source_stamp(source, series))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def sync(new: Path, old: Path) -> None:
    """Make `old` hold what `new` holds. Files with equal content keep their time; others get the present time."""
    names = files_below(new)
    for name in sorted(files_below(old) - names):
        (old / name).unlink()
    for folder, _, _ in os.walk(old, topdown=False):
        if Path(folder) != old and not os.listdir(folder):
            os.rmdir(folder)
    for name in sorted(names):
        here, there = new / name, old / name
        same = there.is_file() and there.is_symlink() == here.is_symlink() and filecmp.cmp(here, there, shallow=False)
        if same and here.stat().st_mode == there.stat().st_mode:
            continue
        if there.is_symlink() or there.exists():
            there.unlink()
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here, there, follow_symlinks=False)
    filecmp.clear_cache()


def files_below(directory: Path) -> set[str]:
    """Relative names of all files and links."""
    return {Path(folder, f).relative_to(directory).as_posix() for folder, _, files in os.walk(directory) for f in files}
