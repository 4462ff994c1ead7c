"""How far llama.cpp's logits may be from the reference's: twice what stock files are, at least.

llama.cpp rounds activations before it multiplies (to Q8_0, Q8_1, Q8_K or BF16, by the type of the weights), the reference does not.
nmse on the steps of conftest.py, demo model, experts in one type and the rest in Q8_0, stock files made by llama-quantize:

| experts | bf16 | q8_0 | q6_k | q5_1 | q5_k | q4_k | iq4_xs | iq4_nl | q3_k | q2_k |
|---|---|---|---|---|---|---|---|---|---|---|
| highest median of a step | .00006 | .00014 | .00032 | .00019 | .00030 | .00035 | .00035 | .00015 | .00034 | .00042 |
| highest of a token | .0002 | .0004 | .0012 | .0004 | .0009 | .0016 | .0015 | .0004 | .0011 | .0013 |
| router probability given away | .001 | .002 | .005 | .002 | .004 | .005 | .005 | .001 | .007 | .004 |

One wrong expert of one layer gives some token 0.008 to 1.2, if any token picked it.
"""

import numpy as np
from numpy.typing import NDArray

MEDIAN = 1e-3
"""Median over a step's tokens."""
UPPER = 4e-3
"""Every token."""
REGRET = 0.02
"""Router probability that llama.cpp's choice of experts may give away by the reference's own figures (ties that rounding decides)."""


def passes(errors: list[NDArray[np.float64]]) -> bool:
    """errors: per step, [n_tokens] nmse."""
    return all(np.median(e) < MEDIAN and e.max() < UPPER for e in errors)
