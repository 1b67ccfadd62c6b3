# SPDX-License-Identifier: Apache-2.0
"""Runs verl's ``main_ppo`` on the demo, shows a line a step and summarises the result.

The run is verl's own, in a process of its own. This module only reads the metrics that verl writes as JSON lines.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl_dvpo.bench.tasks.addition import NAME
from verl_dvpo.bench.tasks.prepare import TaskFolder
from verl_dvpo.records import read_metrics
from verl_dvpo.saved.values import FOLDER as VALUES
from verl_dvpo.saved.values import dump_files

ACCURACY = f"val-core/{NAME}/acc/mean@1"

# What the critic believes of 8 answers, every 5 steps; `++`, because a run without a critic has no such section.
DUMPS = ("++critic.value.dump_every=5", "++critic.value.dump_sequences=8")

# Heading -> verl's metric. Cells of the critic stay blank in a run without one.
COLUMNS = {
    "reward": "critic/score/mean",
    "length": "response_length/mean",
    "value": "critic/values/mean",
    "expl.var": "critic/vf_explained_var",
    "q10": "critic/quantile/q10",
    "q50": "critic/quantile/q50",
    "q90": "critic/quantile/q90",
    "crossing": "critic/quantile/crossing_fraction",
    "heads std": "critic/ensemble/std",
    "vf loss": "critic/vf_loss",
    "s/step": "timing_s/step",
}


@dataclass(frozen=True)
class RunPaths:
    """The files of one run.

    Attributes:
        folder: of the run.
    """

    folder: Path

    @property
    def log(self) -> Path:
        """Everything that verl prints."""
        return self.folder / "train.log"

    @property
    def metrics(self) -> Path:
        """JSON lines, one a step."""
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's files."""
        return self.folder / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of verl's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def pictures(self) -> Path:
        """The folder of the pictures of what the critic believed."""
        return self.folder / "pictures"


def run_demo(demo: TaskFolder, folder: str | Path, overrides: Sequence[str]) -> int:
    """Trains on the demo and prints its progress and its result.

    Args:
        demo: model and data.
        folder: of the run; made if needed.
        overrides: Hydra overrides after ours, for example ``algorithm=ppo``.

    Returns:
        The exit status of ``main_ppo``.
    """
    paths = RunPaths(Path(folder).resolve())
    paths.folder.mkdir(parents=True, exist_ok=True)
    paths.metrics.unlink(missing_ok=True)
    shutil.rmtree(paths.checkpoints / VALUES, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "dvpo_trainer", "platform=cpu", "+task=demo"),
        *(f"demo.dir={demo.path.resolve()}", f"trainer.default_local_dir={paths.checkpoints}"),
        f"hydra.run.dir={paths.folder / 'hydra'}",
        *DUMPS,
        *overrides,
    ]
    print(f"log of everything: {paths.log}\n$ {' '.join(['python', *command[1:]])}\n", flush=True)
    environment = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "TQDM_DISABLE": "1",  # a log is no terminal
        "VERL_FILE_LOGGER_PATH": str(paths.metrics),
        "TENSORBOARD_DIR": str(paths.tensorboard),
        # Ray's workers are niced by 15 otherwise, and wait for every other program.
        "RAY_worker_niceness": "0",
    }
    started = time.monotonic()
    with open(paths.log, "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        before = signal.signal(signal.SIGTERM, _exit)  # a SIGTERM ends the training too
        try:
            show(follow(paths.metrics, process))
        finally:
            if process.poll() is None:
                process.terminate()
            status = process.wait()
            signal.signal(signal.SIGTERM, before)
    if status == 0:
        status = summarise(paths, time.monotonic() - started)
    if status != 0:
        print(f"\nthe run failed with exit status {status}; the end of {paths.log}:\n", file=sys.stderr)
        print("\n".join(paths.log.read_text(errors="replace").splitlines()[-25:]), file=sys.stderr)
    return status


def _exit(number: int, frame: Any) -> None:
    """Handles a signal so that ``finally`` clauses run."""
    sys.exit(128 + number)


def follow(metrics: Path, process: subprocess.Popen) -> Iterator[dict[str, Any]]:
    """Yields verl's records ``{"step", "data"}`` as they are written, until the process has ended."""
    position, rest = 0, b""
    while True:
        ended = process.poll() is not None
        if metrics.exists():
            with open(metrics, "rb") as file:
                file.seek(position)
                chunk = file.read()
            position += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)
        if ended:
            return
        time.sleep(0.3)


def show(records: Iterator[dict[str, Any]]) -> None:
    """Prints a table with a line a step; on a terminal a clock runs below it.

    Args:
        records: verl's, as ``follow`` yields them.
    """
    starting = "starting Ray, vLLM, actor and critic"
    progress = tqdm(bar_format="{desc} {elapsed}", desc=starting, disable=None)  # off if stderr is no terminal

    def say(text: str) -> None:
        print(text, flush=True) if progress.disable else progress.write(text)

    if progress.disable:
        say(starting)
    heading = "step " + " ".join(f"{name:>9}" for name in COLUMNS)
    for record in records:
        data = record["data"]
        if ACCURACY in data and "timing_s/step" not in data:
            say(f"validation accuracy before training: {data[ACCURACY]:.3f}\n{heading}")
        if "timing_s/step" in data:
            cells = (data.get(metric) for metric in COLUMNS.values())
            say(f"{record['step']:>4} " + " ".join(" " * 9 if x is None else f"{x:9.3f}" for x in cells))
            if ACCURACY in data:
                say(f"validation accuracy after step {record['step']}: {data[ACCURACY]:.3f}")
        progress.set_description_str(f"step {record['step']}", refresh=True)
    progress.close()


def summarise(paths: RunPaths, seconds: float) -> int:
    """Prints the accuracy before and after training, the time and the run's files.

    Args:
        paths: of the run.
        seconds: that the run took.

    Returns:
        0, or 1 if the run has fewer than two validations.
    """
    records = read_metrics(paths.metrics)
    accuracies = [(record["step"], record["data"][ACCURACY]) for record in records if ACCURACY in record["data"]]
    if len(accuracies) < 2:
        print(
            f"{paths.metrics} holds {len(accuracies)} validations; one before and one after training are expected; "
            "leave trainer.val_before_train and trainer.test_freq on",
            file=sys.stderr,
        )
        return 1
    (_, before), (last, after) = accuracies[0], accuracies[-1]
    times = sorted(record["data"]["timing_s/step"] for record in records if "timing_s/step" in record["data"])
    print(f"\nvalidation accuracy (greedy, clean reward): {before:.3f} before, {after:.3f} after {last} steps", end="")
    print(f" ({after - before:+.3f})")
    print(f"time: {seconds:.0f} s in all, {times[len(times) // 2]:.2f} s a step (median)")
    print(f"log:          {paths.log}\nmetrics:      {paths.metrics}")
    print(f"TensorBoard:  tensorboard --logdir {paths.tensorboard}")
    saved = sorted(paths.checkpoints.glob("global_step_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
    print(f"checkpoint:   {saved[-1] if saved else 'none: trainer.save_freq is off'}")
    print(f"pictures:     {draw_pictures(paths) or 'none: a critic with critic.value.dump_every above 0 has some'}")
    return 0


def draw_pictures(paths: RunPaths) -> str:
    """Draws what the critic believed; those of an earlier run are replaced.

    Returns:
        Where they are, or why there are none; empty for a run whose critic wrote nothing.
    """
    from verl_dvpo.pictures.draw import draw
    from verl_dvpo.pictures.runs import read_run

    if not dump_files(paths.folder):
        return ""
    shutil.rmtree(paths.pictures, ignore_errors=True)
    try:
        page = draw([read_run(paths.folder.name, paths.folder)], paths.pictures)
    except (OSError, ValueError) as error:
        return f"none: {error}"
    return f"{page}\n              (fan chart alone: {page.with_name('fan.png')})"
