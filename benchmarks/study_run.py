# SPDX-License-Identifier: Apache-2.0
"""Measures what a run of a study costs, and compares a run in a row with one that starts cold.

    python benchmarks/study_run.py                              # ten runs in a row, then the tenth again, cold
    python benchmarks/study_run.py --runs 3 --core 1            # on one core

It executes one arm of ``examples/studies/weights.yaml`` with one seed after the other in one process, as a study does,
prints wall and processor seconds of each, and repeats the last one in a fresh process. All metrics but times and memory
have to be equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from verl_dvpo.bench.study.config import Study, load_study, parse_study
from verl_dvpo.bench.study.plan import plan
from verl_dvpo.records import read_metrics

STUDY = Path(__file__).parents[1] / "examples" / "studies" / "weights.yaml"
#: Beginnings of the metrics that differ between equal runs.
TIMES = ("timing", "perf/")


def one_arm(algorithm: str, seeds: list[int], out: Path, exam: Path) -> Study:
    """Returns the study of one arm on clean rewards."""
    content = load_study(STUDY).to_json()
    kept = [entry for entry in content["algorithms"] if entry["name"] == algorithm]
    one = {"hypotheses": None, "arms": [], "tuning": {}, "noises": ["none"], "reference": algorithm, "algorithms": kept}
    base = [*content["base"], f"exam.dir={exam.resolve()}"]
    return parse_study({**content, **one, "tasks": content["tasks"][:1], "seeds": seeds, "out": str(out), "base": base})


def execute(study: Study, folder: Path, core: int | None) -> list[dict[str, Any]]:
    """Runs a study in a process of its own; returns the records of its runs."""
    file = folder / f"{study.out.name}.yaml"
    file.write_text(json.dumps(study.to_json()))  # JSON is YAML
    command = [sys.executable, "-m", "verl_dvpo.cli", "study", "run", str(file)]
    pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
    subprocess.run(command, check=True, preexec_fn=pin, env={**os.environ, "VERL_PLATFORM": "cpu"})
    return [json.loads(run.record.read_text()) for run in plan(study)]


def differences(one: Path, other: Path) -> tuple[int, list[str]]:
    """Counts the metrics of two runs that should be equal, and names those that are not."""
    compared, differ = 0, []
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        for name in sorted(a["data"].keys() | b["data"].keys()):
            if not name.startswith(TIMES):
                compared += 1
                if a["data"].get(name) != b["data"].get(name):
                    differ.append(f"step {a['step']}: {name}")
    return compared, differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs in a row")
    parser.add_argument("--algorithm", default="ppo")
    parser.add_argument("--core", type=int, default=None, help="the only core to use")
    parser.add_argument("--exam", type=Path, default=Path("runs/exam/data"), help="folder of `verl-dvpo exam-data`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = list(range(given.runs))
        warm = one_arm(given.algorithm, seeds, folder / "warm", given.exam)
        for count, record in enumerate(execute(warm, folder, given.core), start=1):
            print(
                f"run {count}: {record['wall_seconds']:.0f} s, {record['cpu_seconds']:.0f} s of processors", flush=True
            )
        cold = one_arm(given.algorithm, seeds[-1:], folder / "cold", given.exam)
        (record,) = execute(cold, folder, given.core)
        print(f"cold: {record['wall_seconds']:.0f} s, {record['cpu_seconds']:.0f} s of processors")
        compared, differ = differences(plan(warm)[-1].metrics, plan(cold)[0].metrics)
        print(
            f"{compared} numbers of the last run compared with the cold one, {len(differ)} differ",
            *differ[:10],
            sep="\n",
        )
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
