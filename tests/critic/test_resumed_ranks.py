# SPDX-License-Identifier: Apache-2.0
"""Two ranks that were stopped go on as if they had not been, to the bit, whatever their family draws or remembers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from critic import harness

ROOT = Path(__file__).parents[2]

SETTINGS = {
    "drawn targets": {
        "num_heads": 2,
        "num_quantiles": 5,
        "target": "sample_replacement",
        "levels": "midpoint",
        "kappa": 0.0,
    },
    "a density that adapts": {"num_heads": 2, "num_quantiles": "auto"},
}


def both(model: str, folder: Path, value: dict, first: int) -> list[dict]:
    port = str(harness.free_port())
    script = Path(__file__).with_name("resumed_ranks.py")
    path = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), model, json.dumps(value), port, str(rank), str(folder), str(first)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"from{first}-rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(one: object, other: object, place: str = "") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    else:
        assert one == other, place


@pytest.mark.parametrize("case", SETTINGS)
def test_two_ranks_go_on_where_they_were(case, tmp_path):
    model = harness.save_model(tmp_path / "model")
    straight = both(model, tmp_path, SETTINGS[case], 1)
    resumed = both(model, tmp_path, SETTINGS[case], 2)
    for rank in range(2):
        assert any("exp_avg" in name for name in straight[rank]["states"])
        assert_same(straight[rank], resumed[rank], f"rank {rank}")
    parameters = [name for name in straight[0]["states"] if name.endswith("/itself")]
    assert any(straight[0]["states"][n].shape != straight[1]["states"][n].shape for n in parameters) or any(
        not torch.equal(straight[0]["states"][n], straight[1]["states"][n]) for n in parameters
    ), "each rank holds its own part"
