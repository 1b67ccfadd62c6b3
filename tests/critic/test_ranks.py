# SPDX-License-Identifier: Apache-2.0
"""Two data-parallel ranks (two processes, gloo) learn what one rank learns from the same sequences."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import verl_dvpo
from critic import harness

ROOT = Path(__file__).parents[2]


def test_two_ranks_have_the_loss_and_gradients_of_one(tmp_path: Path):
    model = harness.save_model(tmp_path / "model")
    out = tmp_path / "out.pt"
    port = str(harness.free_port())
    script = Path(__file__).with_name("two_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), model, "quantile_gae", port, str(rank), str(out)],
            # The checkout before an installed copy, as in this process.
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    two = torch.load(out, weights_only=False)

    assert two["package"] == str(Path(verl_dvpo.__file__).parent) == str(ROOT / "verl_dvpo")
    worker = harness.make_worker(model, value={"share_every": 1})
    gradients = harness.capture_gradients(worker)
    batch = harness.make_batch()
    harness.infer(worker, batch)
    metrics = harness.train(worker, batch)

    assert two["gradients"].keys() == gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-5, atol=1e-5 * scale)
    for name in (
        "loss",
        "critic/multiplier/cvar",
        "critic/multiplier/gain",
        "critic/quantile/q50",
        "critic/ensemble/std",
        "critic/share/quantile",
        "critic/share/consistency",
    ):
        torch.testing.assert_close(
            torch.tensor(two["metrics"][name]), torch.tensor(metrics[name]), rtol=1e-5, atol=1e-7, msg=name
        )
