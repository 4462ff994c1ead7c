"""`rq-gguf runtime wheel`: llama-cpp-python around the patched llama.cpp.

The pinned source package holds both halves: the Python code, taken as it is, and llama.cpp, which `runtime install` patches and builds.
So a wheel compiles only what the runtime still lacks. Format: https://packaging.python.org/specifications/binary-distribution-format/
"""

import base64
import hashlib
import io
import re
import shutil
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rq_gguf.atomic import replacing
from rq_gguf.errors import UserError
from rq_gguf.progress import Bar
from rq_gguf.runtime import build, fetch, installation, patch
from rq_gguf.runtime.cache import cache_dir, read_json, say, tree, write_json

NAME = "llama_cpp_python"
_LIBRARIES = re.compile(r"(lib)?(llama|mtmd|ggml|ggml-\w+)\.(so|dylib|dll)")
_FORM = 1
"""Raised whenever a wheel of the same inputs would be another."""


@dataclass(frozen=True)
class Wheel:
    """A wheel as it should be."""

    version: str
    path: Path
    inputs: dict[str, Any]
    """What it is made of; kept beside it."""

    @property
    def stamp(self) -> Path:
        return self.path.with_suffix(".json")

    def is_complete(self) -> bool:
        return self.path.is_file() and read_json(self.stamp) == self.inputs


def version(backend: str, series: patch.Series) -> str:
    """llama-cpp-python's, with a local part by which pip tells the wheel from a stock one, and from one of other patches."""
    return f"{fetch.VERSION}+rq.{backend}.s{series.sha256[:8]}"


def plan_wheel(backend: str) -> Wheel:
    """The wheel that would be made on this machine now. Raises UserError for a backend that this platform cannot have."""
    source, series = fetch.pinned(), patch.read_series(patch.series_dir())
    wanted = build.plan_build(backend, "patched", source.id, series.sha256, source.commit, tree("patched").source).stamp(True)
    del wanted["targets"]  # the libraries are the same, whichever programs are built beside them
    number = version(backend, series)
    name = f"{NAME}-{number}-py3-none-{re.sub(r'[-.]', '_', sysconfig.get_platform())}.whl"
    return Wheel(number, cache_dir() / "wheels" / name, {**wanted, "form": _FORM})


def make_wheel(backend: str = "cpu", directory: Path | None = None) -> tuple[str, Path]:
    """(version, path) of a wheel for this machine, in the cache or copied to `directory`; made only where it is not there yet.

    It appears only when complete, and what an interrupted run compiled is kept.
    backend: one of build.BACKENDS. Raises UserError.
    """
    wheel = plan_wheel(backend)
    if directory is not None and not directory.is_dir():
        raise UserError(f"{directory} is no directory; create it first, the wheel goes into it")
    if wheel.is_complete():
        say(f"{wheel.path.name}: made before")
    else:
        with installation.built(backend) as place:
            wheel.path.parent.mkdir(exist_ok=True)
            wheel.stamp.unlink(missing_ok=True)
            _pack(wheel, libraries(build.bin_dir(place.build(backend))), place.source / "LICENSE")
            write_json(wheel.stamp, wheel.inputs)
            say(f"{wheel.path.name}: made")
    if directory is None:
        return wheel.version, wheel.path
    out = directory / wheel.path.name
    with replacing(out) as temporary:
        shutil.copyfile(wheel.path, temporary)
    return wheel.version, out


def libraries(directory: Path) -> list[Path]:
    """The shared libraries that llama-cpp-python loads, and those which they need. Raises UserError where there are none."""
    found = sorted(p for p in directory.iterdir() if _LIBRARIES.fullmatch(p.name) and not p.is_symlink())
    if not {"libllama", "llama"} & {p.stem for p in found}:
        raise UserError(f"{directory} holds no shared libllama; run `rq-gguf runtime install` again")
    return found


def _pack(wheel: Wheel, shared: list[Path], llama_license: Path) -> None:
    """Write the wheel: the package's Python code, the libraries in llama_cpp/lib, metadata."""
    package, info = fetch.archive(), PurePosixPath(f"{NAME}-{wheel.version}.dist-info")
    tag = "-".join(wheel.path.stem.split("-")[-3:])
    say(f"packing {package.name}'s Python code with {', '.join(p.name for p in shared)}")
    with replacing(wheel.path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        writer = _Writer(archive)
        metadata = False
        for name, _, data in fetch.members(package, fetch.TOP):
            if name.parts[0] == "llama_cpp":
                writer.add(name, data)
            elif name == PurePosixPath("LICENSE.md"):
                writer.add(info / "licenses" / name, data)
            elif name == PurePosixPath("PKG-INFO"):
                text = data.read().replace(f"\nVersion: {fetch.VERSION}\n".encode(), f"\nVersion: {wheel.version}\n".encode(), 1)
                metadata = wheel.version.encode() in text
                writer.add(info / "METADATA", io.BytesIO(text))
        if not metadata:
            raise UserError(f"{package} holds no PKG-INFO of version {fetch.VERSION}")
        with llama_license.open("rb") as data:
            writer.add(info / "licenses" / "llama.cpp" / "LICENSE", data)
        total = sum(path.stat().st_size for path in shared)
        with Bar(total=total, desc="packing", unit="B", unit_scale=True, leave=False, disable=None, delay=1) as bar:
            for path in shared:
                with path.open("rb") as data:
                    writer.add(PurePosixPath("llama_cpp", "lib", path.name), data, mode=0o755, bar=bar)
        head = f"Wheel-Version: 1.0\nGenerator: rq-gguf\nRoot-Is-Purelib: false\nTag: {tag}\n"
        writer.add(info / "WHEEL", io.BytesIO(head.encode()))
        writer.finish(info / "RECORD")


class _Writer:
    """Adds files to a wheel and remembers what RECORD says of them: name, sha256, size."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive, self._record = archive, ""

    def add(self, name: PurePosixPath, data: IO[bytes], mode: int = 0o644, bar: Bar | None = None) -> None:
        entry = zipfile.ZipInfo(str(name), (1980, 1, 1, 0, 0, 0))  # no time: the same inputs, the same wheel
        entry.external_attr, entry.compress_type = (0o100000 | mode) << 16, zipfile.ZIP_DEFLATED
        digest, size = hashlib.sha256(), 0
        with self._archive.open(entry, "w", force_zip64=True) as out:
            while chunk := data.read(1 << 20):
                out.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if bar is not None:
                    bar.update(len(chunk))
        self._record += f"{name},sha256={base64.urlsafe_b64encode(digest.digest()).rstrip(b'=').decode()},{size}\n"

    def finish(self, name: PurePosixPath) -> None:
        self._archive.writestr(zipfile.ZipInfo(str(name), (1980, 1, 1, 0, 0, 0)), f"{self._record}{name},,\n")
