"""Who waits for whom on a device that really works beside the host (cpp/async_device.h): experts on both at the same time (overlap), and
experts that go up for prompts by way of pinned memory (staging): the CPU's numbers, only what is used, and no chunk filled too early."""

import subprocess
from pathlib import Path

import pytest
from hot.conftest import linked

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module", params=["overlap", "staging"])
def program(runtime: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return linked(request.param, runtime, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("works", ["order", "thread"])
@pytest.mark.parametrize("kind", ["stock_demo", "tiered_demo"])
def test_who_waits_for_whom(kind: str, works: str, program: Path, request: pytest.FixtureRequest) -> None:
    """On a device that does everything as late as it can, or on a thread of its own."""
    done = subprocess.run([program, works, request.getfixturevalue(kind)], capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
