# SPDX-License-Identifier: Apache-2.0
"""The sweeps as Hydra runs them, with a training that takes no time: which runs there are, and what is optimised."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from verl_dvpo import train
from verl_dvpo.critic.config import family_config
from verl_dvpo.seeds import SEEDS, set_seeds

CONFIG = Path(__file__).parents[3] / "config"
TERMS = ("consistency", "cvar", "gain", "shift", "shape", "curvature")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs ``python -m verl_dvpo.train`` with overrides; returns the fields of critic.value of each run."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, score=lambda dvpo: 0.5) -> list[dict]:
        runs: list[dict] = []

        def fake(config, metrics):
            dvpo = OmegaConf.to_container(config.critic.value, resolve=True)
            assert isinstance(dvpo, dict)
            family_config(**{name: value for name, value in dvpo.items() if name != "_target_"})
            assert (config.trainer.save_freq, config.trainer.resume_mode) == (-1, "disable")
            assert metrics.parent.parent == tmp_path / "sweep"
            runs.append(dvpo)
            return score(dvpo)

        monkeypatch.setattr(train, "run", fake)
        monkeypatch.delenv(train.METRICS_ENV, raising=False)
        arguments = ["platform=cpu", "+task=demo", f"hydra.sweep.dir={tmp_path / 'sweep'}", *overrides]
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        GlobalHydra.instance().clear()
        train.main()
        return runs

    return run


def test_risk_weights_and_densities_are_the_papers(sweep):
    assert [run["coef"]["risk"] for run in sweep("+sweep=risk_weight")] == [0, 0.05, 0.1, 0.2]
    assert [run["num_quantiles"] for run in sweep("+sweep=quantile_density")] == [50, 100, 200, 500]


@pytest.mark.parametrize("algorithm", ["dvpo", "dvpo_calibrated"])
def test_the_ladder_adds_terms_and_ends_with_every_term(sweep, algorithm):
    """``curvature`` is off in the algorithms themselves; in levels, as ``shape``, it has no form."""
    runs = sweep("+sweep=loss_ladder", f"algorithm={algorithm}")
    whole = sweep("+sweep=base", f"algorithm={algorithm}")
    active = [{term for term in TERMS if run["coef"][term] > 0} for run in runs]
    possible = set(TERMS) - ({"shape", "curvature"} if algorithm == "dvpo_calibrated" else set())
    rungs: list[set] = [set()]
    for terms in ({"consistency"}, {"cvar", "gain"}, {"shift"}, {"shape", "curvature"}):
        rungs.append(rungs[-1] | terms)
    assert active == [rung & possible for rung in rungs]
    assert len({run["coef"]["risk"] for run in runs}) == 1
    runs[-1]["coef"]["curvature"] = 0.0
    assert runs[-1] == whole[0]


def test_optuna_finds_what_scores_highest(sweep):
    """A score with its maximum at risk 0.05 and 100 quantiles."""
    pytest.importorskip("optuna")

    def score(dvpo):
        return -abs(dvpo["coef"]["risk"] - 0.05) - (0.0 if dvpo["num_quantiles"] == 100 else 0.1)

    runs = sweep("+sweep=optuna", "hydra.sweeper.n_trials=25", score=score)
    assert len(runs) == 25
    assert all(0 <= run["coef"]["risk"] <= 0.2 and run["num_quantiles"] in (50, 100, 200, 500) for run in runs)
    best = OmegaConf.load("sweep/optimization_results.yaml")
    assert best.best_value == pytest.approx(max(map(score, runs)))
    assert best.best_params["critic.value.num_quantiles"] == 100
    assert best.best_params["critic.value.coef.risk"] == pytest.approx(0.05, abs=0.02)


def test_the_objective_is_the_last_validations_mean(tmp_path):
    records = [
        {"step": 0, "data": {"val-core/a/acc/mean@1": 0.9}},
        {"step": 2, "data": {"val-core/a/acc/mean@1": 0.25, "val-core/b/acc/mean@1": 0.75, "val-aux/a/x/mean@1": 9}},
        {"step": 3, "data": {"critic/score/mean": 1.0}},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert train.last_score(path) == 0.5
    assert train.last_score(path, ["b"]) == 0.75
    with pytest.raises(ValueError, match=r"objective is \['a', 'c'\].*\['a', 'b'\]; take out \['c'\]"):
        train.last_score(path, ["a", "c"])
    assert train.last_score(tmp_path / "nothing.jsonl", ["a"]) is None


@pytest.mark.parametrize("task", ["arithmetic", "science", "dialogue"])
def test_a_domain_is_swept_for_its_own_score(task):
    config = OmegaConf.load(CONFIG / "task" / f"{task}.yaml")
    assert config.objective == [task]


def test_one_seed_goes_to_everything_that_draws():
    fields = {field: 0 for field in SEEDS if not field.startswith(("noise", "critic.fsdp"))}
    config = OmegaConf.create({"noise": None, "trainer": {"seed": 0}})
    for field, value in fields.items():
        OmegaConf.update(config, field, value)
    set_seeds(config, 7)
    assert {field: OmegaConf.select(config, field) for field in fields} == dict.fromkeys(fields, 7)
    assert config.noise is None
    assert "fsdp" not in config.critic
    assert config.trainer.seed == 0


def test_a_sweep_sets_the_seed_of_each_run(tmp_path, monkeypatch):
    """Stopped before anything starts: what the run is told is what its configuration then holds."""
    told = []

    def stop(config, **_):
        told.append((config.data.seed, config.critic.value.head_seed, config.actor_rollout_ref.rollout.seed))
        raise ValueError("enough")

    monkeypatch.setattr(train, "validate_config", stop)
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("dvpo_trainer", overrides=["platform=cpu", "+sweep=base", "seed=5"])
    with pytest.raises(ValueError, match="enough"):
        train.run(config, tmp_path / "metrics.jsonl")
    assert told == [(5, 5, 5)]


def test_jobs_of_slurm_ask_for_what_a_run_takes():
    assert find_spec("submitit"), "submitit is missing; run `make install`"
    GlobalHydra.instance().clear()
    sweep = ["+sweep=risk_weight", "+slurm=gpus", "hydra.launcher.partition=fast", "trainer.n_gpus_per_node=4"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("dvpo_trainer", overrides=sweep, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        launcher = instantiate(config.hydra.launcher)
    assert type(launcher).__name__ == "SlurmLauncher"
    given = {name: launcher.params[name] for name in ("partition", "nodes", "gpus_per_node", "timeout_min", "mem_gb")}
    assert given == {"partition": "fast", "nodes": 1, "gpus_per_node": 4, "timeout_min": 1440, "mem_gb": 512}
    assert config.hydra.sweeper.params["critic.value.coef.risk"] == "0,0.05,0.1,0.2"


def test_every_sweep_that_ships_is_tested_here():
    assert {file.stem for file in (CONFIG / "sweep").glob("*.yaml")} == {
        "base", "loss_ladder", "optuna", "quantile_density", "risk_weight"
    }  # fmt: skip
