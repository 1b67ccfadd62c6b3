# SPDX-License-Identifier: Apache-2.0
"""Runs what a study still lacks, one run after another.

    <out>/study.json              the study, for the report
    <out>/runs/<run>/config.yaml  resolved configuration
                     metrics.jsonl  verl's metrics, as they come
                     train.log    everything that was printed
                     run.json     how it ended: status, score, seed, wall time, versions, error

``run.json`` is written beside its place and renamed into it, so a run is over or it is not. A run without one was cut
short; its folder is emptied, and it starts anew. A run that failed is recorded, the study goes on, and a later call
tries it again.

Processes on one machine may share a study: each takes the next run that nobody has, under a lock in ``<out>/.locks``
that goes with the process that holds it, however that ends.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig
from tqdm import tqdm

from verl_dvpo.bench.study.config import Study
from verl_dvpo.bench.study.plan import Run, compose, plan, resolved
from verl_dvpo.bench.study.versions import versions
from verl_dvpo.records import read_metrics, scores

#: Trains and leaves JSON lines at the path.
Train = Callable[[DictConfig, Path], object]
FINISHED, FAILED = "finished", "failed"
LONGEST_ERROR = 4000


class RunFailedError(RuntimeError):
    """A run ended without an exception, and without what it was asked for."""


class RunTimeoutError(RuntimeError):
    """A run took longer than ``minutes_per_run``."""


def run_study(study: Study, *, train: Train | None = None, stream: IO[str] | None = None) -> list[Run]:
    """Runs what is not there yet, but for runs that other processes have taken, and returns those that failed here.

    Args:
        study: what to run.
        train: does one run; verl's ``main_ppo`` on one Ray by default.
        stream: where progress goes; a copy of standard error by default, because a run's own output goes to its log.

    Raises:
        ValueError: a configuration is wrong, or a finished run was made with other settings; nothing was started.
    """
    out = study.out.absolute()
    runs = plan(study)
    before = {run: read_record(run) for run in runs}
    pending = [run for run in runs if not _is_finished(run, before[run])]
    configs = [compose(run) for run in tqdm(pending, desc="checking", unit="run", disable=len(pending) < 8)]

    def ended_elsewhere(run: Run) -> bool:
        # A run that failed before and is tried again has no record in between.
        return read_record(run) not in (None, before[run])

    def steps_done() -> int:
        """Of all runs that are over, whoever ran them."""
        return study.steps * (len(runs) - len(pending) + sum(map(ended_elsewhere, pending)))

    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        write_json(out / "study.json", study.to_json())
        if stream is None:
            stream = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
        if train is None:
            train = stack.enter_context(_verl())
        bar = stack.enter_context(
            # smoothing=0: time left from the average of this call, starts and validations included
            tqdm(total=len(runs) * study.steps, initial=steps_done(), unit="step", smoothing=0, file=stream)
        )
        stack.enter_context(_sigterm_exits())
        done = len(runs) - len(pending)
        bar.write(f"{study.name}: {len(runs)} runs, {done} of them finished before; in {out}", file=stream)
        failed = []
        for run, config in zip(pending, configs, strict=True):
            with _claim(run) as is_ours:
                if not is_ours or ended_elsewhere(run):
                    continue
                with _following(run, bar, steps_done):
                    record = _one(run, config, train, study.minutes_per_run)
            if record["status"] == FAILED:
                failed.append(run)
                bar.write(f"FAILED {run.name}: {_last_line(record['error'])}; see {run.log}", file=stream)
            else:
                bar.write(f"{run.name}: score {record['score']:.3f} in {record['wall_seconds']:.0f} s", file=stream)
            bar.n = steps_done()
            bar.refresh()
    return failed


def unfinished(study: Study) -> list[Run]:
    """Runs that have not ended: nobody has taken them, or another process is at them."""
    return [run for run in plan(study) if read_record(run) is None]


def read_record(run: Run) -> dict[str, Any] | None:
    """How a run ended; None if it has not."""
    return json.loads(run.record.read_text()) if run.record.is_file() else None


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _is_finished(run: Run, record: dict[str, Any] | None) -> bool:
    if record is None or record["status"] != FINISHED:
        return False
    if record["overrides"] != list(run.overrides):
        raise ValueError(
            f"run {run.name} is finished, but with other settings than this study's: {record['overrides']} there, "
            f"{list(run.overrides)} here; choose another out, or remove {run.folder}"
        )
    return True


def _one(run: Run, config: DictConfig, train: Train, minutes: float | None) -> dict[str, Any]:
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
    try:
        with redirected(run.log), _at_most(minutes):
            try:
                train(config, run.metrics)
            except Exception:
                traceback.print_exc()
                raise
        record |= {"status": FINISHED, "error": None, "score": _final_score(run)}
    except Exception as error:  # whatever a run dies of is recorded, and the next one starts
        text = "".join(traceback.format_exception(error))
        record |= {"status": FAILED, "error": text[-LONGEST_ERROR:], "score": None}
    record["wall_seconds"] = round(time.monotonic() - start, 1)
    write_json(run.record, record)
    return record


def _final_score(run: Run) -> float:
    """The mean over the in-domain sources of the last validation, which must be that of the last step."""
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
    """Trains with verl on one Ray, which is started by the first run, and again after a run that failed."""
    import ray

    from verl_dvpo import train

    def run(config: DictConfig, metrics: Path) -> None:
        try:
            train.run(config, metrics)
        except BaseException:
            ray.shutdown()  # whatever the run has left behind goes with it
            raise

    # Ray's workers are niced by 15 otherwise, and wait for every other program.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        yield run
    finally:
        ray.shutdown()


@contextlib.contextmanager
def redirected(path: Path) -> Iterator[None]:
    """Sends standard output and error, those of other threads and of C included, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    try:
        with open(path, "a", buffering=1) as log:
            for target in (1, 2):
                os.dup2(log.fileno(), target)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
    finally:
        for target, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, target)
            os.close(copy)


@contextlib.contextmanager
def _following(run: Run, bar: tqdm, steps_done: Callable[[], int]) -> Iterator[None]:
    """Moves the bar along with the run's metrics, and with the runs that are over."""
    over = threading.Event()
    bar.set_description(run.name)
    seconds = 1.0 if bar.fp.isatty() else 30.0  # a file gets a line each time

    def follow() -> None:
        while not over.wait(seconds):
            step = max((record["step"] for record in read_metrics(run.metrics)), default=0)
            bar.n = steps_done() + min(step, run.steps)
            bar.refresh()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _at_most(minutes: float | None) -> Iterator[None]:
    if minutes is None:
        yield
        return

    def stop(*_: object) -> None:
        raise RunTimeoutError(f"the run took longer than minutes_per_run={minutes}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, minutes * 60)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """A termination unwinds the stack, so that Ray ends; only the main thread can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _claim(run: Run) -> Iterator[bool]:
    """Whether the run is this process's; the lock is not in the run's folder, which is emptied."""
    folder = run.out / ".locks"
    folder.mkdir(exist_ok=True)
    with open(folder / run.name, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300]
