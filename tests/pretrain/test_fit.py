# SPDX-License-Identifier: Apache-2.0
"""Fitting a critic to rollouts: against the worker's loss, naive loops and returns that are known."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
from critic import harness
from pyarrow import parquet
from typer.testing import CliRunner

from verl_dvpo import ValueModel, cli
from verl_dvpo.families.registry import build_family, family_names, family_settings
from verl_dvpo.pretrain.commands import overrides, parse_settings, pretrain_critic
from verl_dvpo.pretrain.fit import Batch, FitConfig, evaluate, fit, update
from verl_dvpo.pretrain.measure import measure
from verl_dvpo.pretrain.rollouts import Rollout, read_rollouts, split_by_prompt

SIZES = {"num_heads": 2, "num_quantiles": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def some_rollouts(count: int = 8, seed: int = 0) -> list[Rollout]:
    rng = np.random.default_rng(seed)
    return [
        Rollout(
            tuple(rng.integers(0, 32, rng.integers(1, 5)).tolist()),
            tuple(rng.integers(0, 32, rng.integers(1, 9)).tolist()),
            float(rng.normal()),
        )
        for _ in range(count)
    ]


def as_worker_batch(rollouts: list[Rollout]):
    """The same sequences as the trainer stores them."""
    fields: dict[str, list[torch.Tensor]] = {
        "prompts": [torch.tensor(r.prompt) for r in rollouts],
        "responses": [torch.tensor(r.response) for r in rollouts],
        "input_ids": [torch.tensor(r.prompt + r.response) for r in rollouts],
        "position_ids": [torch.arange(len(r.prompt) + len(r.response)) for r in rollouts],
        "response_mask": [torch.ones(len(r.response), dtype=torch.int64) for r in rollouts],
        "loss_mask": [torch.ones(len(r.response), dtype=torch.int64) for r in rollouts],
        "rm_scores": [torch.tensor([0.0] * (len(r.response) - 1) + [r.reward]) for r in rollouts],
    }
    from verl.utils import tensordict_utils as tu

    return tu.get_tensordict({name: harness.jagged(rows) for name, rows in fields.items()})


@pytest.mark.parametrize(
    "value", [SIZES, {"family": "robust_bellman", "num_heads": 3, "num_quantiles": None, "heads_see": "shards"}]
)
def test_an_update_has_the_workers_loss_and_gradient(value, base):
    rollouts = some_rollouts()
    worker = harness.make_worker(base, value=value)
    gradients = harness.capture_gradients(worker)
    batch = as_worker_batch(rollouts)
    harness.infer(worker, batch)
    metrics = harness.train(worker, batch)
    name, *rest = ("quantile_ensemble",) if "family" not in value else (value["family"],)
    assert not rest
    kept = {key: item for key, item in value.items() if key != "family" and item is not None}
    model = ValueModel.build(base, family_settings(name, **kept))
    config = FitConfig(gamma=0.9, lam=0.8, clip=1e9)
    ours = Batch.of(rollouts, torch.device("cpu"))
    if "family" in value:
        from verl_dvpo.critic.store import prompt_keys

        object.__setattr__(ours, "prompts", prompt_keys(batch["prompts"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = update(model, ours, optimizer, config, torch.Generator())
    assert loss == pytest.approx(sum(metrics["critic/vf_loss"]), rel=1e-5)
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for key, parameter in model.module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5 * scale)


def test_returns_are_the_discounted_reward_that_is_left():
    rollouts = some_rollouts(5, seed=2)
    returns = Batch.of(rollouts, torch.device("cpu")).returns(0.9)
    for row, rollout in zip(returns, rollouts, strict=True):
        length = len(rollout.response)
        expected = [rollout.reward * 0.9 ** (length - 1 - t) for t in range(length)]
        torch.testing.assert_close(row[:length], torch.tensor(expected))
        assert (row[length:] == 0).all()


def test_measures_against_loops():
    rng = np.random.default_rng(1)
    family = build_family(family_settings("quantile_ensemble", **SIZES))
    outputs, returns = rng.normal(size=(40, 10)), rng.normal(size=40)
    places = (np.arange(40) % 8 + 0.5) / 8
    found = measure(family, *(torch.tensor(array, dtype=torch.float32) for array in (outputs, returns, places)))
    points = np.sort(outputs.reshape(40, 2, 5).mean(1), axis=1)
    crps = [
        np.abs(row - y).mean() - 0.5 * np.abs(row[:, None] - row[None]).mean()
        for row, y in zip(points, returns, strict=True)
    ]
    assert found.crps == pytest.approx(np.mean(crps), rel=1e-5)
    values = points.mean(1)

    def explained(chosen):
        return 1 - np.var((returns - values)[chosen], ddof=1) / (np.var(returns[chosen], ddof=1) + 1e-5)

    assert found.explained_variance == pytest.approx(explained(slice(None)), rel=1e-4)
    for part, value in enumerate(found.by_position):
        chosen = (places * 10).astype(int) == part
        if chosen.sum() > 1:
            assert value == pytest.approx(explained(chosen), rel=1e-4)
        else:
            assert math.isnan(value)
    below = [
        np.mean([np.mean(row < y) <= level / 20 for row, y in zip(points, returns, strict=True)]) for level in (5, 13)
    ]
    assert [found.calibration[4], found.calibration[12]] == pytest.approx(below, abs=1e-6)


def letters(count: int, seed: int = 0) -> list[Rollout]:
    """Prompts of three tokens; the first says what the reward is: 1, 0, or one of both by chance."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        kind = int(rng.integers(0, 3))
        prompt = (kind, *rng.integers(3, 32, 2).tolist())
        reward = (1.0, 0.0, float(rng.integers(0, 2)))[kind]
        rows.append(Rollout(prompt, tuple(rng.integers(3, 32, int(rng.integers(1, 4))).tolist()), reward))
    return rows


def test_a_fit_learns_values_and_spreads_and_keeps_the_best(base):
    model = ValueModel.build(base, family_settings("quantile_ensemble", num_heads=1, num_quantiles=10, kappa=0.0))
    train, held_out = split_by_prompt(letters(240), 0.2, seed=0)
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    lines: list[str] = []
    fitted = fit(model, train, held_out, FitConfig(epochs=8, lr=3e-3, patience=8), progress=lines.append)
    first, best = fitted.history[0], fitted.history[fitted.best]
    assert best.crps == min(measured.crps for measured in fitted.history)
    assert best.crps < 0.5 * first.crps
    assert best.explained_variance > 0.3 > first.explained_variance
    assert len(lines) >= len(fitted.history)
    rows = model.values([[kind, a, b] for kind in range(3) for a in (4, 9, 20) for b in (5, 11, 30)], batch_size=27)
    means = torch.stack([row.mean[-1] for row in rows]).unflatten(0, (3, 9)).mean(1)
    spreads = torch.stack([row.spread[-1] for row in rows]).unflatten(0, (3, 9)).mean(1)
    assert means[0] > means[1] + 0.3
    assert means[2] > means[1] + 0.1
    assert (spreads > 0.05).all()


@pytest.mark.parametrize("family", sorted(family_names())[:20])
def test_every_family_can_be_fitted(family, base):
    if not family_settings(family).__class__.__module__.startswith("verl_dvpo.families"):
        pytest.skip("a family of another test")
    model = ValueModel.build(base, family_settings(family))
    rows = letters(12, seed=1)
    fitted = fit(model, rows[:8], rows[8:], FitConfig(epochs=1, lr=1e-3))
    assert all(math.isfinite(measured.crps) for measured in fitted.history)
    assert len(fitted.losses) == 1


def test_it_stops_when_nothing_gets_better(base):
    model = ValueModel.build(base, family_settings("scalar"))
    rows = letters(20)
    fitted = fit(model, rows[:10], rows[10:], FitConfig(epochs=50, lr=1e-12, patience=2))
    assert len(fitted.history) <= 6


def test_without_patience_the_last_weights_are_kept(base):
    """At a rate at which the held-out score gets worse."""
    rows = letters(20)
    train, held_out = rows[:10], rows[10:]
    model = ValueModel.build(base, family_settings("scalar"))
    chosen = copy.deepcopy(model)
    kept = fit(model, train, held_out, FitConfig(epochs=3, lr=0.5, patience=0))
    assert kept.best == 3
    worse = fit(chosen, train, held_out, FitConfig(epochs=3, lr=0.5, patience=3))
    assert worse.best < 3
    after = evaluate(model, held_out, FitConfig())
    assert after.crps == kept.history[3].crps == worse.history[3].crps > worse.history[worse.best].crps


def test_messages_and_texts_are_tokenised_and_empty_answers_passed_over(tmp_path):
    class Letters:
        def __call__(self, text, add_special_tokens):
            assert add_special_tokens is False
            return {"input_ids": [ord(letter) for letter in text]}

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            assert not tokenize
            return "".join(message["content"] for message in messages) + ">" * add_generation_prompt

    messages = [{"role": "user", "content": "ab"}]
    table = pa.table({"prompt": [messages, messages], "response": ["c", ""], "reward": [1, 2], "more": ["x", "y"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"input": "ab", "output": "d", "score": 0.5, "gts": null, "step": 1}\n\n')
    assert read_rollouts([tmp_path], Letters()) == [
        Rollout((97, 98, 62), (99,), 1.0),
        Rollout((97, 98), (100,), 0.5),
    ]


def invoke(*arguments: str):
    """Runs the command as ``cli.main`` does: a ValueError is one line and status 2."""
    app = typer.Typer()
    app.command()(pretrain_critic)
    return CliRunner().invoke(app, list(arguments))


def write(file: Path, rows: list[Rollout], **changes) -> Path:
    columns = {"prompt": [list(r.prompt) for r in rows], "response": [list(r.response) for r in rows]}
    columns |= {"reward": [r.reward for r in rows], **changes}
    parquet.write_table(pa.table({name: column for name, column in columns.items() if column is not None}), file)
    return file


def test_the_command_writes_what_value_model_and_a_run_load(base, tmp_path):
    file = write(tmp_path / "rollouts.parquet", letters(60))
    arguments = ["--model", base, "--rollouts", str(file), "--out", str(tmp_path / "out"), "--epochs", "2"]
    done = invoke(*arguments, "--set", "num_heads=2", "--set", "num_quantiles=5", "--lr", "1e-3")
    assert done.exit_code == 0, done.output
    assert "critic.value.num_quantiles=5" in done.output
    out = tmp_path / "out"
    table = json.loads((out / "pretraining.json").read_text())
    assert table["sequences"] + table["sequences_held_out"] == 60
    assert len(table["held_out"]) == 3
    assert (out / "pretraining.png").stat().st_size > 10_000
    assert "held-out CRPS" in (out / "README.md").read_text()
    (values,) = ValueModel.from_pretrained(out).values([[1, 2, 3]])
    worker = harness.make_worker(str(out))
    with torch.no_grad():
        outputs = worker.engine.module.eval()(input_ids=torch.tensor([[1, 2, 3]])).logits[0]
    torch.testing.assert_close(values.outputs, outputs, rtol=0, atol=1e-6)
    again = invoke(*arguments)
    assert "does not exist or is empty" in str(again.exception)


BAD = {
    "column": ({"reward": None}, "has no column 'reward'; it has prompt, response; expected: prompt"),
    "text": ({"reward": ["good"] * 4}, "row 0: reward is 'good'; a finite number is allowed"),
    "nan": ({"reward": [0.0, math.nan, 0.0, 1.0]}, "row 1: reward is nan"),
    "numbers": ({"response": [1, 2, 3, 4]}, "row 0: response is '1'; text or token ids"),
    "no tokenizer": ({"response": ["a", "b", "c", "d"]}, "row 0: response is text; the model has no tokenizer"),
    "one prompt": ({"prompt": [[1]] * 4}, "hold 1 prompt; two or more"),
    "vocabulary": ({"response": [[99]] * 4}, "token id 99; the model allows ids below 32"),
    "length": ({"response": [[1] * 80] * 4}, "the model allows 64"),
    "empty": ({"response": [[], [], [], []]}, "none holds a prompt with an answer"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_rollouts_are_refused_and_nothing_is_written(bad, base, tmp_path):
    changes, message = BAD[bad]
    file = write(tmp_path / "rollouts.parquet", letters(4), **changes)
    done = invoke("--model", base, "--rollouts", str(file), "--out", str(tmp_path / "out"))
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts.parquet"]


def test_a_pickle_among_rollouts_does_not_run(base, tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name in ("a.parquet", "a.jsonl"):
        torch.save({"x": Attack()}, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            read_rollouts([tmp_path / name], None)
    with pytest.raises(ValueError, match="parquet files, JSON lines"):
        read_rollouts([tmp_path / "a.pt"], None)
    assert not (tmp_path / "ran").exists()


def test_settings_and_overrides():
    assert parse_settings(["num_heads=3", "coef.risk=0.1", "levels=midpoint"]) == {
        "num_heads": 3, "coef": {"risk": 0.1}, "levels": "midpoint",
    }  # fmt: skip
    with pytest.raises(ValueError, match="name=value is allowed"):
        parse_settings(["num_heads"])
    line = overrides(Path("x"), family_settings("quantile_ensemble", **SIZES))
    assert line == [
        "critic.model.path=x", "critic.value.head_width=null", "critic.value.num_heads=2",
        "critic.value.num_quantiles=5", "critic.value.levels=right",
    ]  # fmt: skip
    assert cli.GROUP == "verl_dvpo.commands"
    for field, value in (
        ("epochs", 0),
        ("patience", -1),
        ("lr", 0.0),
        ("gamma", 1.5),
        ("lam", -0.1),
        ("clip", math.inf),
    ):
        with pytest.raises(ValueError, match=f"{field} is"):
            FitConfig(**{field: value})
