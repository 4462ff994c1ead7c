"""Fuzzing of the patched loader, a minute of it in CI: see tools/fuzz.sh and fuzz_tiers.cpp.

RQ_GGUF_FUZZ_SECONDS=60 python -m pytest tests/robustness/test_fuzz.py
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = os.environ.get("RQ_GGUF_FUZZ_SECONDS", "60" if os.environ.get("CI") == "true" else None)


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.skipif(SECONDS is None, reason="fuzzing builds llama.cpp once more, 10 to 30 minutes: set RQ_GGUF_FUZZ_SECONDS=60")
@pytest.mark.skipif(shutil.which("clang++-19") is None, reason="fuzzing needs clang-19, libclang-rt-19-dev and lld-19")
def test_nothing_is_found(runtime: Path) -> None:
    done = subprocess.run(["bash", "tools/fuzz.sh", str(SECONDS)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    runs = re.search(r"number_of_executed_units: (\d+)", done.stdout)
    assert runs is not None and int(runs[1]) > 100, done.stdout[-1000:]
