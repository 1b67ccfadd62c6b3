# SPDX-License-Identifier: Apache-2.0
"""One run under ``verl-dvpo run``: its rollout server is killed, and it goes on; it listens on loopback addresses only.

All other faults are in ``tests/faults``, a command of its own.
"""

import ipaddress
import json
import re
import sys
from pathlib import Path

import psutil
import pytest

from verl_dvpo.cli import main as command_line
from verl_dvpo.restarts import adopt_orphans

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from training import Ended, command, descendants, own_folder, run

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("guarded")]  # one process has what they share

RUN = "import typer; from verl_dvpo.restarts import run; typer.run(run)"


def listening() -> set[tuple[str, str]]:
    """Lists the addresses at which the processes below this one listen, with what they are."""
    found = set()
    for process in descendants():
        try:
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, process.name()))
        except psutil.Error:
            continue
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[Ended, set[tuple[str, str]], list[dict]]:
    folder = tmp_path_factory.mktemp("guarded")
    assert command_line(["demo-data", "--out", str(folder / "demo"), "--tiny"]) == 0
    overrides = command(folder / "demo", folder / "checkpoints", "trainer.total_training_steps=3")[5:]
    fault = {"do": "kill", "what": "HttpServer", "phase": "generation", "step": 2, "stamp": str(folder / "stamp")}
    seen: set[tuple[str, str]] = set()
    adopt_orphans()
    with own_folder() as own:
        ended = run(
            [sys.executable, "-c", RUN, "--max-restarts", "1", "--", *overrides],
            own,
            fault,
            look=lambda: seen.update(listening()),
        )
        records = [json.loads(line)["data"] for line in (own / "metrics.jsonl").read_text().splitlines()]
    return ended, seen, records


def test_a_killed_rollout_server_is_named_and_the_run_goes_on(broken):
    ended, _, records = broken
    assert ended.status == 0, ended.log[-3000:]
    said = [line for line in ended.log.splitlines() if line.startswith("verl-dvpo run, ")]
    assert len(said) == 1
    # the answers of step 2 may have come before the server died; then the next that needs it says so
    assert re.search(r"step [23], [a-z ]+: rollout server \(process ", said[0])
    assert "starting again, 1 of at most 1 times" in said[0]
    assert re.search(r"global_step_([12]), setting global step to \1", ended.log)
    assert records[-1]["training/global_step"] == 3


def test_nothing_is_left_of_it(broken):
    assert broken[0].left == []


def test_it_listens_on_loopback_addresses_only(broken):
    seen = broken[1]
    assert len(seen) > 5
    assert any("raylet" in name for _, name in seen)
    assert {(address, name) for address, name in seen if not is_loopback(address)} == set()
