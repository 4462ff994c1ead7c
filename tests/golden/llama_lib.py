"""A thin ctypes binding of libllama: decode batches, get logits, watch what the experts were given.

Structures follow include/llama.h of the pinned llama.cpp. Two builds cannot live in one process, so tests use `run`, which starts
this file as a program: `python llama_lib.py JOB.json RESULT.npz`.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

CAPTURED = ("ffn_moe_topk", "ffn_moe_phys")
"""Graph nodes that `Llama` can watch: logical ids [token, used] and physical ids [group, token, used], per layer."""


@dataclass(frozen=True)
class Step:
    """One call of llama_decode: [n_tokens] each, logits wanted for all of them."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """Steps to run on a new context of a model."""

    library: Path
    """libllama.so"""
    model: Path
    steps: Sequence[Step]
    overrides: dict[str, str | int | bool] = field(default_factory=dict)
    """As --override-kv."""
    n_ctx: int = 1024
    n_ubatch: int = 512
    threads: int = 2
    capture: bool = False
    mmap: bool = True
    repack: bool = True
    precise: bool = False
    """Keys and values in F32, no flash attention."""
    servers: Sequence[str] = ()
    """HOST:PORT of RPC servers: all layers go to them."""


@dataclass(frozen=True)
class Result:
    """What a job gave, a list entry per step."""

    logits: list[NDArray[np.float32]]
    """[n_tokens, n_vocab]"""
    captured: list[dict[str, NDArray[np.int32]]]
    """Node name with its layer, such as ffn_moe_topk-0 -> ids [.., n_tokens, n_used]; empty without `capture`."""
    log: str = ""
    """What llama.cpp printed."""


def run(job: Job, work: Path, env: dict[str, str] | None = None) -> Result:
    """Run a job in a process of its own. Raises RuntimeError with what llama.cpp printed where it fails."""
    request, answer = work / "job.json", work / "result.npz"
    request.write_text(json.dumps(asdict(job), default=str))
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, request, answer]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, **(env or {})})
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-4000:]}")
    with np.load(answer) as data:
        logits = [data[f"logits {i}"] for i in range(len(job.steps))]
        captured: list[dict[str, NDArray[np.int32]]] = [{} for _ in job.steps]
        for key in data.files:
            i, name = key.split(" ", 1) if key[0].isdigit() else ("", "")
            if i:
                captured[int(i)][name] = data[key]
    return Result(logits, captured, done.stderr)


def same_bits(a: Result, b: Result) -> bool:
    """Every logit of every step."""
    return all(np.array_equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def prompt(tokens: Sequence[int], sequence: int = 0, start: int = 0) -> Step:
    """A step of consecutive tokens of one sequence."""
    return Step(tuple(tokens), tuple(range(start, start + len(tokens))), (sequence,) * len(tokens))


class _Override(ctypes.Structure):
    class _Value(ctypes.Union):
        _fields_ = [("i64", ctypes.c_int64), ("f64", ctypes.c_double), ("bool", ctypes.c_bool), ("str", ctypes.c_char * 128)]

    _fields_ = [("tag", ctypes.c_int), ("key", ctypes.c_char * 128), ("value", _Value)]


class _ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.POINTER(_Override)),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
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
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class _Tensor(ctypes.Structure):
    """The head of struct ggml_tensor."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4)]


_EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_bool, ctypes.c_void_p)
_LOAD_MODES = {False: b"none", True: b"mmap"}
_OVERRIDE_TAGS = {int: 0, bool: 2, str: 3}


class Llama:
    """A model and a context of one libllama. Close it, or use it in a `with`."""

    def __init__(self, job: Job) -> None:
        """Raises RuntimeError where llama.cpp refuses the model."""
        self._lib = lib = ctypes.CDLL(str(job.library), mode=ctypes.RTLD_GLOBAL)
        self._folder = Path(job.library).parent
        base = ctypes.CDLL(str(self._folder / "libggml-base.so"))
        self._name, self._get = base.ggml_get_name, base.ggml_backend_tensor_get
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.POINTER(_Tensor)]
        self._get.restype, self._get.argtypes = None, [ctypes.POINTER(_Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.POINTER(_Tensor)]
        self._nbytes = base.ggml_nbytes
        lib.llama_load_mode_from_str.restype, lib.llama_load_mode_from_str.argtypes = ctypes.c_int, [ctypes.c_char_p]
        lib.llama_model_default_params.restype = _ModelParams
        lib.llama_context_default_params.restype = _ContextParams
        lib.llama_model_load_from_file.restype = ctypes.c_void_p
        lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
        lib.llama_init_from_model.restype, lib.llama_init_from_model.argtypes = ctypes.c_void_p, [ctypes.c_void_p, _ContextParams]
        lib.llama_decode.restype, lib.llama_decode.argtypes = ctypes.c_int32, [ctypes.c_void_p, _Batch]
        lib.llama_get_logits.restype, lib.llama_get_logits.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]
        lib.llama_model_get_vocab.restype, lib.llama_model_get_vocab.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        lib.llama_vocab_n_tokens.restype, lib.llama_vocab_n_tokens.argtypes = ctypes.c_int32, [ctypes.c_void_p]
        lib.llama_free.restype, lib.llama_free.argtypes = None, [ctypes.c_void_p]
        lib.llama_model_free.restype, lib.llama_model_free.argtypes = None, [ctypes.c_void_p]
        lib.llama_backend_init.restype = None
        lib.llama_backend_init()

        self._overrides = (_Override * (len(job.overrides) + 1))()
        for entry, (key, value) in zip(self._overrides, job.overrides.items(), strict=False):
            entry.key, entry.tag = key.encode(), _OVERRIDE_TAGS[type(value)]
            if isinstance(value, str):
                entry.value.str = value.encode()
            elif isinstance(value, bool):
                entry.value.bool = value
            else:
                entry.value.i64 = value
        params = lib.llama_model_default_params()
        params.load_mode = lib.llama_load_mode_from_str(_LOAD_MODES[job.mmap])
        params.use_extra_bufts = job.repack
        for server in job.servers:
            self._add_server(server)
        params.n_gpu_layers = 999 if job.servers else 0
        params.kv_overrides = self._overrides
        self._context = None
        self._model = lib.llama_model_load_from_file(str(job.model).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp refused {job.model}")
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self.captured: dict[str, NDArray[np.int32]] = {}
        self._callback = _EvalCallback(self._watch)
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = job.n_ctx, max(512, job.n_ubatch), job.n_ubatch
        context.n_seq_max = 1 + max(s for step in job.steps for s in step.sequences)
        context.n_threads = context.n_threads_batch = job.threads
        context.kv_unified = True
        if job.precise:
            context.type_k = context.type_v = context.flash_attn_type = 0  # GGML_TYPE_F32, LLAMA_FLASH_ATTN_TYPE_DISABLED
        if job.capture:
            context.cb_eval = ctypes.cast(self._callback, ctypes.c_void_p)
        self._context = lib.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {job.model}")

    def _add_server(self, endpoint: str) -> None:
        base, rpc = (ctypes.CDLL(str(self._folder / f"libggml{part}.so"), mode=ctypes.RTLD_GLOBAL) for part in ("", "-rpc"))
        rpc.ggml_backend_rpc_add_server.restype, rpc.ggml_backend_rpc_add_server.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        base.ggml_backend_register.restype, base.ggml_backend_register.argtypes = None, [ctypes.c_void_p]
        registry = rpc.ggml_backend_rpc_add_server(endpoint.encode())
        if not registry:
            raise RuntimeError(f"no RPC server at {endpoint}")
        base.ggml_backend_register(registry)

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

    def decode(self, step: Step) -> NDArray[np.float32]:
        """Logits [n_tokens, n_vocab]; `captured` is what the watched nodes held. Raises RuntimeError where llama_decode fails."""
        n = len(step.tokens)
        ids = [(ctypes.c_int32 * 1)(s) for s in step.sequences]
        batch = _Batch(
            n_tokens=n,
            token=(ctypes.c_int32 * n)(*step.tokens),
            pos=(ctypes.c_int32 * n)(*step.positions),
            n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
            seq_id=(ctypes.POINTER(ctypes.c_int32) * n)(*[ctypes.cast(i, ctypes.POINTER(ctypes.c_int32)) for i in ids]),
            logits=(ctypes.c_int8 * n)(*[1] * n),
        )
        self.captured = {}
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (n, self.n_vocab)).copy()

    def _watch(self, tensor: "ctypes._Pointer[_Tensor]", ask: bool, _data: object) -> bool:
        """ggml_backend_sched_eval_callback: asked first whether a node is wanted, then called with its values."""
        name = self._name(tensor).decode()
        if name.rsplit("-", 1)[0] not in CAPTURED:
            return not ask
        if not ask:
            t, raw = tensor.contents, ctypes.create_string_buffer(self._nbytes(tensor))
            self._get(tensor, raw, 0, len(raw))
            shape, strides = tuple(reversed(t.ne[:3])), tuple(reversed(t.nb[:3]))
            values = np.ndarray(shape, np.int32, raw, strides=strides)  # the ids of the best experts are a view of all ids, sorted
            values = values[0] if values.shape[0] == 1 else values
            before = self.captured.get(name)  # of an earlier ubatch
            self.captured[name] = values.copy() if before is None else np.concatenate([before, values], axis=-2)
        return True


def main(request: str, answer: str) -> None:
    data = json.loads(Path(request).read_text())
    job = Job(**data | {"steps": [Step(**{k: tuple(v) for k, v in s.items()}) for s in data["steps"]]})
    arrays = {}
    with Llama(job) as llama:
        for i, step in enumerate(job.steps):
            arrays[f"logits {i}"] = llama.decode(step)
            arrays |= {f"{i} {name}": ids for name, ids in llama.captured.items()}
    np.savez(answer, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
