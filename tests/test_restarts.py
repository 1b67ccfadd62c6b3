# SPDX-License-Identifier: Apache-2.0
"""``verl-dvpo run`` with small programs in place of ``main_ppo``; with ``main_ppo`` it runs in test_guarded_run.py."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

from verl_dvpo.restarts import STATE_ENV, Failure, Run, announce, failure_of
from verl_dvpo.saved.checkpoints import point_to

#: What every stand-in begins with: ``attempt`` counts from 1, ``announced()`` says that the configuration is in order.
BEGIN = """
import json, os, pathlib, subprocess, sys, time
from types import SimpleNamespace
from verl_dvpo.restarts import announce
from verl_dvpo.saved.checkpoints import point_to
here = pathlib.Path({here!r})
attempt = len(list(here.glob("attempt*"))) + 1
(here / f"attempt{{attempt}}").write_text(json.dumps(sys.argv[1:]))
def announced(mode="disable"):
    trainer = SimpleNamespace(default_local_dir=str(here), resume_mode=mode)
    announce(SimpleNamespace(trainer=trainer))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Returns a function that makes a `Run` of a stand-in's source."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.setattr("verl_dvpo.restarts.GRACE", 2.0)

    def make(source: str, max_restarts: int = 5) -> tuple[Run, io.StringIO]:
        file = tmp_path / "program.py"
        file.write_text(BEGIN.format(here=str(tmp_path)) + source)
        out = io.StringIO()
        return Run([sys.executable, str(file)], max_restarts, out), out

    return make


def attempts(folder: Path) -> list[list[str]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("attempt*"))]


def test_a_run_that_ends_well_is_run_once_and_its_output_passed_on(program, tmp_path, capfd):
    run, out = program("announced(); print('step:1 - loss:0.5')")
    assert run.until_done() == 0
    assert out.getvalue() == "step:1 - loss:0.5\n"
    assert attempts(tmp_path) == [[]]
    assert capfd.readouterr().err == ""


def test_output_without_an_end_of_line_gets_one(program):
    run, out = program("announced(); print('a library, as it leaves', end='')")
    assert run.until_done() == 0
    assert out.getvalue() == "a library, as it leaves\n"


def test_what_torch_compiles_is_kept_from_run_to_run(program):
    run, out = program(
        "announced()\nfrom torch._inductor.runtime.cache_dir_utils import cache_dir\n"
        "import tempfile\nprint(cache_dir(), tempfile.gettempdir(), sep='\\n')"
    )
    assert run.until_done() == 0
    compiled, temporary = map(Path, out.getvalue().split())
    assert compiled == Path(cache_dir())
    assert temporary != Path(tempfile.gettempdir())
    assert not temporary.exists()


def test_a_configuration_that_is_refused_is_not_tried_again(program, tmp_path, capfd):
    run, _ = program("sys.exit('ValueError: critic.value.kappa is -1')")
    assert run.until_done() == 2
    assert len(attempts(tmp_path)) == 1
    said = capfd.readouterr().err
    assert "the configuration was refused" in said
    assert said.endswith("ValueError: critic.value.kappa is -1\n")


@pytest.mark.parametrize("error", ["ModuleNotFoundError: No module named 'verl'", "MemoryError: no memory"])
def test_an_end_before_the_configuration_is_in_order_is_no_refusal(error, program, tmp_path, capfd):
    run, _ = program(f"sys.exit({error!r})")
    assert run.until_done() == 1
    assert len(attempts(tmp_path)) == 1
    said = capfd.readouterr().err
    assert "refused" not in said
    assert f"{error}; not started again: it ended before the configuration was in order" in said


def test_what_hydra_cannot_compose_is_a_refusal():
    for error in (
        "hydra.errors.MissingConfigException: x",
        "omegaconf.errors.InterpolationKeyError: y",
        "ValueError: z",
    ):
        assert Failure(error, None).refuses
    assert not Failure("OSError: ValueError: x", None).refuses


def test_it_goes_on_from_its_own_checkpoint(program, tmp_path, capfd):
    run, _ = program(
        "announced(); point_to(here, attempt); sys.exit(0 if attempt == 3 else f'OSError: {attempt * \"x\"}')"
    )
    assert run.until_done() == 0
    assert attempts(tmp_path) == [[], ["trainer.resume_mode=auto"], ["trainer.resume_mode=auto"]]
    assert "OSError: xx; starting again, 2 of at most 5 times" in capfd.readouterr().err


def test_the_checkpoint_of_another_run_in_the_folder_is_left_alone(program, tmp_path):
    point_to(tmp_path, 40)
    run, _ = program("announced(); sys.exit(0 if attempt == 2 else 'OSError: x')")
    assert run.until_done() == 0
    assert attempts(tmp_path) == [[], []]


def test_the_same_failure_at_the_same_step_ends_it(program, tmp_path, capfd):
    """Process ids differ, and count no more than the memory's addresses."""
    run, _ = program(
        "announced()\n"
        "print(f'verl_dvpo.health.RunEndedError: step 3, values: critic (process {os.getpid()}) is dead')\n"
        "sys.exit(1)"
    )
    assert run.until_done() == 1
    assert len(attempts(tmp_path)) == 2
    assert "not started again: the same failure at the same step, twice" in capfd.readouterr().err


def test_the_same_failure_at_another_step_does_not(program, tmp_path, capfd):
    run, _ = program(
        "announced()\nprint(f'x.RunEndedError: step {attempt}, values: critic is dead')\nsys.exit(1)", max_restarts=3
    )
    assert run.until_done() == 1
    assert len(attempts(tmp_path)) == 4
    assert "--max-restarts is 3" in capfd.readouterr().err


def test_a_signal_is_passed_on_and_nothing_is_started_again(program, tmp_path):
    run, _ = program(
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((here / 'told').touch(), sys.exit(3)))\n"
        "announced(); (here / 'ready').touch(); time.sleep(30)"
    )

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        run.stop(signal.SIGTERM)

    threading.Thread(target=send).start()
    assert run.until_done() == 128 + signal.SIGTERM
    assert (tmp_path / "told").exists()
    assert len(attempts(tmp_path)) == 1


def test_nothing_is_left_of_a_run_that_was_killed(program, tmp_path):
    """In a process of its own, which becomes the parent of orphans."""
    _, _ = program(
        "announced()\n"
        "import tempfile\n"
        "(here / 'temporary').write_text(tempfile.mkdtemp())\n"
        'orphan = \'import os, subprocess; subprocess.Popen(["sleep", "60"], start_new_session=True); os._exit(0)\'\n'
        "subprocess.run([sys.executable, '-c', orphan])\n"
        "os.kill(os.getpid(), 9)"
    )
    code = (
        "import sys; from verl_dvpo import restarts; restarts.GRACE = 1.0; restarts.adopt_orphans()\n"
        f"print(restarts.Run([sys.executable, {str(tmp_path / 'program.py')!r}], 1, sys.stdout).until_done())\n"
        "import psutil; print(len(psutil.Process().children(recursive=True)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "0"]
    assert "main_ppo ended with signal SIGKILL" in done.stderr
    temporary = Path((tmp_path / "temporary").read_text())
    assert not temporary.parent.exists()
    assert temporary.parent.name.startswith("vdr-")
    assert not [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "60"]]


def test_what_a_run_announces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir="saved", resume_mode="auto"))
    announce(config)  # nobody asked
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(STATE_ENV, str(tmp_path / "state"))
    announce(config)
    state = json.loads((tmp_path / "state").read_text())
    assert state == {"checkpoints": str(tmp_path / "saved"), "resume_mode": "auto", "tracker": None}


@pytest.mark.parametrize(
    ("lines", "status", "expected"),
    [
        (
            ["step:4 - loss:1", "ray.exceptions.RayTaskError(X): ray::run()", "ValueError: bad"],
            1,
            ("ValueError: bad", 5),
        ),
        (["x.RunEndedError: step 9, saving: full", "more"], 1, ("step 9, saving: full", 9)),
        (
            ["(pid=1) step:2 - a", "ray.exceptions.ActorDiedError: gone", "class_name: TaskRunnerV1"],
            1,
            ("the trainer", 3),
        ),
        ([], -9, ("signal SIGKILL", None)),
        (["killed"], 137, ("exit status 137", None)),
    ],
)
def test_what_ended_a_run_is_found_in_its_log(lines, status, expected):
    found = failure_of(lines, status)
    assert expected[0] in found.text
    assert found.step == expected[1]


def test_failures_are_compared_without_numbers():
    assert Failure("process 12 on 10.0.0.1", 3).same(Failure("process 9876 on 10.0.0.2", 3))
    assert not Failure("process 12", 3).same(Failure("process 12", 4))
    assert not Failure("critic", 3).same(Failure("actor", 3))
    assert not Failure("critic", 3).same(None)
