"""Which model a calibration belongs to."""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def router_fingerprint(routers: Iterable[NDArray[np.float32]]) -> str:
    """sha256 over all routers' weights, float32 [n_expert, n_embd] each, in block order.

    The same for a transformers checkpoint and the GGUF made of it, because converters and quantizers leave routers exact.
    """
    digest = hashlib.sha256()
    for router in routers:
        digest.update(np.ascontiguousarray(router, dtype="<f4").tobytes())
    return digest.hexdigest()
