"""A model's directory cannot run anything here: no pickles, no code of its own, nothing that is fetched for it."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from rq_gguf.calibration.run import tokenize
from rq_gguf.errors import UserError
from rq_gguf.writing import convert
from rq_gguf.writing.convert import convert_base
from rq_gguf.writing.untrusted import without_code

EVIL = "from pathlib import Path\nPath({!r}).touch()\nfrom transformers import LlamaTokenizerFast as Evil, LlamaConfig as EvilConfig\n"


@pytest.fixture
def evil(demo_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(a copy of the demo model that brings code for all that transformers could load, the file that the code would make)."""
    directory, mark = tmp_path / "evil-model", tmp_path / "ran"
    shutil.copytree(demo_model, directory)
    (directory / "evil.py").write_text(EVIL.format(str(mark)))
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "someone/else--evil.Evil"]}),
    ):
        data = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(data | {"auto_map": classes}))
    return directory, mark


def test_code_is_not_run(evil: tuple[Path, Path], tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, mark = evil
    commands: list[Any] = []

    def run_tool(args: list[Any], **options: Any) -> Any:
        commands.append((args, options, sorted(p.name for p in Path(args[2]).iterdir())))
        return real(args, **options)

    real = convert.run_tool
    monkeypatch.setattr(convert, "run_tool", run_tool)
    convert_base(directory, tmp_path / "base.gguf", progress=False)
    tokenize(directory, "Once upon a time")
    assert (tmp_path / "base.gguf").stat().st_size > 1 << 20 and not mark.exists()
    (_, options, names) = commands[0]
    assert options["env"]["HF_HUB_OFFLINE"] == "1" and "evil.py" not in names and "model.safetensors" in names


def test_all_but_code_is_there(evil: tuple[Path, Path], demo_model: Path) -> None:
    directory, _ = evil
    with without_code(directory) as folder:
        assert folder.name == directory.name
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in directory.iterdir() if p.suffix != ".py")
        for name in ("config.json", "tokenizer_config.json"):
            assert json.loads((folder / name).read_text()) == json.loads((demo_model / name).read_text())
    assert not folder.exists()
    with without_code(demo_model) as folder:
        assert folder == demo_model


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_are_refused_unless_asked_for(demo_model: Path, tmp_path: Path, runtime: Path) -> None:
    directory, mark = tmp_path / "m", tmp_path / "ran"
    directory.mkdir()
    for path in demo_model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil(mark)}))
    with pytest.raises(UserError, match=r"only as \.bin files.*--allow-pickle"):
        convert_base(directory, tmp_path / "base.gguf", progress=False)
    assert not mark.exists()
    with pytest.raises(UserError, match="cannot convert"):
        convert_base(directory, tmp_path / "base.gguf", allow_pickle=True, progress=False)
    assert not mark.exists()  # the converter reads weights only
    shutil.copy(demo_model / "model.safetensors", directory)
    convert_base(directory, tmp_path / "base.gguf", progress=False)
    assert not mark.exists()
