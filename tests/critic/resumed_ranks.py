# SPDX-License-Identifier: Apache-2.0
"""One of two data-parallel ranks that train, save and go on; run by test_resumed_ranks.py in a process of its own."""

import json
import sys
from pathlib import Path

import torch

from critic import harness


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return getattr(tensor, "_local_tensor", tensor).detach().clone()


def main(model: str, value: str, port: str, rank: str, folder: str, first: str) -> None:
    """Updates 1 to 3 where ``first`` is 1, saved after the first; where it is 2, updates 2 and 3 after a resume."""
    worker = harness.make_worker(model, rank=int(rank), world_size=2, port=int(port), value=json.loads(value))
    critic = Path(folder) / "critic"
    if first == "2":
        worker.load_checkpoint(str(critic))
    for step in range(int(first), 4):
        batch = harness.make_batch(rows=slice(0, 4) if rank == "0" else slice(4, 8), seed=step)
        inferred = harness.infer(worker, batch)
        metrics = harness.train(worker, batch, step=step)
        if step == 1:
            worker.save_checkpoint(str(critic), global_step=1)
    states = {
        f"{name}/{key}": local(value)
        for name, parameter in worker.engine.module.named_parameters()
        for key, value in (("itself", parameter), *worker.engine.optimizer.state.get(parameter, {}).items())
        if isinstance(value, torch.Tensor)
    }
    numbers = {name: value for name, value in metrics.items() if name.startswith("critic/")}
    out = {"states": states, "metrics": numbers, "values": inferred["values"].values(), "family": worker.family.state()}
    torch.save(out, Path(folder) / f"from{first}-rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
