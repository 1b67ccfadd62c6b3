# SPDX-License-Identifier: Apache-2.0
"""The noise inside verl's own reward workers, reward managers and rollout workers."""

import asyncio
import importlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import verl.experimental.agent_loop.agent_loop as agent_loop
import verl.trainer.ppo.reward as verl_reward
import verl.trainer.ppo.v1.trainer_base as trainer_base
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig
from samples import SOURCE, problem, response
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker
from verl.experimental.reward_loop import RewardLoopWorker
from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

from verl_dvpo.bench.tasks.tokenizer import END, build_tokenizer, messages
from verl_dvpo.compat import apply, table
from verl_dvpo.hydra_plugin import VerlDvpoSearchPath
from verl_dvpo.noise.manager import VALIDATE
from verl_dvpo.noise.metrics import noise_metrics
from verl_dvpo.noise.reward import RewardFunctionError

#: One for all: the reward manager `rate_limited` keeps its semaphore on its class.
LOOP = asyncio.new_event_loop()

COUNTING = """
from pathlib import Path
from verl_dvpo.bench.tasks.reward import compute_score as demo

def _count(extra_info):
    assert "verl_dvpo_noise" not in extra_info
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write(str(extra_info["index"]) + "\\n")

def sync(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0, **kwargs):
    _count(extra_info)
    return demo(data_source, solution_str, ground_truth) | {"bonus": bonus}

async def coroutine(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0, **kwargs):
    _count(extra_info)
    return demo(data_source, solution_str, ground_truth) | {"bonus": bonus}

def failing(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return 1.0 / (int(extra_info["index"]) % 4)
"""


def install(symbol: str) -> None:
    """Puts the table's change of ``symbol`` in place, where the plug-in has not done it."""
    change = table.entry(symbol)
    apply.put(change, importlib.import_module(change.module))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's file of reward functions, and a tokenizer."""
    for symbol in (
        "verl.trainer.ppo.reward:resolve_reward_manager_cls",
        "verl.experimental.agent_loop.agent_loop:AgentLoopWorker._run_agent_loop",
        "verl.experimental.agent_loop.agent_loop:AgentLoopWorker._compute_score",
    ):
        install(symbol)
    folder = tmp_path_factory.mktemp("user")
    (folder / "mine.py").write_text(COUNTING)
    build_tokenizer().save_pretrained(folder / "model")
    return folder


def config(folder: Path, function: str = "sync", *overrides: str) -> DictConfig:
    """The user's own command line, and ``overrides``."""
    Plugins.instance().register(VerlDvpoSearchPath)
    GlobalHydra.instance().clear()
    mine = [f"reward.custom_reward_function.path={folder}/mine.py", f"reward.custom_reward_function.name={function}"]
    mine += ["+reward.custom_reward_function.reward_kwargs={bonus: 2.0}"]
    mine += [f"actor_rollout_ref.model.path={folder}/model"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", [*mine, *overrides])


def rows(numbers: list[int], *, validate: bool = False, step: int = 1) -> DataProto:
    """What verl's rollout workers send for these problems, the even ones answered right."""
    tokenizer = build_tokenizer()
    answers = [response(problem(number), right=number % 2 == 0) + END for number in numbers]
    prompts = [tokenizer.encode(problem(number).prompt) for number in numbers]
    ids = tokenizer(answers, padding=True, return_tensors="pt", padding_side="right")
    prompt = torch.tensor(prompts)
    # numpy makes one array of lists of equal length, and numbers of its own: as verl's np.array([value]) does
    fields = {
        "data_source": [SOURCE] * len(numbers),
        "reward_model": [{"style": "rule", "ground_truth": problem(number).answer} for number in numbers],
        "extra_info": [{"split": "train", "index": number} for number in numbers],
        "raw_prompt": [messages(problem(number).prompt) for number in numbers],
        "uid": [f"uid-{np.random.random()}" for _ in numbers],
        "index": numbers,
        "global_steps": [step] * len(numbers),
        "session_id": [0] * len(numbers),
        VALIDATE: [validate] * len(numbers),
    }
    return DataProto(
        batch=TensorDict(
            {
                "prompts": prompt,
                "responses": ids["input_ids"],
                "attention_mask": torch.cat([torch.ones_like(prompt), ids["attention_mask"]], dim=1),
            },
            batch_size=len(numbers),
        ),
        non_tensor_batch={name: np.array(values) for name, values in fields.items()},
    )


def score(settings: DictConfig, data: DataProto) -> list[dict[str, Any]]:
    """One real reward worker of verl on a batch."""

    async def run() -> list[dict[str, Any]]:
        return await RewardLoopWorker(settings).compute_score_batch(data)

    return LOOP.run_until_complete(run())


@pytest.mark.parametrize("function", ["sync", "coroutine"])
@pytest.mark.parametrize("name", sorted(set(REWARD_MANAGER) - {"remote"}))
def test_every_reward_manager_of_verl_with_the_users_function(folder: Path, name: str, function: str):
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    numbers = list(range(40))
    override = f"reward.reward_manager.name={name}"
    plain = score(config(folder, function, override), rows(numbers))
    assert sorted(map(int, calls.read_text().split())) == numbers
    calls.unlink()
    flipped = score(config(folder, function, override, "+noise=flip", "noise.rate=0.4"), rows(numbers))
    assert sorted(map(int, calls.read_text().split())) == numbers, "asked exactly once per sample"

    strikes = [result["reward_extra_info"]["corrupted"] for result in flipped]
    assert 4 < sum(strikes) < 28
    for clean, noisy, strike in zip(plain, flipped, strikes, strict=True):
        truth = clean["reward_score"]
        assert noisy["reward_score"] == (1.0 - truth if strike else truth)
        expected = {"score": noisy["reward_score"], "clean_score": truth, "corrupted": strike}
        expected |= {"clean_pass": truth, "noisy_pass": noisy["reward_score"]}
        assert noisy["reward_extra_info"] == clean["reward_extra_info"] | expected
        assert noisy["reward_extra_info"]["acc"] == truth

    validated = score(config(folder, function, override, "+noise=flip", "noise.rate=1.0"), rows(numbers, validate=True))
    assert validated == plain, "validation is as without noise"


def test_one_and_four_reward_workers_and_any_order(folder: Path):
    settings = config(folder, "sync", "+noise=gaussian")
    numbers = list(range(60))
    alone = dict(zip(numbers, score(settings, rows(numbers)), strict=True))
    parts = [numbers[40:50][::-1], numbers[:7], numbers[7:40][::-1], numbers[50:]]
    for part in parts:
        assert dict(zip(part, score(settings, rows(part)), strict=True)) == {number: alone[number] for number in part}
    assert len({result["reward_score"] for result in alone.values()}) == 60


def test_lengths_are_in_tokens_of_the_response(folder: Path):
    settings = config(folder, "sync", "+noise=length_bias", "noise.slope=1", "noise.reference=100")
    numbers = [0, 899]  # 100+100 has no carry, 999+100 has
    for number, result in zip(numbers, score(settings, rows(numbers)), strict=True):
        tokens = len(response(problem(number), right=number % 2 == 0)) + 1  # one per character, and the end
        added = result["reward_score"] - result["reward_extra_info"]["clean_score"]
        assert added == pytest.approx(tokens / 100)


def test_without_noise_verls_class_is_untouched(folder: Path):
    for overrides in ((), ("+noise=none",)):
        settings = config(folder, "sync", *overrides)
        assert verl_reward.resolve_reward_manager_cls(settings) is REWARD_MANAGER["naive"]


def test_a_failing_reward_is_nan_with_a_reason_in_training_and_raises_in_validation(folder: Path):
    settings = config(folder, "failing", "+noise=dropout")
    results = score(settings, rows([3, 4, 5]))
    assert [math.isnan(result["reward_score"]) for result in results] == [False, True, False]
    with pytest.raises(
        RewardFunctionError, match=r"(?s)1 of 3 rewards failed.*mine.py:failing raised ZeroDivision.*'4'"
    ):
        noise_metrics([result["reward_extra_info"] for result in results])
    with pytest.raises(
        RewardFunctionError, match=r"mine.py:failing raised ZeroDivisionError.*demo_addition.*index '4'"
    ):
        score(settings, rows([4], validate=True))


def test_a_rollout_that_does_not_say_what_it_is_for_is_refused(folder: Path):
    data = rows([1])
    del data.non_tensor_batch[VALIDATE]
    with pytest.raises(ValueError, match="must tell training from validation"):
        score(config(folder, "sync", "+noise=flip"), data)


class FakeHandle:
    """Stands for a reward worker's actor handle, in this process."""

    def __init__(self, settings: DictConfig):
        self.worker = RewardLoopWorker(settings)
        self.heard: list[dict[str, Any]] = []
        self.compute_score = SimpleNamespace(remote=self._score)

    async def _score(self, data: DataProto) -> dict[str, Any]:
        self.heard.append({name: values[-1] for name, values in data.non_tensor_batch.items()})
        return await self.worker.compute_score(data)


def rolled_out(settings: DictConfig, monkeypatch: pytest.MonkeyPatch, *, own_reward: float | None = None):
    """Training and validation trajectories side by side through verl's own rollout worker; the last stage is ours."""
    tokenizer = build_tokenizer()

    class Loop:
        async def run(self, sampling_params: Any, **kwargs: Any) -> AgentLoopOutput:
            await asyncio.sleep(0.01 * (kwargs["index"] % 3))  # the trajectories overlap
            asked = problem(kwargs["index"])
            answer = tokenizer.encode(response(asked, right=True) + END)
            return AgentLoopOutput(
                prompt_ids=tokenizer.encode(asked.prompt),
                response_ids=answer,
                response_mask=[1] * len(answer),
                reward_score=own_reward,
                metrics={},
            )

    class Worker(AgentLoopWorker):
        async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> Any:
            stored = dict(kwargs)
            await self._compute_score([output], kwargs=kwargs)
            assert kwargs == stored, "what goes to TransferQueue is as without noise"
            return kwargs["index"], validate, output

    async def run() -> Any:
        worker = Worker.__new__(Worker)
        worker.config = settings
        worker.reward_loop_worker_handles = [FakeHandle(settings)]
        worker.processor = worker.llm_client = worker.tokenizer = worker.hf_model_type = worker.dataset_cls = None
        worker.tools = []
        worker.mm_processor_kwargs = {}
        monkeypatch.setattr(worker, "_compute_multi_modal_inputs", lambda *_: {}, raising=False)
        monkeypatch.setattr(worker, "_compute_position_ids", lambda ids, mask, *_: torch.zeros_like(ids), raising=False)
        monkeypatch.setattr(agent_loop.hydra.utils, "instantiate", lambda **_: Loop())
        monkeypatch.setitem(agent_loop._agent_loop_registry, "loop", {})
        trajectories = [
            worker._run_agent_loop(
                {},
                trajectory={"step": 3, "sample_index": index, "rollout_n": 0, "validate": index % 2 == 0},
                agent_name="loop",
                trace=False,
                session_id=1,
                uid=f"uid-{index}",
                index=index,
                global_steps=3,
                raw_prompt=messages(problem(index).prompt),
                data_source=SOURCE,
                reward_model={"ground_truth": problem(index).answer},
                extra_info={"index": index},
            )
            for index in range(12)
        ]
        outputs = await asyncio.gather(*(asyncio.create_task(one) for one in trajectories), return_exceptions=True)
        return outputs, worker.reward_loop_worker_handles[0].heard

    return LOOP.run_until_complete(run())


def test_verls_rollout_worker_tells_training_from_validation(folder: Path, monkeypatch: pytest.MonkeyPatch):
    outputs, heard = rolled_out(config(folder, "sync", "+noise=flip", "noise.rate=1.0"), monkeypatch)
    for index, validate, output in outputs:
        assert validate is (index % 2 == 0)
        assert output.reward_score == (1.0 if validate else 0.0), "right, and flipped in training only"
        assert ("clean_score" in output.extra_fields["reward_extra_info"]) is not validate
    assert {row["index"]: bool(row[VALIDATE]) for row in heard} == {i: i % 2 == 0 for i in range(12)}


@pytest.mark.parametrize("overrides", [(), ("+noise=none",)])
def test_without_noise_the_rollout_worker_sends_what_it_sent(folder: Path, monkeypatch, overrides):
    outputs, heard = rolled_out(config(folder, "sync", *overrides), monkeypatch)
    assert all(output.reward_score == 1.0 for _, _, output in outputs)
    assert not any(VALIDATE in row for row in heard)


def test_an_agent_loop_with_a_reward_of_its_own_is_refused_in_training(folder: Path, monkeypatch):
    outputs, _ = rolled_out(config(folder, "sync", "+noise=flip"), monkeypatch, own_reward=0.5)
    for index, output in enumerate(outputs):
        if index % 2:
            assert isinstance(output, ValueError)
            assert "reward_score of an agent loop is 0.5; it must be unset with noise=flip" in str(output)
        else:
            assert output[2].reward_score == 0.5


def test_the_trainer_logs_clean_beside_corrupted_and_stops_on_failed_rewards(folder: Path, monkeypatch):
    monkeypatch.setattr(trainer_base.PPOTrainer, "_balance_batch", lambda self, batch, metrics, **_: batch)
    install("verl.trainer.ppo.v1.trainer_base:PPOTrainer._balance_batch")
    infos: list[dict[str, Any]] = [
        {"score": 0.0, "clean_score": 1.0, "corrupted": 1.0},
        {"score": 0.0, "clean_score": 0.0, "corrupted": 0.0},
        {"score": 3.0, "clean_score": 1.0, "corrupted": 1.0},
        {"acc": 0.0, "timeout": True},
    ]

    def get(keys: Any, partition_id: str, select_fields: list[str]) -> Any:
        assert select_fields == ["extra_fields"]
        return {"extra_fields": [{"reward_extra_info": info} for info in infos]}

    monkeypatch.setattr(trainer_base.tq, "kv_batch_get", get)
    batch = SimpleNamespace(keys=["a", "b", "c", "d"], partition_id="train")
    balance = trainer_base.PPOTrainer._balance_batch
    trainer = SimpleNamespace(config=config(folder, "sync", "+noise=gaussian"))
    logged: dict[str, float] = {}
    assert balance(trainer, batch, metrics=logged) is batch
    assert logged == {
        "noise/clean_score/mean": pytest.approx(2 / 3),
        "noise/score/mean": pytest.approx(3 / 3),
        "noise/corrupted/mean": pytest.approx(2 / 3),
        "noise/error/mean": pytest.approx((-1 + 0 + 2) / 3),
        "noise/error/abs_mean": pytest.approx((1 + 0 + 2) / 3),
        "noise/unscored/mean": pytest.approx(1 / 4),
    }
    infos.append({"reward_error": "reward function f raised"})
    with pytest.raises(RewardFunctionError, match="1 of 5 rewards failed, and nothing was updated: reward function f"):
        balance(trainer, batch, metrics={})
    trainer.config = config(folder, "sync", "+noise=none")
    untouched: dict[str, float] = {}
    balance(trainer, batch, metrics=untouched)
    assert untouched == {}


@pytest.mark.parametrize("name", sorted(set(REWARD_MANAGER) - {"remote"}))
def test_heavy_tails_on_some_prompts_in_every_reward_manager_of_verl(folder: Path, name: str):
    numbers = [*range(10), *range(450, 460)]  # prompts that begin with 1, and with 5
    heavy = ("+noise=heavy_tailed", "noise.where.prompt_matches='^[5-9]'", f"reward.reward_manager.name={name}")
    plain = [result["reward_score"] for result in score(config(folder, "sync", heavy[2]), rows(numbers))]
    results = [result["reward_score"] for result in score(config(folder, "sync", *heavy), rows(numbers))]
    everywhere = score(config(folder, "sync", heavy[0], heavy[2]), rows(numbers))
    assert results[:10] == plain[:10], "untouched"
    assert results[10:] == [result["reward_score"] for result in everywhere[10:]]
    assert all(noisy != clean for noisy, clean in zip(results[10:], plain[10:], strict=True))


def test_data_sources_and_steps_in_a_reward_manager_of_verl(folder: Path):
    def struck(*overrides: str, step: int = 1) -> list[float]:
        results = score(config(folder, "sync", "+noise=flip", "noise.rate=1", *overrides), rows([1, 2], step=step))
        return [result["reward_extra_info"]["corrupted"] for result in results]

    assert struck(f"noise.where.data_source=[{SOURCE}]") == [1.0, 1.0]
    assert struck("noise.where.data_source=[openai/gsm8k]") == [0.0, 0.0]
    window = ("noise.from_step=3", "noise.until_step=4")
    assert [struck(*window, step=step)[0] for step in (2, 3, 4, 5)] == [0.0, 1.0, 1.0, 0.0]


def test_backward_correction_and_its_metrics_in_a_reward_manager_of_verl(folder: Path):
    numbers = list(range(40))
    flip = ("+noise=flip", "noise.rate=0.4")
    noisy = score(config(folder, "sync", *flip), rows(numbers))
    corrected = score(config(folder, "sync", *flip, "noise.correction.kind=backward"), rows(numbers))
    for before, after in zip(noisy, corrected, strict=True):
        assert after["reward_score"] == pytest.approx((before["reward_score"] - 0.4) / 0.2)
        assert after["reward_extra_info"]["noisy_score"] == before["reward_score"]
    logged = noise_metrics([result["reward_extra_info"] for result in corrected])
    wrong = [result["reward_score"] for number, result in zip(numbers, noisy, strict=True) if number % 2 == 1]
    assert logged["noise/fpr"] == pytest.approx(sum(wrong) / 20)


def test_a_correction_works_without_noise(folder: Path):
    settings = config(folder, "sync", "+noise=none", "noise.correction.kind=clip", "noise.correction.high=0.25")
    assert [result["reward_score"] for result in score(settings, rows([1, 2]))] == [0.0, 0.25]
    assert score(settings, rows([2], validate=True))[0]["reward_score"] == 1.0
