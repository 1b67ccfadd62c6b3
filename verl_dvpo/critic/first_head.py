# SPDX-License-Identifier: Apache-2.0
"""The first weights of a head that the model at ``critic.model.path`` brings: an exported critic's, or a scalar's."""

import logging
from pathlib import Path
from typing import Any

import torch

from verl_dvpo.critic.checkpoints import refuse_differences
from verl_dvpo.critic.head import ScalarHead, TwoLayerHead, ValueHead
from verl_dvpo.families.base import FamilyConfig, ValueFamily
from verl_dvpo.saved.head_file import ADAPTER, CONFIG_KEY, copy_head, read_head
from verl_dvpo.saved.manifest import Manifest, check_files, read_manifest

logger = logging.getLogger(__name__)


def fill_head(
    head: ValueHead | TwoLayerHead,
    family: ValueFamily,
    settings: FamilyConfig,
    *,
    path: str,
    config: Any,
    scalar: ScalarHead | None,
) -> None:
    """Gives a head that was just built what the model has, unless ``head_from`` is ``seed``.

    Args:
        head: changed in place; a head without storage (on ``meta``) is left alone.
        family: that gives the head's outputs their meaning.
        settings: of that family.
        path: of the model.
        config: of the model.
        scalar: the model's own head, where it has one output.

    Raises:
        ValueError: ``path`` is an exported critic that is not whole, or of another family or other sizes.
    """
    if settings.head_from == "seed":
        return
    if getattr(config, CONFIG_KEY, None):
        manifest = check_export(path, settings, family.num_outputs)
        if not next(head.parameters()).is_meta:
            check_files(Path(path).expanduser(), manifest)
            copy_head(
                {name: p.data for name, p in head.named_parameters()}, read_head(Path(path).expanduser()), Path(path)
            )
    elif scalar is not None and not next(head.parameters()).is_meta:
        _start_at_scalar(head, family, settings, path, scalar)


def check_export(path: str, settings: FamilyConfig, num_outputs: int) -> Manifest:
    """Reads the manifest of an exported critic and compares it with ``critic.value``; loads nothing.

    Raises:
        ValueError: there is no whole critic of this family and these sizes in the folder ``path``.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"critic.model.path is {path!r}, an exported critic of a hub; a folder is allowed; download it first with "
            "`hf download`"
        )
    manifest = read_manifest(folder, "critic")
    refuse_differences(folder, manifest, settings, num_outputs)
    check_files(folder, manifest, contents=False)
    return manifest


def refuse_lost_adapter(path: str, adapter_path: str | None) -> None:
    """Raises ValueError where an exported critic keeps an adapter apart, and the run would start without it."""
    kept = Path(path).expanduser() / ADAPTER
    if adapter_path is None and (kept / "adapter_config.json").is_file():
        raise ValueError(
            f"critic.model.lora_adapter_path is None; {path} keeps its adapter apart; set it to {kept}, with "
            "critic.model.lora_rank and lora_alpha as there, or export with --adapter merge"
        )


@torch.no_grad()
def _start_at_scalar(
    head: ValueHead | TwoLayerHead, family: ValueFamily, settings: FamilyConfig, path: str, scalar: ScalarHead
) -> None:
    if isinstance(head, TwoLayerHead):
        reason = "a head with critic.value.head_width cannot start at a linear one's value"
    elif family.start_at(head.weight, head.bias, scalar.weight, scalar.bias):
        logger.info("critic: the head starts at the value of the one output of %s", path)
        return
    else:
        reason = f"the family {settings.family!r} cannot start at a scalar's value"
    logger.warning("critic: the one output of %s is not used: %s; the head is drawn from head_seed", path, reason)
