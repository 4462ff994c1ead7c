"""What published files are called."""

from pathlib import Path

import pytest

from rq_gguf.card.naming import name_for, published_name, short_bpw, split_name
from rq_gguf.gguf_file import Header, string


def header(**general: str) -> Header:
    return Header(Path("some file.gguf"), 0, {f"general.{key}": string(value) for key, value in general.items()}, {}, 32)


@pytest.mark.parametrize(
    ("general", "bpw", "name"),
    [
        (
            {"name": "OLMoE 1B 7B Instruct", "basename": "OLMoE", "size_label": "1B-7B", "finetune": "Instruct"},
            4.5,
            "OLMoE-1B-7B-Instruct-RQ-4.5bpw.gguf",
        ),
        (
            {"basename": "Mixtral", "size_label": "8x7B", "finetune": "Instruct", "version": "v0.1"},
            3.999,
            "Mixtral-8x7B-Instruct-v0.1-RQ-4bpw.gguf",
        ),
        ({"name": "Demo", "size_label": "16x5.8M"}, 8.523, "Demo-16x5.8M-RQ-8.52bpw.gguf"),
        ({"name": "Qwen3 30B", "size_label": "30B"}, 5.0, "Qwen3-30B-RQ-5bpw.gguf"),  # says the size once
        ({}, 2.1, "some-file-RQ-2.1bpw.gguf"),
        ({"name": "../../etc: a/b\n"}, 2.0, "etc-a-b-RQ-2bpw.gguf"),  # a name is no path
        ({"name": "名前"}, 2.0, "model-RQ-2bpw.gguf"),
    ],
)
def test_names(general, bpw, name):
    assert published_name(header(**general), bpw) == name


def test_bits():
    assert [short_bpw(x) for x in (10.0, 4.504, 4.506, 16.02)] == ["10", "4.5", "4.51", "16.02"]


def test_files_of_one_model():
    assert split_name("x-RQ-2bpw.gguf", 0, 1) == "x-RQ-2bpw.gguf"
    assert split_name("x-RQ-2bpw.gguf", 1, 3) == "x-RQ-2bpw-00002-of-00003.gguf"
    assert split_name("x-RQ-2bpw-00001-of-00003.gguf", 2, 3) == "x-RQ-2bpw-00003-of-00003.gguf"


@pytest.mark.runtime
def test_of_a_file(demo_base):
    assert name_for(demo_base) == "Demo-16x5.8M-RQ-16.02bpw.gguf"
