# SPDX-License-Identifier: Apache-2.0
"""Breaks a run in every way of ``table.py`` and writes what came of it.

    verl-dvpo demo-data --tiny --out runs/demo-tiny
    python tests/faults/run.py --demo runs/demo-tiny --out docs/results/faults
    python tests/faults/run.py --demo DIR --only kill-rollout-server-generation --times 1

One chain of runs: each begins at the checkpoint that the fault before it left, trains and saves a step, and is broken
in the step after that. So each run also shows that the last good checkpoint of the one before it loads.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from table import FAULTS, Fault
from training import Ended, command, own_folder, run

from verl_dvpo.restarts import adopt_orphans
from verl_dvpo.saved import checkpoints

#: Seconds in which a run has to end after its fault; the watchdog's own patience comes on top.
LIMIT = 60.0


def flip(file: Path) -> None:
    """Flips one bit in the middle of a file's largest entry."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def halve(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def largest(folder: Path) -> Path:
    return max(folder.rglob("*.pt"), key=lambda path: path.stat().st_size)


SPOILERS = {
    "truncated": lambda latest: halve(largest(latest)),
    "flipped": lambda latest: flip(largest(latest)),
    "tracker": lambda latest: (latest.parent / checkpoints.TRACKER).write_text(""),
    "critic-gone": lambda latest: shutil.rmtree(latest / "critic"),
}


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[None]:
    """Puts what is in ``folder`` on a disk with ``room`` more bytes, and brings what is there at the end back."""
    beside = folder.with_name(folder.name + "-beside")
    shutil.move(folder, beside)
    folder.mkdir()
    size = sum(path.stat().st_size for path in beside.rglob("*") if path.is_file())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size + room}", "tmpfs", str(folder)], check=True)
    try:
        shutil.copytree(beside, folder, dirs_exist_ok=True)
        yield
    finally:
        shutil.rmtree(beside)
        shutil.copytree(folder, beside)
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()
        shutil.move(beside, folder)


def weigh(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Chain:
    """The runs, one after the other, in one folder of checkpoints."""

    def __init__(self, demo: Path, folder: Path) -> None:
        self.demo, self.folder = demo, folder
        folder.mkdir(parents=True, exist_ok=True)

    def latest(self) -> int:
        return checkpoints.latest(self.folder) or 0

    def begin(self) -> None:
        """Makes the first checkpoints."""
        if checkpoints.latest(self.folder) is None:
            with own_folder() as own:
                ended = run(self.arguments(2), own)
                if ended.status != 0:
                    raise SystemExit(f"a run without a fault ended with status {ended.status}:\n{ended.log[-4000:]}")

    def arguments(self, steps: int, *overrides: str) -> list[str]:
        keep = ("trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=2")
        return command(self.demo, self.folder, f"trainer.total_training_steps={steps}", *keep, *overrides)

    def strike(self, fault: Fault) -> dict[str, Any]:
        """Does one fault and returns a row."""
        good = self.latest()
        if fault.spoil:
            SPOILERS[fault.spoil](checkpoints.folder_of(self.folder, good))
            good -= fault.spoil != "tracker"
        with ExitStack() as stack:
            own = stack.enter_context(own_folder())
            if fault.mount:
                one = weigh(checkpoints.folder_of(self.folder, good))
                stack.enter_context(small_disk(self.folder, one * 3 // 2 if fault.kind == "full" else one * 10))
            spec = fault.spec and {
                **fault.spec,
                "step": good + 2,
                "stamp": str(own / "stamp"),
                "what": {"FLAG": str(own / "flag"), "CHECKPOINTS": str(self.folder)}.get(
                    fault.spec["what"], fault.spec["what"]
                ),
            }
            # a run that the fault does not end has two steps more
            ended = run(self.arguments(good + (3 if spec else 1), *fault.overrides), own, spec, limit=LIMIT + 30)
        (self.folder / f"{fault.name}.log").write_text(ended.log)
        return self.judge(fault, ended, good)

    def judge(self, fault: Fault, ended: Ended, good: int) -> dict[str, Any]:
        resumed = re.search(rf"Resuming from \S*global_step_{good}\b", ended.log) is not None or good == 0
        at_least = good + 1
        whole = checkpoints.choose(self.folder, critic=True)
        row = {
            "name": fault.name,
            "resumed": resumed,
            "status": ended.status,
            "seconds": round(ended.seconds, 1) if fault.spec else 0.0,
            "said": not fault.message or ended.says(fault.message),
            "whole": whole is not None and whole >= at_least,
            "last": ended.last,
            "left": ended.left,
        }
        # a run that the fault does not end trains the steps that it was to train
        in_time = ended.status == 0 or (ended.seconds <= LIMIT and fault.spec is not None)
        row["held"] = bool(resumed and row["said"] and row["whole"] and not ended.left and in_time)
        return row


def table(rows: list[dict[str, Any]]) -> str:
    """Writes rows as Markdown, a line a fault."""
    lines = ["| part | phase | fault | what happens | seconds, median | held | note |", "| --- " * 7 + "|"]
    for fault in FAULTS:
        own = [row for row in rows if row["name"] == fault.name]
        if not own:
            continue
        seconds = f"{statistics.median(row['seconds'] for row in own):.0f}" if fault.spec else ""
        happens = f"ends; says `{fault.message}`" if fault.message else "ends"
        if fault.spec is None:
            happens = "goes on from the checkpoint before"
        if fault.spoil == "tracker":
            happens = "goes on from the latest checkpoint"
        held = f"{sum(row['held'] for row in own)} of {len(own)}"
        lines.append(f"| {fault.part} | {fault.phase} | {fault.kind} | {happens} | {seconds} | {held} | {fault.note} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="of `verl-dvpo demo-data --tiny --out DIR`")
    parser.add_argument("--out", type=Path, default=Path("docs/results/faults"))
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), help="checkpoints and logs")
    parser.add_argument("--only", nargs="*", default=[fault.name for fault in FAULTS])
    parser.add_argument("--times", type=int, default=5)
    chosen = parser.parse_args()
    adopt_orphans()
    commit = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, text=True
    ).strip()
    chain = Chain(chosen.demo.resolve(), chosen.work.resolve())
    chain.begin()
    chosen.out.mkdir(parents=True, exist_ok=True)
    record = chosen.out / "rows.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for time in range(chosen.times):
        for fault in (fault for fault in FAULTS if fault.name in chosen.only):
            if sum(row["name"] == fault.name for row in rows) > time:
                continue  # done before an interruption
            rows.append({**chain.strike(fault), "commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d}"})
            with open(record, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    (chosen.out / "table.md").write_text(table(rows))
    return int(not all(row["held"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
