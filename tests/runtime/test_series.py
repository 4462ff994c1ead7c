"""The patch series itself: how much of upstream's files it touches. These lines are what breaks on every update."""

import re

from rq_gguf.runtime.patch import series_dir

MOST_HOOK_LINES = 512
"""As many as in the present series: 142 for ggml's CPU part, llama and tests, 33 for the scheduler, 59 for CUDA, 55 for Metal, 58 for
RPC and the log, 62 for busy experts in fast memory, 46 (31 of them the scheduler's) for experts by device, 39 (the scheduler's) for the
CPU and a device at the same time, and 14 (13 of them the scheduler's) for experts that go up by way of pinned memory."""


def hook_lines() -> dict[str, int]:
    """Upstream file -> lines that the series adds or removes in it; files of its own are left out."""
    changed: dict[str, int] = {}
    own: set[str] = set()
    for patch in sorted(series_dir().glob("*.patch")):
        for part in re.split(r"^diff --git ", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name = part.split(" b/", 1)[1].split("\n", 1)[0]
            body = part.split("\n@@", 1)
            if "new file mode" in body[0]:
                own.add(name)
            if name in own or len(body) == 1:
                continue
            changed[name] = changed.get(name, 0) + len(re.findall(r"^[+-]", body[1], flags=re.MULTILINE))
    return changed


def test_few_lines_of_upstream_files_change():
    changed = hook_lines()
    assert "ggml/src/ggml.c" in changed and "src/llama-tiers.cpp" not in changed
    total = sum(changed.values())
    assert total <= MOST_HOOK_LINES, f"{total} lines: {changed}"
