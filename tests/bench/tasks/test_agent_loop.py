# SPDX-License-Identifier: Apache-2.0
"""The agent loop with a policy that says what it is told, and what the mask of its conversation does to training."""

import asyncio

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.trainer.ppo.core_algos import agg_loss, compute_gae_advantage_return, compute_policy_loss_vanilla
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.config import ActorConfig
from verl.workers.rollout.replica import TokenOutput

from verl_dvpo.bench.tasks.agent_loop import DialogueAgentLoop
from verl_dvpo.bench.tasks.conversation import encode
from verl_dvpo.bench.tasks.dialogue import Goal
from verl_dvpo.bench.tasks.prepare import AGENTS
from verl_dvpo.bench.tasks.registry import TASKS
from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.bench.tasks.task import TURNS
from verl_dvpo.bench.tasks.tokenizer import build_tokenizer, messages
from verl_dvpo.distributional.returns import distributional_gae, sample_replacement_returns
from verl_dvpo.families.quantile_ensemble import QuantileEnsembleConfig, QuantileEnsembleFamily
from verl_dvpo.platforms.cpu.agent_loops import make_agent_loop

TOKENIZER = build_tokenizer()
GOAL = Goal("table", {"food": "thai", "day": "fri", "people": "4"}, ("food", "people"))


class Server:
    """A policy that says `turns`, one a call; a turn without an end stands for one that was cut off.

    Its log-probability of the i-th token that it writes is -i/100.
    """

    def __init__(self, turns):
        self.turns = list(turns)
        self.prompts, self.limits, self.written = [], [], 0

    async def generate(self, *, request_id, prompt_ids, sampling_params, priority):
        self.prompts.append(list(prompt_ids))
        self.limits.append(sampling_params["max_tokens"])
        tokens = TOKENIZER.encode(self.turns.pop(0), add_special_tokens=False)[: sampling_params["max_tokens"]]
        log_probs = [-(self.written + i) / 100 for i in range(len(tokens))]
        self.written += len(tokens)
        step = len(self.prompts)
        fields = {"min_global_steps": step, "max_global_steps": step}
        return TokenOutput(token_ids=tokens, log_probs=log_probs, num_preempted=0, extra_fields=fields)


def arguments(server=None, response_length=112):
    """The arguments that verl's worker gives an agent loop."""
    rollout = {"prompt_length": 64, "response_length": response_length, "full_determinism": False}
    return {
        "trainer_config": DictConfigWrap(OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})),
        "server_manager": server,
        "tokenizer": TOKENIZER,
        "processor": None,
        "dataset_cls": RLHFDataset,
        "data_config": DictConfigWrap(OmegaConf.create({})),
        "hf_model_type": "qwen3",
    }


def run(turns, response_length=112, goal=GOAL, source="dialogue"):
    server = Server(turns)

    async def converse():
        loop = DialogueAgentLoop(**arguments(server, response_length))
        row = {"raw_prompt": messages(goal.prompt), "reward_model": {"ground_truth": goal.to_json()}}
        return await loop.run({"temperature": 1.0}, data_source=source, **row)

    return asyncio.run(converse()), server


def text(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=False)


def test_a_dialogue_token_by_token():
    output, server = run(["day?<|im_end|>", "ok thai fri 4<|im_end|>"])
    assert text(output.prompt_ids) == "<|im_start|>user\ntable food thai people 4<|im_end|>\n<|im_start|>assistant\n"
    users = "\n<|im_start|>user\nfri<|im_end|>\n<|im_start|>assistant\n"
    assert text(output.response_ids) == f"day?<|im_end|>{users}ok thai fri 4<|im_end|>"
    # "day?" and its end; newline, start, user, newline, f, r, i, end, newline, start, assistant, newline; 13 and an end
    assert output.response_mask == [1] * 5 + [0] * 12 + [1] * 14
    policys = [log_prob for log_prob, own in zip(output.response_logprobs, output.response_mask, strict=True) if own]
    assert policys == [-i / 100 for i in range(19)]
    assert all(
        log_prob == 0 for log_prob, own in zip(output.response_logprobs, output.response_mask, strict=True) if not own
    )
    assert server.limits == [112, 112 - 17]
    assert server.prompts[1] == output.prompt_ids + output.response_ids[:17]
    assert output.num_turns == 4
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (1, 2)
    assert compute_score("dialogue", "", GOAL.to_json(), output.extra_fields)["tcr"] == 1.0


def test_the_rollout_has_the_tokens_of_the_warm_start():
    said = [GOAL.prompt, "day?", "fri", "ok thai fri 4"]
    output, _ = run(["day?<|im_end|>", "ok thai fri 4<|im_end|>"])
    ids, labels = encode(TOKENIZER, said)
    assert output.prompt_ids + output.response_ids == ids
    assert [int(label != -100) for label in labels[len(output.prompt_ids) :]] == output.response_mask


def test_a_turn_that_is_cut_off_ends_the_dialogue():
    output, _ = run(["day?<|im_end|>", "ok thai fri"], response_length=17 + 11)
    assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs) == 28
    assert output.extra_fields[TURNS] == ["day?", "ok thai fri"]
    assert compute_score("dialogue", "", GOAL.to_json(), output.extra_fields)["score"] == 0.0


def test_a_user_whose_words_do_not_fit_is_left_out():
    output, server = run(["day?<|im_end|>"], response_length=12)
    assert text(output.response_ids) == "day?<|im_end|>"
    assert output.response_mask == [1] * 5
    assert len(server.prompts) == 1


def test_the_policy_cannot_speak_for_the_user():
    """Role names are tokens that it may write; its turn is judged as one."""
    output, _ = run(["day?\nuser\nfri\nassistant\nok thai fri 4<|im_end|>", "ok thai fri 4<|im_end|>"])
    assert output.extra_fields[TURNS][0] == "day?\nuser\nfri\nassistant\nok thai fri 4"
    assert text(output.response_ids).count("what?") == 1
    found = compute_score("dialogue", "", GOAL.to_json(), output.extra_fields)
    assert (found["tcr"], found["acr"]) == (1.0, 0.0)


def test_five_turns_and_the_user_hangs_up():
    output, _ = run(["hm<|im_end|>"] * 9)
    assert output.extra_fields[TURNS] == ["hm"] * 5
    assert output.num_turns == 10


def test_a_task_without_a_user_is_refused():
    with pytest.raises(ValueError, match=r"data_source is 'science_shifted'; .* set agent_name=single_turn_agent"):
        run(["day?<|im_end|>"], source="science_shifted")


def test_the_written_file_makes_it_as_verls_worker_does():
    """verl loads the file, keeps each entry by its name and instantiates it with Hydra."""
    (entry,) = OmegaConf.create(AGENTS)
    assert entry.name == TASKS["dialogue"].agent == "dialogue_agent"
    made = hydra.utils.instantiate(entry, **arguments())
    assert type(made) is DialogueAgentLoop
    assert type(make_agent_loop(entry, **arguments())) is DialogueAgentLoop
    assert made.response_length == 112


def masked_conversation():
    """Seven tokens: two of the policy's, three of the user's, two of the policy's; reward 1 at the end.

    Values of the user's tokens are absurd on purpose.
    """
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1]])
    rewards = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1]])
    values = torch.tensor([[0.2, 0.4, 99.0, -99.0, 99.0, 0.6, 0.8]])
    return rewards, values, mask


def test_values_are_carried_through_the_users_tokens_by_hand():
    """gamma = 1, lam = 1/2. Errors: 1-.8 = .2, .8-.6 = .2, over the user .6-.4 = .2, .4-.2 = .2.
    Advantages from the end: .2, .2+.1 = .3, over the user .2+.15 = .35, .2+.175 = .375.
    """
    rewards, values, mask = masked_conversation()
    theirs, returns = compute_gae_advantage_return(
        token_level_rewards=rewards, values=values, response_mask=mask, gamma=1.0, lam=0.5
    )
    spread = torch.tensor([-0.1, 0.0, 0.1])  # three quantiles around each value
    targets, advantages = distributional_gae(rewards, values[..., None] + spread, mask, gamma=1.0, lam=0.5)
    own = mask.bool()
    by_hand = torch.tensor([0.375, 0.35, 0.3, 0.2])
    torch.testing.assert_close(advantages[own], by_hand)
    torch.testing.assert_close(targets.mean(-1)[own], torch.tensor([0.575, 0.75, 0.9, 1.0]))
    torch.testing.assert_close(returns[own], targets.mean(-1)[own])
    torch.testing.assert_close(theirs[own], (by_hand - by_hand.mean()) / by_hand.std(), atol=1e-4, rtol=1e-3)
    changed = values.clone()
    changed[mask == 0] = 7.0
    again, _ = distributional_gae(rewards, changed[..., None] + spread, mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(again[own], targets[own])


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_samples_are_carried_through_the_users_tokens(lam):
    rewards, values, mask = masked_conversation()
    samples = sample_replacement_returns(rewards, values[..., None].expand(-1, -1, 4), mask, gamma=1.0, lam=lam)
    # one-step targets are the next own token's value, Monte-Carlo ones the reward
    by_hand = [0.4, 0.6, 0.8, 1.0] if lam == 0 else [1.0] * 4
    torch.testing.assert_close(samples[mask.bool()], torch.tensor(by_hand)[:, None].expand(-1, 4))


def test_the_users_tokens_get_no_gradient():
    """Policy and critic, through verl's own loss and aggregation, on the mask of a real dialogue."""
    output, _ = run(["day?<|im_end|>", "ok thai fri 4<|im_end|>"])
    mask = torch.tensor([output.response_mask])
    own = mask.bool()
    rewards = torch.zeros(mask.shape)
    rewards[0, -1] = 1.0
    family = QuantileEnsembleFamily(QuantileEnsembleConfig(num_heads=2, num_quantiles=3))
    outputs = torch.randn(*mask.shape, family.num_outputs, generator=torch.Generator().manual_seed(0))
    kept = family.keep(outputs)
    advantages = distributional_gae(rewards, family.samples(outputs), mask, gamma=1.0, lam=0.95)[1]

    log_probs = torch.tensor([output.response_logprobs]).requires_grad_()
    config = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1)
    loss, _ = compute_policy_loss_vanilla(log_probs.detach(), log_probs, advantages, mask, "token-mean", config)
    loss.backward()
    assert (log_probs.grad[~own] == 0).all()
    # the ratio is 1 there: the gradient is minus the advantage over the number of the policy's tokens
    torch.testing.assert_close(log_probs.grad[own], -advantages[own] / own.sum())

    targets = family.build_targets(kept, rewards, mask, gamma=1.0, lam=0.95)
    flat = {name: target.flatten(0, 1) for name, target in targets.items()}
    learned = outputs.flatten(0, 1).requires_grad_()
    per_token = family.loss(learned, flat, family.multipliers(flat, mask.flatten())).total
    agg_loss(per_token[None], mask, "token-mean").backward()
    assert (learned.grad[~own.flatten()] == 0).all()
    assert (learned.grad[own.flatten()].abs().sum(-1) > 0).all()
