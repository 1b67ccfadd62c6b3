# SPDX-License-Identifier: Apache-2.0
"""The command, against numbers worked by hand, and what it says to input that it cannot use."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from verl_dvpo.estimate.commands import estimate
from verl_dvpo.estimate.gpus import GPUS, find_gpu
from verl_dvpo.estimate.memory import GIB, OVERHEAD
from verl_dvpo.estimate.settings import compose_recipe, read_settings, with_gpus
from verl_dvpo.estimate.shapes import find_shape
from verl_dvpo.estimate.speed import BANDWIDTH, Rollout, rollout_seconds

QWEN = 8_190_735_360  # parameters of Qwen3-8B
EMBEDDING = 151_936 * 4096
CRITIC = QWEN - EMBEDDING + 4097 * 600
RECIPE = "qwen3_8b_math"


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]):
    def ask(*overrides: str, **options: object) -> dict:
        estimate(RECIPE, list(overrides), **{"gpu": ["H100"], "json": True, **options})
        return json.loads(capsys.readouterr().out)

    return ask


def test_states_of_actor_and_critic_are_sixteen_bytes_a_parameter_over_eight_gpus(ask):
    found = ask()
    for name, parameters in (("actor", QWEN), ("critic", CRITIC)):
        role = found["roles"][name]
        assert found[name]["parameters"] == parameters
        assert role["weights"] == role["gradients"] == parameters * 4 / 8
        assert role["optimizer"] == parameters * 8 / 8
    assert "reference" not in found["roles"]
    actor, critic, phases = found["roles"]["actor"], found["roles"]["critic"], found["by_gpu"]["H100"]["phases"]
    kept = 2 * 4 * 200 * 256 * 8192 / 8  # samples and targets of 32 answers, 200 numbers a token
    assert critic["between"] == kept  # weights and optimizer are offloaded
    assert actor["between"] == QWEN * 12 / 8
    assert phases["update actor"] == pytest.approx(actor["turn"] + kept + OVERHEAD)
    assert phases["rollout"] == pytest.approx(0.6 * GPUS["H100"].memory + actor["between"] + kept + OVERHEAD)
    assert actor["outputs"] == 16384 * 151_936 * 8


def test_more_gpus_and_offloading_take_less_of_each(ask):
    one, two = ask(), ask(gpus=16)
    assert two["roles"]["actor"]["weights"] == one["roles"]["actor"]["weights"] / 2
    assert two["by_gpu"]["H100"]["seconds"]["step"] < one["by_gpu"]["H100"]["seconds"]["step"]
    offload = [f"actor_rollout_ref.actor.fsdp_config.{what}_offload=true" for what in ("param", "optimizer")]
    assert ask(*offload)["roles"]["actor"]["between"] == 0


def test_operations_follow_the_models_and_the_passes(ask):
    """256 sequences of 2048 tokens of a prompt and, on average, 4096 of an answer."""
    flops = ask()["flops"]
    layers = QWEN - 2 * EMBEDDING - 4096 - 36 * (2 * 4096 + 256)
    tokens, attention = 256 * 6144, 256 * 2 * 6144**2 * 4096 * 36
    forward = 2 * (layers + EMBEDDING) * tokens + attention
    assert flops["rollout"] == flops["old log-probabilities"] == pytest.approx(forward, rel=1e-12)
    again = 2 * (layers - 36 * 4096 * 12288) * tokens + attention  # but the last product of each layer
    assert flops["update actor"] == pytest.approx(3 * forward + again, rel=1e-12)
    values = 2 * (layers + 600 * 4096) * tokens + attention
    assert flops["values"] == pytest.approx(values, rel=1e-12)
    training = sum(flops.values()) - flops["rollout"]
    seconds = ask()["by_gpu"]["H100"]["seconds"]
    assert seconds["step"] - seconds["rollout"] == pytest.approx(training / (8 * 989e12 * 0.4), rel=1e-12)


def test_what_a_run_leaves_out_is_not_counted(ask):
    sao = ask("+preset=sao", "trainer_mode=sync")
    assert "old log-probabilities" not in sao["flops"]
    assert sao["flops"]["update critic"] == pytest.approx(2 * ask()["flops"]["update critic"])
    grpo = ask("algorithm=grpo", "actor_rollout_ref.rollout.n=8")
    assert grpo["critic"] is None
    assert set(grpo["flops"]) == {"rollout", "old log-probabilities", "update actor"}
    assert grpo["flops"]["rollout"] == pytest.approx(8 * ask()["flops"]["rollout"])
    reference = ask("actor_rollout_ref.actor.use_kl_loss=true")
    assert reference["roles"]["reference"]["weights"] == QWEN * 4 / 8
    ppo = ask("algorithm=ppo", "critic.value.keep_on=cpu")
    assert ppo["critic"]["outputs"] == 1
    assert ppo["roles"]["critic"]["between"] == 0


def test_devices_of_their_own_for_the_rollout_work_beside_training(ask):
    rollout = ["actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=4"]
    found = ask("trainer_mode=separate_async", *rollout)
    seconds = found["by_gpu"]["H100"]["seconds"]
    training = sum(value for name, value in seconds.items() if name not in ("rollout", "step"))
    assert found["rollout_gpus"] == 4
    assert seconds["step"] == max(training, seconds["rollout"])
    assert found["by_gpu"]["H100"]["phases"]["rollout"] == pytest.approx(0.6 * GPUS["H100"].memory + OVERHEAD)


def test_a_run_too_large_is_said_not_to_fit():
    """As a shell gives it: options and overrides in any order, several GPUs."""
    app = typer.Typer()
    app.command()(estimate)
    done = CliRunner().invoke(
        app, ["qwen3_8b_math", "--gpu", "L40S", "algorithm=ppo", "--gpus", "8", "+preset=vapo", "--gpu", "H200"]
    )
    assert done.exit_code == 0, done.exception
    assert "1 outputs per token" in done.stdout
    small, large = (line for line in done.stdout.splitlines() if line.startswith(("L40S", "H200")))
    assert small.endswith("does not fit")
    assert not large.endswith("does not fit")


def test_decoding_is_bound_by_memory_for_few_sequences_and_by_operations_for_many():
    shape, gpu = find_shape("Qwen/Qwen3-8B"), GPUS["H100"]
    alone = rollout_seconds(shape, Rollout(1, 1, 1000, 1, 1, 1), gpu, 0.4)
    read = (2 * QWEN + 501 * 2 * 36 * 8 * 128 * 2) / (gpu.bandwidth * BANDWIDTH)
    assert alone == pytest.approx(1000 * read, rel=1e-3)
    in_two_waves, at_once = (rollout_seconds(shape, Rollout(64, 1, 1000, 1, 1, n), gpu, 0.4) for n in (32, 64))
    assert alone < at_once < in_two_waves < 2 * at_once
    operations = 4096 * 1000 * 2 * (QWEN - EMBEDDING) / (gpu.flops * 0.4)
    many = rollout_seconds(shape, Rollout(4096, 1, 1000, 1, 1, 4096), gpu, 0.4)
    assert many > operations


def test_the_table_of_gpus_is_that_of_the_data_sheets():
    assert find_gpu("h100") == GPUS["H100"]
    assert {name: round(gpu.memory / GIB) for name, gpu in GPUS.items()} == {
        "A100-40G": 40, "A100-80G": 80, "H100": 80, "H200": 140, "B200": 179, "L40S": 45,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("qwen4", {}, r"recipe is 'qwen4'; a YAML file or one of .*qwen3_8b_math.*"),
        ("nowhere.yaml", {}, r"recipe is 'nowhere\.yaml', which is no file"),
        (RECIPE, {"gpu": ["H101"]}, r"--gpu is 'H101'; A100-40G, A100-80G, H100, H200, B200, L40S are known"),
        (RECIPE, {"gpus": 12}, r"--gpus is 12; 1 to 8 and multiples of 8 are allowed"),
        (RECIPE, {"utilisation": 0.0}, r"--utilisation is 0\.0; a share in \(0, 1\]"),
        (RECIPE, {"response": 9000.0}, r"--response is 9000\.0; .* at most data\.max_response_length, 8192"),
        (RECIPE, {"overrides": ["algorithm=nothing"]}, r"recipe 'qwen3_8b_math' does not compose: .*nothing"),
        (RECIPE, {"overrides": ["actor_rollout_ref.actor.lr=1"]}, r"recipe 'qwen3_8b_math' does not compose"),
        (RECIPE, {"overrides": ["critic.value.num_heads=0"]}, r"critic\.value\.num_heads is 0"),
        (RECIPE, {"overrides": ["actor_rollout_ref.actor.strategy=megatron"]}, r"'fsdp' and 'fsdp2' are counted"),
        (RECIPE, {"overrides": ["actor_rollout_ref.model.lora_rank=8"]}, r"lora_rank is 8 .*; 0 is counted"),
        (RECIPE, {"overrides": ["actor_rollout_ref.actor.use_dynamic_bsz=false"]}, r"micro_batch_size_per_gpu is None"),
        (RECIPE, {"overrides": ["actor_rollout_ref.rollout.tensor_model_parallel_size=3"]}, r"must divide the 8 GPUs"),
    ],
)
def test_input_that_cannot_be_used_is_one_error(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        estimate(recipe, **options)


def test_a_file_of_ones_own_is_a_recipe(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 100,
    }))  # fmt: skip
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - dvpo_trainer\n  - recipe: qwen3_1_7b_fsdp2\n  - _self_\n")
    config = compose_recipe(str(file), [f"actor_rollout_ref.model.path={tmp_path}", *with_gpus([], 2)])
    settings = read_settings(config, "mine")
    assert settings.gpus == 2
    assert settings.actor.parameters == 2 * 100 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert math.isclose(settings.sampler_share, 0.6)


def test_the_page_comes_without_verl(tmp_path: Path):
    """In a process of its own, from another folder: nothing that is slow to import is imported."""
    program = (
        "import sys; from verl_dvpo.estimate.commands import estimate; estimate('qwen3_8b_math', gpu=['H100']); "
        "from verl_dvpo.estimate.settings import compose_recipe; "
        "assert compose_recipe('qwen3_8b_fsdp2', []).trainer.n_gpus_per_node == 8; "
        "print([name for name in ('verl', 'ray', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *page, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert page[0] == "qwen3_8b_math: 8 GPUs, 256 answers a step, 2048 + 4096 tokens each"
    assert any(line.startswith("H100") for line in page)
