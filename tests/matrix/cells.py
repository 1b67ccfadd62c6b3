# SPDX-License-Identifier: Apache-2.0
"""The cells of the support table: which engines, parallel sizes and options a critic's update is tried with."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OPTIONS = ("packed", "lora", "dynamic", "checkpointing")


@dataclass(frozen=True)
class Layout:
    """An engine with its parallel sizes.

    Attributes:
        name: unique.
        title: as the table shows it.
        engine: ``fsdp2``, ``fsdp`` or ``megatron``.
        ranks: processes.
        data_ranks: shares that the batch is cut into.
        settings: fields of the engine's configuration.
    """

    name: str
    title: str
    engine: str
    ranks: int = 1
    data_ranks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


TENSOR, STAGES = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("fsdp2", "FSDP2, 1 rank", "fsdp2"),
        Layout("fsdp2_sharded", "FSDP2, 2 ranks", "fsdp2", 2, 2),
        Layout("fsdp2_hybrid", "FSDP2, 2 replicas (HSDP)", "fsdp2", 2, 2, {"fsdp_size": 1}),
        Layout("fsdp2_ulysses", "FSDP2, Ulysses 2", "fsdp2", 2, 1, {"ulysses_sequence_parallel_size": 2}),
        Layout("fsdp", "FSDP1", "fsdp"),
        Layout("megatron", "Megatron, 1 rank", "megatron"),
        Layout("megatron_data", "Megatron, data 2", "megatron", 2, 2),
        Layout("megatron_tensor", "Megatron, tensor 2", "megatron", 2, 1, {**TENSOR, "sequence_parallel": False}),
        Layout("megatron_sequence", "Megatron, tensor 2, sequence parallel", "megatron", 2, 1, TENSOR),
        Layout("megatron_stages", "Megatron, pipeline 2", "megatron", 2, 1, STAGES),
    )
}

#: Why a cell is not tried: kind -> note of the table.
NOTES = {
    "no_padded_ulysses": "Ulysses splits packed sequences; verl has no padded form of it.",
    "no_fsdp1": "FSDP1 broadcasts a module's first state over an accelerator's backend only; no engine of it is "
    "registered for the CPU.",
    "no_adapters": "The critic on Megatron refuses LoRA before Ray starts.",
}


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    layout: str
    packed: bool
    lora: bool
    dynamic: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        """Unique, in words."""
        words = ("packed" if self.packed else "padded", "lora" if self.lora else "full")
        words += ("dynamic" if self.dynamic else "fixed", "checkpointing" if self.checkpointing else "stored")
        return " ".join((self.layout, *words))

    @property
    def excuse(self) -> str | None:
        """A key of ``NOTES`` where the cell is not tried."""
        if self.layout == "fsdp":
            return "no_fsdp1"
        if self.layout == "fsdp2_ulysses" and not self.packed:
            return "no_padded_ulysses"
        if LAYOUTS[self.layout].engine == "megatron" and self.lora:
            return "no_adapters"
        return None

    @property
    def verdict(self) -> str:
        """What the table says of a cell that is not tried."""
        return "not here" if self.excuse == "no_fsdp1" else "n/a"


CELLS = {
    cell.name: cell
    for cell in (Cell(name, *options) for name in LAYOUTS for options in itertools.product((True, False), repeat=4))
}


def covering(cells: list[Cell]) -> list[Cell]:
    """Chooses cells, the fewest a greedy search finds, in which every two values of two options meet."""

    def pairs(cell: Cell) -> set[tuple]:
        values = [(name, getattr(cell, name)) for name in OPTIONS]
        return set(itertools.combinations(values, 2))

    left, chosen = set().union(*map(pairs, cells)), []
    while left:
        best = max(cells, key=lambda cell: len(pairs(cell) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen
