# SPDX-License-Identifier: Apache-2.0
"""Tests the warm start's batches, loss, learning rate and accuracy."""

import dataclasses
import re

import pytest
import torch
from transformers import GenerationConfig

from verl_dvpo.bench.tasks.addition import Problem, demonstrator, work
from verl_dvpo.bench.tasks.conversation import greedy_scores, limited_threads
from verl_dvpo.bench.tasks.model import build_model
from verl_dvpo.bench.tasks.registry import DEMO, DOMAINS, TASKS, WarmStartConfig
from verl_dvpo.bench.tasks.task import Split
from verl_dvpo.bench.tasks.tokenizer import build_tokenizer
from verl_dvpo.bench.tasks.warm_start import batches, warm_start

TOKENIZER = build_tokenizer()
NOTHING = Split(train=[], val=[])


def problems_of(ids: torch.Tensor) -> list[Problem]:
    """Reads the problems back out of a batch of token ids (B, L)."""
    texts = (TOKENIZER.decode(row).split("user\n")[1].split("=")[0] for row in ids)
    return [Problem(*(int(number) for number in text.split("+"))) for text in texts]


def first_batch(seed=0, batch_size=64, habit=0.8, slip=0.04):
    teacher = demonstrator(seed, NOTHING, habit=habit, slip=slip)
    return next(batches(TOKENIZER, [teacher], batch_size, seed=(seed, 1)))


def test_batches_depend_on_the_seed_alone():
    for one, other in zip(first_batch(seed=3), first_batch(seed=3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first_batch(seed=3)[0][:, :16], first_batch(seed=4)[0][:, :16])


def test_labels_are_the_response_and_its_end():
    ids, labels = first_batch(habit=0.0, slip=0.0, batch_size=16)
    for problem, row, label in zip(problems_of(ids), ids, labels, strict=True):
        learned = label[label != -100]
        assert TOKENIZER.decode(learned) == work(problem) + "<|im_end|>"
        assert torch.equal(row[label != -100], learned)


def test_padding_does_not_change_the_loss():
    model = build_model(TOKENIZER, seed=0).eval()
    ids, labels = first_batch(batch_size=8)
    lengths = (ids != TOKENIZER.pad_token_id).sum(1).tolist()
    assert len(set(lengths)) > 1
    with torch.no_grad():
        whole = model(input_ids=ids, labels=labels).loss.item()
        total = sum(
            model(input_ids=row[None, :n], labels=label[None, :n]).loss.item() * (label != -100).sum().item()
            for row, label, n in zip(ids, labels, lengths, strict=True)
        )
    assert whole == pytest.approx(total / (labels != -100).sum().item(), rel=1e-5)


def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_weights():
    config = dataclasses.replace(DEMO.warm_start, steps=40, batch_size=8)
    one, other = build_model(TOKENIZER, seed=1), build_model(TOKENIZER, seed=1)
    ids, labels = first_batch(seed=99)
    with torch.no_grad():
        before = one(input_ids=ids, labels=labels).loss.item()
    torch.manual_seed(0)
    warm_start(one, TOKENIZER, [demonstrator(1, NOTHING, habit=0.8, slip=0.04)], config, seed=(1, 1))
    torch.manual_seed(1)
    warm_start(other, TOKENIZER, [demonstrator(1, NOTHING, habit=0.8, slip=0.04)], config, seed=(1, 1))
    with torch.no_grad():
        after = one(input_ids=ids, labels=labels).loss.item()
    # From a uniform guess, ln(104) = 4.64, to better than one among a response's 13 characters and its end,
    # ln(14) = 2.64.
    assert before == pytest.approx(4.64, abs=0.2)
    assert after < 2.64
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


class Parrot:
    """Stands in for a model: answers each prompt (a row of token ids) with what it was given."""

    def __init__(self, responses: list[str]):
        self.responses = responses
        self.generation_config = GenerationConfig()

    def generate(self, ids, *, attention_mask, max_new_tokens, do_sample):
        assert not do_sample
        assert bool(attention_mask.all())
        answers = TOKENIZER(
            [f"{response}<|im_end|>" for response in self.responses], padding=True, padding_side="right"
        )["input_ids"]
        return torch.cat([ids, torch.tensor(answers)[:, :max_new_tokens]], dim=1)


def test_greedy_accuracy_counts_right_answers():
    def accuracy():
        examples = [problem.example("demo_addition") for problem in problems]
        return greedy_scores(Parrot(responses), TOKENIZER, TASKS["demo_addition"], examples, longest=DEMO.longest_turn)

    problems = [Problem(111, 222), Problem(500, 501), Problem(347, 586), Problem(999, 999)]
    responses = [work(problem) for problem in problems]
    assert accuracy() == {"acc": 1.0, "well_formed": 1.0}  # also the longest, 999+999
    responses[1] = ";1002"
    assert accuracy() == {"acc": 0.75, "well_formed": 1.0}
    responses[2] = "933"
    assert accuracy() == {"acc": 0.5, "well_formed": 0.75}


@pytest.mark.parametrize("tasks", [DEMO, DOMAINS])
def test_the_learning_rate_rises_and_falls_as_documented(tasks, monkeypatch):
    """Linear rise to the peak in ``warmup_steps``, times a linear decay to 2 % of it at the end."""
    rates = []
    adam_step = torch.optim.AdamW.step

    def step(self, *arguments, **settings):
        rates.append(self.param_groups[0]["lr"])
        return adam_step(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = dataclasses.replace(tasks.warm_start, steps=60, batch_size=1, warmup_steps=tasks.warm_start.warmup_steps)
    teacher = demonstrator(0, NOTHING, habit=0.0, slip=0.0)
    warm_start(build_model(TOKENIZER, seed=0), TOKENIZER, [teacher], config, seed=(0, 0))
    rise = {"demo": 30, "domains": 50}[tasks.name]
    by_hand = [3e-3 * min(1, (i + 1) / rise) * max(0.02, (60 - i) / 60) for i in range(60)]
    assert rates == pytest.approx(by_hand)


def test_progress_without_a_terminal_is_whole_lines(capfd):
    config = dataclasses.replace(DEMO.warm_start, steps=55, batch_size=1)
    teacher = demonstrator(0, NOTHING, habit=0.0, slip=0.0)
    warm_start(build_model(TOKENIZER, seed=0), TOKENIZER, [teacher], config, seed=(0, 0))
    said = capfd.readouterr()
    assert "\r" not in said.out + said.err
    first, last = said.err.splitlines()
    assert re.fullmatch(r"warm start, loss \d\.\d{3} \[50 of 55 steps, \d\d:\d\d left\]", first)
    assert re.fullmatch(r"warm start, loss \d\.\d{3} \[55 of 55 steps\]", last)


def test_threads_are_limited_and_given_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        with limited_threads():
            assert torch.get_num_threads() == 4
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("warmup_steps", 0), ("learning_rate", 0.0), ("habit", 1.1), ("slip", -0.1)],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        WarmStartConfig(**{**dataclasses.asdict(DEMO.warm_start), field: value})
