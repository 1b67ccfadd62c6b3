# SPDX-License-Identifier: Apache-2.0
"""What the warm start trains on, and that its loss and its accuracy are what they claim to be."""

import pytest
import torch
from transformers import GenerationConfig

from verl_dvpo.bench.demo.model import build_model
from verl_dvpo.bench.demo.task import Problem, work
from verl_dvpo.bench.demo.tokenizer import build_tokenizer
from verl_dvpo.bench.demo.warm_start import (
    WarmStartConfig,
    demonstration_batches,
    greedy_accuracy,
    limited_threads,
    warm_start,
)

TOKENIZER = build_tokenizer()


def problems_of(ids: torch.Tensor) -> list[Problem]:
    """Reads the problems back out of a batch of token ids (B, L)."""
    texts = (TOKENIZER.decode(row).split("user\n")[1].split("=")[0] for row in ids)
    return [Problem(*(int(number) for number in text.split("+"))) for text in texts]


def first_batch(held_out=(), seed=0, **settings):
    return next(demonstration_batches(TOKENIZER, held_out, WarmStartConfig(**settings), seed=seed))


def test_batches_depend_on_the_seed_alone():
    for one, other in zip(first_batch(seed=3), first_batch(seed=3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first_batch(seed=3)[0][:, :16], first_batch(seed=4)[0][:, :16])


def test_held_out_problems_are_skipped_in_either_order():
    shown = problems_of(first_batch()[0])
    held_out = [Problem(problem.b, problem.a) for problem in shown[::2]]
    without = problems_of(first_batch(held_out)[0])
    assert {frozenset((p.a, p.b)) for p in held_out}.isdisjoint(frozenset((p.a, p.b)) for p in without)
    # The others stay, in their order, and fresh ones follow.
    kept = shown[1::2]
    assert without[: len(kept)] == kept


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
    config = WarmStartConfig(steps=40, batch_size=8)
    one, other = build_model(TOKENIZER, seed=1), build_model(TOKENIZER, seed=1)
    ids, labels = first_batch(seed=99)
    with torch.no_grad():
        before = one(input_ids=ids, labels=labels).loss.item()
    torch.manual_seed(0)
    warm_start(one, TOKENIZER, [], config, seed=1)
    torch.manual_seed(1)
    warm_start(other, TOKENIZER, [], config, seed=1)
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
    problems = [Problem(111, 222), Problem(500, 501), Problem(347, 586), Problem(999, 999)]
    responses = [work(problem) for problem in problems]
    assert greedy_accuracy(Parrot(responses), TOKENIZER, problems) == 1.0  # also the longest, 999+999
    responses[1] = ";1002"
    assert greedy_accuracy(Parrot(responses), TOKENIZER, problems) == 0.75


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
    [("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("habit", 1.1), ("slip", -0.1)],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        WarmStartConfig(**{field: value})
