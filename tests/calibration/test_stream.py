"""A model of which one layer at a time is in memory computes what the whole one computes, wherever hidden states wait."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer, tiny_model

from rq_gguf.calibration import memory, run
from rq_gguf.calibration.checkpoint import check_weights
from rq_gguf.calibration.families import FAMILIES, SWITCH, decoder_layers
from rq_gguf.calibration.file import write_calibration
from rq_gguf.calibration.spool import Shelf, Spool
from rq_gguf.calibration.stream import Streamed
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml

CPU = torch.device("cpu")
TEXT = " ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, 96, 700))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != SWITCH])  # encoder and decoder: has a pass of its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_one_by_one_equal_the_whole_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    tiny_model(family).to(dtype).save_pretrained(tmp_path, max_shard_size="100KB")
    check_equal(tmp_path)


def test_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in check_weights(tmp_path)
    check_equal(tmp_path)


def check_equal(tmp_path: Path) -> None:
    """Outputs of all layers bit for bit; logits, which are asked for at fewer positions, up to rounding."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected: list[torch.Tensor] = []
    for layer in decoder_layers(whole):
        layer.register_forward_hook(lambda _m, _a, out: expected.append(out[0] if isinstance(out, tuple) else out))
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 96, (3, 40)))
    streamed = Streamed(tmp_path, check_weights(tmp_path), CPU)
    with torch.inference_mode():
        logits = whole(input_ids=ids, use_cache=False).logits
        hidden = None
        for i in range(len(streamed)):
            with streamed.layer(i):
                hidden = streamed.through(i, ids, hidden)
            assert torch.equal(hidden, expected[i]), i
            assert all(p.is_meta for layer in streamed.layers for p in layer.parameters())
        streamed.load_head()
        assert hidden is not None
        torch.testing.assert_close(streamed.logits(ids, hidden, torch.tensor([3, 39])), logits[:, [3, 39]], rtol=1e-5, atol=1e-6)


def calibrated(directory: Path, ggml: Ggml, out: Path, **options: Any) -> bytes:
    result = run.calibrate(directory, TEXT, types=("q4_0", "q8_0"), ggml=ggml, device="cpu", threads=1, progress=False, **options)
    write_calibration(out, result)
    return out.read_bytes()


def test_hidden_states_on_disk_change_nothing(tmp_path: Path, ggml: Ggml, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, work = tmp_path / "m", tmp_path / "work"
    work.mkdir()
    tiny_model("mixtral").save_pretrained(directory)
    save_tokenizer(directory)
    in_memory = calibrated(directory, ggml, tmp_path / "a.gguf", work=work)
    monkeypatch.setattr(memory, "_IN_MEMORY", 0)
    assert calibrated(directory, ggml, tmp_path / "b.gguf", work=work) == in_memory
    assert not list(work.iterdir())


def test_too_little_memory_is_refused_before_anything_long(tmp_path: Path, ggml: Ggml) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"takes about 0\.5\d GB.* --max-memory allows 0\.40"):
        calibrated(tmp_path, ggml, tmp_path / "a.gguf", max_memory=400_000_000)
    assert calibrated(tmp_path, ggml, tmp_path / "a.gguf", max_memory=600_000_000)


def test_full_disk_is_one_sentence(tmp_path: Path, ggml: Ggml, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    directory = tmp_path / "m"
    tiny_model("mixtral").save_pretrained(directory)
    save_tokenizer(directory)
    monkeypatch.setattr(memory, "_IN_MEMORY", 0)
    monkeypatch.setattr("rq_gguf.calibration.spool.os.pwrite", full)
    with pytest.raises(UserError, match="a temporary file cannot be written: no space left on device"):
        calibrated(directory, ggml, tmp_path / "a.gguf", work=tmp_path)
    assert list(tmp_path.iterdir()) == [directory]


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm.weight", "model.layers.1.block_sparse_moe.experts.3.w1.weight"])
def test_a_layer_that_lacks_a_tensor_is_named_at_once(tmp_path: Path, name: str) -> None:
    tiny_model("mixtral", num_hidden_layers=3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks tensor {name.removeprefix('model.')}"):
        Streamed(tmp_path, check_weights(tmp_path), CPU)


@settings(max_examples=50, deadline=None)
@given(
    room=st.integers(0, 4000),
    steps=st.lists(st.tuples(st.sampled_from(["put", "drop"]), st.integers(0, 4), st.integers(1, 200), st.booleans()), max_size=30),
)
def test_spool_keeps_what_it_is_given(room: int, steps: list[tuple[str, int, int, bool]]) -> None:
    expected: dict[int, torch.Tensor] = {}
    with Spool(None, room) as spool:
        for i, (what, key, n, half) in enumerate(steps):
            if what == "drop":
                spool.drop((key,))
                expected.pop(key, None)
                continue
            tensor = (torch.arange(2 * n, dtype=torch.float32) + i).reshape(n, 2).to(torch.bfloat16 if half else torch.float32)
            spool.put((key,), tensor)
            expected[key] = tensor
            for k, t in expected.items():
                assert torch.equal(spool.get((k,)), t) and spool.get((k,)).dtype == t.dtype
        for key in set(range(5)) - expected.keys():
            with pytest.raises(KeyError):
                spool.get((key,))


def test_shelf_gives_back_its_matrices(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    matrices = [np.random.default_rng(i).random((i + 1, 7), dtype=np.float32) for i in range(4)]
    kept = [shelf.keep(m) for m in matrices]
    del shelf
    for _ in range(2):
        assert all(np.array_equal(read(), m) for read, m in zip(kept, matrices, strict=True))
    assert not list(tmp_path.iterdir())
