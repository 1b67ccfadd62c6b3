# SPDX-License-Identifier: Apache-2.0
"""Tests the demo's folder: verl and transformers read it; it is made whole or not at all, and reused if it fits."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer import hf_tokenizer

from verl_dvpo.bench.tasks import conversation, reward
from verl_dvpo.bench.tasks.addition import Problem, work
from verl_dvpo.bench.tasks.conversation import greedy_responses
from verl_dvpo.bench.tasks.prepare import prepare
from verl_dvpo.bench.tasks.registry import DEMO, TASKS
from verl_dvpo.bench.tasks.task import Example
from verl_dvpo.cli import main

NAME = "demo_addition"
SMALL = {
    "num_train": 40,
    "num_val": 12,
    "config": dataclasses.replace(DEMO.warm_start, steps=2, batch_size=4),
}


def prepare_demo(folder, **settings):
    return prepare(DEMO, folder, **settings)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return prepare_demo(tmp_path_factory.mktemp("made") / "deep" / "demo", **SMALL)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("split", ["train", "val"])
def test_verl_reads_the_data(demo, split, tmp_path):
    config = OmegaConf.create({"max_prompt_length": 32, "cache_dir": str(tmp_path), "truncation": "error"})
    tokenizer = hf_tokenizer(str(demo.model))
    dataset = RLHFDataset(str(demo.file(NAME, split)), tokenizer, config)
    assert len(dataset) == {"train": 40, "val": 12}[split]
    for index, row in enumerate(dataset[i] for i in range(len(dataset))):
        (message,) = row["raw_prompt"]
        a, b = message["content"].removesuffix("=").split("+")
        assert message["role"] == "user"
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(int(a) + int(b))}
        assert row["extra_info"] == {"split": split, "index": index}
        assert row["index"] == index
        assert (row["data_source"], row["ability"]) == ("demo_addition", "math")


def test_the_files_share_no_problem(demo):
    problems = [
        frozenset(row[0]["content"].removesuffix("=").split("+"))
        for path in (demo.file(NAME, "train"), demo.file(NAME, "val"))
        for row in pd.read_parquet(path)["prompt"]
    ]
    assert len(set(problems)) == len(problems) == 52


def test_model_loads_for_actor_and_critic_and_its_accuracy_is_the_recorded_one(demo):
    actor = AutoModelForCausalLM.from_pretrained(demo.model)
    parameters = sum(parameter.numel() for parameter in actor.parameters())
    # By hand, H = 192, 2 layers: attention 2 * 192*192 + 2 * 192*64, feed-forward 3 * 192*448, norms 2*192 + 2*32;
    # embedding and head 2 * 104*192, last norm 192: 2 * (98304 + 258048 + 448) + 39936 + 192 = 753728
    assert parameters == 753_728
    assert {parameter.dtype.itemsize for parameter in actor.parameters()} == {4}
    critic = AutoModelForTokenClassification.from_pretrained(demo.model, num_labels=6)
    assert critic.score.out_features == 6
    assert critic.model.norm.weight.equal(actor.model.norm.weight)
    tokenizer = hf_tokenizer(str(demo.model))
    assert actor.generation_config.eos_token_id == tokenizer.eos_token_id
    prompts = [row[0]["content"] for row in pd.read_parquet(demo.file(NAME, "val"))["prompt"]]
    examples = [Example(NAME, prompt, "") for prompt in prompts]
    responses = greedy_responses(actor, tokenizer, TASKS[NAME], examples, longest=30)
    right = [sum(map(int, prompt[:-1].split("+"))) for prompt in prompts]
    correct = [said.partition(";")[2] == str(answer) for (said,), answer in zip(responses, right, strict=True)]
    assert demo.scores[NAME]["acc"] == sum(correct) / 12


def test_same_settings_are_reused_and_the_seed_gives_the_same_data(demo, tmp_path):
    out = tmp_path / "demo"
    first = prepare_demo(out, **SMALL)
    for part in ("train", "val"):
        assert first.file(NAME, part).read_bytes() == demo.file(NAME, part).read_bytes()
    stamp = first.model.stat().st_mtime_ns
    again = prepare_demo(out, **SMALL)
    assert (first.reused, again.reused) == (False, True)
    assert again.model.stat().st_mtime_ns == stamp
    assert again == dataclasses.replace(first, reused=True)
    assert listing(out) == ["demo.json", "model", "train.parquet", "val.parquet"]

    other = prepare_demo(out, seed=1, **SMALL)
    assert not other.reused
    assert other.file(NAME, "val").read_bytes() != demo.file(NAME, "val").read_bytes()
    assert listing(tmp_path) == ["demo"]


def test_a_failure_leaves_nothing_and_spares_what_was_there(monkeypatch, tmp_path):
    out = tmp_path / "demo"
    prepare_demo(out, **SMALL)
    before = (out / "demo.json").read_text()

    def fail(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "greedy_scores", fail)  # the last thing before the manifest
    for target in (out, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt):
            prepare_demo(target, seed=7, **SMALL)
    assert listing(tmp_path) == ["demo"]
    assert (out / "demo.json").read_text() == before


def test_a_killed_process_leaves_nothing_that_looks_complete(tmp_path):
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "verl_dvpo.cli", "demo-data", "--out", str(out), "--steps", "100000"]
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".demo.partial-*/val.parquet")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert not list(tmp_path.rglob("demo.json"))
    assert not prepare_demo(out, **SMALL).reused


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out_dir is .* an earlier demo folder, but holds no demo\.json"):
        prepare_demo(tmp_path, **SMALL)
    assert listing(tmp_path) == ["precious.txt"]
    with pytest.raises(ValueError, match=r"out_dir is .* an earlier demo folder, but holds no demo\.json"):
        prepare_demo(tmp_path / "precious.txt", **SMALL)


@pytest.mark.parametrize("settings", [{"seed": -1}, {"num_train": 0}, {"num_val": 0}])
def test_impossible_settings_are_named(settings, tmp_path):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        prepare_demo(tmp_path / "demo", **settings)
    assert listing(tmp_path) == []


def test_command_makes_the_tiny_variant_and_says_where(tmp_path, capsys):
    assert main(["demo-data", "--out", str(tmp_path / "demo"), "--tiny", "--steps", "1"]) == 0
    assert str(tmp_path / "demo" / "model") in capsys.readouterr().out
    settings = json.loads((tmp_path / "demo" / "demo.json").read_text())["settings"]
    assert (settings["steps"], settings["num_train"], settings["num_val"]) == (1, 64, 16)
    assert main(["demo-data", "--out", str(tmp_path / "demo"), "--tiny", "--steps", "0"]) == 2
    assert "error: steps is 0; it must be at least 1" in capsys.readouterr().err


def test_the_size_of_the_validation_is_an_option(tmp_path):
    """It is the validation that the library gives for that size, and the tiny training set stays."""
    out = tmp_path / "demo"
    assert main(["demo-data", "--out", str(out), "--tiny", "--steps", "1", "--num-val", "40"]) == 0
    prompts = [row[0]["content"] for row in pd.read_parquet(out / "val.parquet")["prompt"]]
    assert prompts == [example.prompt for example in TASKS[NAME].split(0, num_train=64, num_val=40).val]
    assert len(pd.read_parquet(out / "train.parquet")) == 64
    assert main(["demo-data", "--out", str(out), "--num-val", "0"]) == 2


@pytest.mark.parametrize("path", ["pkg://verl_dvpo.bench.tasks.reward", reward.__file__])
def test_verl_loads_the_reward(path):
    config = OmegaConf.create({"reward": {"custom_reward_function": {"path": path, "name": "compute_score"}}})
    score = get_custom_reward_fn(config)

    def ask(response):
        return score(data_source="demo_addition", solution_str=response, ground_truth="933", extra_info={"index": 0})

    assert ask(work(Problem(347, 586))) == {"score": 1.0, "acc": 1.0, "well_formed": 1.0}
    assert ask("7+6=13,4+8+1=13,3+5+1=9;932") == {"score": 0.0, "acc": 0.0, "well_formed": 1.0}
    assert ask("933") == {"score": 0.0, "acc": 0.0, "well_formed": 0.0}
