# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in a critic's state: added to the weights that they adapt, or kept in a file of PEFT's form."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from verl_dvpo.saved.files import inside, read_json, write_text
from verl_dvpo.saved.head_file import ADAPTER

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")

#: module -> its two matrices, ``{"A": (r, in), "B": (out, r)}``
Adapter = dict[str, dict[str, Tensor]]


def split_adapter(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Adapter]:
    """Splits a PEFT model's state into that of its base, under the base's own names, and the adapter.

    A state without an adapter comes back as it is.

    Raises:
        ValueError: the adapter is of another kind than LoRA's two matrices, or there is nothing else.
    """
    base: dict[str, Tensor] = {}
    adapter: Adapter = {}
    for name, tensor in state.items():
        plain = name.removeprefix(_PEFT)
        if match := _LORA.match(plain):
            adapter.setdefault(match["module"], {})[match["side"]] = tensor
        elif "lora_" in plain or ".adapter_" in plain:
            raise ValueError(f"the checkpoint holds {plain}; LoRA's matrices A and B are allowed; merge it with PEFT")
        else:
            base[plain.replace(".base_layer.", ".")] = tensor
    if adapter and not base:
        raise ValueError(
            "the checkpoint holds an adapter without its base and without a head; a checkpoint with all weights is "
            "allowed; save it with critic.checkpoint.save_lora_only=false"
        )
    return base, adapter


def merge_adapter(base: dict[str, Tensor], adapter: Adapter, scale: float) -> None:
    """Adds scale·B·A to each adapted weight, in place, computed in fp32.

    Args:
        base: name -> tensor.
        adapter: from ``split_adapter`` or ``read_adapter``.
        scale: alpha / r.

    Raises:
        ValueError: the adapter names a module that the base lacks, or has one matrix without the other.
    """
    for module, sides in adapter.items():
        name = f"{module}.weight"
        if name not in base or sides.keys() != {"A", "B"}:
            raise ValueError(f"the adapter changes {name}; a weight of the base and both matrices are needed")
        change = scale * (sides["B"].float() @ sides["A"].float())
        base[name] = (base[name].float() + change).to(base[name].dtype)


def read_scale(folder: Path) -> tuple[int, int]:
    """Reads (r, alpha) that verl saved beside the shards.

    Raises:
        ValueError: the file is missing or holds no positive numbers.
    """
    meta = read_json(folder / "lora_train_meta.json")
    rank, alpha = meta.get("r"), meta.get("lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int) and rank > 0):
        raise ValueError(
            f"{folder / 'lora_train_meta.json'} has r {rank!r} and lora_alpha {alpha!r}; numbers are allowed"
        )
    return rank, alpha


def save_adapter(folder: Path, adapter: Adapter, rank: int, alpha: int) -> None:
    """Writes the adapter as PEFT does, into ``folder``/adapter."""
    target = folder / ADAPTER
    target.mkdir()
    tensors = {
        f"{_PEFT}{module}.lora_{side}.weight": tensor.contiguous()
        for module, sides in adapter.items()
        for side, tensor in sides.items()
    }
    save_file(tensors, target / _WEIGHTS)
    modules = sorted({module.rpartition(".")[2] for module in adapter})
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": modules}
    config |= {"bias": "none", "lora_dropout": 0.0, "task_type": "TOKEN_CLS", "base_model_name_or_path": None}
    write_text(target / _CONFIG, json.dumps(config, indent=2) + "\n")


def read_adapter(folder: Path) -> tuple[Adapter, float] | None:
    """Reads what ``save_adapter`` wrote: the adapter and its scale; None where there is none."""
    file = inside(folder, f"{ADAPTER}/{_WEIGHTS}")
    if not file.is_file():
        return None
    adapter: Adapter = {}
    for name, tensor in load_file(file).items():
        if not (match := _LORA.match(name.removeprefix(_PEFT))):
            raise ValueError(f"{file} holds {name}; LoRA's matrices A and B are allowed")
        adapter.setdefault(match["module"], {})[match["side"]] = tensor
    config = read_json(inside(folder, f"{ADAPTER}/{_CONFIG}"))
    return adapter, config["lora_alpha"] / config["r"]
