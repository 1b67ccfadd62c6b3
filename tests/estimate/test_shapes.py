# SPDX-License-Identifier: Apache-2.0
"""Parameters against transformers' own models, on a device without memory."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from verl_dvpo.critic.head import build_head
from verl_dvpo.estimate.shapes import find_shape, published, read_shape
from verl_dvpo.families.registry import build_family, family_settings

TINY = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 80, "vocab_size": 101, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    **published(),
    "llama, four biases": {**TINY, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**TINY, "model_type": "mistral"},
    "qwen2, tied": {**TINY, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3, wide heads": {**TINY, "model_type": "qwen3", "head_dim": 20},
    "qwen3, the default head": {**TINY, "model_type": "qwen3"},
    "qwen3, all biases": {**TINY, "model_type": "qwen3", "attention_bias": True},
}
#: Parameters of the published weights, from their repositories.
TOTALS = {
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers(name):
    shape = read_shape(SHAPES[name], name)
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"):
        assert shape.policy == count(AutoModelForCausalLM.from_config(config))


def test_published_shapes_have_the_parameters_of_the_published_weights():
    assert {name: find_shape(name).policy for name in published()} == TOTALS
    assert find_shape("Qwen/Qwen3-8B-Base").policy == TOTALS["Qwen/Qwen3-8B"]
    assert find_shape("meta-llama/Llama-3.1-70B-Instruct").policy == TOTALS["meta-llama/Llama-3.1-70B"]


@pytest.mark.parametrize("width", [None, 7])
def test_a_critic_has_the_backbone_and_its_head(width):
    family = build_family(family_settings("quantile_ensemble", num_heads=3, num_quantiles=200))
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(AutoConfig.for_model(**SHAPES["qwen3, wide heads"]))
        model.score = build_head(48, family, seed=0, width=width)
    assert read_shape(SHAPES["qwen3, wide heads"], "tiny").critic(family.num_outputs, width) == count(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, r"model_type is 'qwen3_moe' .*; llama, mistral, qwen2, qwen3 are allowed"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_shape({**SHAPES["mistral"], **change}, "tiny")


def test_models_are_found_in_folders_and_otherwise_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["mistral"]))
    assert find_shape(str(tmp_path)).policy == read_shape(SHAPES["mistral"], "tiny").policy
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"is no JSON"):
        find_shape(str(tmp_path))
    with pytest.raises(ValueError, match=r"model is '\./nowhere'; a folder with a config\.json"):
        find_shape("./nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model is 'someone/unknown'; the hub did not give .*Qwen/Qwen3-8B"):
        find_shape("someone/unknown")
