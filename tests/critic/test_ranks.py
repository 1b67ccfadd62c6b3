# SPDX-License-Identifier: Apache-2.0
"""Two ranks (two processes, gloo) learn what one rank learns from the same sequences.

They share sequences out, or the parts of each (Ulysses), or hold a whole copy of the parameters each (HSDP).
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import verl_dvpo
from critic import harness
from critic.two_ranks import CASES, rows_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("ranks") / "model")


@pytest.fixture(scope="module")
def two(model: str) -> list[dict]:
    """What each rank of each pair saw."""
    out = Path(model).with_name("seen")
    port = str(harness.free_port())
    script = Path(__file__).with_name("two_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), model, port, str(rank), str(out)],
            # The checkout before an installed copy, as in this process.
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=900) for rank in ranks] == [0, 0]
    seen = [torch.load(f"{out}-{rank}", weights_only=False) for rank in range(2)]
    for rank in seen:
        assert rank["package"] == str(Path(verl_dvpo.__file__).parent) == str(ROOT / "verl_dvpo")
    return [rank["cases"] for rank in seen]


def draw_as_two_ranks(worker) -> None:
    """Lets targets of the first four sequences be drawn as rank 0 draws them, and of the others as rank 1 does."""
    build, turns = worker.family.build_targets, itertools.count()

    def build_targets(*arguments, generator, **more):
        rank = next(turns)
        worker.engine.get_data_parallel_rank = lambda: rank
        generator = worker._generator(1, generator.device)
        return build(*arguments, generator=generator, **more)

    worker.family.build_targets = build_targets


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_values_loss_and_gradients_of_one(case, two, model):
    settings = {name: value for name, value in CASES[case].items() if name not in ("engine", "attention")}
    value = {**settings.pop("value"), "rows_per_chunk": 4}
    value.pop("tokens_per_block", None)
    worker = harness.make_worker(model, value=value, **settings)
    draw_as_two_ranks(worker)
    gradients = harness.capture_gradients(worker)
    batch = harness.make_batch()
    values = harness.infer(worker, batch)["values"].unbind()
    metrics = harness.train(worker, batch)

    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    assert scale > 0
    for rank, seen in enumerate(two):
        assert seen[case]["gradients"].keys() == gradients.keys()
        torch.testing.assert_close(seen[case]["gradients"], gradients, rtol=1e-5, atol=1e-5 * scale)
        if rank == 0 or "attention" not in CASES[case]:
            expected = torch.cat(values[rows_of(CASES[case], rank)])
            torch.testing.assert_close(seen[case]["values"], expected, rtol=1e-5, atol=1e-6)
    got = two[0][case]["metrics"]
    names = [name for name in metrics if name == "loss" or name.startswith("critic/")]
    assert len(names) >= 4
    for name in names:
        torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(metrics[name]), rtol=1e-5, atol=1e-6, msg=name)
