# SPDX-License-Identifier: Apache-2.0
"""The head of a saved critic: one safetensors file beside the backbone's, and a section of ``config.json``."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Beside the backbone's files: the head's weights in fp32, named as the critic's checkpoints name them.
FILE = "value_head.safetensors"
PREFIX = "score."

#: In ``config.json`` of an exported critic: the family, its settings, and the number of its outputs.
CONFIG_KEY = "verl_dvpo"

#: In the folder of an exported critic: LoRA's adapter, where it was kept apart.
ADAPTER = "adapter"


def save_head(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the head's tensors, as ``head.state_dict()`` names them, in fp32."""
    tensors = {PREFIX + name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / FILE)


def read_head(folder: Path) -> dict[str, Tensor]:
    """Reads the head's tensors, named as ``head.state_dict()`` names them.

    Raises:
        ValueError: the file is missing, or no safetensors file of a head.
    """
    file = folder / FILE
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}; take a whole copy of its folder") from error
    return {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()}


def copy_head(state: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: Path) -> None:
    """Copies the tensors ``saved`` into those of ``state``.

    Raises:
        ValueError: names or shapes differ; nothing was copied.
    """
    shapes, found = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (state, saved))
    if shapes != found:
        raise ValueError(
            f"{folder} holds a head of shapes {found}; critic.value needs {shapes}; set critic.value as it was when "
            "the head was saved"
        )
    for name, tensor in state.items():
        tensor.copy_(saved[name])
