"""Spearman's rank correlation."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Of two rows of numbers, equal ones sharing the mean of their ranks; nan where a row holds one value only."""
    first, second = _ranks(a), _ranks(b)
    return float(np.corrcoef(first, second)[0, 1]) if np.ptp(first) > 0 and np.ptp(second) > 0 else float("nan")


def _ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 0."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[inverse], dtype=np.float64)
