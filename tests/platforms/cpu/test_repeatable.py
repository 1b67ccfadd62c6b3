# SPDX-License-Identifier: Apache-2.0
"""What makes a run with platform=cpu repeat: seeds of single requests, and an order that is the data's.

That whole runs then repeat to the bit is in test_e2e.py.
"""

import asyncio
import json
import random
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.workers.rollout import llm_server
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from verl_dvpo.cli import main as command
from verl_dvpo.platforms.cpu.agent_loops import CPUAgentLoopWorker, SeededClient, derived_seed
from verl_dvpo.trainer import in_order

PLACE = {"step": 3, "validate": False, "sample_index": 17, "rollout_n": 0}


@pytest.fixture
def seed_of(monkeypatch):
    """The seed with which verl's agent loop is called for an answer."""

    async def as_verl_runs_it(self, sampling_params, trajectory, **kwargs):
        return sampling_params

    monkeypatch.setattr(AgentLoopWorkerTQ.__ray_metadata__.modified_class, "_run_agent_loop", as_verl_runs_it)

    def ask(session: int = 0, seed: int = 1, **place: object) -> int:
        worker = CPUAgentLoopWorker.__new__(CPUAgentLoopWorker)
        worker.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"seed": seed}}})
        given = {"temperature": 1.0}
        found = asyncio.run(worker._run_agent_loop(given, {**PLACE, **place}, session_id=session, agent_name="any"))
        assert given == {"temperature": 1.0}  # shared by all answers of a prompt
        assert found["temperature"] == 1.0
        return found["seed"]

    return ask


def test_every_answer_has_a_seed_of_its_own_and_keeps_it(seed_of):
    assert seed_of() == seed_of()
    others = [seed_of(1), seed_of(seed=2), seed_of(step=4), seed_of(validate=True), seed_of(sample_index=18)]
    assert len({seed_of(), *others}) == 6
    # verl counts equal neighbours within a worker's share of the batch, which depends on the number of workers
    assert seed_of(rollout_n=5) == seed_of()


def test_a_seed_is_the_same_in_every_process():
    code = "from verl_dvpo.platforms.cpu.agent_loops import derived_seed; print(derived_seed(1, 'a', [2, 3]))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed.split()[-1]) == derived_seed(1, "a", [2, 3])
    assert 0 <= derived_seed(1, "a", [2, 3]) < 2**48
    assert derived_seed(1, "a", [2, 3]) != derived_seed(1, "a", [23])


def test_turns_of_one_answer_draw_apart(monkeypatch):
    sent = []

    async def as_verl_sends_it(self, request_id, *, prompt_ids, sampling_params, **kwargs):
        sent.append((request_id, prompt_ids, sampling_params, kwargs))

    monkeypatch.setattr(LLMServerClient, "generate", as_verl_sends_it)
    client = SeededClient.__new__(SeededClient)
    given = {"seed": 5, "top_p": 0.9}
    for prompt in ([1, 2], [1, 2, 3, 4], [1, 2]):
        asyncio.run(client.generate("r", prompt_ids=prompt, sampling_params=given, priority=7))
    asyncio.run(client.generate("r", prompt_ids=[1], sampling_params={"top_p": 0.9}))
    assert given == {"seed": 5, "top_p": 0.9}
    first, second, again, unseeded = (params for _, _, params, _ in sent)
    assert first == again
    assert first["seed"] != second["seed"]
    assert first["top_p"] == 0.9
    assert sent[0][3] == {"priority": 7}
    assert unseeded == {"top_p": 0.9}


def test_what_is_left_of_an_interrupted_answer_draws_apart(monkeypatch):
    """An update ends the request; another goes on behind the tokens that there are, and must not draw them again."""
    sent = []
    answers = [([7, 8], "aborted", 1), ([], "aborted", 1), ([9], "completed", 3)]

    async def as_a_server_answers(self, request_id, *, prompt_ids, sampling_params, **kwargs):
        sent.append((prompt_ids, sampling_params))
        tokens, reason, version = answers[len(sent) - 1]
        return TokenOutput(
            token_ids=tokens,
            log_probs=[-0.5] * len(tokens),
            stop_reason=reason,
            num_preempted=0,
            extra_fields={"global_steps": version},
        )

    async def at_once(seconds):
        pass

    monkeypatch.setattr(LLMServerClient, "generate", as_a_server_answers)
    monkeypatch.setattr(llm_server.asyncio, "sleep", at_once)
    client = FullyAsyncLLMServerClient(OmegaConf.create({}))
    worker = CPUAgentLoopWorker.__new__(CPUAgentLoopWorker)
    worker.llm_client = client
    worker.choose_client()
    given = {"seed": 5, "max_tokens": 10}
    whole = asyncio.run(client.generate("r", prompt_ids=[1, 2], sampling_params=given))
    assert whole.token_ids == [7, 8, 9]
    assert (whole.extra_fields["min_global_steps"], whole.extra_fields["max_global_steps"]) == (1, 3)
    assert [prompt for prompt, _ in sent] == [[1, 2], [1, 2, 7, 8], [1, 2, 7, 8]]
    seeds = [params["seed"] for _, params in sent]
    assert seeds == [derived_seed(5, [1, 2])] + [derived_seed(5, [1, 2, 7, 8])] * 2
    assert given == {"seed": 5, "max_tokens": 10}


def test_order_is_that_of_the_data_then_of_the_answers():
    names = [
        f"{step:08d}-{row:08d}-ab_{session}_{part}"
        for step in (9, 10)
        for row in (8, 11)
        for session in (2, 10)
        for part in (0, 1)
    ]
    mixed = random.Random(0).sample(names, len(names))
    assert [mixed[i] for i in in_order(mixed)] == names
    assert in_order([]) == []


SAMPLE = """
import json, sys
from vllm import LLM, SamplingParams
folder, out, batches = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
engine = LLM(model=folder, dtype="float32", max_model_len=64, seed=0)
found = []
for batch in batches:
    requests = [{"prompt_token_ids": prompt} for prompt, _ in batch]
    params = [SamplingParams(temperature=1.0, max_tokens=24, seed=seed, logprobs=0) for _, seed in batch]
    answers = [each.outputs[0] for each in engine.generate(requests, params, use_tqdm=False)]
    log_probs = [[next(iter(place.values())).logprob for place in answer.logprobs] for answer in answers]
    found.append(list(zip([list(answer.token_ids) for answer in answers], log_probs)))
open(out, "w").write(json.dumps(found))
"""


@pytest.mark.e2e
def test_vllm_gives_a_request_the_same_answer_in_any_company(tmp_path, monkeypatch):
    """Tokens and probabilities, to the bit: a whole batch, another order, groups of five, and alone."""
    assert command(["demo-data", "--out", str(tmp_path / "demo"), "--tiny"]) == 0
    draw = random.Random(1)
    requests = [([draw.randrange(3, 12) for _ in range(draw.randrange(2, 20))], 100 + i) for i in range(40)]
    shuffled = draw.sample(range(40), 40)
    batches = [list(range(40)), shuffled, *(shuffled[i : i + 5] for i in range(0, 40, 5)), *([i] for i in shuffled[:6])]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    (model,) = [path.parent for path in (tmp_path / "demo").rglob("config.json")]
    asked = json.dumps([[requests[i] for i in batch] for batch in batches])
    out = tmp_path / "found.json"
    subprocess.run([sys.executable, "-c", SAMPLE, str(model), str(out), asked], check=True, timeout=300)
    whole, *others = json.loads(out.read_text())
    assert len({tuple(tokens) for tokens, _ in whole}) > 30
    for batch, found in zip(batches[1:], others, strict=True):
        for i, answer in zip(batch, found, strict=True):
            assert answer == whole[i], (len(batch), i)
