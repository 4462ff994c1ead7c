"""What a build is, when it is current, and the progress it prints. A tiny CMake project stands in for llama.cpp."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from rq_gguf.errors import UserError
from rq_gguf.runtime import build, cache, fetch, installation, patch, tools

CMAKE = f"""\
cmake_minimum_required(VERSION 3.14)
project(fake C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
add_subdirectory(tests)
foreach(name {" ".join(build.TARGETS)})
    add_executable(${{name}} main.c)
endforeach()
"""
PATCH = """\
diff --git a/main.c b/main.c
--- a/main.c
+++ b/main.c
@@ -1,2 +1,2 @@
 #include <stdio.h>
-int main(void) { puts("stock"); return 0; }
+int main(void) { puts("patched"); return 0; }
diff --git a/tests/CMakeLists.txt b/tests/CMakeLists.txt
--- a/tests/CMakeLists.txt
+++ b/tests/CMakeLists.txt
@@ -1 +1,2 @@
 # tests
+add_executable(test-moe-tiers ../main.c)
"""


@pytest.fixture
def fake(own_cache, tmp_path, monkeypatch) -> Path:
    """A checkout that builds in a second, a patch series for it, and a cache of their own."""
    root = tmp_path / "llama.cpp"
    for name, text in (
        ("CMakeLists.txt", CMAKE),
        ("main.c", '#include <stdio.h>\nint main(void) { puts("stock"); return 0; }\n'),
        ("tests/CMakeLists.txt", "# tests\n"),
        ("src/llama-graph.cpp", ""),
        ("ggml/CMakeLists.txt", ""),
        ("convert_hf_to_gguf.py", "converter"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    patches = tmp_path / "patches"
    patches.mkdir()
    (patches / "0001-all.patch").write_text(PATCH)
    monkeypatch.setattr(patch, "series_dir", lambda: patches)
    return root


needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")


@needs_cmake
def test_install_end_to_end(fake, capsys, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in fake.rglob("*")}
    where = installation.install(llama_cpp=fake)
    assert (where / "test-moe-tiers").is_file(), "the target that the patch adds"
    assert tools.run_tool(["llama-cli"]).stdout.strip() == "patched"
    assert tools.source_path().read_text() == "converter"
    assert tools.source_path().is_relative_to(tmp_path / "cache")
    assert {f: f.stat().st_mtime_ns for f in fake.rglob("*")} == before, "the user's tree must not change"

    stock = installation.install(llama_cpp=fake, unpatched=True)
    assert tools.run_tool(["llama-perplexity"], unpatched=True).stdout.strip() == "stock"
    assert tools.tool_path("llama-cli") == where / "llama-cli" and not (stock / "llama-cli").exists()

    capsys.readouterr()
    times = {f: f.stat().st_mtime_ns for f in where.iterdir()}
    assert installation.install(llama_cpp=fake) == where
    assert "up to date" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in where.iterdir()} == times


@needs_cmake
def test_a_changed_series_is_noticed_and_rebuilt(fake, monkeypatch):
    installation.install(llama_cpp=fake)
    file = patch.series_dir() / "0001-all.patch"
    file.write_text(PATCH.replace('puts("patched")', 'puts("patched again")'))
    with pytest.raises(UserError, match="another patch series.*`rq-gguf runtime install`"):
        tools.tool_path("llama-cli")
    installation.install(llama_cpp=fake)
    assert tools.run_tool(["llama-cli"]).stdout.strip() == "patched again"

    monkeypatch.setattr(build, "cpu_identity", lambda: "another processor")
    with pytest.raises(UserError, match="another processor"):
        tools.tool_path("llama-cli")


@needs_cmake
def test_a_failed_build_says_why_and_is_continued(fake, capfd):
    good = (fake / "main.c").read_text()
    patched_line = PATCH.replace("+int main(void) {", "+int main(void) { no_such_thing;")
    file = patch.series_dir() / "0001-all.patch"
    file.write_text(patched_line)
    with pytest.raises(UserError, match=r"building llama\.cpp failed .*build-cpu\.log"):
        installation.install(llama_cpp=fake)
    assert "no_such_thing" in capfd.readouterr().err, "the log's tail is shown"
    with pytest.raises(UserError, match="is not installed"):
        tools.tool_path("llama-cli")
    file.write_text(PATCH)
    assert (fake / "main.c").read_text() == good
    installation.install(llama_cpp=fake)
    assert tools.run_tool(["llama-cli"]).stdout.strip() == "patched"


@needs_cmake
def test_build_directory_of_another_place_is_started_anew(fake, capsys, tmp_path, monkeypatch):
    installation.install(llama_cpp=fake)
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv("RQ_GGUF_CACHE", str(tmp_path / "moved"))
    stamp = next((tmp_path / "moved").glob("*/build-cpu.json"))
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "complete": False}))
    where = installation.install(llama_cpp=fake)
    assert "starting it anew" in capsys.readouterr().err
    assert where.is_relative_to(tmp_path / "moved") and tools.run_tool(["llama-cli"]).stdout.strip() == "patched"


def test_wrong_backends(fake, monkeypatch):
    with pytest.raises(UserError, match="choose one of cpu, cuda, vulkan, metal"):
        installation.install(backend="gpu")
    monkeypatch.setattr(build.sys, "platform", "linux")
    with pytest.raises(UserError, match="macOS only"):
        installation.install(backend="metal")
    assert not cache.cache_dir().exists(), "refused before anything was done"


def test_gpu_flags(fake):
    flags = build.plan_build("cuda", "patched", "", None, "unknown", None).flags
    assert "-DGGML_CUDA=ON" in flags and "-DGGML_VULKAN=ON" not in flags
    assert "-DGGML_VULKAN=ON" in build.plan_build("vulkan", "patched", "", None, "unknown", None).flags


def test_little_disk_space_is_one_sentence(fake, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(installation.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    with pytest.raises(UserError, match=r"has 0\.0 GB free and 1 GB are needed"):
        installation.install(llama_cpp=fake)


def test_full_disk_is_one_sentence(fake, monkeypatch):
    def full(target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    source = fetch.Source("fake", "fake", "unknown", None, full)
    monkeypatch.setattr(fetch, "pinned", lambda: source)
    with pytest.raises(UserError, match="installing llama.cpp stopped: .*: No space left on device"):
        installation.install()
    assert not list(cache.cache_dir().glob("*/src*"))


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RQ_GGUF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write the cache directory .* set RQ_GGUF_CACHE"), cache.locked():
        pass


def test_a_second_installation_waits(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RQ_GGUF_CACHE", str(tmp_path))
    order = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with cache.locked():
            inside.set()
            leave.wait(10)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    threading.Timer(0.2, leave.set).start()
    with cache.locked():
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert "waiting for another installation" in capfd.readouterr().err


def test_damaged_stamps_count_as_absent(tmp_path):
    for text in ("", "{", "[1]", "null"):
        (tmp_path / "s.json").write_text(text)
        assert cache.read_json(tmp_path / "s.json") == {}
    cache.write_json(tmp_path / "s.json", {"a": [1]})
    assert cache.read_json(tmp_path / "s.json") == {"a": [1]}
    assert os.listdir(tmp_path) == ["s.json"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1/244] Building C object ggml/src/CMakeFiles/ggml-base.dir/ggml.c.o", (1, 244)),
        ("[244/244] Linking CXX executable bin/llama-cli", (244, 244)),
        ("[ 12%] Building CXX object src/CMakeFiles/llama.dir/llama.cpp.o", (12, 100)),
        ("[100%] Built target llama-cli", (100, 100)),
        ("ninja: no work to do.", None),
        ("FAILED: tools/CMakeFiles/x.dir/x.cpp.o", None),
        ("src/x.cpp:[3/4] warning", None),
        ("[3/x] y", None),
    ],
)
def test_progress_lines(line, expected):
    assert build.parse_progress(line) == expected


def test_jobs_follow_cmakes_variable(monkeypatch):
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "3")
    assert build.job_count() == 3
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "many")
    assert 1 <= build.job_count() <= (os.cpu_count() or 1)
