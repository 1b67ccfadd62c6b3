# SPDX-License-Identifier: Apache-2.0
"""Kills parts of one run at random under ``verl-dvpo run``, and compares its end with that of a run left alone.

    verl-dvpo demo-data --tiny --out runs/demo-tiny
    python tests/faults/random_kills.py --demo runs/demo-tiny --steps 30 --kills 10

Every parameter, every state of the optimizers, the schedules and the place in the data have to be equal to the bit. The
processes' global random states are not compared: each process begins with one of its own.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from table import CONTROLLER, LOOP, SERVER, STORAGE, TRAINING
from training import command, environment, own_folder

from verl_dvpo.restarts import adopt_orphans

PARTS = (SERVER, LOOP, STORAGE, CONTROLLER, TRAINING, "trainer", "raylet", "driver")
PHASES = ("generation", "values", "advantages", "critic_update", "actor_update", "checkpoint", "weight_transfer")
RUN = "import typer; from verl_dvpo.restarts import run; typer.run(run)"


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Lists where two nested structures differ, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        one, other = (getattr(each, "_local_tensor", each) for each in (one, other))
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if type(one) is not type(other):
        return [place]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{place}: keys"]
        return [found for key in one for found in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{place}: length"]
        return [
            found for i, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{place}/{i}")
        ]
    if hasattr(one, "__array__"):
        return [] if (one == other).all() else [place]
    return [] if one == other or not isinstance(one, (int, float, str, bool)) else [place]


def compare(one: Path, other: Path) -> list[str]:
    """Compares all files of two checkpoints."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.pt"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.pt"))
    assert len(files) >= 7, files
    found = []
    for file in files:
        # our own files, of a minute ago
        pair = [torch.load(folder / file, weights_only=False, map_location="cpu") for folder in (one, other)]
        for each in pair:
            each.pop("rng", None)
        found += differences(*pair, str(file))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="of `verl-dvpo demo-data --tiny --out DIR`")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/random_kills"))
    chosen = parser.parse_args()
    adopt_orphans()
    demo, work = chosen.demo.resolve(), chosen.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    draws = random.Random(chosen.seed)
    steps = sorted(draws.sample(range(2, chosen.steps + 1), chosen.kills))
    faults = [
        {
            "do": "kill",
            "what": draws.choice(PARTS),
            "phase": draws.choice(PHASES),
            "step": step,
            "delay": draws.uniform(0.0, 0.1),
            "stamp": str(work / f"stamp-{step}"),
        }
        for step in steps
    ]
    total = f"trainer.total_training_steps={chosen.steps}"
    for name, given in (("alone", None), ("killed", faults)):
        overrides = command(demo, work / name, total)[5:]
        arguments = [sys.executable, "-c", RUN, "--max-restarts", str(chosen.kills + 2), "--", *overrides]
        with own_folder() as own, open(work / f"{name}.log", "wb") as log:
            status = subprocess.call(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment(own, given))
        if status != 0:
            print(f"the run {name} ended with status {status}; see {work / name}.log", file=sys.stderr)
            return 1
    struck = [fault for fault in faults if os.path.exists(fault["stamp"])]
    for fault in struck:
        print(json.dumps({key: fault[key] for key in ("step", "phase", "what")}))
    last = f"global_step_{chosen.steps}"
    found = compare(work / "alone" / last, work / "killed" / last)
    print(f"{len(struck)} of {len(faults)} kills; differences: {found[:10] or 'none'}")
    return int(bool(found) or len(struck) < len(faults))


if __name__ == "__main__":
    sys.exit(main())
