# SPDX-License-Identifier: Apache-2.0
"""One of two data-parallel ranks that train and save; run by test_run_export.py in a process of its own."""

import sys
from pathlib import Path

import torch
from critic import harness
from verl.workers.utils.padding import response_from_nested


def main(model: str, port: str, rank: str, run: str) -> None:
    worker = harness.make_worker(model, rank=int(rank), world_size=2, port=int(port))
    batch = harness.make_batch(rows=slice(0, 4) if rank == "0" else slice(4, 8))
    harness.infer(worker, batch)
    harness.train(worker, batch)
    folder = Path(run) / "global_step_1" / "critic"
    folder.parent.mkdir(parents=True, exist_ok=True)
    worker.save_checkpoint(str(folder), global_step=1)
    worker.load_checkpoint(str(folder))
    batch = harness.make_batch(seed=5)
    values = response_from_nested(harness.infer(worker, batch)["values"], batch["response_mask"])
    if rank == "0":
        torch.save([row.clone() for row in values.unbind()], Path(run) / "values.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
