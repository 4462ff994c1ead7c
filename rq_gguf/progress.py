"""Progress bars that `--quiet` hushes."""

from typing import Any

from tqdm import tqdm

from rq_gguf.verbosity import is_quiet


class Bar(tqdm):
    """tqdm, to stderr; disabled where the command is quiet."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if is_quiet():
            options["disable"] = True
        super().__init__(*args, **options)
