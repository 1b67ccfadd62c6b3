# SPDX-License-Identifier: Apache-2.0
"""One head with D outputs per token on any transformers backbone."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel

from verl_dvpo.distributional.families.base import ValueFamily

#: Where transformers' token classifiers keep their last layer.
HEAD_NAMES = ("score", "classifier")


class ValueHead(nn.Linear):
    """A linear layer that computes in fp32, whatever the backbone and autocast do: (..., H) -> (..., D)."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


def build_head(hidden_size: int, family: ValueFamily, *, seed: int) -> ValueHead:
    """A head for ``family``: filled by :meth:`ValueFamily.init_head` from ``seed``, fp32."""
    head = ValueHead(hidden_size, family.num_outputs, dtype=torch.float32)
    if head.weight.device.type != "meta":
        with torch.no_grad():
            family.init_head(head.weight, head.bias, torch.Generator(head.weight.device).manual_seed(seed))
    return head


class BackboneWithHead(nn.Module):
    """For architectures that transformers gives no token classifier: a backbone and, as ``score``, a head."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.model = backbone
        self.config = backbone.config
        self.score: nn.Module = nn.Identity()
        self._no_split_modules = backbone._no_split_modules

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def enable_input_require_grads(self) -> None:
        self.model.enable_input_require_grads()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, **inputs: object) -> "TokenOutput":
        return TokenOutput(self.score(self.model(**inputs).last_hidden_state))


class TokenOutput:
    """The part of transformers' token classifier output that is read: ``logits`` (B, S, D)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def backbone_kind(config: PreTrainedConfig) -> str:
    """How ``config``'s architecture carries a token head.

    Returns:
        ``token_classification`` or ``backbone``.

    Raises:
        ValueError: transformers has neither class for it, or it has no ``hidden_size``.
    """
    text = config.get_text_config()
    if getattr(text, "hidden_size", None) is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"critic.model.path: the architecture {config.model_type!r} cannot carry a token head "
            "(needs a decoder or encoder with a hidden_size)"
        )
    if type(config) in AutoModelForTokenClassification._model_mapping:
        return "token_classification"
    if type(config) in AutoModel._model_mapping:
        return "backbone"
    raise ValueError(
        f"critic.model.path: transformers has no AutoModelForTokenClassification and no AutoModel for the "
        f"architecture {config.model_type!r}, so it cannot carry a token head"
    )


def load_backbone(path: str, config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """Loads the backbone at ``path`` with its head, if any, still transformers' own (one output).

    The attention implementation is the one in ``config`` (``critic.model.override_config.attn_implementation``).
    """
    config.num_labels = 1
    for dropout in ("classifier_dropout", "hidden_dropout", "summary_dropout_prob"):
        setattr(config, dropout, 0.0)
    common: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if backbone_kind(config) == "token_classification":
        return AutoModelForTokenClassification.from_pretrained(path, **common)
    return BackboneWithHead(AutoModel.from_pretrained(path, **common))


def head_name(module: nn.Module) -> str:
    """The attribute of ``module`` that holds the head.

    Raises:
        ValueError: neither ``score`` nor ``classifier`` is there.
    """
    for name in HEAD_NAMES:
        if hasattr(module, name):
            return name
    raise ValueError(f"{type(module).__name__} has none of the heads {HEAD_NAMES}; cannot attach a value head")
