"""Writes exchanges.json, which both implementations of the policy are tested with: `python tests/vram/vectors.py` after a change of it.

A case is a layer: shares, experts per token, slots, and batches, each with the experts that its tokens picked, in order, and what it is (a
part of a prompt, a prompt's end, generated text); `held`: the experts in VRAM before the first batch and after each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("exchanges.json")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rq_gguf.vram import policy  # noqa: E402


def replay(case: dict[str, Any]) -> list[list[int]]:
    """The experts in VRAM before the first batch and after each."""
    shares, state = np.array(case["shares"]), policy.start(np.array(case["shares"]), case["slots"])
    found = [np.flatnonzero(state.held).tolist()]
    for batch in case["batches"]:
        state = policy.step(state, shares, case["n_used"], np.array(batch["ids"]), batch["phase"])
        found.append(np.flatnonzero(state.held).tolist())
    return found


def make() -> dict[str, Any]:
    cases = [_case(name, i, *numbers) for i, (name, *numbers) in enumerate(_CASES)]
    return {
        "half_life": policy.HALF_LIFE,
        "prior": policy.PRIOR,
        "interval": policy.INTERVAL,
        "gain": policy.GAIN,
        "cases": [case | {"held": replay(case)} for case in cases],
    }


# (name, experts, used, slots, calibrated?)
_CASES = (
    ("a calibrated layer", 16, 2, 4, True),
    ("a stock file", 16, 4, 8, False),
    ("one slot", 8, 2, 1, True),
    ("no slots", 8, 2, 0, True),
    ("all slots", 8, 2, 8, True),
    ("many experts", 64, 8, 16, True),
)


def _case(name: str, seed: int, n_expert: int, n_used: int, slots: int, calibrated: bool) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    load = rng.permutation(np.arange(1, n_expert + 1) ** 2)
    shares = load / load.sum() if calibrated else np.zeros(n_expert)
    taste = 1.5 * rng.standard_normal(n_expert)
    batches = [_batch(rng, taste, n_used, 80, "prompt"), _batch(rng, taste, n_used, 17, "end")]
    for i in range(12):
        if i == 6:  # another subject
            taste = 1.5 * rng.standard_normal(n_expert)
        batches += [_batch(rng, taste, n_used, n, "text") for n in (1, 1, 3, 27)]
    return {"name": name, "n_expert": n_expert, "n_used": n_used, "slots": slots, "shares": shares.tolist(), "batches": batches}


def _batch(rng: np.random.Generator, taste: np.ndarray, n_used: int, tokens: int, phase: str) -> dict[str, Any]:
    chosen = np.argsort(-(taste + rng.gumbel(size=(tokens, len(taste)))), axis=1)[:, :n_used]
    return {"phase": phase, "ids": chosen.tolist()}


def text(data: dict[str, Any]) -> str:
    """JSON with a line per batch."""
    lines = json.dumps(data, separators=(",", ":")).replace('{"phase"', '\n{"phase"').replace('{"name"', '\n{"name"')
    return lines.replace('"held":', '\n"held":') + "\n"


if __name__ == "__main__":
    FILE.write_text(text(make()), encoding="utf-8")
