# SPDX-License-Identifier: Apache-2.0
"""Batches with images, as verl's agent loop stores them, and their rows as transformers takes them."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from critic import harness, models

#: Colours, frames of one patch, and its pixels.
PIXELS = 3 * 2 * models.PATCH**2


def add_images(batch: TensorDict, *, without: tuple[int, ...] = ()) -> TensorDict:
    """Puts an image of 2 or 4 tokens before each prompt but those of the rows ``without``, and 4 rows of positions."""
    generator = torch.Generator().manual_seed(7)
    prompts, sequences, positions, inputs = [], [], [], []
    for row, (prompt, response) in enumerate(zip(batch["prompts"].unbind(), batch["responses"].unbind(), strict=True)):
        grid = None if row in without else (2, 2 * (1 + row % 2))  # in tokens
        if grid is not None:
            image = [models.IMAGE_BEGINS, *[models.IMAGE] * (grid[0] * grid[1] // 2), models.IMAGE_ENDS]
            grid = (grid[0], grid[1] // 2)
            prompt = torch.cat([torch.tensor(image), prompt])
        prompts.append(prompt)
        sequences.append(torch.cat([prompt, response]))
        positions.append(positions_of(sequences[-1], grid))
        inputs.append({} if grid is None else image_of(grid, generator))
    batch = batch.clone()
    batch["prompts"], batch["input_ids"] = harness.jagged(prompts), harness.jagged(sequences)
    offsets = batch["input_ids"].offsets()
    batch["position_ids"] = torch.nested.nested_tensor_from_jagged(torch.cat(positions, -1), offsets, jagged_dim=2)
    tu.assign_non_tensor_stack(batch, "multi_modal_inputs", inputs)
    return batch


def image_of(grid: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Random pixels of an image of (height, width) tokens, in patches."""
    height, width = (models.MERGE * size for size in grid)
    pixels = torch.randn(height * width, PIXELS, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def positions_of(ids: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """(4, length): the place in the text, then time, height and width, which an image's tokens share out."""
    rows: list[tuple[int, int, int]] = []
    following, in_image = 0, 0
    for token in ids.tolist():
        if token != models.IMAGE:
            rows.append((following,) * 3)
            following += 1
            continue
        assert grid is not None
        height, width = divmod(in_image, grid[1])
        rows.append((following, following + height, following + width))
        in_image += 1
        if in_image == grid[0] * grid[1]:
            following += max(grid)
    return torch.cat([torch.arange(len(ids))[None], torch.tensor(rows).T])


def forward_of(batch: TensorDict) -> Any:
    """Runs one row by transformers' own forward, which finds the positions itself."""

    def forward(backbone: Any, row: int) -> Tensor:
        ids = batch["input_ids"].unbind()[row][None]
        inputs = tu.get(batch, "multi_modal_inputs")[row]
        given = {"mm_token_type_ids": (ids == models.IMAGE).int(), **inputs} if inputs else {}
        return backbone(input_ids=ids, use_cache=False, **given).last_hidden_state[0]

    return forward
