"""What quantization makes of an expert's matrix, and threads to do it for many."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.feedback import Feedback
from rq_gguf.ggml import Ggml
from rq_gguf.types import fallback

Matrix = NDArray[np.float32]
Weights = Callable[[int, str, int], Matrix]
"""(block, matrix name gate/up/down, expert) -> [rows, cols] float32."""
Tick = Callable[[], object]


def requantize(ggml: Ggml, type_name: str, w: Matrix, importance: Matrix, feedback: Feedback | None = None) -> Matrix:
    """w [rows, cols] as it comes back from a file: quantized (to the fallback where its rows do not fit the type's blocks), dequantized."""
    kind = fallback(type_name, w.shape[1])
    return ggml.dequantize(
        kind, ggml.quantize(kind, w, importance) if feedback is None else feedback.quantize(ggml, kind, w, importance), w.shape[1]
    )


def in_threads(work: Callable[[int], None], n: int, threads: int, tick: Tick) -> None:
    """Call `work` with 0 to n - 1, `threads` at a time, and `tick` after each. On an error or Ctrl-C what has not begun is dropped."""
    pool = ThreadPoolExecutor(threads)
    try:
        for _ in pool.map(work, range(n)):
            tick()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
