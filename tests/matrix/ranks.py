# SPDX-License-Identifier: Apache-2.0
"""One process of the table: does the cells of layouts with one number of ranks, one after another.

python ranks.py FOLDER RANK WORLD_SIZE PORT CELL...

``FOLDER`` has the backbone and an adapter. What a cell finds is written when it ends, so that the next cells' failures
cost nothing of it.
"""

import contextlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from matrix.cells import CELLS, LAYOUTS, Cell

FIXED = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "infer_micro_batch_size_per_gpu": 2}
DYNAMIC = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 20, "infer_max_token_len_per_gpu": 20}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def fsdp_worker(cell: Cell, folder: Path, rank: int, port: int) -> Any:
    """The worker of a cell, and the function that captures its gradients."""
    from critic import harness, plain

    from matrix import attention, reference

    layout = LAYOUTS[cell.layout]
    settings: dict[str, Any] = {}
    if cell.lora:
        adapter = str(folder / "adapter")
        settings = {"lora_rank": reference.RANK, "lora_alpha": reference.ALPHA, "lora_adapter_path": adapter}
    if "ulysses_sequence_parallel_size" in layout.settings:
        attention.install()
        settings["override_config"] = {"attn_implementation": attention.NAME}
    worker = harness.make_worker(
        str(folder / "model"),
        rank=rank,
        world_size=layout.ranks,
        port=port,
        value=plain.VALUE,
        engine={**(DYNAMIC if cell.dynamic else FIXED), **layout.settings},
        use_remove_padding=cell.packed,
        enable_gradient_checkpointing=cell.checkpointing,
        **settings,
    )
    return worker, harness.capture_gradients


def megatron_worker(cell: Cell, folder: Path) -> Any:
    """The same on Megatron."""
    from critic import plain
    from critic.megatron_cpu import harness

    settings = dict(LAYOUTS[cell.layout].settings)
    if cell.checkpointing:
        settings["override_transformer_config"] = RECOMPUTED
    worker = harness.make_worker(str(folder / "model"), value=plain.VALUE, packed=cell.packed, **settings)
    for name, value in (DYNAMIC if cell.dynamic else FIXED).items():
        object.__setattr__(worker.engine_config, name, value)
    return worker, harness.capture_gradients


def run(cell: Cell, folder: Path, rank: int, port: int) -> dict[str, Any]:
    """One update on this rank's share of the batch: its values, and all gradients."""
    from critic import harness
    from verl.workers.utils.padding import response_from_nested

    layout = LAYOUTS[cell.layout]
    if layout.engine == "megatron":
        worker, capture = megatron_worker(cell, folder)
    else:
        worker, capture = fsdp_worker(cell, folder, rank, port)
    captured = capture(worker)
    share = worker.engine.get_data_parallel_rank()
    size = 8 // layout.data_ranks
    batch = harness.make_batch(rows=slice(share * size, (share + 1) * size))
    inferred = harness.infer(worker, batch)
    values = None if inferred is None else response_from_nested(inferred["values"], batch["response_mask"]).unbind()
    harness.update(worker, batch)
    gradients = {name.replace("base_model.model.", "").replace(".default", ""): g for name, g in captured.items()}
    return {"share": share, "values": None if values is None else list(values), "gradients": gradients}


def main(folder: str, rank: str, world_size: str, port: str, *names: str) -> None:
    import verl  # noqa: F401  (loads the plugin)

    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        if any(LAYOUTS[CELLS[name].layout].engine == "megatron" for name in names):
            from critic.megatron_cpu import harness

            from verl_dvpo.platforms.cpu.megatron_cuda import cuda_is_the_cpu

            stack.enter_context(cuda_is_the_cpu())
            harness.join(int(rank), int(world_size), int(port))
        try_all(names, Path(folder), int(rank), int(port))


def try_all(names: Sequence[str], folder: Path, rank: int, port: int) -> None:
    """Runs cells one after the other, and writes what each gave, or its error."""
    for name in names:
        try:
            seen: dict[str, Any] = run(CELLS[name], folder, rank, port)
        except Exception as error:  # the next cell may do better
            traceback.print_exc()
            seen = {"error": f"{type(error).__name__}: {error}"}
        file = folder / f"{name.replace(' ', '-')}.{rank}.pt"
        torch.save(seen, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
