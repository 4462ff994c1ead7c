"""Wheels: a source package with a tiny llama.cpp goes all the way, through CMake and pip."""

import base64
import csv
import errno
import hashlib
import io
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from runtime.test_build import CMAKE, PATCH
from runtime.test_fetch import package

from rq_gguf.errors import UserError
from rq_gguf.runtime import cache, fetch, patch, wheel

LIBRARY_CMAKE = (
    CMAKE
    + """\
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(ggml-base SHARED who.c)
add_library(llama SHARED lib.c)
set_target_properties(llama ggml-base PROPERTIES VERSION 0.5.0 SOVERSION 0)
target_link_libraries(llama ggml-base)
target_link_libraries(llama-completion llama)
"""
)
LIBRARY_PATCH = (
    PATCH
    + """\
diff --git a/who.c b/who.c
--- a/who.c
+++ b/who.c
@@ -1 +1 @@
-int who(void) { return 1; }
+int who(void) { return 2; }
"""
)
PYTHON = 'import ctypes, pathlib\nlib = ctypes.CDLL(str(pathlib.Path(__file__).parent / "lib" / "libllama.so"))\n'


@pytest.fixture
def pinned(own_cache, tmp_path, monkeypatch) -> Path:
    """A source package that builds in a second and takes the place of the pinned one, a patch series for it, and a cache."""
    top, p = fetch.TOP, fetch.PREFIX
    files = {
        f"{p}/CMakeLists.txt": LIBRARY_CMAKE,
        f"{p}/main.c": '#include <stdio.h>\nint main(void) { puts("stock"); return 0; }\n',
        f"{p}/who.c": "int who(void) { return 1; }\n",
        f"{p}/lib.c": "int who(void);\nint llama_who(void) { return who(); }\n",
        f"{p}/tests/CMakeLists.txt": "# tests\n",
        f"{p}/LICENSE": "MIT of llama.cpp",
        f"{top}/LICENSE.md": "MIT",
        f"{top}/PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {fetch.VERSION}\nRequires-Python: >=3.8\n\nText.\n",
        f"{top}/llama_cpp/__init__.py": PYTHON,
        f"{top}/llama_cpp/server/__init__.py": "",
        f"{top}/docs/index.md": "not for the wheel",
    }
    made = package(tmp_path / fetch.ARCHIVE, {name: text.encode() for name, text in files.items()})
    monkeypatch.setenv("RQ_GGUF_SDIST", str(made))
    monkeypatch.setattr(fetch, "SHA256", fetch.file_sha256(made))
    patches = tmp_path / "patches"
    patches.mkdir()
    (patches / "0001-all.patch").write_text(LIBRARY_PATCH)
    monkeypatch.setattr(patch, "series_dir", lambda: patches)
    return made


needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries have other names there")


@needs_cmake
@on_linux
def test_from_source_package_to_import(pinned, tmp_path):
    version, made = wheel.make_wheel()
    assert version == f"0.3.36+rq.cpu.s{patch.read_series(patch.series_dir()).sha256[:8]}"
    assert made.name.startswith(f"llama_cpp_python-{version}-py3-none-linux_")
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
        info = f"llama_cpp_python-{version}.dist-info"
        assert names == {
            "llama_cpp/__init__.py", "llama_cpp/server/__init__.py", "llama_cpp/lib/libllama.so", "llama_cpp/lib/libggml-base.so",
            *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE.md", "licenses/llama.cpp/LICENSE")),
        }  # fmt: skip
        recorded = list(csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())))
        assert {row[0] for row in recorded} == names
        for name, digest, size in recorded[:-1]:
            data = archive.read(name)
            assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert int(size) == len(data)

    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(made)]
    subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)
    cache.tree("patched").root.rename(tmp_path / "gone")  # nothing outside the wheel is needed
    code = "import importlib.metadata as m, llama_cpp; print(llama_cpp.lib.llama_who(), m.version('llama-cpp-python'))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.stdout.split() == ["2", version], done.stderr


@needs_cmake
@on_linux
def test_made_once_and_anew_with_another_series(pinned, tmp_path, capsys):
    _, first = wheel.make_wheel()
    time, content = first.stat().st_mtime_ns, first.read_bytes()
    shutil.rmtree(cache.tree("patched").root)
    (tmp_path / "out").mkdir()
    _, copied = wheel.make_wheel("cpu", tmp_path / "out")
    assert first.stat().st_mtime_ns == time and "made before" in capsys.readouterr().err, "the build that is gone is not needed"
    assert copied.parent == tmp_path / "out" and copied.read_bytes() == content

    first.unlink()
    assert wheel.make_wheel()[1].read_bytes() == content, "the same inputs, the same wheel"
    (patch.series_dir() / "0001-all.patch").write_text(LIBRARY_PATCH.replace("return 2", "return 3"))
    _, second = wheel.make_wheel()
    assert second.name != first.name
    with zipfile.ZipFile(second) as archive:
        archive.extractall(tmp_path / "second")
    # In a process of its own: this one may hold a libggml-base of that name already, of the runtime.
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).llama_who())"
    command = [sys.executable, "-c", code, str(tmp_path / "second/llama_cpp/lib/libllama.so")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "3\n"


@needs_cmake
@on_linux
@pytest.mark.parametrize(
    ("stop", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), UserError)]
)
def test_stopped_while_packing_nothing_is_left(pinned, monkeypatch, stop, raised):
    wheel.make_wheel()[1].unlink()
    real = wheel._Writer.add

    def add(self: wheel._Writer, name, data, **options) -> None:
        if name.name == "libllama.so":
            raise stop
        real(self, name, data, **options)

    monkeypatch.setattr(wheel._Writer, "add", add)
    with pytest.raises(raised):
        wheel.make_wheel()
    assert not list((cache.cache_dir() / "wheels").iterdir())


@needs_cmake
@on_linux
def test_a_file_that_cannot_grow(pinned, tmp_path):
    """As a disk that is full, while the wheel is copied."""
    _, made = wheel.make_wheel()
    out = tmp_path / "out"
    out.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*\.whl: file too large; nothing was left behind"):
            wheel.make_wheel("cpu", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(out.iterdir()) == [] and made.is_file()


def test_refused_before_any_work(pinned, tmp_path):
    with pytest.raises(UserError, match="--backend gpu: choose one of"):
        wheel.make_wheel("gpu")
    with pytest.raises(UserError, match="none is no directory; create it first"):
        wheel.make_wheel("cpu", tmp_path / "none")
    assert not cache.cache_dir().exists()


@pytest.mark.parametrize(
    "names",
    [
        ["libggml-base.so", "libggml-cpu.so", "libggml-cuda.so", "libggml.so", "libllama.so", "libmtmd.so"],
        ["libggml-base.dylib", "libggml-blas.dylib", "libggml-metal.dylib", "libggml.dylib", "libllama.dylib"],
    ],
)
def test_libraries_of_every_backend(tmp_path, names):
    for name in (*names, "libllama-common.so", "libllama-server-impl.dylib", "llama-cli", "libggml.so.0"):
        (tmp_path / name).touch()
    assert [path.name for path in wheel.libraries(tmp_path)] == names


def test_directory_without_libraries(tmp_path):
    (tmp_path / "libggml.so").touch()
    with pytest.raises(UserError, match="holds no shared libllama"):
        wheel.libraries(tmp_path)
