# SPDX-License-Identifier: Apache-2.0
"""Makes an exported critic of a run's checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification

from verl_dvpo.critic.head import BackboneWithHead, TwoLayerHead, ValueHead, backbone_kind, head_name, load_backbone
from verl_dvpo.export.adapters import merge_adapter, read_scale, save_adapter, split_adapter
from verl_dvpo.export.folder import write_critic
from verl_dvpo.export.shards import read_shards
from verl_dvpo.records import read_metrics
from verl_dvpo.saved.head_file import FILE as HEAD_FILE
from verl_dvpo.saved.head_file import read_head
from verl_dvpo.saved.manifest import Manifest, check_files, read_manifest

TRACKER = "latest_checkpointed_iteration.txt"

#: Of the run's metrics, what the card shows.
SHOWN = ("critic/vf_explained_var", "critic/vf_loss", "critic/score/mean", "critic/quantile/spread")

#: Where verl puts configuration and tokenizer, and with Megatron the weights.
HUGGING_FACE = ("huggingface", "model/huggingface")


@dataclass(frozen=True)
class SavedSettings:
    """The settings of a checkpoint's family, as its manifest has them; the family itself is not imported."""

    manifest: Manifest

    @property
    def family(self) -> str:
        """Its name."""
        return self.manifest.family

    def plain(self) -> dict[str, Any]:
        """Returns the settings of the manifest."""
        return self.manifest.settings

    def layout(self) -> dict[str, Any]:
        """Returns the layout of the manifest."""
        return self.manifest.layout


def export(
    run: Path, out: Path, *, step: int | None = None, adapter: str = "merge", trust_remote_code: bool = False
) -> Path:
    """Writes the critic of a run as a Hugging Face folder.

    Args:
        run: folder of a run, of its checkpoints, of one step, or of its critic.
        out: a folder that does not exist or is empty.
        step: which checkpoint; the last whole one by default.
        adapter: ``merge`` adds LoRA's adapters to the weights; ``keep`` writes them beside the base's.
        trust_remote_code: runs code that comes with the model.

    Returns:
        The folder of the critic that was exported.

    Raises:
        ValueError: there is no whole checkpoint of a critic, or something at ``out``; nothing was written.
    """
    if adapter not in ("merge", "keep"):
        raise ValueError(f"adapter is {adapter!r}; merge and keep are allowed")
    folder = find_critic(run, step)
    manifest = read_manifest(folder, "checkpoint")
    check_files(folder, manifest)
    source = next((folder / name for name in HUGGING_FACE if (folder / name / "config.json").is_file()), None)
    if source is None:
        raise ValueError(f"{folder} has no {HUGGING_FACE[0]}/config.json, which verl saves; take a whole copy of it")
    extra = None
    if (source / HEAD_FILE).is_file():
        module = _whole_model(source, manifest, trust_remote_code)
    else:
        state, lora = split_adapter(read_shards(folder))
        if lora:
            rank, alpha = read_scale(folder)
            if adapter == "merge":
                merge_adapter(state, lora, alpha / rank)
            else:
                extra = partial(save_adapter, adapter=lora, rank=rank, alpha=alpha)
        module = _filled_model(source, state, manifest, trust_remote_code)
    write_critic(
        out,
        module,
        SavedSettings(manifest),
        facts=_facts(manifest),
        tokenizer=source,
        metrics=_metrics(folder, manifest.facts.get("step")),
        extra=extra,
    )
    return folder


def find_critic(run: Path, step: int | None) -> Path:
    """Finds the folder of a run's critic at a step, or at the last step that verl finished saving.

    Raises:
        ValueError: there is none.
    """
    if (run / "manifest.json").is_file() and step is None:
        return run
    places = [folder for folder in (run, run / "checkpoints") if folder.is_dir()]
    steps = {_step(path): path for folder in places for path in folder.glob("global_step_*") if path.is_dir()}
    if (run / "critic").is_dir() and step is None:
        return run / "critic"
    steps = {number: path for number, path in steps.items() if number is not None}
    if not steps:
        raise ValueError(
            f"run is '{run}'; a folder with checkpoints (global_step_N) is allowed; run with trainer.save_freq above 0"
        )
    if step is None:
        finished = [int(text) for folder in places if (text := _tracked(folder)).isdigit() and int(text) in steps]
        step = finished[0] if finished else max(number for number in steps if number is not None)
    if step not in steps:
        raise ValueError(
            f"step is {step}; one of {sorted(number for number in steps if number is not None)} is allowed"
        )
    if not (steps[step] / "critic").is_dir():
        raise ValueError(f"{steps[step]} has no critic; a run with one is allowed, such as algorithm=dvpo")
    return steps[step] / "critic"


def _step(path: Path) -> int | None:
    text = path.name.removeprefix("global_step_")
    return int(text) if text.isdigit() else None


def _tracked(folder: Path) -> str:
    file = folder / TRACKER
    return file.read_text(errors="replace").strip() if file.is_file() else ""


def _whole_model(source: Path, manifest: Manifest, trust_remote_code: bool) -> nn.Module:
    """Loads what the Megatron critic saves: a backbone's folder with the head's file in it."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    module, _ = load_backbone(str(source), config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    setattr(module, head_name(module), _head(read_head(source), manifest))
    return module


def _filled_model(source: Path, state: dict[str, Tensor], manifest: Manifest, trust_remote_code: bool) -> nn.Module:
    """Builds the model without storage and gives it the tensors of ``state``."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    config.num_labels = 1
    plain = backbone_kind(config) == "backbone"
    cls: Any = AutoModel if plain else AutoModelForTokenClassification
    with torch.device("meta"):
        model = cls.from_config(config, trust_remote_code=trust_remote_code)
        module: nn.Module = BackboneWithHead(model) if plain else model
    name = f"{head_name(module)}."
    tensors = {key.removeprefix(name): tensor for key, tensor in state.items() if key.startswith(name)}
    setattr(module, head_name(module), _head(tensors, manifest))
    found = module.load_state_dict(state, strict=False, assign=True)
    missing = [*found.missing_keys, *found.unexpected_keys]
    if missing:
        raise ValueError(
            f"{source.parent} and its config.json differ in {missing[0]}; take a whole copy of the checkpoint"
        )
    return module


def _head(state: Mapping[str, Tensor], manifest: Manifest) -> ValueHead | TwoLayerHead:
    """Makes the head that ``state`` belongs to.

    Raises:
        ValueError: it is not there, or has other sizes than the manifest says.
    """
    width = manifest.layout.get("head_width")
    with torch.device("meta"):
        if width is None:
            head: ValueHead | TwoLayerHead = ValueHead(manifest.hidden_size, manifest.num_outputs)
        else:
            activation = manifest.layout["head_activation"]
            head = TwoLayerHead(manifest.hidden_size, width, manifest.num_outputs, activation)
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != wanted:
        raise ValueError(
            f"the checkpoint holds a head of shapes {found}; its manifest says {wanted}; take a whole copy"
        )
    head.load_state_dict(dict(state), assign=True)
    return head


def _facts(manifest: Manifest) -> dict[str, Any]:
    """Returns what the run's manifest says of the run; versions are those of the training, not of this process."""
    return {**manifest.facts, "exported": True}


def _metrics(folder: Path, step: int | None) -> dict[str, float]:
    """Reads the run's metrics of one step, where the run's folder has them."""
    for place in folder.parents[:3]:
        for record in read_metrics(place / "metrics.jsonl"):
            if record.get("step") == step:
                return {name: float(record["data"][name]) for name in SHOWN if name in record["data"]}
    return {}
