"""The paper's importance of an expert (arXiv 2602.19938): Wanda scores of the weights that a pruner would drop."""

import numpy as np
from numpy.typing import NDArray

PRUNING_RATIO = 0.5


def wanda_importance(
    weights: dict[str, NDArray[np.float32]], in_sum2: dict[str, NDArray[np.float32]], ratio: float = PRUNING_RATIO
) -> float:
    """Mean Wanda score over the entries of one expert that a pruner would drop.

    weights: matrix name -> [rows, cols]. in_sum2: matrix name -> [cols], sums of squared inputs over the expert's tokens.
    The score of an entry is |W[r, c]| * ||X[:, c]||_2 (Wanda, arXiv 2306.11695), and Wanda drops the lowest `ratio` of each row.

    The paper leaves open the pruning ratio, which matrices count and how they are joined. Chosen here: one half, Wanda's own
    unstructured setting; gate, up and down; all dropped entries weigh the same. An expert that no token picked scores 0.
    """
    total, dropped = 0.0, 0
    for name, w in weights.items():
        n = int(w.shape[1] * ratio)
        if n == 0:
            continue
        scores = np.abs(w) * np.sqrt(in_sum2[name])
        scores.partition(n - 1, axis=1)
        total += float(scores[:, :n].sum(dtype=np.float64))
        dropped += n * w.shape[0]
    return total / dropped if dropped else 0.0
