"""Move the patch series to another llama.cpp: which hunk fits as it is, which git merges, and which needs a hand.

    python tools/rebase_patch.py SOURCE [--pinned PACKAGE] [--work DIR] [--out DIR]

SOURCE: llama-cpp-python's source package of another version (`pip download llama-cpp-python==0.3.35 --no-deps --no-binary
llama-cpp-python`) or a checkout of llama.cpp. The pinned package is the cache's or RQ_GGUF_SDIST. Only files that the series touches are
taken from both. Each patch is tried hunk by hunk (GNU patch tells offsets and fuzz), then committed by `git am --3way`, which knows the
pinned files and so merges what moved or changed nearby. All merged: exit status 0, and with --out the new series is written there.
Otherwise the conflicts are printed with their lines, status is 1, and with --work a repository is left in DIR in which `git am` waits at
the first of them: edit the files, `git add -A`, `git am --continue`, and so on; then
`git format-patch --zero-commit --no-signature -N pinned-to`.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from rq_gguf.errors import UserError
from rq_gguf.runtime.fetch import archive
from rq_gguf.runtime.patch import read_series, series_dir

ONTO = "pinned-to"
"""Tag of the commit that the series is moved to."""
_FILE = re.compile(r"^diff --git a/(\S+) b/\S+$", re.MULTILINE)
_HUNK = re.compile(r"Hunk #(\d+) (succeeded|FAILED|ignored|skipped) ?at (\d+)(.*)\.$")


def _file_at(patch: Path, line: int) -> str:
    """The file that a line of a patch belongs to."""
    text = "".join(patch.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[:line])
    return touched(text)[-1]


def touched(patch: str) -> list[str]:
    """Files that a patch changes or makes."""
    return _FILE.findall(patch)


def take(source: Path, names: set[str], target: Path) -> int:
    """Copy the named files of a llama.cpp, in a package or a checkout, below `target`; how many there are. Raises UserError."""
    if source.is_dir():
        if not (source / "src" / "llama-graph.cpp").is_file():
            raise UserError(f"{source} is not a llama.cpp source tree (no src/llama-graph.cpp)")
        found = {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    else:
        found = {}
        try:
            with tarfile.open(source) as tar:
                for member in tar:
                    parts = PurePosixPath(member.name).parts
                    name = "/".join(parts[3:])
                    data = tar.extractfile(member) if parts[1:3] == ("vendor", "llama.cpp") and name in names else None
                    if data is not None:
                        found[name] = data.read()
        except (tarfile.TarError, EOFError, OSError) as e:
            raise UserError(f"{source} is no source package: {e}") from e
        if not found:
            raise UserError(f"{source} holds no llama.cpp below vendor/llama.cpp")
    for name, content in found.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return len(found)


class Repository:
    """A git repository with the pinned files in its first commit, and those of the other llama.cpp, tagged, in its second."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "-q", "-b", "series")

    def git(self, *args: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        identity = ("-c", "user.name=rebase", "-c", "user.email=rebase@localhost", "-c", "core.autocrlf=false", "-c", "gc.auto=0")
        done = subprocess.run(["git", *identity, *args], cwd=self.root, capture_output=True, text=True, errors="replace", check=False)
        if check and done.returncode:
            raise UserError(f"git {' '.join(args)} failed: {done.stderr.strip()}")
        return done

    def commit(self, source: Path, names: set[str], message: str) -> int:
        """The named files of a llama.cpp as a commit, instead of all that was there."""
        for path in self.root.iterdir():
            if path.name != ".git":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        count = take(source, names, self.root)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return count

    def hunks(self, patch: Path) -> list[tuple[str, str]]:
        """(file, what GNU patch says of it) for each hunk that does not fit exactly where it was, and each file that is missing."""
        args = ["patch", "-p1", "--dry-run", "--batch", "--forward", "--force", "-i", str(patch)]
        done = subprocess.run(args, cwd=self.root, capture_output=True, text=True, errors="replace", check=False)
        name, found = "", []
        for line in (done.stdout + done.stderr).splitlines():
            if m := re.match(r"(?:checking|patching) file '?(.*?)'?$", line):
                name = m[1]
            elif m := re.match(r"can't find file to patch at input line (\d+)", line):
                found.append((_file_at(patch, int(m[1])), "file is not there"))
            elif m := _HUNK.match(line):
                found.append((name, f"hunk {m[1]} {m[2].lower()} at line {m[3]}{m[4]}"))
        return found

    def conflicts(self) -> list[str]:
        """`file:line` of each conflict after a `git am --3way` that stopped, and files that could not even be merged."""
        names = self.git("diff", "--name-only", "--diff-filter=U").stdout.split()
        places = []
        for name in names:
            text = (self.root / name).read_text(errors="replace").splitlines()
            places += [f"{name}:{i}" for i, line in enumerate(text, 1) if line.startswith("<<<<<<< ")] or [name]
        return places


def survey(source: Path, pinned: Path, repository: Repository) -> bool:
    """Print what each patch of the series needs on another llama.cpp; True if git could merge all. Conflicts are committed as they are, so
    that later patches are looked at too."""
    patches = prepare(source, pinned, repository, show=True)
    merged = True
    for patch in patches:
        hunks = repository.hunks(patch)
        done = repository.git("am", "--3way", "--keep-cr", str(patch), check=False)
        failed = [what for _, what in hunks if "failed" in what or "not there" in what]
        moved = len(hunks) - len(failed)
        if done.returncode == 0:
            print(
                f"  {patch.name}: "
                + ("merged by git" if failed else f"applies, {moved} hunks at other lines" if moved else "applies as it is")
            )
        else:
            merged = False
            print(f"  {patch.name}: NEEDS A HAND")
        for name, what in hunks:
            print(f"    {name}: {what}")
        if done.returncode:
            for place in repository.conflicts() or [line for line in done.stderr.splitlines() if line.startswith("error: ")]:
                print(f"    conflict: {place}")
            repository.git("add", "-A")
            if repository.git("am", "--continue", check=False).returncode:
                repository.git("am", "--skip", check=False)
    return merged


def prepare(source: Path, pinned: Path, repository: Repository, *, show: bool = False) -> tuple[Path, ...]:
    """Both versions of the files that the series touches as commits; the patches."""
    patches = read_series(series_dir()).patches
    names = {name for patch in patches for name in touched(patch.read_text(encoding="utf-8"))}
    ours = repository.commit(pinned, names, "the pinned llama.cpp")
    theirs = repository.commit(source, names, f"llama.cpp of {source.name}")
    repository.git("tag", ONTO)
    if show:
        changed = repository.git("diff", "--stat", "HEAD~1", "HEAD").stdout.strip().splitlines()
        told = changed[-1].strip() if changed else "all are the same"
        print(f"{source.name}: {theirs} of the {ours} upstream files that the series touches; {told}")
    return patches


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--pinned", type=Path, help="the pinned source package, if not the cache's or RQ_GGUF_SDIST")
    parser.add_argument("--work", type=Path, help="an empty folder to leave the repository in")
    parser.add_argument("--out", type=Path, help="where to write the new series")
    args = parser.parse_args()
    for program in ("git", "patch"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is needed; install it")
    if args.work is not None and args.work.exists() and any(args.work.iterdir()):
        raise UserError(f"{args.work} is not empty")
    pinned = args.pinned or archive()
    with tempfile.TemporaryDirectory(prefix="rebase-") as folder:
        repository = Repository(Path(folder))
        if survey(args.source, pinned, repository):
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                options = ("--zero-commit", "--no-signature", "-N", "-o", str(args.out.resolve()))
                print(repository.git("format-patch", *options, ONTO).stdout.strip())
            return 0
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        repository = Repository(args.work)
        repository.git("am", "--3way", "--keep-cr", *map(str, prepare(args.source, pinned, repository)), check=False)
        print(f"the first of these conflicts are in {args.work}: edit them, git add -A, git am --continue")
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"Error: {error}")
