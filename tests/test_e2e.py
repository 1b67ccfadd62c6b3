# SPDX-License-Identifier: Apache-2.0
"""verl's own trainer, Ray, TransferQueue, FSDP2 and vLLM, for two steps of every algorithm, on one Ray.

Nothing is replaced: what runs here is what a user runs, on a model of a few layers that has learned nothing.
"""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_configs import compose_config, names

from verl_dvpo import train
from verl_dvpo.bench.sweep.report import write_report
from verl_dvpo.cli import main as command
from verl_dvpo.export.run import export
from verl_dvpo.export.value_model import ValueModel
from verl_dvpo.pictures.loggers import CALIBRATION, FAN
from verl_dvpo.saved.manifest import read_manifest
from verl_dvpo.saved.values import dump_files, read_dump

pytestmark = pytest.mark.e2e

QUANTILES = ["critic/quantile/q10", "critic/quantile/q50", "critic/quantile/q90", "critic/quantile/crossing_fraction"]
SHORT = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "critic.ppo_mini_batch_size=4",
    "trainer.logger=[console]",
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "trainer.save_freq=-1",
]
#: A package that is not ours, with a critic of its own.
OUTSIDE = Path(__file__).parent.parent / "examples" / "own_family"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert command(["demo-data", "--out", str(folder), "--tiny"]) == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_ray() -> Iterator[None]:
    """What `run_ppo` starts, once; it takes a Ray that is there."""
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    config = compose_config("dvpo_trainer", "platform=cpu", "trainer.n_gpus_per_node=2")  # as the largest run needs
    settings = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
    runtime_env = get_ppo_ray_runtime_env(config)
    runtime_env["env_vars"] |= settings.pop("runtime_env")["env_vars"] | {"TRANSFER_QUEUE_ENABLE": "1"}
    runtime_env["env_vars"]["VERL_DVPO_CPU_THREADS"] = "1"  # more gain nothing on a tiny model, and wait for each other
    paths = [str(OUTSIDE), os.environ.get("PYTHONPATH", "")]
    runtime_env["env_vars"]["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    ray.init(**settings, runtime_env=runtime_env)
    yield
    ray.shutdown()


def steps(demo: Path, folder: Path, *overrides: str) -> list[dict]:
    """Runs and returns verl's records, one a step, the validation before the first included."""
    return run(folder, "+task=demo", f"demo.dir={demo}", *overrides)


def run(folder: Path, *overrides: str) -> list[dict]:
    """The same for any task."""
    checkpoints = f"trainer.default_local_dir={folder}/checkpoints"
    config = compose_config("dvpo_trainer", "platform=cpu", checkpoints, *overrides[:2], *SHORT, *overrides[2:])
    assert train.run(config, folder / "metrics.jsonl") is not None
    return [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("algorithm", names("algorithm"))
def test_two_steps_of_every_algorithm(algorithm, demo, tmp_path):
    pictures = with_pictures(tmp_path) if algorithm == "dvpo" else []
    before, *records = steps(demo, tmp_path, f"algorithm={algorithm}", *pictures)
    assert "val-core/demo_addition/acc/mean@1" in before
    assert len(records) == 2
    for record in records:
        assert all(math.isfinite(value) for value in record.values())
        assert record["actor/grad_norm"] >= 0
        assert {"critic/score/mean", "response_length/mean", "timing_s/gen", "timing_s/update_actor"} <= record.keys()
    with_critic = compose_config("dvpo_trainer", f"algorithm={algorithm}").critic.enable
    if algorithm == "flowrl":
        # The first mini-batch has w = 1, and the residual of the first step is far from 0: beta is 15.
        assert all(0 < record["actor/flowrl_weight"] <= 1.2 for record in records)
        assert all(record["actor/pg_loss"] > 0 for record in records)
    if not with_critic:
        assert not any("vf_loss" in name for name in records[0])
        return
    assert {"critic/vf_loss", "critic/vf_explained_var", "critic/values/mean", "timing_s/update_critic"} <= records[
        0
    ].keys()
    assert records[0]["critic/grad_norm"] > 0
    spreads = {record.get("critic/quantile/sigma") for record in records}
    shares = {record.get("advantages/effective_share") for record in records}
    if "_weighted" in algorithm:
        assert all(spread > 0 for spread in spreads)
        assert all(0 < share <= 1 for share in shares)
    else:
        assert spreads == shares == {None}
    if algorithm == "dvpo":
        coef = compose_config("dvpo_trainer", "algorithm=dvpo").critic.value.coef
        terms = ["quantile", *(term for term, value in coef.items() if value > 0)]
        assert len(terms) >= 6
        expected = [*QUANTILES, "critic/ensemble/std", *(f"critic/loss/{term}" for term in terms)]
        assert set(expected) <= records[0].keys()
        check_values(tmp_path, records[1])


def with_pictures(folder: Path) -> list[str]:
    """Overrides of a run whose critic writes what it believes in the second step, and whose TensorBoard shows it."""
    logs = f"+ray_kwargs.ray_init.runtime_env.env_vars.TENSORBOARD_DIR={folder}/tensorboard"
    return ["critic.value.dump_every=2", "trainer.logger=[console,tensorboard]", logs]


def check_values(folder: Path, record: dict) -> None:
    """The file of the second step lies within what verl logged of the whole batch, and TensorBoard has its images."""
    (file,) = dump_files(folder)
    dump = read_dump(file)
    assert (dump.step, len(dump.answers)) == (2, 4)
    assert dump.facts["settings"]["critic.value.num_heads"] == 3
    for answer in dump.answers:
        assert "+" in answer.prompt
        assert len(answer.pieces) == len(answer.ids) > 0
        assert answer.heads.shape == (len(answer.ids), 3)
        assert (np.diff(answer.quantiles, axis=-1) >= 0).all()
        for name in ("values", "advantages", "returns"):
            numbers = getattr(answer, name)
            assert record[f"critic/{name}/min"] - 1e-5 <= numbers.min() <= numbers.max()
            assert numbers.max() <= record[f"critic/{name}/max"] + 1e-5
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert sorted(events.Tags()["images"]) == sorted([CALIBRATION, FAN])


def test_two_steps_of_a_weighted_gated_and_read_out_advantage_with_one_answer_to_a_prompt(demo, tmp_path):
    """Every field that an option can ask for goes from the critic's worker to the estimator."""
    options = [f"algorithm.value.{option}" for option in ("reward=gated", "readout=median", "lam_actor=length")]
    records = steps(demo, tmp_path, "algorithm=dvpo_weighted", "actor_rollout_ref.rollout.n=1", *options)[1:]
    assert len(records) == 2
    for record in records:
        assert 0 < record["advantages/effective_share"] <= 1
        assert 0 < record["advantages/gate_gain"] < 1
        assert record["advantages/reward_change"] > 0
        assert 0 <= record["advantages/lam"] < 1
        assert record["critic/advantages/max"] > record["critic/advantages/min"]


@pytest.mark.parametrize(("preset", "algorithm", "alpha"), [("sao", "dvpo", 1.5), ("vapo", "hl_gauss", 0.05)])
def test_two_steps_of_a_preset_one_of_the_critic_alone_and_one_of_both(preset, algorithm, alpha, demo, tmp_path):
    """The actor's trace lies between those of the shortest and the longest answer, worked out here."""
    choices = (f"algorithm={algorithm}", f"+preset={preset}", "trainer.critic_warmup=2")
    first, second = (each for each in steps(demo, tmp_path, *choices) if "training/global_step" in each)
    assert first["critic/grad_norm"] > 0
    assert "actor/pg_loss" not in first
    assert second["actor/grad_norm"] > 0
    for record in (first, second):
        assert all(math.isfinite(value) for value in record.values())
        low, high = (max(0.0, 1 - 1 / (alpha * record[f"response_length/{end}"])) for end in ("min", "max"))
        assert low - 1e-6 <= record["advantages/lam"] <= high + 1e-6
    weighs = [name for name in second if "rollout_is" in name]
    assert bool(weighs) == (preset == "sao"), weighs


def test_two_steps_of_a_critic_of_another_package(demo, tmp_path, monkeypatch):
    """Its settings reach Ray's workers by pickle, and its class by its import path."""
    monkeypatch.syspath_prepend(str(OUTSIDE))
    _, *records = steps(demo, tmp_path, "algorithm=laplace", f"hydra.searchpath=[file://{OUTSIDE / 'config'}]")
    assert len(records) == 2
    for record in records:
        assert all(math.isfinite(value) for value in record.values())
        assert {"critic/loss/negative_log_likelihood", "critic/vf_explained_var"} <= record.keys()
        assert record["critic/grad_norm"] > 0
    first, second = (record["critic/laplace/scale"] for record in records)
    assert first == pytest.approx(1.05, abs=0.1)  # exp(0) and the smallest scale: nothing is learned yet
    assert second != first


#: A critic that chooses in training, each time.
CHOOSING = (
    "dvpo_calibrated",
    "critic.value.num_quantiles=auto",
    "critic.value.risk_form=readout",
    "critic.value.coef.risk=auto",
    "critic.value.auto.sizes=[1,3,9]",
    "critic.value.auto.tolerance=0.5",
    "critic.value.auto.every=1",
)


@pytest.mark.parametrize("choice", [("dvpo",), ("dfpo",), CHOOSING], ids=lambda choice: choice[0])
def test_a_run_that_was_stopped_goes_on_where_it_was(choice, demo, tmp_path):
    """Step 3 from the checkpoint of step 2, with a KL penalty in the reward, equals step 3 of a run that went on.

    To the bit, sampled answers and draws of targets included: another process, other orders of arrival, same numbers.
    """
    kl = ["algorithm.use_kl_in_reward=true", "algorithm.rollout_correction.bypass_mode=false"]
    keep = ["trainer.save_freq=2", "trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=2"]
    choices = [f"algorithm={choice[0]}", "trainer.total_training_steps=3", *keep, *kl, *choice[1:]]
    _, first, second, third = steps(demo, tmp_path, *choices)
    assert first["training/rollout_probs_diff_max"] < 1e-5  # sampler and trainer are one model
    assert "actor/reward_kl_penalty" in first
    assert second["critic/rewards/mean"] != second["critic/score/mean"]  # the policy has left its reference
    saved = tmp_path / "checkpoints"
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "3"
    shutil.rmtree(saved / "global_step_3")
    (saved / "latest_checkpointed_iteration.txt").write_text("2")
    (again,) = [
        record
        for record in steps(demo, tmp_path, *choices, "trainer.resume_mode=auto")
        if "training/global_step" in record
    ]
    assert again["training/global_step"] == 3
    of_the_machine = ("timing", "perf/", "actor/perf/", "critic/perf/")
    assert {
        name: (value, again.get(name))
        for name, value in third.items()
        if value != again.get(name) and not name.startswith(of_the_machine)
    } == {}
    assert third["actor/grad_norm"] > 0
    if choice == CHOOSING:
        assert {"critic/auto/num_quantiles", "critic/auto/risk"} <= third.keys()
        assert second["critic/auto/num_quantiles"] < 9  # what step 3 starts with was chosen, not given


def test_two_training_processes_learn_what_one_learns(demo, tmp_path):
    """Answers have seeds of their own, so both runs see the same batch; sums of floats differ in their order."""
    whole = ("algorithm=dvpo", "critic.ppo_mini_batch_size=8")  # ranks cut a mini-batch elsewhere than one process
    one, two = (steps(demo, tmp_path / str(count), *whole, f"trainer.n_gpus_per_node={count}") for count in (1, 2))
    trained = [[record for record in records if "training/global_step" in record] for records in (one, two)]
    assert [record["training/global_step"] for record in trained[1]] == [1, 2]
    for name in (
        "critic/vf_loss",
        "critic/multiplier/cvar",
        "critic/quantile/q50",
        "critic/vpred_mean",
        "critic/grad_norm",
        "actor/grad_norm",
    ):
        for alone, together in zip(*trained, strict=True):
            assert alone[name] != 0, name
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name


def test_a_critic_on_megatron_beside_an_actor_on_fsdp(demo, tmp_path):
    """In the actor's process; its checkpoint is exported as any other."""
    engine = ("+critic_engine=megatron", "critic.megatron.dtype=float32", "trainer.save_freq=2")
    _, *records = steps(demo, tmp_path, "algorithm=dvpo", *engine)
    assert all(math.isfinite(value) for record in records for value in record.values())
    first, second = (record["critic/vf_loss"] for record in records)
    assert first != second
    assert all(record["critic/grad_norm"] > 0 for record in records)
    facts = read_manifest(export(tmp_path, tmp_path / "critic"), "checkpoint").facts
    assert (facts["engine"], facts["step"]) == ("megatron", 2)
    values = ValueModel.from_pretrained(str(tmp_path / "critic")).values([[5, 6, 7, 8]])
    assert values[0].mean.isfinite().all()


def test_a_dialogue_is_trained_on_what_the_policy_said(tmp_path):
    """The user's tokens have probability 1 in the rollout's records: were they trained on, the trainer would differ."""
    data = tmp_path / "data"
    assert command(["domains", "--tiny", "--out", str(data)]) == 0
    before, *records = run(
        tmp_path,
        "+task=dialogue",
        f"domains.dir={data}",
        "algorithm=dvpo",
        "algorithm.rollout_correction.bypass_mode=false",
    )
    for record in (before, records[-1]):
        rates = [record[f"val-aux/dialogue/{rate}/mean@1"] for rate in ("tcr", "acr", "gcr")]
        assert all(0.0 <= rate <= 1.0 for rate in rates)
        domains = [f"{name}{suffix}" for name in ("arithmetic", "science", "dialogue") for suffix in ("", "_shifted")]
        assert {f"val-core/{domain}/acc/mean@1" for domain in domains} <= record.keys()
    for record in records:
        assert record["num_turns/max"] >= 4  # the policy spoke, the user, and the policy again
        assert record["training/rollout_probs_diff_max"] < 1e-4
        assert math.isfinite(record["critic/vf_loss"])


def test_a_search_maximises_the_last_validation(demo, tmp_path, monkeypatch):
    """Two trials of Optuna's, each a training run of its own on one Ray."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(train.METRICS_ENV, raising=False)
    search = ["+sweep=optuna", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={tmp_path}/sweep", "algorithm=dvpo"]
    fixed = ["platform=cpu", "+task=demo", f"demo.dir={demo}", f"trainer.default_local_dir={tmp_path}/checkpoints"]
    monkeypatch.setattr(sys, "argv", ["train", *search, *fixed, *SHORT])
    GlobalHydra.instance().clear()
    train.main()
    runs = sorted((tmp_path / "sweep").glob("[0-9]*"))
    scores = [train.last_score(each / "metrics.jsonl") for each in runs]
    risks = [OmegaConf.load(each / ".hydra" / "config.yaml").critic.value.coef.risk for each in runs]
    assert len(set(risks)) == len(scores) == 2
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert found.best_value == max(scores)


def swept(demo: Path, folder: Path, *overrides: str) -> list[str]:
    """Arguments of a sweep of three steps a run, below ``folder``."""
    fixed = ["platform=cpu", "+task=demo", f"demo.dir={demo}", f"hydra.sweep.dir={folder}/sweep"]
    return [*fixed, *SHORT, "trainer.total_training_steps=3", "trainer.test_freq=3", *overrides]


def points(folder: Path) -> list[dict[str, str]]:
    """Writes the report of a sweep and returns its points."""
    report = write_report(folder / "sweep")
    assert report.with_name("scores.png").read_bytes().startswith(b"\x89PNG")
    return list(csv.DictReader(report.with_name("points.csv").read_text().splitlines()))


@pytest.mark.parametrize(
    ("sweep", "field", "values"),
    [
        ("risk_weight", "critic.value.coef.risk", (0.0, 0.2)),
        ("quantile_density", "critic.value.num_quantiles", (50, 200)),
    ],
)
def test_two_points_of_a_sweep_are_trained_and_reported(sweep, field, values, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(train.METRICS_ENV, raising=False)
    listed = ",".join(map(str, values))
    monkeypatch.setattr(
        sys, "argv", ["train", f"+sweep={sweep}", *swept(demo, tmp_path, f"{field}={listed}", "seed=7")]
    )
    GlobalHydra.instance().clear()
    train.main()
    found = points(tmp_path)
    assert [(float(point[field]), point["runs"]) for point in found] == [(value, "1") for value in values]
    for number, point in enumerate(found):
        folder = tmp_path / "sweep" / str(number)
        *_, last = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
        assert last["step"] == 3
        assert float(point["score"]) == last["data"]["val-core/demo_addition/acc/mean@1"]
        assert math.isfinite(last["data"]["critic/vf_loss"])


def test_noise_is_in_the_training_and_not_in_the_validation(demo, tmp_path):
    """Every label flipped: what the critic sees is one minus what was deserved, for every sample."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, **kwargs):\n"
        "    return float(len(solution_str) % 3 == 0)\n"
    )
    before, *records = steps(
        demo,
        tmp_path,
        "algorithm=ppo",
        "noise=flip",
        "noise.rate=1.0",
        f"reward.custom_reward_function.path={reward}",
    )
    for record in records:
        assert record["critic/score/mean"] == pytest.approx(1.0 - record["noise/clean_score/mean"])
        assert record["noise/corrupted/mean"] == 1.0
    assert not any(name.startswith("noise/") for name in before)


def test_rewards_that_are_not_finite_stop_the_run(demo, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, **kwargs):\n    return float('nan')\n"
    )
    with pytest.raises(ray.exceptions.RayTaskError, match=r"not finite for .* samples; uids: "):
        steps(
            demo,
            tmp_path,
            f"reward.custom_reward_function.path={reward}",
            "trainer.val_before_train=false",
            "trainer.save_freq=1",
        )
    assert not list((tmp_path / "checkpoints").glob("global_step_*"))


@pytest.mark.long
def test_a_launcher_of_clusters_trains_a_point_in_a_process_of_its_own(demo, tmp_path):
    """Submitit's local executor takes the place of Slurm: the same launcher, pickled and started from a file."""
    overrides = swept(demo, tmp_path, "critic.value.num_quantiles=50", "hydra/launcher=submitit_local")
    threads = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_DVPO_CPU_THREADS='1'"
    command = [sys.executable, "-m", "verl_dvpo.train", "+sweep=quantile_density", *overrides, threads]
    environment = {k: v for k, v in os.environ.items() if k not in (train.METRICS_ENV, "CUDA_VISIBLE_DEVICES")}
    ray.shutdown()  # the job has a Ray of its own; no test comes after this one
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (point,) = points(tmp_path)
    assert point["runs"] == "1"
    assert list((tmp_path / "sweep" / ".submitit").glob("*/*_log.out"))
