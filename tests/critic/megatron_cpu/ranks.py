# SPDX-License-Identifier: Apache-2.0
"""One process of a Megatron test: runs a list of cases, one after another, and saves what it saw.

python ranks.py MODEL CASES.json OUT RANK WORLD_SIZE PORT
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

TWO_LAYERS = {"family": "quantile_ensemble", "num_heads": 2, "num_quantiles": 5, "head_width": 12}


def main(model: str, cases: str, out: str, rank: str, world_size: str, port: str) -> None:
    import verl  # noqa: F401  (loads the plugin)

    from verl_dvpo.platforms.cpu.megatron_cuda import cuda_is_the_cpu

    torch.set_num_threads(1)
    with cuda_is_the_cpu():
        from critic.megatron_cpu import harness

        harness.join(int(rank), int(world_size), int(port))
        seen = {name: run(model, case) for name, case in json.loads(Path(cases).read_text()).items()}
        if world_size == "2":
            folder = Path(out).parent
            seen["checkpoints"] = {
                "divided": loaded_into_stages(model, folder / "tp2"),
                "mixed": loaded_states(model, folder / "mixed"),
                "resumed": resumed(model, folder / "dp2"),
            }
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


def step(worker: Any, batch: Any) -> None:
    """One step of a critic, as the trainer takes it."""
    from critic import harness as common

    common.infer(worker, batch)
    common.update(worker, batch)


def loaded_into_stages(model: str, folder: Path) -> dict[str, Any]:
    """A trained critic of two tensor-parallel ranks, and what two pipeline stages make of its checkpoint."""
    from critic import harness as common
    from critic.megatron_cpu import harness, trial

    batch, seen = common.make_batch(), {}
    whole = {"saved": ("model", "optimizer"), "dist_ckpt_optim_fully_reshardable": True}
    worker = harness.make_worker(model, value=TWO_LAYERS, tensor_model_parallel_size=2, **whole)
    step(worker, batch)
    seen["saved"] = trial.raw_outputs(worker, batch)
    worker.save_checkpoint(str(folder), global_step=1)
    step(worker, batch)
    seen["went_on"] = trial.raw_outputs(worker, batch)

    worker = harness.make_worker(model, value=TWO_LAYERS, pipeline_model_parallel_size=2, **whole)
    worker.load_checkpoint(str(folder))
    seen["loaded"] = trial.raw_outputs(worker, batch)
    step(worker, batch)
    seen["resumed"] = trial.raw_outputs(worker, batch)

    contents = ("model", "optimizer", "extra")
    worker = harness.make_worker(model, value=TWO_LAYERS, pipeline_model_parallel_size=2, saved=contents)
    try:
        worker.load_checkpoint(str(folder))
    except ValueError as error:
        seen["refused"] = str(error)
    return seen


def loaded_states(model: str, folder: Path) -> dict[str, Any]:
    """The optimizer's states of an fp32 head beside a bf16 backbone, before and after they were on the disk."""
    from critic import harness as common
    from critic.megatron_cpu import harness
    from verl_dvpo.platforms.cpu.megatron import open_states

    batch = common.make_batch()
    worker = harness.make_worker(model, value=TWO_LAYERS, dtype="bfloat16")
    step(worker, batch)
    seen = {"states": harness.optimizer_states(worker)}
    worker.save_checkpoint(str(folder), global_step=1)
    worker = harness.make_worker(model, value=TWO_LAYERS, dtype="bfloat16")
    for part in worker.engine.optimizer.chained_optimizers:
        open_states(part)
    seen["fresh"] = harness.optimizer_states(worker)
    worker.load_checkpoint(str(folder))
    return seen | {"loaded": harness.optimizer_states(worker)}


def resumed(model: str, folder: Path) -> dict[str, Any]:
    """Weights after two steps, and after a step, a checkpoint, another worker, and a step."""
    from critic import harness as common
    from critic.megatron_cpu import harness

    whole: dict[str, Any] = {"value": TWO_LAYERS, "saved": ("model", "optimizer", "extra")}
    rank = torch.distributed.get_rank()
    first, second = (common.make_batch(rows=slice(rank * 4, rank * 4 + 4), seed=seed) for seed in (0, 1))
    worker = harness.make_worker(model, **whole)
    step(worker, first)
    worker.save_checkpoint(str(folder), global_step=1)
    step(worker, second)
    undisturbed = harness.named_weights(worker)
    worker = harness.make_worker(model, **whole)
    fresh = harness.named_weights(worker)
    worker.load_checkpoint(str(folder))
    step(worker, second)
    steps = {
        float(state["step"])
        for part in worker.engine.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
    }
    rates = {group["lr"] for group in worker.engine.optimizer.param_groups}
    weights = {"undisturbed": undisturbed, "fresh": fresh, "resumed": harness.named_weights(worker)}
    return weights | {"steps": steps, "rates": rates}


if __name__ == "__main__":
    main(*sys.argv[1:])
