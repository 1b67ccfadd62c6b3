# SPDX-License-Identifier: Apache-2.0
"""Processor time of a run, against what processes say of themselves."""

import subprocess
import sys
import time

import pytest

from verl_dvpo.bench.study.cost import INTERVAL, ProcessorTime

BURN = """
import sys, time
while time.process_time() < float(sys.argv[1]):
    pass
print(time.process_time(), flush=True)
time.sleep(float(sys.argv[2]))
"""


def burn(seconds: float, stay: float) -> float:
    """Uses ``seconds`` of processor time in a child that stays ``stay`` seconds longer; returns what it used."""
    command = [sys.executable, "-c", BURN, str(seconds), str(stay)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def test_a_child_that_has_ended_counts() -> None:
    own = time.process_time()
    with ProcessorTime() as cost:
        used = burn(0.6, stay=1.5 * INTERVAL)
    own = time.process_time() - own
    assert cost.seconds == pytest.approx(used + own, abs=0.25)


def test_what_was_used_before_does_not_count() -> None:
    start = time.process_time()
    while time.process_time() < start + 0.5:
        pass
    with ProcessorTime() as cost:
        pass
    assert 0.0 <= cost.seconds < 0.3
