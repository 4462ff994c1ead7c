"""The harness, built once per session and kept in the cache."""

from pathlib import Path

import pytest
from metal import build

from rq_gguf.runtime.cache import cache_dir

NO_COMPILER = "clang++-19 on x86-64 Linux is needed to compile Metal kernels for a CPU (Debian: apt install clang-19)"


@pytest.fixture(scope="session")
def tree(runtime: Path) -> build.Tree:
    """The patched llama.cpp."""
    if build.compiler() is None:
        pytest.skip(NO_COMPILER)
    tree = build.find_tree(runtime)
    if not tree.has_tiers:
        pytest.skip(f"{tree.root} has no Metal part of the patch series ({build.SOURCE} names another tree)")
    return tree


@pytest.fixture(scope="session")
def home() -> Path:
    """Where what is compiled is kept."""
    return cache_dir() / "metal-tests"


@pytest.fixture(scope="session")
def harness(tree: build.Tree, home: Path) -> Path:
    """The program that runs cases."""
    return build.build(tree, home)
