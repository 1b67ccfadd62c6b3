# SPDX-License-Identifier: Apache-2.0
"""What each cell has to find: the gradient of one process in plain torch and transformers, with adapters by hand.

An adapter adds s·B·A to a weight W. With G the gradient of the sum, that of A is s·Bᵀ·G and that of B is s·G·Aᵀ.
"""

import json
from pathlib import Path
from typing import Any

import torch
from critic import harness, plain
from critic.megatron_cpu import trial
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

RANK, ALPHA = 2, 4
TARGETS = ("q_proj", "v_proj", "down_proj")
#: Greatest difference that rounding in fp32 may make, as a share of the largest number.
TOLERANCE = 1e-5


def save_model(folder: Path) -> str:
    """The backbone of every cell: four layers, which two stages can share."""
    return trial.save_model(folder)


def save_adapter(model: str, folder: Path) -> str:
    """Writes a random adapter in PEFT's format; neither A nor B is zero."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, weight in AutoModel.from_pretrained(model).state_dict().items():
        if name.split(".")[-2] in TARGETS:
            name = f"base_model.model.model.{name.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, weight.shape[1], generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": list(TARGETS)}))
    return str(folder)


def reference(model: str, head: dict[str, Tensor], adapter: str | None) -> dict[str, Any]:
    """Values (a list of (T,)) and gradients of one update on the whole batch, in float64."""
    backbone = AutoModel.from_pretrained(model, attn_implementation="eager", dtype=torch.float64)
    batch = harness.make_batch()
    adapters = {} if adapter is None else read_adapter(Path(adapter))
    scale = ALPHA / RANK
    with torch.no_grad():
        for name, (a, b) in adapters.items():
            backbone.get_submodule(name).weight += scale * b @ a
    values = [each.detach() for each in plain.values_of(plain.states_of(backbone, head, batch))]
    gradients = plain.gradients_of(backbone, head, batch)
    if adapter is not None:
        whole, gradients = gradients, {name: g for name, g in gradients.items() if name.startswith("score.")}
        for name, (a, b) in adapters.items():
            gradient = whole[f"model.{name}.weight"]
            gradients[f"model.{name}.lora_A.weight"] = scale * b.T @ gradient
            gradients[f"model.{name}.lora_B.weight"] = scale * gradient @ a.T
    return {"values": values, "gradients": gradients}


def read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B), in float64."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    prefix = "base_model.model.model."
    return {
        name: tuple(tensors[f"{prefix}{name}.lora_{letter}.weight"].double() for letter in "AB")  # type: ignore[misc]
        for name in sorted(modules)
    }


def distance(seen: dict[str, Any], expected: dict[str, Any]) -> float:
    """The greatest difference of a value or a gradient, as a share of the largest; infinite where names differ."""
    if seen["gradients"].keys() != expected["gradients"].keys() or len(seen["values"]) != len(expected["values"]):
        return float("inf")
    pairs = [(seen["gradients"][name], gradient) for name, gradient in expected["gradients"].items()]
    return max(_share(pairs), _share(list(zip(seen["values"], expected["values"], strict=True))))


def _share(pairs: list[tuple[Tensor, Tensor]]) -> float:
    largest = max(expected.abs().max().item() for _, expected in pairs)
    assert largest > 0
    worst = max((got.double() - expected).abs().max().item() for got, expected in pairs)
    return worst / largest if worst == worst else float("inf")
