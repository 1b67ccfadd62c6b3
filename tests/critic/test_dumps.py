# SPDX-License-Identifier: Apache-2.0
"""``critic.value.dump_every``: the numbers of a file against the family's own on a plain forward pass."""

import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from verl.utils import tensordict_utils as tu

from critic import harness
from verl_dvpo.critic.config import family_config
from verl_dvpo.critic.dumps import PLAN, DumpPlan, choose_rows, realised_returns, shown_settings
from verl_dvpo.families.registry import build_family, family_names, family_settings
from verl_dvpo.saved.values import LEVELS, path_of, read_dump

SMALL = {
    "quantile_ensemble": {"num_heads": 2, "num_quantiles": 5},
    "scalar_ensemble": {"num_heads": 3},
    "robust_bellman": {"num_heads": 3},
}
FAMILIES = [name for name in family_names() if not name.startswith("test_")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def dumped(worker, folder: Path, batch=None, **fields: torch.Tensor):
    """One step of a worker with a plan; returns its metrics."""
    batch = harness.make_batch() if batch is None else batch
    planned = batch.clone()
    tu.assign_non_tensor(planned, **{PLAN: DumpPlan(3, str(folder), {"settings": {"data.seed": 7}})})
    harness.infer(worker, planned)
    for name, field in fields.items():
        batch[name] = field
    return harness.train(worker, batch, step=3)


def worker_of(model: str, family: str, count: int, **more):
    settings = {"num_heads": None, "num_quantiles": None, **SMALL.get(family, {})}
    return harness.make_worker(model, value={"family": family, "dump_sequences": count, **settings, **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_has_the_familys_own_numbers_of_a_plain_forward(family, model, tmp_path):
    """Micro-batches of 20 tokens mix the rows, which are found again; row 3 is padding and never written."""
    engine = {"use_dynamic_bsz": True, "infer_max_token_len_per_gpu": 20}
    worker = harness.make_worker(
        model,
        value={
            "num_heads": None,
            "num_quantiles": None,
            "family": family,
            "dump_sequences": 64,
            **SMALL.get(family, {}),
        },
        engine=engine,
    )
    batch = harness.make_batch()
    prompts, responses = batch["prompts"].unbind(), batch["responses"].unbind()
    with torch.no_grad():
        module = worker.engine.module.eval()
        states = [
            module(input_ids=torch.cat([p, r])[None]).logits[0, len(p) - 1 : -1].float()
            for p, r in zip(prompts, responses, strict=True)
        ]
    advantages = torch.nested.nested_tensor_from_jagged(
        torch.arange(len(responses[0].new_ones(sum(map(len, responses)))), dtype=torch.float32),
        batch["responses"].offsets(),
    )
    dumped(worker, tmp_path, batch, advantages=advantages)
    dump = read_dump(path_of(tmp_path, 3))
    rows = [row for row in range(8) if row != 3]
    assert dump.step == 3
    assert dump.facts == {"settings": {"data.seed": 7}, "gamma": 0.9}
    assert len(dump.answers) == len(rows)
    plain = build_family(worker.settings)
    for answer, row in zip(dump.answers, rows, strict=True):
        assert answer.ids.tolist() == responses[row].tolist()
        assert answer.mask.tolist() == (batch["response_mask"].unbind()[row] != 0).tolist()
        for found, expected in (
            (answer.quantiles, plain.quantiles(states[row], torch.tensor(LEVELS))),
            (answer.heads, plain.head_values(states[row])),
            (answer.values, plain.value(states[row])),
        ):
            torch.testing.assert_close(torch.tensor(found), expected.float(), rtol=1e-4, atol=1e-5)
        assert answer.rewards.tolist() == batch["rm_scores"].unbind()[row].tolist()
        assert answer.advantages.tolist() == advantages.unbind()[row].tolist()
        assert answer.returns is None
        assert answer.realised.tolist() == pytest.approx(naive_returns(answer, 0.9), rel=1e-6)
        assert (answer.pieces, answer.prompt) == ((), "")
    scalar = "scalar" in family or family == "robust_bellman"
    widths = [float((answer.quantiles[:, -1] - answer.quantiles[:, 0]).max()) for answer in dump.answers]
    assert (max(widths) > 0) != scalar
    assert dump.answers[0].heads.shape[-1] == SMALL.get(family, {}).get("num_heads", 1)


def naive_returns(answer, gamma: float) -> list[float]:
    """Token by token from the end; masked tokens neither pay nor take time, and carry what follows them."""
    found, later = [], 0.0
    for reward, valid in zip(answer.rewards.tolist()[::-1], answer.mask.tolist()[::-1], strict=True):
        later = reward + gamma * later if valid else later
        found.append(later)
    return found[::-1]


def test_without_a_plan_nothing_is_written_and_with_one_nothing_else_changes(model, tmp_path):
    """Sampled targets too: a dump draws no random number."""
    value = {"target": "sample_replacement", "levels": "midpoint", "kappa": 0.0}
    plain = harness.make_worker(model, value=value)
    harness.infer(plain, harness.make_batch())
    expected = harness.train(plain, harness.make_batch(), step=3)
    assert plain._dump is None
    watched = harness.make_worker(model, value=value)
    state = torch.get_rng_state()
    found = dumped(watched, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert {n: v for n, v in found.items() if "perf" not in n and "mfu" not in n} == {
        n: v for n, v in expected.items() if "perf" not in n and "mfu" not in n
    }
    for one, other in zip(plain.engine.module.parameters(), watched.engine.module.parameters(), strict=True):
        assert torch.equal(harness.full(one), harness.full(other))
    assert [file.name for file in (tmp_path / "values").iterdir()] == ["step_3.safetensors"]
    assert watched._dump is None
    harness.infer(watched, harness.make_batch())
    harness.train(watched, harness.make_batch(), step=4)
    assert len(list((tmp_path / "values").iterdir())) == 1


def test_tokens_are_written_with_their_texts(model, tmp_path):
    worker = worker_of(model, "scalar", 2)
    words = {f"w{number}": number for number in range(harness.VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    worker.model_config.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    dumped(worker, tmp_path)
    answers = read_dump(path_of(tmp_path, 3)).answers
    batch = harness.make_batch()
    assert len(answers) == 2
    for answer, row in zip(answers, (0, 4), strict=True):  # at even distances among seven with a valid token
        assert answer.pieces == tuple(f"w{token}" for token in batch["responses"].unbind()[row].tolist())
        kept = [token for token in batch["prompts"].unbind()[row].tolist() if token != 0]  # w0 is special
        assert answer.prompt.split() == [f"w{token}" for token in kept]


@pytest.mark.parametrize("block", [None, 3])
def test_an_update_in_another_order_writes_the_same_and_an_absent_answer_is_left_out(block, model, tmp_path):
    """Blocks of three tokens cut the rows; the update has the rows in reverse, or half of them."""
    files = []
    orders = (slice(None), slice(None, None, -1), slice(0, 4))
    for number, rows in enumerate(orders):
        worker = worker_of(model, "scalar", 64, tokens_per_block=block)
        planned = harness.make_batch()
        tu.assign_non_tensor(planned, **{PLAN: DumpPlan(number, str(tmp_path))})
        harness.infer(worker, planned)
        data = harness.make_batch(rows=rows)
        worker._dump.write(data, data["rm_scores"], gamma=0.9)
        files.append(read_dump(path_of(tmp_path, number)).answers)
    first, reverse, part = files
    assert [len(answers) for answers in files] == [7, 7, 3]
    for answers in (reverse, part):
        for one, other in zip(first, answers, strict=False):
            for name in ("ids", "mask", "rewards", "realised", "values"):
                assert getattr(one, name).tolist() == getattr(other, name).tolist()
            assert len(one.values) == len(one.ids)


def test_a_disk_that_refuses_the_file_stops_nothing(model, tmp_path, caplog):
    (tmp_path / "values").write_text("in the way")
    worker = worker_of(model, "scalar", 2)
    with caplog.at_level(logging.WARNING):
        metrics = dumped(worker, tmp_path)
    assert metrics["critic/vf_loss"]
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("valid", "count", "expected"),
    [
        ([1, 1, 1, 1, 1, 1], 3, [0, 2, 4]),
        ([0, 1, 1, 0, 1], 2, [1, 2]),
        ([1, 0, 1], 64, [0, 2]),
        ([0, 0], 4, []),
    ],
)
def test_rows_are_chosen_at_even_distances_among_those_with_a_token(valid, count, expected):
    mask = harness.jagged([torch.tensor([0, one])[: 1 + index % 2 + one] for index, one in enumerate(valid)])
    assert choose_rows(mask, count) == expected


def test_what_was_received_of_one_token_and_of_none_that_counts():
    assert realised_returns(torch.tensor([2.0]), torch.tensor([1]), 0.5).tolist() == [2.0]
    assert realised_returns(torch.tensor([2.0, 1.0]), torch.tensor([0, 0]), 0.5).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dump_every": -1}, "critic.value.dump_every is -1; it must be an integer >= 0"),
        ({"dump_every": 2.5}, "critic.value.dump_every is 2.5; it must be an integer >= 0"),
        ({"dump_sequences": 0}, r"critic.value.dump_sequences is 0; it must be an integer in \[1, 64\]"),
        ({"dump_sequences": 65}, r"critic.value.dump_sequences is 65; it must be an integer in \[1, 64\]"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        family_config("scalar", **settings)


def test_it_is_off_until_it_is_asked_for():
    assert family_settings("scalar").dump_every == 0


def test_settings_that_are_shown_are_those_of_the_run_alone():
    config = {
        "algorithm": {"gamma": 1.0, "value": {"weighting": "none", "gate_gain": None}},
        "critic": {"value": {"family": "scalar"}, "optim": {"lr": 1e-3}, "model": {"path": "/secret"}},
        "ray_kwargs": {"token": "secret"},
    }
    assert shown_settings(config) == {
        "settings": {
            "algorithm.gamma": 1.0,
            "algorithm.value.weighting": "none",
            "critic.value.family": "scalar",
            "critic.optim.lr": 1e-3,
        }
    }
