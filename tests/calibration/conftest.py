"""ggml's library of the built llama.cpp."""

from pathlib import Path

import pytest

from rq_gguf.ggml import Ggml
from rq_gguf.runtime import tools


@pytest.fixture(scope="session")
def ggml(runtime: Path) -> Ggml:
    return Ggml(tools.library_path("ggml-base"))
