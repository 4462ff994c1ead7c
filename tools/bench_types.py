"""What a byte of each type costs one core: `python tools/bench_types.py [THREADS GB/S]`.

Times ggml's dot product of one long row (it fits the caches) on one core, best of many, for every type that experts can take. With a
number of threads and the bandwidth of the RAM it also prints `type_cost` for a machine's file: how many times longer than that bandwidth
says the CPU takes, where arithmetic is the limit.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rq_gguf.runtime.tools import library_path
from rq_gguf.types import TYPES, number, row_bytes

ROW = 1 << 18
ROUNDS, CALLS = 6, 150


class Traits(ctypes.Structure):
    """struct ggml_type_traits_cpu"""

    _fields_ = [("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p), ("type", ctypes.c_int), ("rows", ctypes.c_int64)]


DOT = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
)
"""ggml_vec_dot_t: values, result, its stride, weights, their stride, the other factor, its stride, rows."""


def rates() -> dict[str, float]:
    """Bytes of weights per second, by type."""
    ggml = ctypes.CDLL(str(library_path("ggml-cpu")))
    ggml.ggml_get_type_traits_cpu.restype, ggml.ggml_get_type_traits_cpu.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    ggml.ggml_cpu_init()
    rng = np.random.default_rng(0)
    other, result = np.zeros(4 * ROW, dtype=np.uint8), np.zeros(16, dtype=np.float32)
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name in TYPES:
            traits = ggml.ggml_get_type_traits_cpu(number(name)).contents
            if not traits.vec_dot:
                continue
            dot, weights = DOT(traits.vec_dot), rng.integers(0, 64, row_bytes(name, ROW), dtype=np.uint8)
            for _ in range(CALLS):
                start = time.perf_counter()
                dot(ROW, result.ctypes.data, 0, weights.ctypes.data, 0, other.ctypes.data, 0, 1)
                best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
    return {name: row_bytes(name, ROW) / seconds for name, seconds in best.items()}


def main() -> None:
    found = rates()
    print("| type | GB/s of one core | 10^9 weights per second |\n|---|---|---|")
    for name, rate in found.items():
        print(f"| {name} | {rate / 1e9:.1f} | {rate / row_bytes(name, ROW) * ROW / 1e9:.1f} |")
    if len(sys.argv) > 2:
        threads, bandwidth = int(sys.argv[1]), 1e9 * float(sys.argv[2])
        costs = {name: round(bandwidth / (threads * rate), 2) for name, rate in found.items()}
        print(json.dumps({"type_cost": {name: cost for name, cost in costs.items() if cost > 1}}))


if __name__ == "__main__":
    main()
