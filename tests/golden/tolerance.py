"""How far llama.cpp's logits may be from the reference's, measured on stock files.

llama.cpp rounds activations before it multiplies (to Q8_0, Q8_1 or Q8_K, by the type of the weights), the reference does not.
"""

import numpy as np

MEDIAN = 1e-3
UPPER = 5e-3
REGRET = 0.02


def passes(errors: list[np.ndarray]) -> bool:
    """errors: per step, [n_tokens] nmse."""
    return all(np.median(e) < MEDIAN and e.max() < UPPER for e in errors)
