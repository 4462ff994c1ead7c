"""Experts that go up for prompts by way of pinned memory, beside what the device computes: the CPU's numbers, and only what is used."""

import subprocess
from pathlib import Path

import pytest
from hot.conftest import linked

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def program(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked("staging", runtime, tmp_path_factory.mktemp("staging"))


@pytest.mark.parametrize("works", ["order", "thread"])
@pytest.mark.parametrize("kind", ["stock_demo", "tiered_demo"])
def test_who_waits_for_whom(kind: str, works: str, program: Path, request: pytest.FixtureRequest) -> None:
    """On a device that computes as late as it can and copies as early or as late, or both on threads (cpp/staging.cpp)."""
    done = subprocess.run([program, works, request.getfixturevalue(kind)], capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
