# SPDX-License-Identifier: Apache-2.0
"""The watch over a run, without Ray but for the messages that Ray's table is made of."""

import os
import subprocess
import sys
import threading
import time

import pytest
from ray.core.generated import common_pb2

from verl_dvpo import health
from verl_dvpo.health import Actor, HealthConfig, RunEndedError, Watch, health_config

SERVER = Actor("VLLMCPUHttpServer", "127.0.0.1", 4711, "its process ended")


@pytest.fixture
def table(monkeypatch):
    """Stands for Ray's table of actors."""
    rows: dict[str, dict[str, Actor]] = {"DEAD": {}, "ALIVE": {}}
    monkeypatch.setattr(health, "actors", lambda state: dict(rows[state]))
    monkeypatch.setattr(health, "GRACE", 3600.0)
    return rows


def test_a_death_ends_what_the_trainer_waits_for_and_names_part_phase_and_step(table, capfd):
    watch = Watch(None, interval=0.05)
    began = time.monotonic()

    def generate() -> None:
        with watch:
            watch.moved("generation", 3)
            table["DEAD"]["a"] = SERVER
            time.sleep(20.0)

    with pytest.raises(RunEndedError, match=r"^step 3, waiting for answers: rollout server \(process 4711 on 127"):
        generate()
    assert time.monotonic() - began < 5.0
    assert "trainer.resume_mode=auto" in watch.failure
    assert watch.failure in capfd.readouterr().err


def test_a_wait_for_another_thread_is_ended_too(table):
    """As TransferQueue's client waits; a lock is no call of Python's that a signal would end by itself."""

    def wait() -> None:
        with Watch(None, interval=0.05):
            table["DEAD"]["a"] = SERVER
            threading.Event().wait(20.0)

    with pytest.raises(RunEndedError, match="rollout server"):
        wait()


@pytest.mark.e2e
def test_a_wait_for_a_stopped_worker_is_ended_too(capfd):
    """With Ray itself: what ``ray.get`` waits for in C++ is no call of Python's at all."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    worker = ray.remote(lambda: time.sleep(300))
    began = time.monotonic()

    def update() -> None:
        with Watch(2.0, interval=0.2) as watch:
            watch.moved("critic_update", 7)
            ray.get(worker.remote())

    try:
        with pytest.raises(RunEndedError, match="updating the critic: nothing has moved for 2 s"):
            update()
        assert time.monotonic() - began < 60.0
    finally:
        ray.shutdown()


def test_who_was_dead_before_counts_no_more(table):
    table["DEAD"]["a"] = SERVER
    with Watch(None, interval=0.02):
        time.sleep(0.1)


def test_an_error_that_a_death_caused_becomes_its_message(table):
    def fail() -> None:
        table["DEAD"]["a"] = SERVER
        raise KeyError("prompts")

    with pytest.raises(RunEndedError, match="rollout server") as raised:
        with Watch(None, interval=10.0):
            fail()
    assert isinstance(raised.value.__cause__, KeyError)


def test_an_error_of_another_cause_stays(table):
    with pytest.raises(KeyError):
        with Watch(None, interval=0.02):
            raise KeyError("prompts")


def test_a_run_in_which_nothing_moves_ends(table, monkeypatch):
    monkeypatch.setattr(health, "HANDED_ON", 0.1)
    watch = Watch(0.3, interval=0.05)
    began = time.monotonic()

    def update() -> None:
        with watch:
            watch.moved("critic_update", 7)
            threading.Event().wait(20.0)

    with pytest.raises(RunEndedError, match=r"step 7, updating the critic: nothing has moved for 0.3 s; it is the"):
        update()
    assert 0.3 < time.monotonic() - began < 5.0


def test_signs_of_progress_keep_it_alive_and_the_same_sign_again_does_not(table, monkeypatch):
    monkeypatch.setattr(health, "HANDED_ON", 0.1)
    watch = Watch(0.4, interval=0.05)
    with watch:
        for number in range(8):
            watch.sign(number)
            threading.Event().wait(0.1)

    def show_the_same() -> None:
        with watch:
            for _ in range(80):
                watch.sign("same")
                threading.Event().wait(0.1)

    with pytest.raises(RunEndedError, match="nothing has moved"):
        show_the_same()


def test_it_can_be_entered_again(table):
    watch, before = Watch(None, interval=0.02), threading.active_count()
    for _ in range(3):
        with watch:
            assert threading.active_count() == before + 1
        time.sleep(0.1)
        assert threading.active_count() == before


def death(reason: str, message: str = "") -> common_pb2.ActorDeathCause:
    context = common_pb2.ActorDiedErrorContext(
        reason=common_pb2.ActorDiedErrorContext.Reason.Value(reason), error_message=message
    )
    return common_pb2.ActorDeathCause(actor_died_error_context=context)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (death("WORKER_DIED", "Worker exit type: SYSTEM_ERROR"), "SIGKILL"),
        (death("WORKER_DIED", "Worker exit type: INTENDED_USER_EXIT"), None),
        (death("NODE_DIED"), "left the Ray cluster"),
        (death("RAY_KILL"), None),
        (death("OUT_OF_SCOPE"), None),
        (common_pb2.ActorDeathCause(oom_context=common_pb2.OomContext()), "memory"),
        (common_pb2.ActorDeathCause(), None),
    ],
)
def test_only_deaths_that_nobody_asked_for_count(cause, expected):
    found = health._cause(cause)
    assert found is None if expected is None else expected in found


@pytest.mark.parametrize("kind", ["WorkerDict", "CPUAgentLoopWorker", "SimpleStorageUnit", "TransferQueueController"])
def test_parts_are_called_by_their_names(kind):
    assert str(Actor(kind, "10.0.0.1", 5)).endswith("(process 5 on 10.0.0.1)")
    assert kind not in str(Actor(kind, "10.0.0.1", 5))


def test_an_unknown_actor_is_called_by_its_class():
    assert str(Actor("FileLogger", "10.0.0.1", 5)) == "actor FileLogger (process 5 on 10.0.0.1)"


def test_a_worker_answers_with_the_stacks_of_its_threads_and_goes_on():
    code = (
        "import sys, time; from verl_dvpo.health import answer_with_stacks\n"
        "def waits_here(): print('ready', flush=True); time.sleep(0.5); print('goes on', flush=True)\n"
        "answer_with_stacks(); waits_here()"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_RAYLET_PID": "1"},
    )
    assert worker.stdout.readline() == "ready\n"
    asked = health.ask_for_stacks([Actor("WorkerDict", "", worker.pid), Actor("Gone", "", 2**22 - 1)])
    assert [actor.pid for actor in asked] == [worker.pid]
    out, err = worker.communicate(timeout=20)
    assert worker.returncode == 0
    assert "goes on" in out
    assert "in waits_here" in err


def test_a_process_without_an_answer_is_not_asked():
    """The signal would end it."""
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        assert health.ask_for_stacks([Actor("TransferQueueController", "", sleeper.pid)]) == []
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_outside_of_ray_nothing_is_registered():
    code = (
        "import os, signal; from verl_dvpo import health; health.answer_with_stacks()\n"
        "signal.signal(signal.SIGHUP, lambda *_: None)\n"
        "print(health.catches(os.getpid(), health.STACKS), health.catches(os.getpid(), signal.SIGHUP))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_RAYLET_PID"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert told.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"stall_seconds": 0}, "trainer.value.stall_seconds is 0; a number above 0"),
        ({"stall_seconds": "long"}, "trainer.value.stall_seconds is 'long'"),
        ({"verify_checkpoints": 1}, "trainer.value.verify_checkpoints is 1; true and false"),
        ({"stall": 3}, "trainer.value.stall is 3; there is no such field; use one of stall_seconds"),
    ],
)
def test_wrong_settings_name_the_field(section, field):
    with pytest.raises(ValueError, match=field):
        health_config(section)


def test_settings():
    assert health_config(None) == HealthConfig()
    assert health_config({"stall_seconds": None}).stall_seconds is None
