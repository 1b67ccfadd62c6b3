# SPDX-License-Identifier: Apache-2.0
"""One process of a Megatron test: runs a list of cases, one after another, and saves what it saw.

python ranks.py MODEL CASES.json OUT RANK WORLD_SIZE PORT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main(model: str, cases: str, out: str, rank: str, world_size: str, port: str) -> None:
    import verl  # noqa: F401  (loads the plugin)

    from critic.megatron_cpu import cuda

    torch.set_num_threads(1)
    cuda.install()
    from critic.megatron_cpu import harness

    harness.join(int(rank), int(world_size), int(port))
    seen = {name: run(model, case) for name, case in json.loads(Path(cases).read_text()).items()}
    if world_size == "2":
        seen["checkpoints"] = checkpoints(model, Path(out).parent)
    torch.save(seen, out)


def run(model: str, case: dict[str, Any]) -> dict[str, Any]:
    """Two updates of a worker on this rank's share of the batch."""
    from megatron.core import parallel_state

    from critic import harness as common
    from critic.megatron_cpu import harness, trial
    from verl_dvpo.critic.megatron_bridge import output_layers

    worker = harness.make_worker(model, **case)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batch = common.make_batch(rows=slice(rank * 8 // size, (rank + 1) * 8 // size))
    seen = trial.two_updates(worker, batch, harness.capture_gradients)
    head = [parameter for chunk in output_layers(worker.engine.module) for parameter in chunk.parameters()]
    return seen | {"data_rank": rank, "head_dtypes": {str(parameter.dtype) for parameter in head}}


def checkpoints(model: str, folder: Path) -> dict[str, Any]:
    """A trained critic of two tensor-parallel ranks, saved; then loaded into two stages, and into its own kind."""
    from critic import harness as common
    from critic.megatron_cpu import harness, trial

    value = {"family": "quantile_ensemble", "num_heads": 2, "num_quantiles": 5, "head_width": 12}
    batch, seen = common.make_batch(), {}

    worker = harness.make_worker(model, value=value, saved=("model",), tensor_model_parallel_size=2)
    common.infer(worker, batch)
    common.update(worker, batch)
    seen["saved"] = trial.raw_outputs(worker, batch)
    worker.save_checkpoint(str(folder / "tp2"), global_step=1)
    worker = harness.make_worker(model, value=value, saved=("model",), pipeline_model_parallel_size=2)
    worker.load_checkpoint(str(folder / "tp2"), del_local_after_load=False)
    seen["loaded"] = trial.raw_outputs(worker, batch)

    worker = harness.make_worker(model, value=value, dtype="bfloat16")
    common.infer(worker, batch)
    common.update(worker, batch)
    seen["states"] = harness.optimizer_states(worker)
    worker.save_checkpoint(str(folder / "dp2"), global_step=1)
    worker = harness.make_worker(model, value=value, dtype="bfloat16")
    harness.open_states(worker)
    seen["fresh_states"] = harness.optimizer_states(worker)
    worker.load_checkpoint(str(folder / "dp2"), del_local_after_load=False)
    seen["loaded_states"] = harness.optimizer_states(worker)
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
