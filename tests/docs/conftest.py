"""A directory in which pages and help texts can be tried: `rq-gguf` on PATH, the built llama.cpp, the demo model built once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Workshop:
    """Runs shell commands in a directory as a user would."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory, self._environment = directory, environment

    def run(self, commands: str) -> "subprocess.CompletedProcess[str]":
        """Run commands with bash, each of which must succeed.

        On a busy machine llama-completion may exit before its last words are printed, and bench then has nothing to read: once more.
        """
        for _ in range(3):
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", commands],
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            if "llama-completion measured nothing" not in done.stderr:
                break
        assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return done

    def copy(self, directory: Path) -> "Workshop":
        """Another directory with the same files, and their times."""
        shutil.copytree(self.directory, directory, dirs_exist_ok=True)
        return Workshop(directory, self._environment)


@pytest.fixture(scope="session")
def built(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A directory that holds demo-rq.gguf, built as the quick start does."""
    programs = tmp_path_factory.mktemp("bin")
    program = programs / "rq-gguf"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rq_gguf "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RQ_GGUF_RUNTIME": str(runtime),
        "RQ_GGUF_DEBUG": "",
        "HF_HUB_OFFLINE": "1",
    }
    workshop = Workshop(tmp_path_factory.mktemp("built"), environment)
    workshop.run("rq-gguf build demo demo-rq.gguf")
    return workshop


@pytest.fixture
def workshop(built: Workshop, tmp_path: Path) -> Workshop:
    """A directory of the test's own, with demo-rq.gguf in it."""
    return built.copy(tmp_path)
