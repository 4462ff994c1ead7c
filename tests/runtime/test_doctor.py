"""What is needed and there: the state of each thing, and a remedy for what is not ok."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from rq_gguf.cli import main
from rq_gguf.errors import UserError
from rq_gguf.runtime import build, doctor
from rq_gguf.runtime.cache import cache_dir, current_file, write_json


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """A machine with no programs and an empty cache; the directory is its whole PATH."""
    for name in ("RQ_GGUF_RUNTIME", "RQ_GGUF_STOCK_RUNTIME", "RQ_GGUF_SDIST", "CXX", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RQ_GGUF_CACHE", str(tmp_path / "cache"))
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(programs))
    return programs


def program(folder: Path, name: str, prints: str, status: int = 0) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(f"#!{sys.executable}\nprint({prints!r})\nraise SystemExit({status})\n")
    (folder / name).chmod(0o755)


def checks(backend: str | None = None) -> dict[str, doctor.Check]:
    found = doctor.diagnose(backend)
    assert all(check.fix for check in found if check.state != doctor.OK), "a remedy for each"
    assert all("\n" not in check.fix + check.found for check in found)
    return {check.what: check for check in found}


def install_stamp(backend: str, **others: object) -> None:
    """A finished build in the cache, as `runtime install` leaves it."""
    series = doctor.patch.read_series(doctor.patch.series_dir()).sha256
    stamp = {"backend": backend, "complete": True, "series": series, "cpu": build.cpu_identity(), **others}
    directory = cache_dir() / "llama.cpp" / f"build-{backend}"
    program(directory / "bin", "llama-completion", "version: 0")
    write_json(directory.with_suffix(".json"), stamp)
    write_json(current_file(), {"patched": str(directory.with_suffix(".json"))})


def test_a_bare_machine(bare):
    found = checks()
    for what in ("cmake", "git", "C++ compiler", "llama.cpp, patched"):
        assert found[what].state == doctor.MISSING
    for what in ("ccache", "ninja", "llama.cpp, stock", "source package"):
        assert found[what].state == doctor.OPTIONAL
    assert found["llama.cpp, patched"].fix == "rq-gguf runtime install"
    assert "rq-gguf[runtime]" in found["cmake"].fix
    assert not cache_dir().exists(), "looking changes nothing"


def test_a_built_runtime_needs_no_build_tools(bare):
    install_stamp("cpu")
    found = checks()
    assert doctor.is_well(list(found.values()))
    assert found["cmake"].state == doctor.OPTIONAL and found["llama.cpp, patched"].state == doctor.OK


def test_a_stale_series(bare):
    install_stamp("cpu", series="of before")
    found = checks()["llama.cpp, patched"]
    assert found.state == doctor.MISSING and "another patch series" in found.found and found.fix == "rq-gguf runtime install"


def test_another_backend_than_is_wanted(bare):
    install_stamp("cpu")
    found = checks("cuda")
    assert found["llama.cpp, patched"].state == doctor.MISSING
    assert found["llama.cpp, patched"].fix == "rq-gguf runtime install --backend cuda"
    assert found["CUDA toolkit"].state == doctor.MISSING and found["NVIDIA GPU"].state == doctor.OPTIONAL
    with pytest.raises(UserError, match="--backend gpu: choose one of cpu, cuda"):
        doctor.diagnose("gpu")


def test_a_gpu_that_is_not_used(bare):
    install_stamp("cpu")
    program(bare, "nvidia-smi", "A card, 8192 MiB, 550.1")
    program(bare, "nvcc", "nvcc: release 12")
    found = checks()
    assert found["NVIDIA GPU"].found == "A card, 8192 MiB, 550.1"
    assert found["CUDA toolkit"].fix == "rq-gguf runtime install --backend cuda" and doctor.is_well(list(found.values()))


def test_a_program_that_does_not_run(bare, tmp_path, monkeypatch):
    program(tmp_path / "mine", "llama-completion", "error: illegal instruction", 132)
    monkeypatch.setenv("RQ_GGUF_RUNTIME", str(tmp_path / "mine"))
    found = checks()["llama.cpp, patched"]
    assert found.state == doctor.MISSING and "illegal instruction" in found.found
    monkeypatch.setenv("RQ_GGUF_RUNTIME", str(tmp_path / "gone"))
    assert checks()["llama.cpp, patched"].fix == "unset RQ_GGUF_RUNTIME"


def test_an_old_cmake(bare):
    program(bare, "cmake", "cmake version 3.10.2")
    found = checks()["cmake"]
    assert found.state == doctor.MISSING and "too old" in found.found
    program(bare, "cmake", "cmake version 4.1.0")
    assert checks()["cmake"].state == doctor.OK


def test_a_compiler_that_does_not_run(bare, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert "unset CXX" in checks()["C++ compiler"].fix


def test_a_cache_that_cannot_be_written(bare, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RQ_GGUF_CACHE", str(tmp_path / "file" / "cache"))
    found = checks()["cache directory"]
    assert found.state == doctor.MISSING and "RQ_GGUF_CACHE" in found.fix


def test_a_full_disk_and_little_memory(bare, monkeypatch):
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "100000")
    found = checks()
    assert (found["disk space"].state, found["memory"].state) == (doctor.MISSING, doctor.OPTIONAL)
    assert found["memory"].fix.startswith("export CMAKE_BUILD_PARALLEL_LEVEL=")
    assert int(found["memory"].fix.rpartition("=")[2]) < 100_000
    install_stamp("cpu")
    assert checks()["disk space"].state == doctor.OPTIONAL


def test_extras(bare, monkeypatch):
    monkeypatch.setattr(doctor.extras, "has", lambda module: module != "transformers")
    found = checks()["torch and the like"]
    assert found.state == doctor.OPTIONAL and "not installed: transformers;" in found.found
    assert found.fix == "pip install 'rq-gguf[calibrate]'"


def test_python_bindings(bare, monkeypatch):
    def having(version: str) -> doctor.Check:
        real = doctor.importlib.metadata.version
        with monkeypatch.context() as context:
            context.setattr(doctor.importlib.metadata, "version", lambda name: version if name == "llama-cpp-python" else real(name))
            return checks()["llama-cpp-python"]

    assert "stock one" in having("0.3.36").found
    assert "another patch series" in having("0.3.36+rq.cpu.s00000000").found
    current = doctor.wheel.version("cuda", doctor.patch.read_series(doctor.patch.series_dir()))
    assert having(current).state == doctor.OK


def test_the_command(bare):
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 2
    assert result.stdout.splitlines()[-1] == "something is missing: see the lines marked MISSING"
    assert "-> rq-gguf runtime install" in result.stdout
    result = CliRunner().invoke(main, ["runtime", "doctor", "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 2 and data["ok"] is False
    assert {"what", "state", "found", "fix"} == set(data["checks"][0])
    install_stamp("cpu")
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["ok"] is True


@pytest.mark.runtime
def test_this_machine(runtime):
    assert checks()["llama.cpp, patched"].state == doctor.OK
