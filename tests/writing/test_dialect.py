"""What the converter is given instead of transformers' own spelling, and what is refused before it."""

import json
from pathlib import Path

import pytest

from rq_gguf.errors import UserError
from rq_gguf.writing.dialect import adapted, adapted_directory, check_convertible, lacks_mtp


def test_published_configurations_stay_as_they_are() -> None:
    for config in (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        {"model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"]},
        {"model_type": "deepseek_v3", "scoring_func": "sigmoid"},
        {"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]},
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
    ):
        assert adapted(config) is config


def test_transformers_spelling_is_translated() -> None:
    assert adapted({"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]})["architectures"] == ["PhiMoEForCausalLM"]
    for model_type in ("deepseek_v3", "dots1", "glm4_moe_lite", "minimax_m2"):
        assert adapted({"model_type": model_type})["scoring_func"] == "sigmoid"
    hybrid = {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention", "attention"]}
    assert adapted(hybrid)["layer_types"] == ["mamba", "attention", "attention"]
    assert hybrid["layer_types"][0] == "linear_attention"


def test_the_directory_is_seen_through_links(tmp_path: Path) -> None:
    model = tmp_path / "My-Model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text(json.dumps({"model_type": "dots1", "n_routed_experts": 8}))
    with adapted_directory(model) as seen:
        assert seen.name == "My-Model" and seen != model
        assert json.loads((seen / "config.json").read_text()) == {"model_type": "dots1", "n_routed_experts": 8, "scoring_func": "sigmoid"}
        assert (seen / "model.safetensors").read_bytes() == b"weights"
        assert sorted(p.name for p in seen.iterdir()) == ["config.json", "model.safetensors"]
    assert not seen.exists() and (model / "model.safetensors").exists()
    (model / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with adapted_directory(model) as seen:
        assert seen == model
    for text, words in (("{", r"config\.json cannot be read"), ("[]", r"config\.json is not a JSON object")):
        (model / "config.json").write_text(text)
        with pytest.raises(UserError, match=words), adapted_directory(model):
            pass


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "switch_transformers"}, "M is a Switch Transformer, .* `rq-gguf calibrate` and `rq-gguf plan` work on it"),
        ({"model_type": "llama_moe"}, "M is a LLaMA-MoE, whose routers are networks of two layers .* `rq-gguf plan` work on it"),
    ],
)
def test_what_llama_cpp_cannot_run(config: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_convertible(config, "M")
    check_convertible({"model_type": "mixtral"}, "M")


@pytest.mark.parametrize(
    ("config", "tensor", "lacking"),
    [
        ({"model_type": "qwen3_next", "num_hidden_layers": 2}, "model.layers.1.mlp.gate.weight", True),
        ({"model_type": "qwen3_next", "num_hidden_layers": 2}, "mtp.layers.0.mlp.gate.weight", False),
        ({"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 2}}, "lm_head.weight", True),
        ({"model_type": "glm4_moe", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}, "model.layers.1.mlp.gate.weight", True),
        ({"model_type": "glm4_moe", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}, "model.layers.2.enorm.weight", False),
        ({"model_type": "glm4_moe", "num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "model.layers.1.mlp.gate.weight", False),
        ({"model_type": "mixtral", "num_hidden_layers": 2}, "model.layers.1.mlp.gate.weight", False),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}, "lm_head.weight", False),
    ],
)
def test_models_saved_without_their_heads_for_further_tokens(config: dict[str, object], tensor: str, lacking: bool) -> None:
    assert lacks_mtp(config, iter([tensor])) == lacking
