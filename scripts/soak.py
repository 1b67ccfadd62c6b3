# SPDX-License-Identifier: Apache-2.0
"""Runs hundreds of short steps and fails where memory, files, sockets or time grow.

    verl-dvpo demo-data --tiny --out runs/demo-tiny
    python scripts/soak.py --demo runs/demo-tiny --steps 300 --out docs/results/soak

At each step the run's processes are counted: resident memory, open files, sockets and threads of each, and the
processor time of all; shared memory of the machine's /dev/shm; Ray's objects and bytes in its store; entries of
TransferQueue. The mean over the last third is compared with the mean over the third before it (steps 200 to 300
against 100 to 200): growth above 1 % fails. Medians are compared of time on the clock, because a shared machine has
pauses, and of shared memory, where a count may fall into a weight transfer.

Shared memory of other programs is counted too; as root a view of one's own has none of it:

    unshare -m sh -c 'mount -t tmpfs none /dev/shm && exec python scripts/soak.py --demo runs/demo-tiny'
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil

#: What may not grow, the share that it may all the same, and the amount below which a share says nothing.
BOUNDS = {
    "memory_mb": (0.01, 5.0),
    "files": (0.01, 0.5),
    "sockets": (0.01, 0.5),
    "threads": (0.01, 0.5),
    "processes": (0.01, 0.5),
    "shared_memory_mb": (0.01, 1.0),
    "temporary_files": (0.01, 0.5),
    "queue_entries": (0.01, 0.5),
    "ray_objects": (0.01, 2.0),
    "ray_mb": (0.01, 1.0),
    "processor_seconds": (0.01, 0.02),
    "seconds": (0.01, 0.02),
}


#: Bounds of what grows slowly up to a bound, so that it is full early: Ray keeps events of the last 100,000 tasks, and
#: TransferQueue up to four idle connections an address.
SMALL = {"RAY_task_events_max_num_task_in_gcs": "500", "TQ_SOCKET_POOL_SIZE": "2"}


def command(demo: Path, folder: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "dvpo_trainer", "platform=cpu", "+task=demo"),
        *(f"demo.dir={demo}", f"trainer.default_local_dir={folder / 'checkpoints'}", "hydra.run.dir=" + str(folder)),
        *("algorithm=dvpo", "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"),
        *("critic.ppo_mini_batch_size=4", "trainer.logger=[console,file]", "trainer.val_before_train=false"),
        'ray_kwargs.ray_init.runtime_env.env_vars.VERL_DVPO_CPU_THREADS="1"',
        *("trainer.test_freq=20", "trainer.save_freq=20", f"trainer.total_training_steps={steps}"),
    ]


def role(process: psutil.Process) -> str:
    """Names a process by what Ray made of it, or by its program; without its number."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0].split(".")[0].removeprefix("ray::")
    named = [Path(word).stem for word in words[:4] if word.endswith(".py") or "/" in word]
    module = words[words.index("-m") + 1].rpartition(".")[2] if "-m" in words else ""
    return module or (named[-1] if named else words[0])


def weigh(root: psutil.Process, own: Path) -> dict[str, float]:
    """Counts everything of the run once; names are ``measure/role``."""
    found: defaultdict[str, float] = defaultdict(float)
    for process in [root, *root.children(recursive=True)]:
        try:
            with process.oneshot():
                name = role(process)
                found[f"memory_mb/{name}"] += process.memory_info().rss / 2**20
                found[f"threads/{name}"] += process.num_threads()
                found["processor_seconds/all"] += sum(process.cpu_times()[:2])
                links = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        except (psutil.NoSuchProcess, OSError):
            continue
        found[f"files/{name}"] += len(links)
        found[f"sockets/{name}"] += sum(link.startswith("socket:") for link in links)
        found["processes/all"] += 1
    found["shared_memory_mb/dev_shm"] = sum(entry.stat().st_size for entry in os.scandir("/dev/shm")) / 2**20
    found["temporary_files/all"] = sum(1 for _ in (own / "tmp").rglob("*"))
    return dict(found)


def ray_objects(log: str) -> dict[str, float]:
    """Reads what the run's own probe printed last: entries of TransferQueue, and objects in Ray's store."""
    lines = re.findall(r"soak-probe (\{.*?\})", log)
    return json.loads(lines[-1]) if lines else {}


def record(demo: Path, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Runs, and returns a record a step."""
    for name in ("tmp", "r"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    metrics, log = folder / "metrics.jsonl", folder / "log"
    metrics.unlink(missing_ok=True)
    here = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "TMPDIR": str(folder / "tmp"),
        "RAY_worker_niceness": "0",
        **SMALL,
        "VERL_USE_EXTERNAL_MODULES": "soak_probe",
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    records: list[dict[str, Any]] = []
    before = 0.0
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command(demo, folder, steps), stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(0.05)
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                if len(lines) > len(records):
                    data = json.loads(lines[-1])
                    told = ray_objects(log.read_text(errors="replace"))
                    weights = {**weigh(psutil.Process(process.pid), folder), **told}
                    timing = data["data"]
                    weights["seconds/step"] = timing["timing_s/step"] - timing.get("timing_s/save_checkpoint", 0.0)
                    new = len(lines) - len(records)
                    used, weights["processor_seconds/all"] = weights["processor_seconds/all"], 0.0
                    if records:
                        weights["processor_seconds/all"] = (used - before) / new
                    before = used
                    records += [{"step": data["step"], **weights}] * new
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
    if process.returncode != 0 or len(records) < 6:
        raise SystemExit(f"the run ended with status {process.returncode} after {len(records)} steps; see {log}")
    return records


def growth(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares the last third of the steps with the third before it; a row for each measure."""
    third = len(records) // 3
    before, after = records[-2 * third : -third], records[-third:]
    rows = []
    for name in sorted({name for each in records for name in each} - {"step"}):
        mean = median if name.startswith(("seconds/", "shared_memory_mb/")) else fmean
        first, last = (mean(float(each.get(name, 0.0)) for each in part) for part in (before, after))
        share, amount = BOUNDS[name.split("/")[0]]
        grown = last - first
        rows.append({"name": name, "before": first, "after": last, "held": grown <= max(share * first, amount)})
    return rows


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Draws memory a process, files, seconds a step and TransferQueue's entries over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, constrained_layout=True)
    steps = [each["step"] for each in records]
    titles = {
        "memory_mb": "resident memory, MB",
        "files": "open files",
        "processor_seconds": "processor seconds a step",
    }
    for axis, measure in zip(axes.flat, [*titles, "queue_entries"], strict=True):
        names = sorted({name for each in records for name in each if name.startswith(f"{measure}/")})
        names.sort(key=lambda name: -records[-1].get(name, 0.0))
        for name in names[:8]:
            axis.plot(steps, [each.get(name) for each in records], label=name.partition("/")[2], linewidth=1)
        axis.set_title(titles.get(measure, "entries of TransferQueue"))
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/soak"))
    chosen = parser.parse_args()
    records = record(chosen.demo.resolve(), chosen.work.resolve(), chosen.steps)
    rows = growth(records)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "steps.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    lines = ["| measure | third before | last third | held |", "| --- | --- | --- | --- |"]
    for row in rows:
        held = "yes" if row["held"] else "NO"
        lines.append(f"| {row['name']} | {row['before']:.2f} | {row['after']:.2f} | {held} |")
    (chosen.out / "table.md").write_text("\n".join(lines) + "\n")
    draw(records, chosen.out / "soak.svg")
    print("\n".join(lines))
    return int(not all(row["held"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
