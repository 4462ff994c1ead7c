"""Files that appear under their final name only when complete."""

import errno
import glob
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rq_gguf.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a temporary name in the directory of `out`; rename it to `out` if the block ends well, remove it if it does not.

    What a program that was killed left behind under such a name is removed first. SIGTERM inside the block ends the program through
    SystemExit, so that it removes the file too.
    Raises UserError where the directory cannot be written or the disk is full.
    """
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    if out.is_dir():
        raise UserError(f"{out} is a directory; name the file to write")
    try:
        _remove_abandoned(out)
        temporary.touch()
    except OSError as e:
        raise UserError(f"cannot write in {out.parent}: {reason(e)}") from e
    try:
        with _sigterm_exits():
            yield temporary
        os.replace(temporary, out)
    except OSError as e:
        if e.errno in FULL:
            raise UserError(f"cannot write {out}: {reason(e)}; nothing was left behind") from e
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _remove_abandoned(out: Path) -> None:
    """Remove temporary files for `out` of processes that are gone."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        number = path.name.removesuffix(".partial").rpartition(".")[2]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):
            continue


@contextmanager
def full_disk_told() -> Iterator[None]:
    """A full disk inside, in a temporary file without a name, as UserError."""
    try:
        yield
    except OSError as e:
        if e.errno in FULL:
            raise UserError(f"a temporary file cannot be written: {reason(e)}; free some space and run the command again") from e
        raise


def reason(e: OSError) -> str:
    """What the system says about an error, as a clause."""
    text = e.strerror or str(e)
    return text[:1].lower() + text[1:]


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """While inside, SIGTERM raises SystemExit(143) in the main thread, unless the program handles the signal itself."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
