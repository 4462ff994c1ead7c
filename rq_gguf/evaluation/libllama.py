"""libllama through ctypes: load a model, tokenize, decode batches, get logits.

Structures follow include/llama.h of the pinned llama.cpp. A library whose default parameters do not lie where they should is refused.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from rq_gguf.errors import UserError
from rq_gguf.runtime.tools import INSTALL, Output, last_error

GPU_LAYERS = "LLAMA_ARG_N_GPU_LAYERS"
"""llama.cpp's own environment variable for how many layers go to the GPU, all if it is not set."""


class _ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        *((name, ctypes.c_int) for name in ("split_mode", "load_mode", "lazy_mode")),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
        ("reserve", ctypes.c_char * 256),  # what a newer llama.h may append is passed on as its defaults
    ]


class _ContextParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        *((name, ctypes.c_int) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")),
        *((name, ctypes.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, ctypes.c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        *((name, ctypes.c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", ctypes.c_void_p),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", ctypes.c_void_p),
        ("reserve", ctypes.c_char * 256),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "main_gpu": 0, "kv_overrides": None, "vocab_only": False, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1,
    "yarn_beta_slow": -1.0, "type_k": 1, "type_v": 1, "embeddings": False, "offload_kqv": True, "no_perf": True, "kv_unified": False,
    "samplers": None, "n_samplers": 0,
}  # fmt: skip
NodeCallback = Callable[[int, bool], bool]
"""(address of a ggml_tensor, whether to say if it is of interest) -> that, or with a tensor that was computed whether to go on."""
_NodeCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@dataclass(frozen=True)
class Batch:
    """Tokens for one llama_decode."""

    tokens: NDArray[np.int32]
    """[n_tokens]"""
    positions: NDArray[np.int32]
    """[n_tokens] in their sequences."""
    sequences: Sequence[Sequence[int]]
    """[n_tokens] the sequences that each token belongs to: several where they share it."""
    outputs: NDArray[np.int8]
    """[n_tokens] 1 where logits are wanted."""


class Llama:
    """A model, and a context once `start` made one. Close it, or use it in a `with`."""

    def __init__(self, library: Path, model: Path) -> None:
        """Raises UserError for an unsuitable library and a model that llama.cpp refuses."""
        self._log: deque[str] = deque(maxlen=200)
        self._log_callback = _LogCallback(lambda level, text, data: self._log.append(text.decode(errors="replace")))
        self._model = self._context = None
        try:
            self._lib = lib = ctypes.CDLL(str(library))
            _declare(lib)
        except (OSError, AttributeError) as e:
            raise UserError(f"cannot use {library} as libllama ({e}); {INSTALL}") from e
        lib.llama_log_set(self._log_callback, None)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        self._context_params = lib.llama_context_default_params()
        for found, expected in ((params, _MODEL_DEFAULTS), (self._context_params, _CONTEXT_DEFAULTS)):
            wrong = [name for name, value in expected.items() if getattr(found, name) != value]
            if wrong:
                raise UserError(f"{library} is not of the llama.cpp that this rq-gguf knows ({wrong[0]} is not where it was); {INSTALL}")
        params.n_gpu_layers = _gpu_layers()
        self._model = lib.llama_model_load_from_file(os.fsencode(model), params)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {model}: {self.last_error()}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._model)
        self.recurrent = bool(lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))
        """Whether layers keep a state, which sequences cannot share."""
        self.max_sequences: int = lib.llama_max_parallel_sequences()
        bos, eos = lib.llama_vocab_bos(self._vocab), lib.llama_vocab_eos(self._vocab)
        self.bos: int | None = bos if lib.llama_vocab_get_add_bos(self._vocab) and bos >= 0 else None
        """What text of this model begins with."""
        self.start_token: int | None = next((t for t in (bos, eos) if t >= 0), None)
        """What to begin with where there is no text."""

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text alone, without BOS."""
        data = text.encode()
        tokens = (ctypes.c_int32 * (len(data) + 8))()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, False)
        if n < 0:
            tokens = (ctypes.c_int32 * -n)()
            n = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, False)
        return tokens[:n]

    def start(self, n_tokens: int, n_sequences: int, threads: int, on_node: NodeCallback | None = None) -> None:
        """Make the context. n_tokens, n_sequences: the most that a batch holds. on_node: see NodeCallback.

        Raises UserError where llama.cpp makes none.
        """
        params = self._context_params
        params.n_ctx = params.n_batch = n_tokens
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True  # sequences share tokens and room
        if on_node is not None:
            self._node_callback = _NodeCallback(lambda tensor, ask, _: on_node(tensor, ask))
            params.cb_eval = ctypes.cast(self._node_callback, ctypes.c_void_p)
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(f"llama.cpp made no context of {n_tokens} tokens: {self.last_error()}")

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Run a batch on an empty context: logits [outputs, n_vocab], good until the next call. Raises UserError where it fails."""
        tokens, positions, outputs = (
            np.ascontiguousarray(a, dtype=t) for a, t in ((batch.tokens, np.int32), (batch.positions, np.int32), (batch.outputs, np.int8))
        )
        counts = np.array([len(s) for s in batch.sequences], dtype=np.int32)
        ids = np.array([i for s in batch.sequences for i in s], dtype=np.int32)
        addresses = (ids.ctypes.data + ids.itemsize * (np.cumsum(counts) - counts)).astype(np.uintp)
        raw = _Batch(len(tokens), *(a if a is None else a.ctypes.data for a in (tokens, None, positions, counts, addresses, outputs)))
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        status = self._lib.llama_decode(self._context, raw)
        if status != 0:
            raise UserError(f"llama.cpp cannot run a batch of {len(tokens)} tokens (status {status}): {self.last_error()}")
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (int(outputs.sum()), self.n_vocab))

    def last_error(self) -> str:
        """The line of llama.cpp's log that most likely says what went wrong."""
        return last_error(Output("", "".join(self._log)))


def _declare(lib: ctypes.CDLL) -> None:
    """Give the functions their types. Raises AttributeError where one is missing."""
    pointer, i32, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    for name, result, *arguments in (
        ("llama_log_set", None, _LogCallback, pointer),
        ("llama_backend_init", None),
        ("llama_model_default_params", _ModelParams),
        ("llama_context_default_params", _ContextParams),
        ("llama_model_load_from_file", pointer, text, _ModelParams),
        ("llama_model_free", None, pointer),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_model_n_ctx_train", i32, pointer),
        ("llama_model_is_recurrent", ctypes.c_bool, pointer),
        ("llama_model_is_hybrid", ctypes.c_bool, pointer),
        ("llama_vocab_n_tokens", i32, pointer),
        ("llama_vocab_bos", i32, pointer),
        ("llama_vocab_eos", i32, pointer),
        ("llama_vocab_get_add_bos", ctypes.c_bool, pointer),
        ("llama_tokenize", i32, pointer, text, i32, pointer, i32, ctypes.c_bool, ctypes.c_bool),
        ("llama_max_parallel_sequences", ctypes.c_size_t),
        ("llama_init_from_model", pointer, pointer, _ContextParams),
        ("llama_free", None, pointer),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, ctypes.c_bool),
        ("llama_decode", i32, pointer, _Batch),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


def _gpu_layers() -> int:
    try:
        return int(os.environ.get(GPU_LAYERS, "-1"))
    except ValueError:  # "all" or "auto"
        return -1
