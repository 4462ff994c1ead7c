"""A model's directory with some of its files changed, for a program that takes a directory: nothing is copied."""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def linked(model_dir: Path, changed: Mapping[str, str], left_out: Collection[str] = ()) -> Iterator[Path]:
    """While inside, a folder of the directory's name with links to its files.

    changed: file's name -> text that it has there. left_out: names of files that are not there.
    """
    with tempfile.TemporaryDirectory(prefix="rq-gguf-") as name:
        folder = Path(name) / model_dir.resolve().name
        folder.mkdir()
        for file in model_dir.iterdir():
            if file.name in changed:
                (folder / file.name).write_text(changed[file.name], encoding="utf-8")
            elif file.name not in left_out:
                (folder / file.name).symlink_to(file.resolve())
        yield folder
