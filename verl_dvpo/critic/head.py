# SPDX-License-Identifier: Apache-2.0
"""One head with D outputs per token on any transformers backbone."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput

from verl_dvpo.critic.head_call import HeadCall
from verl_dvpo.families.base import ValueFamily
from verl_dvpo.saved.head_file import CONFIG_KEY

#: Where transformers' token classifiers keep their last layer.
HEAD_NAMES = ("score", "classifier")

#: Activations of a two-layer head; the names are those of ``verl_dvpo.families.base.ACTIVATION_NAMES``.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


class DirectedHead(nn.Module):
    """A head that an engine may tell which states to compute.

    Attributes:
        call: set by an engine for one forward pass; then only the states that it names are computed.
    """

    call: HeadCall | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outputs(hidden) if self.call is None else self.call(self.outputs, hidden)

    def outputs(self, hidden: Tensor) -> Tensor:
        """Computes (..., H) -> (..., D)."""
        raise NotImplementedError


class ValueHead(DirectedHead, nn.Linear):
    """A linear layer that computes in fp32, whatever the backbone and autocast do: (..., H) -> (..., D)."""

    def outputs(self, hidden: Tensor) -> Tensor:
        """Computes (..., H) -> (..., D)."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float())


class TwoLayerHead(DirectedHead):
    """A hidden layer before the outputs, in fp32 as well: (..., H) -> (..., width) -> (..., D)."""

    def __init__(self, hidden_size: int, width: int, num_outputs: int, activation: str) -> None:
        super().__init__()
        self.hidden = ValueHead(hidden_size, width, dtype=torch.float32)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]
        self.out = ValueHead(width, num_outputs, dtype=torch.float32)

    def outputs(self, hidden: Tensor) -> Tensor:
        """Computes (..., H) -> (..., D)."""
        return self.out(self.activation(self.hidden(hidden)))


def build_head(
    hidden_size: int, family: ValueFamily, *, seed: int, width: int | None = None, activation: str = "gelu"
) -> ValueHead | TwoLayerHead:
    """Builds a head for ``family`` in fp32; ``family.init_head`` fills its last layer from ``seed``.

    Args:
        hidden_size: H of the backbone.
        family: gives D, and the first values of the last layer.
        seed: of the first weights.
        width: of a hidden layer, drawn with standard deviation 1/sqrt(H); None for a linear head.
        activation: of that layer, a name in ``ACTIVATIONS``.
    """
    if width is None:
        head: ValueHead | TwoLayerHead = ValueHead(hidden_size, family.num_outputs, dtype=torch.float32)
        last = head
    else:
        head = TwoLayerHead(hidden_size, width, family.num_outputs, activation)
        last = head.out
    assert isinstance(last, ValueHead)
    if last.weight.device.type != "meta":
        generator = torch.Generator(last.weight.device).manual_seed(seed)
        with torch.no_grad():
            if isinstance(head, TwoLayerHead):
                head.hidden.weight.normal_(std=hidden_size**-0.5, generator=generator)
                head.hidden.bias.zero_()
            family.init_head(last.weight, last.bias, generator)
    return head


class BackboneWithHead(nn.Module):
    """A backbone and, as ``score``, a head: for architectures that transformers gives no token classifier."""

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

    def forward(self, **inputs: object) -> TokenClassifierOutput:
        """Returns what a token classifier does; FSDP2 looks for tensors in it, to gather weights again before them."""
        return TokenClassifierOutput(logits=self.score(self.model(**inputs).last_hidden_state))


def backbone_kind(config: PreTrainedConfig) -> str:
    """Finds out how ``config``'s architecture carries a token head.

    Returns:
        ``token_classification`` or ``backbone``.

    Raises:
        ValueError: transformers has neither class for it, or it has no ``hidden_size``.
    """
    text = config.get_text_config()
    if getattr(text, "hidden_size", None) is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"critic.model.path has the architecture {config.model_type!r}, which cannot carry a token head; it must "
            "be a decoder or an encoder with a hidden_size; choose another model"
        )
    if type(config) in AutoModelForTokenClassification._model_mapping:
        return "token_classification"
    if type(config) in AutoModel._model_mapping:
        return "backbone"
    raise ValueError(
        f"critic.model.path has the architecture {config.model_type!r}, which cannot carry a token head; transformers "
        "must have an AutoModelForTokenClassification or an AutoModel for it; choose another model"
    )


@dataclass(frozen=True)
class ScalarHead:
    """The head of a model with one output per token: ``weight`` (H,) and ``bias`` (), in fp32."""

    weight: Tensor
    bias: Tensor


def load_backbone(
    path: str, config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[nn.Module, ScalarHead | None]:
    """Loads the model at ``path``; its head is still that of transformers.

    The attention implementation is that of ``config`` (``critic.model.override_config.attn_implementation``).

    Returns:
        The model, and the head that it brought where that has one output.

    Raises:
        ValueError: weights are missing or have other shapes than ``config`` says, or the model's own head has several
            outputs.
    """
    exported = getattr(config, CONFIG_KEY, None)
    config.num_labels = exported["num_outputs"] if exported else 1
    for dropout in ("classifier_dropout", "hidden_dropout", "summary_dropout_prob"):
        setattr(config, dropout, 0.0)
    common: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if backbone_kind(config) != "token_classification":
        return BackboneWithHead(_bare_backbone(path, common)), None
    module, report = AutoModelForTokenClassification.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **common
    )
    _refuse_missing(path, module, {name for name in report["missing_keys"] if name.split(".")[0] not in HEAD_NAMES})
    if report["mismatched_keys"]:
        name, saved, wanted = sorted(report["mismatched_keys"])[0]
        raise ValueError(
            f"critic.model.path is {path!r} with {name} of shape {tuple(saved)}; {tuple(wanted)} is allowed; a head of "
            "several outputs is no critic's; take the backbone without it"
        )
    return module, None if exported else _scalar_head(module, report["missing_keys"])


def _bare_backbone(path: str, common: dict[str, Any]) -> PreTrainedModel:
    """Loads a model without its head.

    transformers renames weights of older files for the whole model only, so where the bare one does not find all of
    its own, the model that the files name is loaded, and its inner model taken.
    """
    backbone, report = AutoModel.from_pretrained(path, output_loading_info=True, **common)
    named = getattr(transformers, next(iter(common["config"].architectures or []), ""), None)
    if report["missing_keys"] and named is not None and not isinstance(backbone, named):
        whole, report = named.from_pretrained(path, output_loading_info=True, **common)
        if isinstance(whole.base_model, type(backbone)):
            backbone, prefix = whole.base_model, f"{whole.base_model_prefix}."
            report["missing_keys"] = {name for name in report["missing_keys"] if name.startswith(prefix)}
    _refuse_missing(path, backbone, report["missing_keys"])
    return backbone


def _refuse_missing(path: str, module: nn.Module, missing: Collection[str]) -> None:
    """Raises ValueError where weights of the backbone were made up; a module without storage is left alone."""
    if missing and not any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"critic.model.path is {path!r}, whose files lack {len(missing)} of the backbone's weights, the first "
            f"{min(missing)}; a whole model is allowed; save it again with save_pretrained"
        )


def _scalar_head(module: nn.Module, missing: Collection[str]) -> ScalarHead | None:
    """Returns the head that a checkpoint brought; None where transformers had to make it up."""
    name = head_name(module)
    head = getattr(module, name)
    if f"{name}.weight" in missing or not isinstance(head, nn.Linear) or head.weight.is_meta:
        return None
    weight = head.weight.detach().float().clone().squeeze(0)
    made_up = head.bias is None or f"{name}.bias" in missing
    return ScalarHead(weight, weight.new_zeros(()) if made_up else head.bias.detach().float().clone().squeeze(0))


def head_name(module: nn.Module) -> str:
    """Returns the name of the attribute that holds the head.

    Raises:
        ValueError: neither ``score`` nor ``classifier`` is there.
    """
    for name in HEAD_NAMES:
        if hasattr(module, name):
            return name
    raise ValueError(
        f"critic.model.path has the class {type(module).__name__}; its head must be called one of "
        f"{', '.join(HEAD_NAMES)}; choose another model"
    )
