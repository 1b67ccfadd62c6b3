# SPDX-License-Identifier: Apache-2.0
"""Refuses backbones that mbridge cannot translate for megatron-core, before Ray starts. Imports neither of them.

mbridge 0.15.1 passes over some fields of a model's configuration without a word, so that the critic would compute
another function than the model's. Here they are refused.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: Architecture -> fields of megatron-core's configuration as mbridge sets them, whatever the model's own configuration
#: has: whether experts' shares are those of all experts (else they add up to one), and a gate before shared experts.
SETS = {
    "mixtral": {"moe_router_pre_softmax": True},
    "qwen2_moe": {"moe_router_pre_softmax": True, "moe_shared_expert_gate": False},
    "qwen3_moe": {"moe_router_pre_softmax": False},
}
#: Architectures whose sliding windows mbridge knows, and whose biases.
WINDOWS = {"gemma3"}
BIASES = {"glm4_moe"}


def known_architectures() -> set[str]:
    """Returns the values of ``model_type`` that the installed mbridge has a bridge for, as its source names them.

    Empty where its source is not where 0.15.1 has it.
    """
    spec = importlib.util.find_spec("mbridge")
    folders = [] if spec is None else [Path(place) / "models" for place in spec.submodule_search_locations or []]
    return {name for folder in folders for file in sorted(folder.rglob("*.py")) for name in _registered(file)}


def _registered(file: Path) -> Iterator[str]:
    """The arguments of ``@register_model`` in a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "register_model":
                for argument in call.args:
                    value = ast.literal_eval(argument)
                    yield from [value] if isinstance(value, str) else value


def refuse_model(config: Any, overrides: Mapping[str, Any]) -> None:
    """Refuses a backbone that mbridge does not know, or knows without a field that matters.

    Args:
        config: transformers' configuration of ``critic.model.path``.
        overrides: ``critic.megatron.override_transformer_config``.

    Raises:
        ValueError: names the field of its config.json, or the override that it needs.
    """
    name, text = config.model_type, config.get_text_config()
    known = known_architectures()
    if known and name not in known:
        raise ValueError(
            f"critic.model.path has model_type {name!r}; the critic on Megatron runs with those that mbridge knows, "
            f"{', '.join(sorted(known))}; choose such a model, or leave critic_engine=megatron out for FSDP"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    _require("rope_parameters.rope_type", rope.get("rope_type", "default"), "default")
    if name not in BIASES:
        for field in ("attention_bias", "mlp_bias"):
            _require(field, bool(getattr(text, field, False)), False)
    if name not in WINDOWS:
        layers = getattr(text, "layer_types", None)
        windowed = "sliding_attention" in layers if layers else getattr(text, "sliding_window", None) is not None
        _require("sliding_window", getattr(text, "sliding_window", None) if windowed else None, None)
    needed = {
        "moe_router_pre_softmax": not getattr(text, "norm_topk_prob", True),
        "moe_shared_expert_gate": name == "qwen2_moe",
    }
    for field, value in (SETS.get(name, {}) | dict(overrides)).items():
        if field in needed and value != needed[field]:
            place = f"critic.megatron.override_transformer_config.{field}"
            raise ValueError(
                f"{place} is {value}; critic.model.path, a {name}, allows {needed[field]}; "
                f"set +{place}={str(needed[field]).lower()}"
            )


def _require(field: str, value: Any, allowed: Any) -> None:
    if value != allowed:
        raise ValueError(
            f"critic.model.path has {field} {value!r} in its config.json; mbridge hands {allowed!r} only to "
            "megatron-core; choose another model, or leave critic_engine=megatron out for FSDP"
        )
