# SPDX-License-Identifier: Apache-2.0
"""The critic's sections as verl reads them, and ``critic.value`` turned into a family's settings.

``critic.value._target_`` in the YAML is ``family_config``. verl builds these sections when it validates its
configuration, before Ray starts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from verl.workers.config import FSDPCriticConfig, HFModelConfig

from verl_dvpo.families.base import FamilyConfig, ValueFamily
from verl_dvpo.families.check import check_family
from verl_dvpo.families.registry import build_family, family_names, family_settings

PREFIX = "critic.value"

REFUSED_CHECKPOINTS = {
    "save_lora_only": "it drops the critic's head, which is trained whole beside the adapters",
    "async_save": "a critic's checkpoint ends with a manifest of files that are all written",
}


def family_config(family: str, **settings: Any) -> FamilyConfig:
    """Returns the settings of a family; the ``_target_`` of ``critic.value``.

    Args:
        family: a registered name, or an import path such as ``my_package.module.MyFamily``.
        **settings: the other fields of ``critic.value``; those left out keep their default.

    Raises:
        ValueError: the family cannot be found, imported or instantiated, an unknown field, or a value outside its
            bounds.
    """
    with prefixed():
        return family_settings(family, **settings)


def checked_family(settings: FamilyConfig) -> ValueFamily:
    """Builds the family and tries each of its methods on a tiny batch, in milliseconds.

    Raises:
        ValueError: one of them raises or returns a wrong shape; see ``check_family``.
    """
    with prefixed():
        family = build_family(settings)
        check_family(family, settings.family)
        return family


@dataclass
class ValueModelConfig(HFModelConfig):
    """verl's model section, with the critic's family beside it, so that an engine can build its head.

    Attributes:
        value: filled by ``DistributionalFSDPCriticConfig``; not set by users.
    """

    _mutable_fields = HFModelConfig._mutable_fields | {"value"}

    value: Any = None


@dataclass
class DistributionalFSDPCriticConfig(FSDPCriticConfig):
    """verl's critic section for FSDP and FSDP2, and ``critic.value``.

    Attributes:
        value: the settings of the family.

    Raises:
        ValueError: ``value`` names no family, ``model`` is verl's own section, ``strategy`` is not one of FSDP, or
            sequences are cut (``fsdp.ulysses_sequence_parallel_size``) without flash-attention.
    """

    value: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in ("fsdp", "fsdp2"):
            raise ValueError(
                f"critic.strategy is {self.strategy!r}; this section runs 'fsdp' and 'fsdp2'; "
                "for Megatron-core put +critic_engine=megatron after the algorithm"
            )
        attach_family(self)
        size = self.fsdp.ulysses_sequence_parallel_size
        attention = self.model.override_config.get("attn_implementation", "flash_attention_2")
        if size > 1 and not _separates_sequences(attention):
            raise ValueError(
                f"critic.fsdp.ulysses_sequence_parallel_size is {size}; 1 is allowed where "
                f"critic.model.override_config.attn_implementation is {attention!r}, because verl joins the parts of a "
                "sequence in flash-attention only; give one of the two another value"
            )


def _separates_sequences(attention: str) -> bool:
    """Tells whether an attention finds the sequences of a packed batch by their positions, as flash-attention does."""
    return "flash" in attention or ALL_MASK_ATTENTION_FUNCTIONS.get(attention) is flash_attention_mask


def attach_family(critic: Any) -> None:
    """Checks the two sections of ``critic.*`` that are ours, and hands the settings of the family to the model's.

    Raises:
        ValueError: ``critic.value`` names no family, ``critic.model`` is verl's own section, or its checkpoints would
            not be whole.
    """
    if not isinstance(critic.value, FamilyConfig):
        raise ValueError(
            f"{PREFIX} is {critic.value!r}; it must be a section whose field family is one of "
            f"{', '.join(map(repr, family_names()))} or an import path; choose an algorithm, which sets it"
        )
    if not isinstance(critic.model, ValueModelConfig):
        raise ValueError(
            f"critic.model._target_ makes a {type(critic.model).__name__}; it must be "
            "verl_dvpo.critic.config.ValueModelConfig; choose an algorithm, which sets it"
        )
    for name, reason in REFUSED_CHECKPOINTS.items():
        if getattr(critic.checkpoint, name, False):
            raise ValueError(f"critic.checkpoint.{name} is True; False is allowed, because {reason}; take it out")
    critic.model.value = critic.value


@contextmanager
def prefixed() -> Iterator[None]:
    """Puts ``critic.value.`` in front of a family's own ValueError, which begins with the field's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{PREFIX}.{error}") from error.__cause__
