"""A text's tokens as the sequences that pass a model. No torch."""

import numpy as np
from numpy.typing import NDArray

from rq_gguf.errors import UserError

SEQUENCE = 512
"""Tokens per sequence, as llama-imatrix and llama-perplexity take them."""


def cut(encoded: tuple[NDArray[np.int64], int | None], tokens: int, length: int) -> list[NDArray[np.int64]]:
    """Sequences of `length` tokens, each begun by bos where there is one, evenly spaced over the text, about `tokens` tokens in all.

    Where the text has no more than that, all of it is used, and its last sequence is as short as it comes out.
    Raises UserError for a text of less than one sequence.
    """
    ids, bos = encoded
    step = length - (bos is not None)
    if tokens < 1:
        raise UserError(f"cannot calibrate on {tokens} tokens: choose a positive number")
    if len(ids) < step:
        raise UserError(f"the calibration text has only {len(ids)} tokens: give at least {step}, better many thousands")
    wanted = max(1, tokens // length)
    pieces = [ids[i : i + step] for i in range(0, len(ids), step)]
    if len(pieces) > wanted:
        whole = len(ids) // step
        pieces = [pieces[i * whole // wanted] for i in range(wanted)]
    return pieces if bos is None else [np.concatenate([[bos], p]) for p in pieces]
