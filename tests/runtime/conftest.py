"""What tests of building share."""

from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, empty, and no built llama.cpp from elsewhere. Compiles without ccache."""
    for name in ("RQ_GGUF_RUNTIME", "RQ_GGUF_STOCK_RUNTIME", "CMAKE_BUILD_PARALLEL_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RQ_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CCACHE_DISABLE", "1")
    return tmp_path / "cache"
