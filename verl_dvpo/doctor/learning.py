# SPDX-License-Identifier: Apache-2.0
"""Checks that every value family learns; the trainings run in another process, see ``training``."""

from collections.abc import Iterator
from typing import Any

from verl_dvpo.doctor.checks import Machine, check
from verl_dvpo.doctor.lines import Line, ok, problem

#: The mean distance of values from the truth, in units of reward, that every family reaches in 100 updates: the least
#: exact of them ends at 0.09, and all begin above 0.2.
CLOSE = 0.12
REMEDY = (
    "reinstall torch and this package; if a family of your own is meant, `verl_dvpo.families.check.check_family` names "
    "what is wrong with it"
)


@check("families", about="a training of two seconds of each value family", remedy=REMEDY, dear=True)
def families(machine: Machine) -> Iterator[Line]:
    """One line a family."""
    answer = machine.ask("families")
    for name, outcome in answer.facts.items():
        yield judge_family(name, outcome)
    if answer.error:
        yield problem("families", answer.error, REMEDY)


def judge_family(name: str, outcome: dict[str, Any]) -> Line:
    """Judges what ``learn`` returned, or the error in its place."""
    shown = f"family {name}"
    if "error" in outcome:
        return problem(shown, outcome["error"], REMEDY)
    text = (
        f"error of the value {outcome['first']:.3f} before, {outcome['last']:.3f} after {outcome['updates']} updates "
        f"in {outcome['seconds']:.1f} s"
    )
    if not outcome["finite"]:
        return problem(shown, f"its outputs are not numbers after {outcome['updates']} updates", REMEDY)
    if outcome["last"] > CLOSE:
        return problem(shown, f"it has not learned: {text}; {CLOSE} is close enough", REMEDY)
    return ok(shown, text)
