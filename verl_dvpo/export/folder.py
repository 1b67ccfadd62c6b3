# SPDX-License-Identifier: Apache-2.0
"""Writes a critic as a Hugging Face folder, whole or not at all.

``config.json`` carries the family and its settings under ``verl_dvpo``, ``value_head.safetensors`` the head in fp32. A
linear head of a token classifier is in the model's own file too, so that transformers alone gives the raw outputs.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from verl_dvpo.critic.checkpoints import Settings, describe_critic
from verl_dvpo.critic.head import BackboneWithHead, TwoLayerHead, head_name
from verl_dvpo.export.card import model_card
from verl_dvpo.saved.files import whole_folder, write_text
from verl_dvpo.saved.head_file import CONFIG_KEY, save_head
from verl_dvpo.saved.manifest import describe_files, file_names, write_manifest

CARD = "README.md"

#: A tokenizer's files; data all of them.
TOKENIZER = ("tokenizer*.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "chat_template.*", "*.jinja")


def write_critic(
    out: Path,
    module: nn.Module,
    settings: Settings,
    *,
    facts: Mapping[str, Any],
    tokenizer: Path | None = None,
    metrics: Mapping[str, float] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Writes ``out``: model, head, tokenizer, model card, and last the manifest.

    Args:
        out: a folder that does not exist or is empty.
        module: backbone with our head in its place.
        settings: of the head's family.
        facts: of the run, for manifest and card.
        tokenizer: a folder with a tokenizer's files; None for none.
        metrics: name -> number, for the card.
        extra: writes more files into the folder that it is given.

    Raises:
        ValueError: there is something at ``out`` already.
    """
    head = getattr(module, head_name(module))
    last = head.out if isinstance(head, TwoLayerHead) else head
    num_outputs, hidden_size = last.out_features, module.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    manifest = describe_critic("critic", settings, num_outputs, hidden_size, facts)
    with whole_folder(out) as partial:
        _save_model(partial, module, head, settings, num_outputs)
        save_head(partial, head.state_dict())
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        if extra is not None:
            extra(partial)
        write_text(partial / CARD, model_card(manifest, metrics or {}))
        # People edit cards; everything else is as it was written.
        write_manifest(partial, manifest.of_files(describe_files(partial, set(file_names(partial)) - {CARD})))


def _save_model(folder: Path, module: nn.Module, head: nn.Module, settings: Settings, num_outputs: int) -> None:
    model: Any = module.model if isinstance(module, BackboneWithHead) else module
    before = model.config
    model.config = copy.deepcopy(before)
    try:
        model.config.num_labels = num_outputs
        about = {"family": settings.family, "num_outputs": num_outputs, "settings": settings.plain()}
        setattr(model.config, CONFIG_KEY, about)
        state = model.state_dict()
        if isinstance(head, TwoLayerHead):  # transformers has no place for it
            state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{head_name(module)}.")}
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config = before


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files, no code among them."""
    found = {path for pattern in TOKENIZER for path in source.glob(pattern) if path.is_file()}
    for path in found:
        shutil.copyfile(path, target / path.name)
