# SPDX-License-Identifier: Apache-2.0
"""One process of a test of several models on Megatron: two updates of each case, and what was seen of them.

python model_ranks.py CASES.json OUT RANK WORLD_SIZE PORT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

WHOLE = ("model", "optimizer", "extra")


def main(cases: str, out: str, rank: str, world_size: str, port: str) -> None:
    import verl  # noqa: F401  (loads the plugin)

    from verl_dvpo.platforms.cpu.megatron_cuda import cuda_is_the_cpu

    torch.set_num_threads(1)
    with cuda_is_the_cpu():
        from critic.megatron_cpu import harness

        harness.join(int(rank), int(world_size), int(port))
        folder = Path(out).parent
        torch.save({name: run(case, folder / name) for name, case in json.loads(Path(cases).read_text()).items()}, out)


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Two updates on this rank's share of the batch: the weights before each, values, gradients.

    Where a case has ``resumed``, a second worker of those settings loads a checkpoint of the first update and does the
    second one again.
    """
    from megatron.core import parallel_state
    from verl.workers.utils.padding import response_from_nested

    from critic import harness as common
    from critic import plain
    from critic.megatron_cpu import harness

    resumed = case.pop("resumed", None)
    worker = harness.make_worker(value=plain.VALUE, saved=WHOLE, **case)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batch = common.make_batch(rows=slice(rank * 8 // size, (rank + 1) * 8 // size))
    seen: dict[str, Any] = {"data_rank": rank, "weights": [], "values": [], "gradients": []}
    captured = harness.capture_gradients(worker)
    for number in (1, 2):
        seen["weights"].append(harness.named_weights(worker))
        inferred = common.infer(worker, batch)
        if inferred is not None:  # one rank of a model reports
            seen["values"].append(response_from_nested(inferred["values"], batch["response_mask"]).values())
        common.update(worker, batch, step=number)
        seen["gradients"].append(dict(captured))
        if number == 1 and resumed is not None:
            worker.save_checkpoint(str(folder), global_step=1)
    seen["last"] = harness.named_weights(worker)
    if resumed is not None:
        worker = harness.make_worker(value=plain.VALUE, saved=WHOLE, **{**case, **resumed})
        worker.load_checkpoint(str(folder))
        seen["loaded"] = harness.named_weights(worker)
        common.infer(worker, batch)
        common.update(worker, batch, step=2)
        seen["resumed"] = harness.named_weights(worker)
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
