"""Record the routing of a GGUF with libllama: `python -m rq_gguf.evaluation.routing REQUEST.json ANSWER.npz`.

A process of its own, since libllama ends its process where an assertion fails. It prints how many tokens have passed, line by line, and
writes a trace, or where that fails a JSON with one key, error, instead. Any GGUF that the library runs, in tiers or not: what the router
chooses is the node `ffn_moe_topk` of llama.cpp's graphs, logical ids before they are remapped.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rq_gguf.calibration.sequences import SEQUENCE, cut
from rq_gguf.calibration.trace import Recorder, Trace, write_trace
from rq_gguf.errors import UserError
from rq_gguf.evaluation.libllama import Batch, Llama
from rq_gguf.format import parse_expert_name
from rq_gguf.gguf_file import Header, read_headers

_NODE = b"ffn_moe_topk-"


class _TensorHead(ctypes.Structure):
    """How ggml's struct ggml_tensor begins."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4)]


class ChosenExperts:
    """A callback for libllama.Llama.start that hands what routers choose to a recorder."""

    def __init__(self, ggml: Path, recorder: Recorder) -> None:
        """ggml: the library ggml-base that the model's libllama uses. Raises UserError where it cannot be used."""
        self._recorder = recorder
        self.error: Exception | None = None
        try:
            lib = ctypes.CDLL(str(ggml))
            self._name, self._size, self._get = lib.ggml_get_name, lib.ggml_nbytes, lib.ggml_backend_tensor_get
        except (OSError, AttributeError) as e:
            raise UserError(f"cannot use {ggml} as ggml-base ({e})") from e
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._size.restype, self._size.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        self._get.restype, self._get.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

    def __call__(self, tensor: int, ask: bool) -> bool:
        name: bytes = self._name(tensor)
        if not name.startswith(_NODE):
            return not ask
        if ask:
            return True
        try:
            self._recorder.add(int(name[len(_NODE) :]), self._read(tensor))
        except Exception as e:  # must not pass through the library: it is raised when the batch has ended
            self.error = e
            return False
        return True

    def _read(self, tensor: int) -> NDArray[np.int32]:
        """[n_tokens, n_expert_used]: a view of all experts in order, so its rows lie apart."""
        head = ctypes.cast(tensor, ctypes.POINTER(_TensorHead)).contents
        data = np.empty(self._size(tensor), dtype=np.uint8)
        self._get(tensor, data.ctypes.data, 0, data.nbytes)
        return np.lib.stride_tricks.as_strided(data.view(np.int32), (head.ne[1], head.ne[0]), (head.nb[1], head.nb[0])).copy()


def record(library: Path, ggml: Path, model: Path, text: str, tokens: int, threads: int) -> Trace:
    """Pass about `tokens` tokens of a text through a GGUF. Raises UserError for a model without experts, and as libllama.Llama does."""
    headers = read_headers(model)
    n_expert, n_embd, n_ff = _sizes(model, headers)
    recorder = Recorder()
    with Llama(library, model) as llama:
        length = min(SEQUENCE, llama.n_ctx_train or SEQUENCE)
        sequences = cut((np.asarray(llama.tokenize(text), dtype=np.int64), llama.bos), tokens, length)
        recorder.begin(len(s) for s in sequences)
        chosen = ChosenExperts(ggml, recorder)
        llama.start(length, 1, threads, chosen)
        done = 0
        for ids in sequences:
            # All logits are asked for: llama.cpp computes the last layer for tokens of which somebody wants to know something.
            n = len(ids)
            batch = Batch(ids.astype(np.int32), np.arange(n, dtype=np.int32), [[0]] * n, np.ones(n, dtype=np.int8))
            try:
                llama.decode(batch)
            except UserError:
                if chosen.error is None:
                    raise
            if chosen.error is not None:
                raise chosen.error
            done += n
            print(done, flush=True)
    return recorder.trace(model.stem, n_expert, n_embd, n_ff)


def _sizes(model: Path, headers: list[Header]) -> tuple[int, int, int]:
    """(experts, n_embd, n_ff)"""
    down = [t for h in headers for t in h.tensors.values() if (parse_expert_name(t.name) or (0, "", 0))[1] == "down"]
    n_expert = headers[0].integer(f"{headers[0].get('general.architecture')}.expert_count", 0)
    if not down or n_expert < 2:
        raise UserError(f"{model} holds no routed experts (a dense model, perhaps): there is no routing to record")
    return n_expert, down[0].ne[1], down[0].ne[0]


def main(request: Path, answer: Path) -> None:
    data: dict[str, Any] = json.loads(request.read_text(encoding="utf-8"))
    try:
        library, ggml, model = (Path(data[name]) for name in ("library", "ggml", "model"))
        write_trace(answer, record(library, ggml, model, data["text"], data["tokens"], data["threads"]))
    except UserError as e:
        answer.write_text(json.dumps({"error": str(e)}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
