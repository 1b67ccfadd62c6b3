# SPDX-License-Identifier: Apache-2.0
"""Every recipe composes as its script does it, passes what can be checked without a model hub, and fits its GPUs."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from test_configs import CONFIG, compose_config, family_of, names

from verl_dvpo import preflight
from verl_dvpo.estimate.gpus import GPUS
from verl_dvpo.estimate.result import memory_of
from verl_dvpo.estimate.settings import compose_recipe, read_settings
from verl_dvpo.families.registry import build_family

RECIPES = CONFIG.parent / "examples" / "recipes"
NAMES = sorted(file.stem for file in RECIPES.glob("*.yaml"))
#: The GPU that a recipe is written for, by its number of GPUs.
WRITTEN_FOR = {4: "A100-40G", 8: "A100-80G", 32: "A100-80G"}


@functools.cache
def as_main_ppo(recipe: str, *overrides: str) -> DictConfig:
    """Composes once for all tests, which change nothing; the data's folder is looked up when a field is read."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose(recipe, overrides=["hydra.searchpath=[pkg://verl.trainer.config]", *overrides])


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty parquet file for each that a recipe names."""
    import pandas

    monkeypatch.setenv("VERL_DVPO_DATA_DIR", str(tmp_path))
    for recipe in NAMES:
        section = as_main_ppo(recipe).data
        for file in [section.train_files, *section.val_files]:
            pandas.DataFrame({"prompt": []}).to_parquet(file)
    return tmp_path


def test_each_recipe_has_a_script_of_its_own():
    assert NAMES
    assert sorted(file.stem for file in RECIPES.glob("*.sh")) == NAMES
    for recipe in NAMES:
        lines = (RECIPES / f"{recipe}.sh").read_text().splitlines()
        assert len(lines) == 5
        assert f"bash examples/recipes/{recipe}.sh " in lines[1]
        assert f"--config-name {recipe} " in lines[-1]
        assert os.access(RECIPES / f"{recipe}.sh", os.X_OK)


def test_recipes_pass_the_checks_before_ray(data):
    """All of preflight but the model, which is a name on a hub; and sizes that fit each other."""
    for recipe in NAMES:
        config = as_main_ppo(recipe)
        preflight.check(config)
        OmegaConf.to_container(config, resolve=True)
        assert family_of(config).family == "quantile_ensemble"
        assert config.trainer.experiment_name == recipe
        assert config.critic.model.path == config.actor_rollout_ref.model.path
        length = config.data.max_prompt_length + config.data.max_response_length
        for section in (config.actor_rollout_ref.actor, config.critic):
            assert length <= section.ppo_max_token_len_per_gpu * section.ulysses_sequence_parallel_size, recipe
        gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
        assert gpus % config.actor_rollout_ref.rollout.tensor_model_parallel_size == 0
        for size in (config.actor_rollout_ref.actor.ppo_mini_batch_size, config.critic.ppo_mini_batch_size):
            assert size * config.actor_rollout_ref.rollout.n % gpus == 0, recipe


@pytest.mark.parametrize("override", ["algorithm=ppo", "algorithm=grpo", "domain=science", "+preset=vapo"])
def test_a_recipe_takes_what_is_added_on_the_command_line(override, data):
    config = as_main_ppo("qwen3_8b_math", override, "trainer.total_training_steps=7")
    preflight.check(config)
    assert config.trainer.total_training_steps == 7
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-8B"
    assert {
        "algorithm=ppo": config.algorithm.adv_estimator == "gae",
        "algorithm=grpo": not config.critic.enable,
        "domain=science": config.data.train_files == str(data / "supergpqa_votes.parquet"),
        "+preset=vapo": config.trainer.critic_warmup == 50,
    }[override]


def test_the_script_composes_from_elsewhere_what_the_estimate_composes(tmp_path):
    """What ``main_ppo`` really takes from script, YAML and an override, field by field."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(RECIPES / "qwen3_1_7b_science.sh"), "algorithm=dfpo", "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout[re.search(r"^[a-z_]+:( |$)", done.stdout, re.MULTILINE).start() :]  # behind what others say
    theirs, ours = OmegaConf.create(printed), compose_recipe("qwen3_1_7b_science", ["algorithm=dfpo"])
    assert (theirs.critic.value.family, theirs.trainer.experiment_name) == ("value_flow", "qwen3_1_7b_science")
    assert OmegaConf.to_container(theirs, resolve=True) == OmegaConf.to_container(ours, resolve=True)


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_fits_the_gpus_that_it_is_written_for(recipe):
    config = as_main_ppo(recipe)
    settings = read_settings(config, recipe)
    assert settings.critic is not None
    assert settings.critic.outputs == build_family(family_of(config)).num_outputs == 600
    found = memory_of(settings, GPUS[WRITTEN_FOR[settings.gpus]])
    assert found["fits"], {name: round(size / 2**30, 1) for name, size in found["phases"].items()}


@pytest.mark.parametrize("recipe", names("recipe"))
@pytest.mark.parametrize("algorithm", ["dvpo", "grpo"])
def test_the_settings_of_a_model_compose_alone(recipe, algorithm):
    config = compose_config("dvpo_trainer", f"+recipe={recipe}", f"algorithm={algorithm}")
    OmegaConf.to_container(config, resolve=True)


def test_a_missing_file_of_a_recipe_is_named_before_ray(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_DVPO_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(f"data.train_files is '{tmp_path}/light_r1_votes.parquet'")):
        preflight.check(as_main_ppo("qwen3_8b_math"))
