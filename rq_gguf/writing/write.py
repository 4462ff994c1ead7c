"""Write a tiered GGUF: a base model, a plan and a calibration in, one file out.

The whole layout is computed first, so every row's place in the file is known and threads write where they are done. Peak memory
is a few pieces (quantize.PIECE_WEIGHTS) per thread, whatever the model's size.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType
from threadpoolctl import threadpool_limits

import rq_gguf
from rq_gguf import format as fmt
from rq_gguf import gguf_file as gg
from rq_gguf.atomic import replacing
from rq_gguf.calibration.data import Calibration
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import Value
from rq_gguf.planning.plan import Plan
from rq_gguf.progress import Bar
from rq_gguf.threads import available_threads
from rq_gguf.writing import layout
from rq_gguf.writing.layout import Output
from rq_gguf.writing.others import FILE_TYPES, Others, file_type_of, importance_rows, stored_types
from rq_gguf.writing.quantize import Piece, convert
from rq_gguf.writing.source import Source
from rq_gguf.writing.split import part_names, split_headers

log = logging.getLogger(__name__)

QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION"""


@dataclass(frozen=True)
class WriteReport:
    """What a write made."""

    paths: tuple[Path, ...]
    """The file, or the files of a split model."""
    total_bytes: int
    expert_bytes: int
    """Tier tensors, their padding, and maps: what the plan's budget bounds."""
    other_bytes: int
    """All else: header, attention, embeddings and so on."""
    seconds: float
    threads: int


def write_model(
    base: Path,
    plan: Plan,
    calibration: Calibration,
    out: Path,
    *,
    ggml: Ggml,
    others: Others | None = None,
    threads: int | None = None,
    calibration_file: str = "",
    split_bytes: int | None = None,
    progress: bool = True,
) -> WriteReport:
    """Write `plan` for the base model to `out`, which appears only when complete.

    base: F16, BF16, F32 or Q8_0 GGUF. ggml: the runtime's libggml-base. others: types of what is no routed expert, Q8_0 by default.
    threads: all processors this process may use by default.
    calibration_file: name for quantize.imatrix.file. split_bytes: most bytes of a file: a larger model goes to out-00001-of-0000n.gguf and
    so on, of which the first appears last.
    Raises UserError for a base, plan and calibration that do not belong together, a plan over its budget, weights that are not
    finite, a full disk or a directory that cannot be written.
    """
    start = time.perf_counter()
    threads = threads or available_threads()
    others = others or Others()
    with Source(base) as source:
        if out.exists() and out.samefile(base):
            raise UserError(f"{out} is the base model itself; name another file")
        check_plan(source, plan)
        check_calibration(source, calibration, [p.layer for p in plan.layers])
        if plan.feedback and any(layer.moments is None for layer in calibration.layers):
            raise UserError(
                "the plan quantizes with error feedback, which needs moments of inputs that the calibration lacks; calibrate again"
            )
        types = stored_types(source, others)
        rows = importance_rows(source, types, calibration)
        outputs = list(layout.outputs(source, plan, types))
        expert_bytes = layout.expert_bytes(outputs)
        if expert_bytes > plan.budget_bytes:
            raise UserError(f"the plan's experts take {expert_bytes} bytes, more than its budget of {plan.budget_bytes}; plan again")
        values = _values(source, plan, calibration, others, calibration_file, expert_bytes)
        values["general.file_type"] = gg.scalar(
            GGUFValueType.UINT32, file_type_of(o.tensor for o in outputs) or FILE_TYPES[others.file_type]
        )
        parts = split_headers(values, (o.tensor for o in outputs), split_bytes)
        outputs = [Output(t, o.content) for t, o in zip((t for _, placed in parts for t in placed), outputs, strict=True)]
        sizes = [placed[-1].offset + gg.pad(placed[-1].n_bytes) for _, placed in parts]
        paths, total = part_names(out, len(parts)), sum(sizes)
        layers = {c.layer: c for c in calibration.layers}
        pieces = layout.pieces(outputs, layers, rows, plan.feedback)
        quiet = None if progress else True  # None: only where stderr is a terminal
        with (
            ExitStack() as files,
            Bar(desc="write", total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=0.5, leave=False, disable=quiet) as bar,
        ):
            temporary = [files.enter_context(replacing(path)) for path in paths]
            _write(temporary, [header for header, _ in parts], sizes, outputs, pieces, source, ggml, threads, bar)
            if len(paths) > 1:  # new files must not meet an old first one
                paths[0].unlink(missing_ok=True)
    log.debug("%d tensors, %d bytes of experts, %d of all else, %d threads", len(outputs), expert_bytes, total - expert_bytes, threads)
    return WriteReport(paths, total, expert_bytes, total - expert_bytes, time.perf_counter() - start, threads)


def check_plan(source: Source, plan: Plan) -> None:
    """Raise UserError unless the plan covers exactly the model's routed experts, with the same instances in both groups."""
    shapes = {s.layer: s for s in source.shape.layers}
    planned = [p.layer for p in plan.layers]
    for layer in sorted(shapes.keys() ^ set(planned)):
        what = "has no entry for" if layer in shapes else "has experts for"
        raise UserError(f"the plan {what} block {layer}, unlike {source.path}; plan for this model")
    if len(planned) != len(set(planned)):
        raise UserError("the plan has two entries for one block")
    for p in plan.layers:
        n_expert = shapes[p.layer].n_expert
        if (len(p.gate_up), len(p.down)) != (n_expert, n_expert):
            raise UserError(f"the plan has {len(p.gate_up)} experts in block {p.layer}, {source.path} has {n_expert}; plan for this model")
        for e, rows in enumerate(zip(p.gate_up, p.down, strict=True)):
            if len(rows[0]) != len(rows[1]) or not rows[0]:
                raise UserError(
                    f"the plan gives expert {e} of block {p.layer} {len(rows[0])} instances of gate and up and {len(rows[1])} of down; "
                    "both need the same number, 1 or more"
                )
    if plan.dispatch not in fmt.DISPATCHES:
        raise UserError(f"the plan's dispatch is {plan.dispatch!r}; it can be {' or '.join(fmt.DISPATCHES)}")
    if not 1 <= plan.dispatch_block < 1 << 31:
        raise UserError(f"the plan's dispatch block is {plan.dispatch_block}; it must be 1 or more")


def check_calibration(source: Source, calibration: Calibration, layers: Iterable[int]) -> None:
    """Raise UserError for a calibration that was made for another model, or lacks one of the layers."""
    known = {c.layer: c for c in calibration.layers}
    shapes = {s.layer: s for s in source.shape.layers}
    for layer in layers:
        if layer not in known:
            raise UserError(f"the calibration has no entry for block {layer} of {source.path}; calibrate this model")
        n, wanted = known[layer].n_expert, shapes[layer].n_expert
        if n != wanted:
            raise UserError(f"the calibration has {n} experts in block {layer}, {source.path} has {wanted}; calibrate this model")
        for matrix, rows in known[layer].in_sum2.items():
            cols = shapes[layer].n_ff if matrix == "down" else shapes[layer].n_embd
            if rows.shape != (wanted, cols):
                raise UserError(
                    f"the calibration's {matrix} inputs of block {layer} have shape {list(rows.shape)}, "
                    f"{source.path} needs {[wanted, cols]}; calibrate this model"
                )
    if calibration.model_fingerprint:
        fingerprint = source.fingerprint()
        if fingerprint and fingerprint != calibration.model_fingerprint:
            name = calibration.model or "unnamed"
            raise UserError(f"the calibration was made for another model ({name}): {source.path} has other routers; calibrate this model")


def _values(
    source: Source, plan: Plan, calibration: Calibration, others: Others, calibration_file: str, expert_bytes: int
) -> dict[str, Value]:
    """The source's values as they are, then what llama-quantize would set, then rq.*."""
    u32, u64, f32 = GGUFValueType.UINT32, GGUFValueType.UINT64, GGUFValueType.FLOAT32
    # Alignment is the default one, the split another, and who quantized the source did not quantize this.
    dropped = ("split.", "quantize.imatrix.", "general.alignment", "general.quantized_by", "general.file_type")
    values = {k: v for k, v in source.header.values.items() if not k.startswith(dropped)}
    values["general.quantization_version"] = gg.scalar(u32, QUANTIZATION_VERSION)
    if calibration_file:
        values["quantize.imatrix.file"] = gg.string(calibration_file)
    if calibration.text_sha256:
        values["quantize.imatrix.dataset"] = gg.string(f"text of sha256 {calibration.text_sha256}")
    values["quantize.imatrix.entries_count"] = gg.scalar(
        u32, len(calibration.dense_in_sum2) + sum(len(c.in_sum2) for c in calibration.layers)
    )

    blocks = source.header.integer(f"{source.shape.arch}.block_count", 0)
    blocks = max(blocks, 1 + max(p.layer for p in plan.layers))
    if blocks > len(source.tensors):
        raise UserError(f"{source.path} is damaged: it claims {blocks} blocks and holds {len(source.tensors)} tensors")
    replicas = [0] * blocks
    for p in plan.layers:
        replicas[p.layer] = sum(p.copies)
    values[fmt.KEY_FORMAT_VERSION] = gg.scalar(u32, fmt.FORMAT_VERSION)
    values[fmt.KEY_DISPATCH] = gg.string(plan.dispatch)
    values[fmt.KEY_DISPATCH_BLOCK] = gg.scalar(u32, plan.dispatch_block)
    values[fmt.KEY_TOOL_VERSION] = gg.string(rq_gguf.__version__)
    values[fmt.KEY_POLICY] = gg.string(plan.policy)
    values[fmt.KEY_BUDGET] = gg.string(plan.budget)
    values[fmt.KEY_BUDGET_BYTES] = gg.scalar(u64, plan.budget_bytes)
    values[fmt.KEY_EXPERT_BYTES] = gg.scalar(u64, expert_bytes)
    values[fmt.KEY_TYPES] = gg.strings(plan.types)
    values[fmt.KEY_OTHER] = gg.string(others.file_type)
    if others.tensor_types:
        values[fmt.KEY_TENSOR_TYPES] = gg.strings(others.texts)
    values[fmt.KEY_REPLICAS] = gg.numbers(u32, replicas)
    values[fmt.KEY_CALIBRATION_HASH] = gg.string(plan.calibration_sha256)
    values[fmt.KEY_CALIBRATION_TOKENS] = gg.scalar(u64, plan.calibration_tokens)
    values[fmt.KEY_SOURCE_MODEL] = gg.string(plan.model)
    planned = {p.layer for p in plan.layers}
    for c in calibration.layers:
        if c.layer in planned and calibration.load_known:
            share = c.selections / max(int(c.selections.sum()), 1)
            values[fmt.KEY_LOAD.format(layer=c.layer)] = gg.numbers(f32, share.tolist())
    return values


def _write(
    paths: Sequence[Path],
    headers: Sequence[bytes],
    sizes: list[int],
    outputs: list[Output],
    pieces: Iterator[Piece],
    source: Source,
    ggml: Ggml,
    threads: int,
    bar: Bar,
) -> None:
    """Fill the temporary files: headers and maps here, pieces by threads. The bytes written must be the bytes laid out."""
    fds: list[int] = []
    try:
        for path, size in zip(paths, sizes, strict=True):
            fds.append(os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0)))
            _reserve(fds[-1], size)
        written = sum(_put(fd, header, 0) for fd, header in zip(fds, headers, strict=True))
        for o in outputs:
            if isinstance(o.content, np.ndarray):
                written += _put(fds[o.tensor.file], np.ascontiguousarray(o.content, dtype="<i4").tobytes(), o.tensor.offset)
        bar.update(written)
        workers = _Workers(pieces, lambda piece: _write_piece(fds[piece.file], piece, source, ggml))
        with threadpool_limits(1):  # numpy's products run in threads already
            written += workers.run(threads, bar)
        expected = sum(map(len, headers)) + sum(o.tensor.n_bytes for o in outputs)
        found = [os.fstat(fd).st_size for fd in fds]
        if written != expected or found != sizes:
            raise RuntimeError(f"{written} bytes written to files of {found}, {expected} of {sizes} laid out")
    finally:
        for fd in fds:
            os.close(fd)


def _write_piece(fd: int, piece: Piece, source: Source, ggml: Ggml) -> int:
    data = convert(piece, source, ggml).data.cast("B")
    return sum(_put(fd, data, offset) for offset in piece.offsets)


def _put(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of data at an offset; the number of bytes."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done


def _reserve(fd: int, total: int) -> None:
    """Take the file's space at once: a full disk shows before the work, and padding is zero."""
    os.ftruncate(fd, total)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, total)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


class _Workers:
    """Threads that take pieces in order from one iterator; an error stops them all.

    Whoever fails, all earlier pieces have been taken and are finished, so the earliest piece's error is the same in every run.
    """

    def __init__(self, pieces: Iterator[Piece], work: Callable[[Piece], int]) -> None:
        self._pieces, self._work = enumerate(pieces), work
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._errors: list[tuple[int, BaseException]] = []
        self._written = 0

    def run(self, threads: int, bar: Bar) -> int:
        """Do all the work and return the sum of what it returned. An exception here (Ctrl-C) stops the threads first."""
        workers = [threading.Thread(target=self._loop, daemon=True) for _ in range(threads)]
        shown = 0
        try:
            for w in workers:
                w.start()
            for w in workers:
                while w.is_alive():
                    w.join(0.1)
                    bar.update(self._written - shown)
                    shown = self._written
        finally:
            self._stop.set()
            for w in workers:
                if w.ident is not None:
                    w.join()
        if self._errors:
            raise min(self._errors, key=lambda error: error[0])[1]
        return self._written

    def _loop(self) -> None:
        number = -1  # until a piece is taken: making one failed
        try:
            while not self._stop.is_set():
                with self._lock:
                    taken = next(self._pieces, None)
                if taken is None:
                    return
                number, piece = taken
                n = self._work(piece)
                with self._lock:
                    self._written += n
        except BaseException as e:
            self._errors.append((number, e))
            self._stop.set()
