# SPDX-License-Identifier: Apache-2.0
"""The registry of checks of the machine, and how one runs: alone, and never the end of the others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from verl_dvpo.doctor.lines import Line, problem

#: Seconds that a probe may take. An import of vLLM takes ten seconds, ten times as long on a machine under load.
PATIENCE = 300.0
#: Seconds that a probe has to end by itself.
PARTING = 10.0
#: What a probe writes before its answer, so that nothing that a library prints is taken for it.
ANSWER = "verl-dvpo doctor: "


@dataclass
class Machine:
    """The machine as checks see it; tests plant their problems here.

    Attributes:
        environment: variables of the processes that probe.
        folder: where a run would write.
        shared_memory: the folder of shared memory.
        accelerators: whether there is one; None to find out.
        answers: what probes have answered already; two checks may share one.
    """

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: Path = field(default_factory=Path.cwd)
    shared_memory: Path = Path("/dev/shm")
    accelerators: bool | None = None
    answers: dict[str, "Answer"] = field(default_factory=dict)

    @cached_property
    def platform(self) -> str:
        """``cpu`` or ``gpu``: what VERL_PLATFORM says; without it, ``cpu`` where there is no accelerator."""
        said = self.environment.get("VERL_PLATFORM", "").strip().lower()
        if said:
            return "cpu" if said == "cpu" else "gpu"
        found = self.accelerators
        if found is None:
            found = any(True for name in ACCELERATORS for _ in Path("/dev").glob(name))
        return "gpu" if found else "cpu"

    def ask(self, probe: str, patience: float = PATIENCE) -> "Answer":
        """Runs a probe of ``verl_dvpo.doctor.probes`` in a process of its own, once."""
        if probe not in self.answers:
            self.answers[probe] = run_probe(probe, self._variables(), patience)
        return self.answers[probe]

    def _variables(self) -> dict[str, str]:
        cpu = {"VERL_PLATFORM": "cpu"} if self.platform == "cpu" else {}
        return {**self.environment, **cpu}


#: Device files of NVIDIA's, AMD's and Huawei's accelerators.
ACCELERATORS = ("nvidia[0-9]*", "kfd", "davinci[0-9]*")


@dataclass(frozen=True)
class Answer:
    """The outcome of a probe.

    Attributes:
        facts: what it found; empty where it did not get that far. A probe may answer in several parts.
        error: why it has no more; empty if it has.
        output: the end of what it printed.
    """

    facts: Mapping[str, Any]
    error: str = ""
    output: str = ""


def run_probe(probe: str, environment: Mapping[str, str], patience: float) -> Answer:
    """Runs one probe in another process; a crash, an exit or silence there is an ``Answer`` with an error."""
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-m", "verl_dvpo.doctor.probes", probe]
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = False
    try:
        output, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        late = True
        output = _end(process)
    except BaseException:  # the user's Ctrl-C
        _end(process)
        raise
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith(ANSWER):
            facts.update(json.loads(line.removeprefix(ANSWER)))
    rest = "\n".join(line for line in output.splitlines() if not line.startswith(ANSWER))
    return Answer(facts, _error(facts, process.returncode, late, patience, rest), rest[-4000:])


def _end(process: "subprocess.Popen[str]") -> str:
    """Ends a probe and its own children, Ray's, with time to tidy up; returns what it printed."""
    for number, seconds in ((signal.SIGTERM, PARTING), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=seconds)[0]
    return ""


def _error(facts: dict[str, Any], status: int, late: bool, patience: float, output: str) -> str:
    raised = facts.pop("error", "")
    if late:
        return f"no answer within {patience:.0f} seconds"
    if raised:
        return str(raised)
    if status == 0:
        return ""
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it printed nothing")
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return f"the process {how}: {last[:300]}"


Find = Callable[[Machine], Line | Iterable[Line]]


@dataclass(frozen=True)
class Check:
    """One check of the machine.

    Attributes:
        name: in the report, and for ``--only``.
        about: what it looks at.
        remedy: what to do where it finds something.
        find: runs it.
        dear: whether ``--quick`` leaves it out.
    """

    name: str
    about: str
    remedy: str
    find: Find
    dear: bool


CHECKS: dict[str, Check] = {}


def check(name: str, *, about: str, remedy: str, dear: bool = False) -> Callable[[Find], Find]:
    """Registers a check; checks run in the order in which they are registered."""

    def register(find: Find) -> Find:
        CHECKS[name] = Check(name, about, remedy, find, dear)
        return find

    return register


def remedy(name: str) -> str:
    """Returns what to do where the check ``name`` finds something."""
    return CHECKS[name].remedy


def run_checks(checks: Iterable[Check], machine: Machine) -> Iterator[Line]:
    """Runs checks one after the other; a check that raises is a problem, and the next one runs."""
    for each in checks:
        try:
            found = each.find(machine)
            yield from [found] if isinstance(found, Line) else found
        except Exception as error:  # whatever a broken installation raises
            text = f"the check itself failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield problem(each.name, text, each.remedy)
