# SPDX-License-Identifier: Apache-2.0
"""One of two data-parallel ranks; run by test_ranks.py in a process of its own."""

import sys
from pathlib import Path

import torch

import verl_dvpo
from critic import harness


def main(model: str, target: str, port: str, rank: str, out: str) -> None:
    value = {"target": target, "num_heads": 2, "num_quantiles": 5, "share_every": 1}
    worker = harness.make_worker(model, rank=int(rank), world_size=2, port=int(port), value=value)
    gradients = harness.capture_gradients(worker)
    batch = harness.make_batch(rows=slice(0, 4) if rank == "0" else slice(4, 8))
    harness.infer(worker, batch)
    metrics = harness.train(worker, batch)
    if rank == "0":
        loss = sum(metrics["critic/loss"]) if "critic/loss" in metrics else metrics["loss"]
        package = str(Path(verl_dvpo.__file__).parent)
        torch.save({"gradients": gradients, "loss": loss, "metrics": metrics, "package": package}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
