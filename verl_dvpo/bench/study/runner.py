# SPDX-License-Identifier: Apache-2.0
"""Executes the runs of a study that are not finished, one after another.

    <out>/study.json              the study, for the report
    <out>/runs/<run>/config.yaml  resolved configuration
                     metrics.jsonl  verl's metrics, one line a step
                     train.log    everything that the run printed
                     run.json     how it ended: status, score, seed, wall time, versions, error

``run.json`` is written atomically when a run has ended. A run without one was interrupted: its folder is emptied, and
it starts again. A failed run is recorded, the study continues, and a later call repeats it. An interrupted study, once
resumed, produces the same report.

Several processes on one machine may share a study. Each process claims the next free run; no run executes twice. A
claim is a file lock in ``<out>/.locks``, which ends with its process. With hypotheses a process goes on until the
stopping rule needs no further run; where all that it needs now are claimed by others, it waits for them.
"""

import contextlib
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig

from verl_dvpo.bench.common import Progress, write_json
from verl_dvpo.bench.study.config import Study
from verl_dvpo.bench.study.cost import ProcessorTime
from verl_dvpo.bench.study.frozen import check_frozen, freeze
from verl_dvpo.bench.study.guards import at_most, claim, redirected, sigterm_exits
from verl_dvpo.bench.study.heads import check_same_head
from verl_dvpo.bench.study.plan import FAILED, FINISHED, Run, compose, plan, read_record, resolved
from verl_dvpo.bench.study.stopping import Records, needed, records_of
from verl_dvpo.bench.study.versions import versions
from verl_dvpo.records import read_metrics, scores

#: Trains and leaves JSON lines at the path.
Train = Callable[[DictConfig, Path], object]
LONGEST_ERROR = 4000
#: Seconds between looks at runs that other processes execute, where nothing else is left to do.
WAIT = 1.0


class RunFailedError(RuntimeError):
    """Says that a run ended without an exception, but without the score that it should have."""


def run_study(study: Study, *, train: Train | None = None, stream: IO[str] | None = None) -> list[Run]:
    """Executes the runs that are not finished and that no other process has claimed; returns those that failed here.

    With hypotheses these are the runs that the stopping rule needs, until it needs no more.

    Args:
        study: what to run.
        train: executes one run; verl's ``main_ppo`` on one Ray by default.
        stream: receives the progress; a copy of standard error by default, because a run's own output goes to its log.

    Raises:
        ValueError: a configuration is wrong, a finished run was made with other settings, or hypotheses or settings
            are others than at the first run; nothing was started.
    """
    check_frozen(study)
    state = _State(study)
    if any("platform=cpu" in run.overrides for run in state.runs):
        os.environ.setdefault("VERL_PLATFORM", "cpu")  # before verl is imported, which then looks for no accelerator
    check_same_head(study)
    configs = {run.name: compose(run) for run in state.first_of_arms()}
    state.out.mkdir(parents=True, exist_ok=True)
    freeze(study)
    failed = []
    with contextlib.ExitStack() as stack:
        write_json(state.out / "study.json", study.to_json())
        if stream is None:
            stream = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
        if train is None:
            train = stack.enter_context(_verl())
        stack.enter_context(sigterm_exits())
        progress = stack.enter_context(
            Progress(len(state.runs) * study.steps, unit="step", done=state.steps_done(), stream=stream)
        )
        done = len(state.runs) - len(state.pending)
        most = "at most " if study.hypotheses is not None else ""
        progress.note(f"{study.name}: {most}{len(state.runs)} runs, {done} of them finished before; in {state.out}")
        for run in state.due():
            with claim(run) as is_ours:
                if not is_ours or state.has_ended(run):
                    continue
                config = configs.pop(run.name) if run.name in configs else compose(run)
                with _following(run, progress, state.steps_done):
                    record = _one(run, config, train, study.minutes_per_run)
                state.executed.add(run.name)
            if record["status"] == FAILED:
                failed.append(run)
                event = f"FAILED {run.name}: {last_line(record['error'])}; see {run.log}"
            else:
                event = f"{run.name}: score {record['score']:.3f} in {record['wall_seconds']:.0f} s"
            progress.update(state.steps_done(), event, keep=True)
    return failed


class _State:
    """Keeps the runs of a study and their records at the start, and sees which have ended since."""

    def __init__(self, study: Study) -> None:
        self.study, self.out, self.steps = study, study.out.absolute(), study.steps
        self.runs = plan(study)
        self.before = {run.name: read_record(run) for run in self.runs}
        self.pending = [run for run in self.runs if not _is_finished(run, self.before[run.name])]
        self.executed: set[str] = set()

    def first_of_arms(self) -> list[Run]:
        """Returns the first pending run of each arm: what is wrong with one is wrong with all its seeds."""
        return list({run.arm: run for run in reversed(self.pending)}.values())[::-1]

    def due(self) -> Iterator[Run]:
        """Yields the runs to try to claim; with hypotheses, asks the rule again after each run that has ended."""
        if self.study.hypotheses is None:
            yield from self.pending
            return
        while runs := needed(self.study, self._records()):
            for run in runs:
                yield run
                if self.has_ended(run):
                    break
            else:
                time.sleep(WAIT)

    def _records(self) -> Records:
        """Returns how runs ended; one that failed before this call has not, because it is repeated."""
        waiting = {run.name for run in self.pending if not self.has_ended(run)}
        return {name: None if name in waiting else record for name, record in records_of(self.study).items()}

    def has_ended(self, run: Run) -> bool:
        """Tells whether any process has ended this run since; one that is being repeated has no record."""
        return run.name in self.executed or read_record(run) not in (None, self.before[run.name])

    def steps_done(self) -> int:
        """Counts the steps of all runs that have ended, in any process."""
        return self.steps * (len(self.runs) - len(self.pending) + sum(map(self.has_ended, self.pending)))


def unfinished(study: Study) -> list[Run]:
    """Returns the runs that are needed and have not ended: no process has claimed them, or another executes them."""
    return needed(study, records_of(study))


def last_line(error: str) -> str:
    """Returns the last line of an error, shortened."""
    return error.strip().splitlines()[-1][:300]


def _is_finished(run: Run, record: dict[str, Any] | None) -> bool:
    if record is None or record["status"] != FINISHED:
        return False
    if record["overrides"] != list(run.overrides):
        raise ValueError(
            f"run {run.name} is finished with the settings {record['overrides']}; this study's are "
            f"{list(run.overrides)}; choose another out, or remove {run.folder}"
        )
    return True


def _one(run: Run, config: DictConfig, train: Train, minutes: float | None) -> dict[str, Any]:
    """Executes one run and returns its record, which it also writes."""
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(resolved(config))
    record: dict[str, Any] = {
        "name": run.name,
        "algorithm": run.algorithm.name,
        "noise": run.noise.name,
        "task": run.task.name,
        "seed": run.seed,
        "overrides": list(run.overrides),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    start = time.monotonic()
    cost = ProcessorTime()
    try:
        with cost, redirected(run.log), at_most(minutes):
            try:
                train(config, run.metrics)
            except Exception:
                traceback.print_exc()
                raise
        record |= {"status": FINISHED, "error": None, "score": _final_score(run)}
    except Exception as error:  # any failure of a run is recorded, and the next run starts
        text = "".join(traceback.format_exception(error))
        record |= {"status": FAILED, "error": text[-LONGEST_ERROR:], "score": None}
    record |= {"wall_seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(cost.seconds, 1)}
    write_json(run.record, record)
    return record


def _final_score(run: Run) -> float:
    """Returns the mean over the in-domain sources of the last step's validation."""
    records = read_metrics(run.metrics)
    last = max((record["step"] for record in records), default=0)
    if last < run.steps:
        raise RunFailedError(f"the run ended at step {last} of {run.steps}")
    final: dict[str, float] = {}
    for record in records:
        if record["step"] == last:
            final |= scores(record)
    missing = [source for source in run.task.in_domain if source not in final]
    if missing:
        raise RunFailedError(
            f"step {last} has no validation score for the in-domain sources {missing}, only for {sorted(final)}; "
            "name the task's own in tasks: in_domain"
        )
    values = [final[source] for source in run.task.in_domain]
    if not all(map(math.isfinite, final.values())):
        raise RunFailedError(f"a validation score is not finite: {final}")
    return sum(values) / len(values)


@contextlib.contextmanager
def _verl() -> Iterator[Train]:
    """Yields a function that trains with verl on one Ray, which starts with the first run and again after a failure."""
    import ray

    from verl_dvpo import train

    def run(config: DictConfig, metrics: Path) -> None:
        try:
            train.run(config, metrics)
        except BaseException:
            ray.shutdown()  # ends whatever the run has left behind
            raise

    # Ray's workers are niced by 15 otherwise, and wait for every other program.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray keeps an idle worker for each logical CPU, and no run can use those of another, whose environment differs.
    os.environ.setdefault("RAY_num_workers_soft_limit", "1")
    try:
        yield run
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _following(run: Run, progress: Progress, steps_done: Callable[[], int]) -> Iterator[None]:
    """Reports each step of a run while it executes."""
    over = threading.Event()

    def follow() -> None:
        seen = 0
        if progress.terminal:
            progress.update(steps_done(), run.name)
        while not over.wait(1.0):
            step = max((record["step"] for record in read_metrics(run.metrics)), default=0)
            if progress.terminal or step > seen:
                seen = step
                progress.update(steps_done() + min(step, run.steps), f"{run.name}: step {step} of {run.steps}")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
