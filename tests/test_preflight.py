# SPDX-License-Identifier: Apache-2.0
"""What is wrong is said before Ray starts, with the field, the value and the remedy."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
from omegaconf import open_dict
from test_configs import compose_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, T5Config

from verl_dvpo import preflight
from verl_dvpo.bench.tasks.model import build_model
from verl_dvpo.bench.tasks.tokenizer import build_tokenizer
from verl_dvpo.compat import versions
from verl_dvpo.critic.checkpoints import describe_critic
from verl_dvpo.families.registry import family_settings
from verl_dvpo.saved.manifest import write_manifest


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("demo")
    build_model(build_tokenizer(), seed=0).save_pretrained(folder / "model")
    for name in ("train", "val"):
        pandas.DataFrame({"data_source": ["demo"]}).to_parquet(folder / f"{name}.parquet")
    return ["platform=cpu", "+task=demo", f"demo.dir={folder}"]


#: Four updates of actor and critic between two transfers of weights to rollout servers apart.
APART = "trainer_mode=separate_async actor_rollout_ref.actor.ppo_mini_batch_size=16 critic.ppo_mini_batch_size=8"


def check(files: list[str], *overrides: str) -> None:
    preflight.check(compose_config("dvpo_trainer", *files, *overrides))


@pytest.mark.parametrize("algorithm", ["dvpo", "ppo", "grpo"])
def test_good_configurations_pass(files, algorithm):
    check(files, f"algorithm={algorithm}")


@pytest.mark.parametrize("mode", ["trainer_mode=colocate_async", APART])
def test_good_asynchronous_configurations_pass(files, mode):
    check(files, *mode.split())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("critic.value.family=normal", ["critic.value.family", "'normal'", "quantile_ensemble"]),
        ("critic.value.num_heads=0", ["critic.value.num_heads", ">= 1", "0"]),
        ("critic.value.num_quantiles=-5", ["critic.value.num_quantiles", ">= 1", "-5"]),
        ("critic.value.alpha=0", ["critic.value.alpha", "(0, 0.5]"]),
        ("critic.value.beta=0.6", ["critic.value.beta", "0.6", "(0, 0.5]"]),
        ("critic.value.kappa=-1", ["critic.value.kappa", "-1"]),
        ("critic.value.coef.risk=-0.1", ["critic.value.coef.risk", "-0.1"]),
        ("+critic.value.coef.entropy=0.1", ["critic.value.coef", "entropy", "consistency"]),
        ("critic.value.levels=left", ["critic.value.levels", "'left'", "midpoint"]),
        ("critic.value.lam=1.5", ["critic.value.lam", "1.5"]),
        ("+critic.value.quantiles=5", ["critic.value.quantiles", "num_quantiles"]),
        ("critic.enable=false", ["critic.enable", "False", "critic.enable=true"]),
        ("trainer.v1.trainer_mode=sync", ["trainer.v1.trainer_mode", "'sync'", "dvpo_sync"]),
        ("critic._target_=verl.workers.config.FSDPCriticConfig", ["critic._target_", "algorithm=dvpo"]),
        ("data.train_files=nowhere/train.parquet", ["data.train_files", "nowhere/train.parquet"]),
        ("data.val_files=[nowhere/val.parquet]", ["data.val_files", "nowhere/val.parquet"]),
        ("actor_rollout_ref.model.path=/nowhere/model", ["actor_rollout_ref.model.path", "/nowhere/model"]),
        ("critic.model.path=./nowhere", ["critic.model.path", "./nowhere"]),
        ("critic.strategy=fsdp", ["critic.strategy", "fsdp2"]),
        ("actor_rollout_ref.actor.strategy=megatron", ["actor.strategy is 'megatron'", "platform=cpu", "fsdp2"]),
        (
            "+critic_engine=megatron critic.megatron.context_parallel_size=2",
            ["critic.megatron.context_parallel_size is 2", "platform=cpu allows 1"],
        ),
        ("critic.ppo_mini_batch_size=48", ["critic.ppo_mini_batch_size", "48", "data.train_batch_size", "64"]),
        (
            "trainer_mode=separate_async",
            ["trainer.v1.separate_async.parameter_sync_step is 4", "data.train_batch_size, which is 64"],
        ),
        (f"{APART} critic.ppo_mini_batch_size=64", ["critic.ppo_mini_batch_size is 64", "actor's mini-batch", "16"]),
        (
            f"{APART} actor_rollout_ref.rollout.checkpoint_engine.backend=naive",
            ["actor_rollout_ref.rollout.checkpoint_engine.backend", "'naive'", "gloo"],
        ),
        (f"{APART} actor_rollout_ref.hybrid_engine=false", ["actor_rollout_ref.hybrid_engine is False", "True"]),
        (f"{APART} actor_rollout_ref.rollout.nnodes=0", ["actor_rollout_ref.rollout.nnodes is 0", ">= 1"]),
        ("noise=flip noise.rate=1.5", ["noise.rate", "1.5"]),
        ("critic.value.family=no_such.Family", ["critic.value.family", "'no_such.Family'", "PYTHONPATH"]),
        ("+critic.dvpo.num_heads=3", ["critic.dvpo", "critic.value"]),
    ],
)
def test_bad_values_name_field_value_and_remedy(files, override, words):
    with pytest.raises(ValueError, match=r"critic|trainer|data|actor|noise") as error:
        check(files, *override.split())
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("algorithm=dvpo algorithm.value.weighting_eps=0", ["algorithm.value.weighting_eps is 0", "greater than 0"]),
        ("algorithm=dvpo algorithm.value.readout=mode", ["algorithm.value.readout is 'mode'", "median, trimmed"]),
        ("algorithm=dvpo +algorithm.value.weights=1", ["algorithm.value.weights is 1", "weighting_eps"]),
        ("algorithm=ppo algorithm.value.lam_actor=1.0", ["algorithm.adv_estimator is 'gae'", "only 'dvpo'"]),
        (
            "algorithm=ppo_ensemble algorithm.value.weighting=precision",
            [
                "algorithm.value.weighting is 'precision'",
                "critic.value.family is 'scalar_ensemble'",
                "quantile_ensemble",
            ],
        ),
        (
            "algorithm=dfpo algorithm.value.reward=gated",
            ["algorithm.value.reward is 'gated'", "critic.value.family is 'value_flow'", "algorithm.value.gate_gain"],
        ),
        (
            "algorithm=dvpo algorithm.value.weighting=group_std actor_rollout_ref.rollout.n=1",
            ["actor_rollout_ref.rollout.n is 1", "'group_std'", "'precision'"],
        ),
    ],
)
def test_options_of_the_advantage_that_cannot_work(files, overrides, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        check(files, *overrides.split())
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "algorithm=dvpo_weighted actor_rollout_ref.rollout.n=1",
        "algorithm=ppo_gaussian_weighted actor_rollout_ref.rollout.n=1",
        "algorithm=dvpo algorithm.value.reward=gated",
        "algorithm=ppo_ensemble algorithm.value.reward=clipped algorithm.value.lam_actor=length",
        "algorithm=ppo algorithm.adv_estimator=dvpo algorithm.value.weighting=group_std actor_rollout_ref.rollout.n=4",
    ],
)
def test_options_of_the_advantage_that_work(files, overrides):
    check(files, *overrides.split())


def test_a_backbone_that_cannot_carry_a_token_head(files, tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"critic\.model\.path.*'t5'.*token head"):
        check(files, f"critic.model.path={tmp_path / 't5'}")


def test_the_estimator_on_verls_own_configuration(files):
    config = compose_config("ppo_trainer", "algorithm.adv_estimator=dvpo", "critic.enable=true")
    with pytest.raises(ValueError, match=r"trainer\.v1\.trainer_mode.*'sync'.*dvpo_sync"):
        preflight.check(config)


def test_verls_own_configuration_is_left_alone():
    config = compose_config("ppo_trainer")
    with open_dict(config):
        before = json.dumps(str(config))
    preflight.check(config)
    assert json.dumps(str(config)) == before


def test_cpu_platform_without_its_packages_says_how_to_get_them(files, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else real(name, *rest))
    with pytest.raises(ValueError, match=r"platform=cpu.*make install"):
        check(files)


def test_a_family_that_returns_a_wrong_shape(files, tmp_path, monkeypatch):
    (tmp_path / "flat_family.py").write_text(
        "from verl_dvpo.families.quantile_ensemble import QuantileEnsembleFamily\n\n\n"
        "class Flat(QuantileEnsembleFamily):\n"
        "    def quantiles(self, outputs, levels):\n"
        "        return self.value(outputs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"critic\.value\.family is 'flat_family\.Flat'; quantiles.*\(2, 3, 3\), not"):
        check(files, "critic.value.family=flat_family.Flat")


def test_the_old_section_in_yaml(files):
    config = compose_config("dvpo_trainer", *files)
    with open_dict(config):
        config.critic.dvpo = {"num_heads": 5}
    with pytest.raises(ValueError, match=r"critic\.dvpo is set; .* write critic\.value"):
        preflight.check(config)


@pytest.mark.parametrize("overrides", [[], ["algorithm=grpo"], ["noise=flip"]])
def test_a_version_outside_the_table_is_refused_in_one_line_that_names_those_that_fit(files, overrides, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: "0.8.0")
    with pytest.raises(ValueError, match=r"^verl is '0\.8\.0'; this verl-dvpo fits 0\.9\.0, 0\.9\.1") as error:
        check(files, *overrides)
    assert "\n" not in str(error.value)
    monkeypatch.setenv(versions.OVERRIDE_ENV, "1")
    check(files)


def test_a_run_with_nothing_of_ours_may_have_any_version(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: "0.8.0")
    preflight.check(compose_config("ppo_trainer"))


def test_dialogues_on_a_verl_that_needs_a_switch_for_them(files, tmp_path, monkeypatch):
    pandas.DataFrame({"agent_name": ["single_turn_agent", "dialogue_agent"]}).to_parquet(tmp_path / "rows.parquet")
    dialogue = f"data.train_files={tmp_path}/rows.parquet"
    monkeypatch.setattr(versions, "installed", lambda: "0.9.1")
    check(files, dialogue)
    monkeypatch.setattr(versions, "installed", lambda: "0.9.0")
    check(files)  # rows for verl's own loop
    switch = "++data.continuous_token.enable"
    with pytest.raises(ValueError, match=r"data\.train_files is .*'dialogue_agent'.*continuous_token\.enable=true"):
        check(files, dialogue, f"{switch}=false")
    check(files, dialogue, f"{switch}=true")


def test_a_platform_that_is_set_is_left_without_a_word(files, caplog):
    check(files)
    caplog.clear()
    check(files)
    assert not [record for record in caplog.records if "platform" in record.getMessage().lower()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=dvpoo"], "Available options in 'algorithm'"),
        (["algorithm=dvpo", "critic.value.num_heads=0"], "critic.value.num_heads is 0"),
        (["algorithm=dvpo", "critic.dvpo.num_heads=5"], "write critic.value.num_heads=5"),
    ],
)
def test_the_command_fails_fast_and_before_ray(files, overrides, message, tmp_path: Path):
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "dvpo_trainer", *files, *overrides]
    start = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    seconds = time.monotonic() - start
    assert done.returncode != 0
    assert "Started a local Ray instance" not in done.stderr
    assert message in done.stderr
    print(f"{seconds:.1f} s")


def test_a_plugin_that_cannot_register_is_loud(tmp_path):
    """verl logs a failed plugin at DEBUG; ours says so itself."""
    code = "import wrapt; del wrapt.register_post_import_hook; import verl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "verl-dvpo could not be registered" in done.stderr


def critic_manifest(folder: Path, kind: str, **sizes: int) -> None:
    """A folder that says which critic it holds, and holds nothing else."""
    settings = family_settings("quantile_ensemble", **sizes)
    num_outputs = settings.num_heads * settings.num_quantiles
    manifest = describe_critic(kind, settings, num_outputs, 192, {})
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest)


def whole_checkpoint(checkpoint: Path, **sizes: int) -> None:
    """The files that a whole one has, empty, and the manifest of its critic."""
    (checkpoint / "actor").mkdir(parents=True)
    for name in ("actor/model_world_size_1_rank_0.pt", "data.pt"):
        (checkpoint / name).touch()
    critic_manifest(checkpoint / "critic", "checkpoint", **sizes)


def test_a_checkpoint_of_other_sizes_is_refused_before_ray(files, tmp_path):
    whole_checkpoint(tmp_path / "global_step_3", num_heads=3, num_quantiles=7)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    run = ["algorithm=dvpo", "trainer.resume_mode=auto", f"trainer.default_local_dir={tmp_path}"]
    with pytest.raises(ValueError, match="num_quantiles is 7 there and 8 here"):
        check(files, *run, "critic.value.num_quantiles=8")
    check(files, *run, "critic.value.num_quantiles=7")
    check(files, *run, "critic.value.num_quantiles=8", "trainer.resume_mode=disable")
    (tmp_path / "global_step_3" / "critic" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="critic is missing or empty"):
        check(files, *run, "critic.value.num_quantiles=7")


def test_where_the_latest_checkpoint_is_broken_the_one_before_is_judged(files, tmp_path):
    """The trainer resumes from that one, so a broken one is no reason to refuse the run."""
    whole_checkpoint(tmp_path / "global_step_3", num_heads=3, num_quantiles=7)
    whole_checkpoint(tmp_path / "global_step_4", num_heads=3, num_quantiles=8)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    run = ["algorithm=dvpo", "trainer.resume_mode=auto", f"trainer.default_local_dir={tmp_path}"]
    check(files, *run, "critic.value.num_quantiles=8")
    shutil.rmtree(tmp_path / "global_step_4" / "critic")
    check(files, *run, "critic.value.num_quantiles=7")
    with pytest.raises(ValueError, match="num_quantiles is 7 there and 8 here"):
        check(files, *run, "critic.value.num_quantiles=8")
    shutil.rmtree(tmp_path / "global_step_3" / "actor")
    with pytest.raises(ValueError, match="a folder with a checkpoint that loads is allowed"):
        check(files, *run, "critic.value.num_quantiles=7")


def test_an_exported_critic_of_other_sizes_is_refused_before_ray(files, tmp_path):
    critic_manifest(tmp_path / "critic", "critic", num_heads=3, num_quantiles=7)
    config = compose_config("dvpo_trainer", *files).critic.model.path
    content = json.loads((Path(config) / "config.json").read_text()) | {"verl_dvpo": {"num_outputs": 21}}
    (tmp_path / "critic" / "config.json").write_text(json.dumps(content))
    run = ["algorithm=dvpo", f"critic.model.path={tmp_path / 'critic'}"]
    with pytest.raises(ValueError, match="num_quantiles is 7 there and 8 here"):
        check(files, *run, "critic.value.num_quantiles=8")
    check(files, *run, "critic.value.num_quantiles=7")
    check(files, *run, "critic.value.num_quantiles=8", "critic.value.head_from=seed")


def model_folder(folder: Path, tokens: str, vocab_size: int = 64, **config) -> Path:
    """A Llama with a tokenizer of single letters."""
    LlamaConfig(vocab_size=vocab_size, **config).save_pretrained(folder)
    vocabulary = {token: place for place, token in enumerate(tokens)}
    Tokenizer(WordLevel(vocabulary, unk_token=tokens[0])).save(str(folder / "tokenizer.json"))
    return folder


def test_a_critic_that_reads_other_tokens_is_refused_before_ray(files, tmp_path):
    policy = tmp_path / "policy"
    policy.mkdir()
    shutil.copytree(compose_config("dvpo_trainer", *files).actor_rollout_ref.model.path, policy, dirs_exist_ok=True)
    build_tokenizer().save_pretrained(policy)
    run = ["algorithm=dvpo", f"actor_rollout_ref.model.path={policy}"]
    other = model_folder(tmp_path / "llama", "abc")
    with pytest.raises(ValueError, match=r"critic\.model\.path is .*llama.*'llama'.*'qwen3'.*token 0.*'a'"):
        check(files, *run, f"critic.model.path={other}")
    same = model_folder(tmp_path / "same_tokens", "abc", vocab_size=50)
    build_tokenizer().save_pretrained(same)
    with pytest.raises(ValueError, match=r"'llama'.*ids up to \d+, the critic has embeddings for 50"):
        check(files, *run, f"critic.model.path={same}")
    build = model_folder(tmp_path / "wide", "abc", vocab_size=500)
    build_tokenizer().save_pretrained(build)
    check(files, *run, f"critic.model.path={build}")  # another family that reads the same tokens
    check(files, *run, f"critic.model.path={policy}")
