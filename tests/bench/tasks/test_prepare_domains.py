# SPDX-License-Identifier: Apache-2.0
"""Tests the domains' folder: verl reads it, one model serves it, and the YAML points to it."""

import dataclasses
import json
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM
from verl.experimental.agent_loop import agent_loop
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer import hf_tokenizer

import verl_dvpo.plugin  # noqa: F401  (puts verl_dvpo.config on the search path)
from verl_dvpo import preflight
from verl_dvpo.bench.tasks import conversation
from verl_dvpo.bench.tasks.addition import Problem, work
from verl_dvpo.bench.tasks.conversation import encode, greedy_responses, greedy_scores
from verl_dvpo.bench.tasks.dialogue import Goal, converse
from verl_dvpo.bench.tasks.model import build_model
from verl_dvpo.bench.tasks.prepare import prepare
from verl_dvpo.bench.tasks.registry import DOMAINS, TASKS
from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.bench.tasks.task import TURNS, Example
from verl_dvpo.bench.tasks.tokenizer import build_tokenizer, encode_prompt
from verl_dvpo.bench.tasks.warm_start import batches, warm_start
from verl_dvpo.cli import main

SMALL = {
    "num_train": 24,
    "num_val": 6,
    "config": dataclasses.replace(DOMAINS.warm_start, steps=2, batch_size=6),
}
TOKENIZER = build_tokenizer(max_length=DOMAINS.max_positions)
AGENTS = {"arithmetic": "single_turn_agent", "science": "single_turn_agent", "dialogue": "dialogue_agent"}
#: Tokens of a prompt and of a response in config/task/domains.yaml.
LONGEST_PROMPT, LONGEST_RESPONSE = 64, 112


def prepare_domains(folder, **settings):
    return prepare(DOMAINS, folder, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepare_domains(tmp_path_factory.mktemp("made") / "domains", **SMALL)


def task_config(task: str, folder: Path):
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "dvpo_trainer", overrides=["algorithm=dvpo", "platform=cpu", f"+task={task}", f"domains.dir={folder}"]
        )


@pytest.mark.parametrize("task", ["domains", *DOMAINS.tasks])
def test_a_run_trains_on_its_own_and_validates_on_all(task, made, tmp_path):
    config = task_config(task, made.path)
    preflight.check(config)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (LONGEST_PROMPT, LONGEST_RESPONSE)
    tokenizer = hf_tokenizer(str(made.path / "model"))
    settings = OmegaConf.create({"max_prompt_length": 64, "truncation": "error", "cache_dir": str(tmp_path)})
    train, val = (RLHFDataset(files, tokenizer, settings) for files in (config.data.train_files, config.data.val_files))
    trained = set(DOMAINS.tasks) if task == "domains" else {task}
    assert {row["data_source"] for row in (train[i] for i in range(len(train)))} == trained
    assert len(train) == 24 * len(trained)
    sources = [val[i]["data_source"] for i in range(len(val))]
    assert sources == [name + end for name in DOMAINS.tasks for end in ("", "_shifted") for _ in range(6)]
    for i in range(len(val)):
        row = val[i]
        assert row["agent_name"] == AGENTS[row["data_source"].removesuffix("_shifted")]
        assert len(tokenizer.apply_chat_template(row["raw_prompt"], add_generation_prompt=True)["input_ids"]) <= 64
    score = get_custom_reward_fn(config)
    assert score(data_source="arithmetic", solution_str="x;12", ground_truth="12", extra_info={})["score"] == 0.0


@pytest.mark.parametrize("absolute", [True, False])
def test_verls_rollout_worker_registers_the_dialogue_from_the_folder(absolute, made, tmp_path, monkeypatch):
    """An absolute folder from anywhere, a relative one from where its data are found too."""
    monkeypatch.chdir(tmp_path if absolute else made.path.parent)
    config = task_config("dialogue", made.path if absolute else Path("domains"))
    registry = {}
    monkeypatch.setattr(agent_loop, "_agent_loop_registry", registry)
    agent_loop.AgentLoopWorker(config, None)
    entry = registry["dialogue_agent"]
    assert entry == {"name": "dialogue_agent", "_target_": "verl_dvpo.bench.tasks.agent_loop.DialogueAgentLoop"}
    assert hydra.utils.get_class(entry["_target_"]).__name__ == "DialogueAgentLoop"


@pytest.mark.parametrize("name", DOMAINS.tasks)
def test_every_prompt_and_demonstration_fits(name):
    split = TASKS[name].split(0, num_train=2048, num_val=128)
    for example in (*split.train, *split.val, *split.shifted):
        assert len(encode_prompt(TOKENIZER, example.prompt)) <= LONGEST_PROMPT
    demonstrate = TASKS[name].demonstrator(0, split, habit=0.5, slip=0.05)
    rng = np.random.default_rng(0)
    for _ in range(500):
        conversation = demonstrate(rng)
        ids, labels = encode(TOKENIZER, conversation)
        assert TOKENIZER.unk_token_id not in ids
        prompt = encode_prompt(TOKENIZER, conversation[0])
        assert ids[: len(prompt)] == prompt
        assert len(ids) - len(prompt) <= LONGEST_RESPONSE
        learned = TOKENIZER.decode([label for label in labels if label != -100])
        assert learned == "".join(f"{turn}<|im_end|>" for turn in conversation[1::2])


def test_scores_in_the_manifest_are_those_of_the_saved_model(made):
    model = AutoModelForCausalLM.from_pretrained(made.path / "model")
    assert model.config.max_position_embeddings >= LONGEST_PROMPT + LONGEST_RESPONSE
    split = TASKS["dialogue"].split(0, num_train=24, num_val=6)
    assert made.scores["dialogue_shifted"] == greedy_scores(
        model, TOKENIZER, TASKS["dialogue"], split.shifted, longest=48
    )
    assert list(made.scores) == [name + end for name in DOMAINS.tasks for end in ("", "_shifted")]
    assert made.scores["dialogue"].keys() == {"acc", "tcr", "acr", "gcr", "well_formed"}


def test_a_model_that_has_learned_a_few_by_heart_says_them_greedily():
    """Training, padding on the left and the dialogue's turns together: the right answers come back."""
    wanted = {}
    for name in DOMAINS.tasks:
        split = TASKS[name].split(0, num_train=4, num_val=1)
        wanted[name] = split.train[1:2]
    faultless = {name: _right(name, examples[0]) for name, examples in wanted.items()}
    demonstrators = [lambda rng, name=name: faultless[name] for name in faultless]
    model = build_model(TOKENIZER, seed=0)
    config = dataclasses.replace(DOMAINS.warm_start, steps=60, batch_size=6, learning_rate=2e-3)
    warm_start(model, TOKENIZER, demonstrators, config, seed=(0, 40))
    for name, (example,) in wanted.items():
        # beside a longer prompt, so that this one is padded on the left
        examples = [example, dataclasses.replace(example, prompt=example.prompt + " " * 9)]
        said, _ = greedy_responses(model, TOKENIZER, TASKS[name], examples, longest=48)
        assert said == faultless[name][1::2]
        assert compute_score(example.source, said[-1], example.truth, {TURNS: said})["score"] == 1.0


def _right(name: str, example: Example) -> list[str]:
    """The faultless conversation on an example."""
    if name == "arithmetic":
        return [example.prompt, work(Problem(*map(int, example.prompt[:-1].split("+"))))]
    if name == "science":
        rng = np.random.default_rng(0)
        science = TASKS["science"]
        demonstrate = science.demonstrator(0, science.split(0, num_train=1, num_val=1), habit=0.0, slip=0.0)
        while (conversation := demonstrate(rng))[0] != example.prompt:
            pass
        return conversation
    return converse(Goal.from_json(example.truth), np.random.default_rng(0), habit=0.0, slip=0.0)


def test_batches_depend_on_the_seed_and_hold_every_domain():
    splits = {name: TASKS[name].split(0, num_train=2, num_val=2) for name in DOMAINS.tasks}

    def first(seed):
        demonstrators = [TASKS[name].demonstrator(0, split, habit=0.5, slip=0.1) for name, split in splits.items()]
        return next(batches(TOKENIZER, demonstrators, 6, seed=(seed, 40)))

    ids, labels = first(1)
    assert torch.equal(ids, first(1)[0])
    assert not torch.equal(ids[:, :12], first(2)[0][:, :12])
    prompts = [TOKENIZER.decode(row).split("user\n")[1].split("<|im_end|>")[0] for row in ids]
    assert [prompt.endswith("=") for prompt in prompts] == [True, False, False] * 2
    assert ((labels == -100) | (labels == ids)).all()


def test_same_settings_are_reused_and_others_replace(tmp_path, monkeypatch):
    out = tmp_path / "domains"
    first = prepare_domains(out, **SMALL)
    again = prepare_domains(out, **SMALL)
    assert (first.reused, again.reused, again.scores) == (False, True, first.scores)
    before = (out / "science" / "val.parquet").read_bytes()

    def fail(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversation, "greedy_scores", fail)  # the last thing before the manifest
        with pytest.raises(KeyboardInterrupt):
            prepare_domains(out, seed=1, **SMALL)
    assert (out / "science" / "val.parquet").read_bytes() == before
    assert not prepare_domains(out, seed=1, **SMALL).reused
    assert (out / "science" / "val.parquet").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["domains"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out_dir is .* holds no domains\.json"):
        prepare_domains(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_the_command_makes_the_tiny_variant(tmp_path, capsys):
    assert main(["domains", "--out", str(tmp_path / "d"), "--tiny", "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "dialogue_shifted" in said
    assert "tcr" in said
    settings = json.loads((tmp_path / "d" / "domains.json").read_text())["settings"]
    assert (settings["steps"], settings["num_train"], settings["num_val"]) == (1, 64, 16)
    assert main(["domains", "--out", str(tmp_path / "d"), "--steps", "0"]) == 2
    assert "error: steps is 0; it must be at least 1" in capsys.readouterr().err
    assert main(["domains", "--out", str(tmp_path / "d"), "--seed", "-1"]) == 2
