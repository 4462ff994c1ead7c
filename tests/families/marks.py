"""Tests that do not run every time."""

import os

import pytest

ALL = "RQ_GGUF_ALL_FAMILIES"
SLOW = [pytest.mark.slow, pytest.mark.skipif(not os.environ.get(ALL), reason=f"slow: runs where {ALL} is set")]
