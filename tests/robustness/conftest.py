"""A valid tiered file for tests to damage."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def good(tiered_demo) -> Path:
    return tiered_demo
