"""Reading what llama-perplexity prints, and refusing pairs of files that it would compare anyway."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from evaluation.printed import BASE_STDERR, BASE_STDOUT, KLD_STDERR, KLD_STDOUT, TOO_SHORT_STDERR

from rq_gguf.errors import UserError
from rq_gguf.evaluation import quality
from rq_gguf.evaluation.quality import Figure, Quality, _ChunkBar, check_same_vocabulary, check_space, logits_bytes
from rq_gguf.runtime.tools import Output

KLD = Output(KLD_STDOUT, KLD_STDERR)


def test_statistics():
    assert quality.parse_statistics(KLD) == Quality(
        chunks=6,
        ppl=Figure(29.625717, 2.116334),
        ppl_base=Figure(29.153271, 2.076323),
        kld=Figure(0.015272, 0.000769),
        kld_999=Figure(0.348848, None),
        rms_dp=Figure(2.532, 0.191),
        same_top=Figure(91.699, 0.706),
    )


@pytest.mark.parametrize("label", quality.LABELS.values())
def test_a_missing_label_is_an_error_with_the_last_line(label):
    lines = [line for line in KLD_STDOUT.splitlines() if " ".join(line.split(":")[0].split()) != label]
    assert len(lines) == len(KLD_STDOUT.splitlines()) - 1
    with pytest.raises(UserError) as e:
        quality.parse_statistics(Output("\n".join(lines), KLD_STDERR + "failed to decode\n"))
    assert str(e.value) == f"llama-perplexity printed no '{label}': failed to decode"


def test_no_statistics_at_all():
    with pytest.raises(UserError, match=r"no 'Mean PPL\(Q\)': it printed nothing"):
        quality.parse_statistics(Output("", ""))


def test_probabilities_that_are_not_finite():
    with pytest.raises(UserError, match="'nan' for 'Mean KLD'.*not finite"):
        quality.parse_statistics(Output(KLD_STDOUT.replace("0.015272", "nan"), KLD_STDERR))


def test_a_difference_of_nothing_has_no_error():
    # 0.5 / 0 * 0, where both models give the same
    printed = Output(KLD_STDOUT.replace("2.532 ± 0.191 %\nSame", "0.000 ±  -nan %\nSame"), KLD_STDERR)
    assert quality.parse_statistics(printed).rms_dp == Figure(0, 0)


def test_estimate_of_the_base(tmp_path):
    assert quality.parse_estimate(Output(BASE_STDOUT, BASE_STDERR), tmp_path / "a.txt") == Figure(29.1533, 2.07632)
    with pytest.raises(UserError, match=r"scored nothing of a.txt: give a text of at least 1024 tokens"):
        quality.parse_estimate(Output("", TOO_SHORT_STDERR), tmp_path / "a.txt")


@pytest.mark.parametrize(("printed", "last"), [(BASE_STDOUT, 6), (KLD_STDOUT, 6)])
@pytest.mark.parametrize("size", [1, 7, 10000])
def test_the_bar_follows_pieces_of_any_size(printed, last, size):
    seen = []
    with _ChunkBar("test", 8, False) as bar:
        bar._bar.update = lambda n: seen.append(n) or setattr(bar._bar, "n", bar._bar.n + n)
        for i in range(0, len(printed), size):
            bar.feed(printed[i : i + size])
    assert sum(seen) == last


def test_space_for_logits(tmp_path, monkeypatch):
    # The base's file of the captured run: 6 chunks, 16384 tokens in the vocabulary.
    assert logits_bytes(16384, 6) == 50159588
    check_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"logits take 1000000000.0 GB .*set TMPDIR"):
        check_space(tmp_path, 10**18)


def model(path: Path, arch: str = "llama", tokens: tuple[str, ...] = ("a", "b"), experts: int = 4) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(4)
    writer.add_expert_count(experts)
    writer.add_token_list(list(tokens))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_pairs(tmp_path):
    ours = model(tmp_path / "ours.gguf")
    assert quality.vocabulary_size(ours) == 2
    check_same_vocabulary(ours, model(tmp_path / "same.gguf"))
    for name, options, reason in [
        ("arch", {"arch": "qwen3moe"}, "its architecture is qwen3moe, not llama"),
        ("experts", {"experts": 8}, "its llama.expert_count is 8, not 4"),
        ("vocabulary", {"tokens": ("a", "c")}, "it has another vocabulary"),
    ]:
        with pytest.raises(UserError, match=f"{name}.gguf is no base of .*ours.gguf: {reason}"):
            check_same_vocabulary(ours, model(tmp_path / f"{name}.gguf", **options))
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    with pytest.raises(UserError, match="is not a GGUF file"):
        check_same_vocabulary(ours, text)
    with pytest.raises(UserError, match=r"none.gguf"):
        check_same_vocabulary(tmp_path / "none.gguf", ours)
