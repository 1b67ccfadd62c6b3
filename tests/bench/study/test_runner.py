# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping of a study, with a trainer that takes no time: what is run, repeated, recorded and said."""

import fcntl
import io
import json
import signal
import time

import pytest
from fake import FakeTrainer, folders, names, study_of, texts
from omegaconf import OmegaConf

from verl_dvpo.bench.study import runner
from verl_dvpo.bench.study.plan import plan
from verl_dvpo.bench.study.report import write_report
from verl_dvpo.bench.study.runner import read_record, run_study
from verl_dvpo.cli import main
from verl_dvpo.records import read_metrics, scores


def test_every_run_leaves_config_versions_seed_time_metrics_and_log(out):
    study = study_of(out)
    stream = io.StringIO()
    assert run_study(study, train=FakeTrainer(), stream=stream) == []
    runs = plan(study)
    assert folders(out) == sorted(names(runs))
    for run in runs:
        record = read_record(run)
        assert (record["status"], record["seed"], record["error"]) == ("finished", run.seed, None)
        assert record["wall_seconds"] >= 0
        assert record["versions"]["verl"].startswith("0.9.")
        assert record["versions"]["python"].startswith("3.")
        config = OmegaConf.load(run.folder / "config.yaml")
        assert (config.data.seed, config.noise.kind) == (run.seed, run.noise.kind)
        assert [line["step"] for line in read_metrics(run.metrics)] == [0, 1, 2, 3, 4]
        assert run.log.read_text() == f"output of {run.name}\n"
    # by hand, the last run: 0.4 + 0.1 * 4/4 + 0.2 - 0.1 + 0.01
    assert read_record(runs[-1])["score"] == pytest.approx(0.61)
    assert "8 runs, 0 of them finished before" in stream.getvalue()
    assert "score 0.610 in" in stream.getvalue()


@pytest.mark.parametrize("kill_at", [(1, 0), (3, 2), (4, 4)])
def test_an_interrupted_study_goes_on_and_its_report_is_that_of_an_uninterrupted_one(out, tmp_path, kill_at):
    whole = study_of(tmp_path / "whole", seeds=[0])
    run_study(whole, train=FakeTrainer(), stream=io.StringIO())
    study = study_of(out, seeds=[0])
    interrupted = FakeTrainer(kill_at=kill_at)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, train=interrupted, stream=io.StringIO())
    assert read_record(plan(study)[kill_at[0] - 1]) is None
    again = FakeTrainer()
    assert run_study(study, train=again, stream=io.StringIO()) == []
    assert interrupted.calls[:-1] + again.calls == names(plan(study))  # no finished run is repeated
    assert again.calls[0] == interrupted.calls[-1]
    assert texts(write_report(out)) == texts(write_report(tmp_path / "whole"))


def test_a_run_that_fails_is_recorded_the_study_goes_on_and_tries_it_again_later(out, capfd):
    study = study_of(out, seeds=[0])
    bad = "ppo__flip_0.3__demo__s0"
    trainer = FakeTrainer(fail=(bad,))
    stream = io.StringIO()
    assert names(run_study(study, train=trainer, stream=stream)) == [bad]
    assert len(trainer.calls) == 4
    failed = next(run for run in plan(study) if run.name == bad)
    record = read_record(failed)
    assert (record["status"], record["score"]) == ("failed", None)
    assert f"RuntimeError: the critic of {bad} exploded" in record["error"]
    assert f"RuntimeError: the critic of {bad} exploded" in failed.log.read_text()
    assert f"FAILED {bad}: RuntimeError: the critic" in stream.getvalue()
    report = (write_report(out) / "report.md").read_text()
    assert "3 of 4 runs finished, 1 failed, 0 to come" in report
    assert f"`{bad}` failed: RuntimeError: the critic of {bad} exploded" in report
    again = FakeTrainer()
    assert run_study(study, train=again, stream=io.StringIO()) == []
    assert again.calls == [bad]


def test_the_command_says_so_with_its_exit_status(out, monkeypatch, tmp_path, capsys):
    import contextlib

    import yaml

    content = study_of(out).to_json()
    content |= {"algorithms": ["ppo"], "noises": ["none"], "tasks": [{"name": "demo", "in_domain": ["demo_addition"]}]}
    content |= {"reference": None, "base": [], "seeds": [0]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    command = ["study", "run", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "elsewhere")]
    trainer = FakeTrainer(fail=("ppo__none__demo__s0",))
    monkeypatch.setattr(runner, "_verl", lambda: contextlib.nullcontext(trainer))
    assert main(command) == 1
    assert "failed: ppo__none__demo__s0" in capsys.readouterr().err
    trainer.fail = ()
    assert main(command) == 0
    assert (tmp_path / "elsewhere" / "study.json").is_file()
    assert not out.exists()


@pytest.mark.parametrize(
    ("sources", "message"),
    [(("elsewhere",), r"no validation score for the in-domain sources \['demo_addition'\]"), ((), "no validation")],
)
def test_a_run_without_the_score_it_was_asked_for_has_failed(out, sources, message):
    study = study_of(out, algorithms=["ppo"], noises=["none"], seeds=[0])
    (run,) = run_study(study, train=FakeTrainer(sources=sources), stream=io.StringIO())
    assert read_record(run)["error"].count("RunFailedError")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(read_record(run)["error"])


def test_a_run_that_ends_early_or_with_no_number_has_failed(out):
    study = study_of(out, algorithms=["ppo"], noises=["none"], seeds=[0])

    def early(config, metrics):
        metrics.write_text(json.dumps({"step": 2, "data": {"val-core/demo_addition/acc/mean@1": 0.5}}) + "\n")

    (run,) = run_study(study, train=early, stream=io.StringIO())
    assert "the run ended at step 2 of 4" in read_record(run)["error"]

    def not_finite(config, metrics):
        metrics.write_text('{"step": 4, "data": {"val-core/demo_addition/acc/mean@1": NaN}}\n')

    (run,) = run_study(study, train=not_finite, stream=io.StringIO())
    assert "not finite" in read_record(run)["error"]


def test_a_run_that_hangs_is_stopped_by_its_limit(out):
    study = study_of(out, algorithms=["ppo"], noises=["none"], seeds=[0], minutes_per_run=0.005)
    start = time.monotonic()
    (run,) = run_study(study, train=lambda config, metrics: time.sleep(60), stream=io.StringIO())
    assert time.monotonic() - start < 30
    assert "RunTimeoutError: the run took longer than minutes_per_run=0.005" in read_record(run)["error"]


def test_a_termination_leaves_the_run_to_be_repeated(out):
    study = study_of(out, algorithms=["ppo"], noises=["none"], seeds=[0])

    def terminated(config, metrics):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        run_study(study, train=terminated, stream=io.StringIO())
    assert left.value.code == 143
    assert read_record(plan(study)[0]) is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_finished_runs_of_other_settings_are_not_taken_for_this_studys(out):
    run_study(study_of(out, seeds=[0]), train=FakeTrainer(), stream=io.StringIO())
    trainer = FakeTrainer()
    with pytest.raises(ValueError, match=r"run ppo__none__demo__s0 is finished with the settings"):
        run_study(study_of(out, seeds=[0], steps=6), train=trainer, stream=io.StringIO())
    assert trainer.calls == []
    # an axis may grow
    run_study(study_of(out, seeds=[0, 1]), train=trainer, stream=io.StringIO())
    assert len(trainer.calls) == 4


class Meanwhile(FakeTrainer):
    """Before its first run trains, another process does all of the study but that run."""

    def __init__(self, study, other):
        super().__init__()
        self.study, self.other, self.failed = study, other, None

    def __call__(self, config, metrics):
        if self.failed is None:
            self.failed = names(run_study(self.study, train=self.other, stream=io.StringIO()))
        super().__call__(config, metrics)


def test_processes_share_a_study_and_no_run_is_done_twice(out):
    study = study_of(out, seeds=[0])
    bad = "dvpo__flip_0.3__demo__s0"
    other = FakeTrainer(fail=(bad,))
    first = Meanwhile(study, other)
    stream = io.StringIO()
    assert run_study(study, train=first, stream=stream) == []
    assert first.calls == names(plan(study))[:1]  # what the other one failed is the other one's
    assert other.calls == names(plan(study))[1:]
    assert first.failed == [bad]
    assert "[16 of 16 steps]" in stream.getvalue()
    later = FakeTrainer()
    run_study(study, train=later, stream=io.StringIO())
    assert later.calls == [bad]


def test_a_failed_run_that_another_process_tried_again_and_left_is_not_over(out):
    study = study_of(out, algorithms=["ppo"], seeds=[0])
    first, second = names(plan(study))
    run_study(study, train=FakeTrainer(fail=(first, second)), stream=io.StringIO())
    other = FakeTrainer(kill_at=(1, 2))

    def meanwhile(config, metrics):
        if not other.calls:
            with pytest.raises(KeyboardInterrupt):
                run_study(study, train=other, stream=io.StringIO())
        trainer(config, metrics)

    trainer = FakeTrainer()
    run_study(study, train=meanwhile, stream=io.StringIO())
    assert other.calls == [second]
    assert trainer.calls == [first, second]


def test_who_finds_nothing_left_to_take_says_who_has_it(out, monkeypatch, tmp_path, capsys):
    import contextlib

    study = study_of(out, algorithms=["ppo"], noises=["none"], seeds=[0])
    (run,) = plan(study)
    (out / ".locks").mkdir(parents=True)
    monkeypatch.setattr("verl_dvpo.bench.study.config.load_study", lambda path: study)
    trainer = FakeTrainer()
    monkeypatch.setattr(runner, "_verl", lambda: contextlib.nullcontext(trainer))
    command = ["study", "run", "study.yaml"]
    with open(out / ".locks" / run.name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(command) == 0
        assert f"other processes execute {run.name}" in capsys.readouterr().out
    assert trainer.calls == []
    assert main(command) == 0
    assert trainer.calls == [run.name]
    assert "all runs are finished" in capsys.readouterr().out


def test_scores_are_verls_core_means_by_data_source():
    data = {
        "val-core/a/b/acc/mean@1": 0.5,
        "val-core/c/reward/mean@4": 0.25,
        "val-core/c/reward/best@4/mean": 0.9,
        "val-aux/c/acc/mean@4": 0.1,
        "critic/score/mean": 1.0,
    }
    assert scores({"step": 0, "data": data}) == {"a/b": 0.5, "c": 0.25}


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1, "data": {}}\n{"step": 2, "da')
    assert [record["step"] for record in read_metrics(tmp_path / "m.jsonl")] == [1]
    assert read_metrics(tmp_path / "none.jsonl") == []
