# SPDX-License-Identifier: Apache-2.0
"""What a step of the demo costs: seconds of each phase, and CPU seconds of each process.

    python benchmarks/demo_step.py --data runs/demo/data                    # 64 prompts, 4 answers each
    python benchmarks/demo_step.py --data runs/demo/data algorithm=ppo      # any override

Runs `main_ppo` for a few steps without validation or checkpoint and reads verl's own timers. On a shared machine look
at the CPU seconds too: they vary less than the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from verl_dvpo.records import read_metrics

PHASES = ("gen", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "update_weights", "step")
WARM_UP = 3


def processes() -> dict[int, tuple[str, float]]:
    """Name and CPU seconds so far of every process that this user can see."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name = (folder / "cmdline").read_text().split("\0")[0].split(" ")[0].split(".")[0]
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # it ended
                continue
            found[int(folder.name)] = (name, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    return found


def measure(data: Path, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Runs ``steps`` steps after warming up; medians of verl's timers and CPU seconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        metrics, log = Path(folder, "metrics.jsonl"), Path(folder, "log")
        command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "dvpo_trainer", "platform=cpu"]
        command += ["+task=demo", f"demo.dir={data.resolve()}", f"hydra.run.dir={folder}/hydra"]
        command += [
            f"trainer.default_local_dir={folder}/checkpoints",
            f"trainer.total_training_steps={WARM_UP + steps}",
        ]
        command += ["trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.val_before_train=false"]
        command += ["trainer.logger=[file]", *overrides]
        environment = {"VERL_PLATFORM": "cpu", "VERL_FILE_LOGGER_PATH": str(metrics), "RAY_worker_niceness": "0"}
        started = time.monotonic()
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})
        marks: dict[int, dict[int, tuple[str, float]]] = {}
        startup = 0.0
        while process.poll() is None:
            done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if done == 1 and not startup:
                startup = time.monotonic() - started
            if done in (WARM_UP, WARM_UP + steps - 1) and done not in marks:
                marks[done] = processes()
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(log.read_text()[-4000:])
        records = [record["data"] for record in read_metrics(metrics)][WARM_UP:]
    before, after = marks[min(marks)], marks[max(marks)]
    cpu: Counter[str] = Counter()
    for pid, (name, seconds) in after.items():
        cpu[name] += (seconds - before.get(pid, (name, 0.0))[1]) / (steps - 1)
    timers = {phase: [record.get(f"timing_s/{phase}", 0.0) for record in records] for phase in PHASES}
    return {
        "startup_s": startup,
        "phases_s": {phase: statistics.median(values) for phase, values in timers.items() if any(values)},
        "fastest_step_s": min(timers["step"]),
        "cpu_s": {name: seconds for name, seconds in cpu.most_common() if seconds >= 0.03},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `verl-dvpo demo-data`")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    arguments = parser.parse_args()
    result = measure(arguments.data, arguments.steps, ["algorithm=dvpo", *arguments.overrides])
    print(f"start-up to the end of the first step: {result['startup_s']:.0f} s")
    print("\n| phase | s, median |\n| --- | --- |")
    for phase, seconds in result["phases_s"].items():
        print(f"| {phase} | {seconds:.2f} |")
    print(f"\nfastest step {result['fastest_step_s']:.2f} s\n\n| process | CPU s a step |\n| --- | --- |")
    for name, seconds in result["cpu_s"].items():
        print(f"| {name} | {seconds:.2f} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
