# SPDX-License-Identifier: Apache-2.0
"""The critic worker against verl's own critic, against itself cut differently, and against wrong use."""

from functools import partial
from pathlib import Path

import pytest
import torch
from verl.trainer.ppo.core_algos import compute_gae_advantage_return
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import value_loss
from verl.workers.utils.padding import response_from_nested, response_to_nested

from critic import harness
from verl_dvpo.critic.config import family_config
from verl_dvpo.critic.packing import ResponseTokens
from verl_dvpo.critic.store import KeptSamples, build_targets, reward_std
from verl_dvpo.critic.worker import ROW
from verl_dvpo.families.registry import build_family


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def values_of(worker, batch):
    return harness.infer(worker, batch)["values"]


def test_values_are_the_mean_over_heads_and_quantiles_of_a_plain_forward(model):
    worker = harness.make_worker(model)
    batch = harness.make_batch()
    values = response_from_nested(values_of(worker, batch), batch["response_mask"])
    module = worker.engine.module.eval()
    for row, (prompt, ids) in enumerate(zip(batch["prompts"].unbind(), batch["input_ids"].unbind(), strict=True)):
        with torch.no_grad():
            logits = module(input_ids=ids[None]).logits[0]
        expected = logits[len(prompt) - 1 : -1].double().mean(-1)
        torch.testing.assert_close(values.unbind()[row].double(), expected, rtol=1e-5, atol=1e-6)


def test_scalar_family_has_the_loss_and_gradient_of_verls_value_loss(model):
    worker = harness.make_worker(model, value=None, critic={"cliprange_value": 0.05})
    # The quantile defaults of the harness do not belong to a scalar family.
    worker.settings = family_config(family="scalar", cliprange=0.05)
    worker.family = build_family(worker.settings)
    batch = harness.make_batch()
    generator = torch.Generator().manual_seed(1)
    tokens = batch["input_ids"].values().shape[0]
    old = torch.randn(tokens, 1, generator=generator)
    new = old + 0.1 * torch.randn(tokens, 1, generator=generator)
    offsets = batch["input_ids"].offsets()
    old_values = response_from_nested(
        torch.nested.nested_tensor_from_jagged(old[:, 0], offsets), batch["response_mask"]
    )

    gamma, lam = 0.9, 0.8
    mask = batch["response_mask"].to_padded_tensor(0)
    _, returns = compute_gae_advantage_return(
        batch["rm_scores"].to_padded_tensor(0), old_values.to_padded_tensor(0), mask, gamma, lam
    )
    data = batch.clone()
    data["values"] = old_values
    data["returns"] = response_to_nested(returns, batch["response_mask"])
    data[ROW] = torch.arange(len(data))
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=8)

    config = worker.loss_fn.args[0]
    verl_outputs = new.clone().requires_grad_()
    values = torch.nested.nested_tensor_from_jagged(verl_outputs[:, 0], offsets)
    verl_loss, verl_metrics = value_loss(config, {"values": values}, data)
    verl_loss.backward()

    kept = torch.nested.nested_tensor_from_jagged(old_values.values()[:, None], old_values.offsets())
    worker._targets = build_targets(
        worker.family,
        KeptSamples(kept, batch, {}),
        batch["rm_scores"],
        batch["response_mask"],
        gamma=gamma,
        lam=lam,
        rows_per_chunk=3,
    )
    our_outputs = new.clone().requires_grad_()
    states = ResponseTokens.of(data).states
    jagged_outputs = torch.nested.nested_tensor_from_jagged(our_outputs[states], batch["responses"].offsets())
    our_loss, our_metrics = partial(worker._loss, config)({"outputs": jagged_outputs}, data)
    our_loss.backward()

    assert our_loss.item() == pytest.approx(verl_loss.item(), rel=1e-6)
    torch.testing.assert_close(our_outputs.grad, verl_outputs.grad, rtol=1e-6, atol=1e-8)
    assert verl_outputs.grad.abs().sum() > 0
    assert our_metrics["critic/vf_loss"].aggregate() == pytest.approx(verl_metrics["critic/vf_loss"].aggregate())


CUTS = {
    "micro_1": {"micro_batch_size_per_gpu": 1},
    "micro_2": {"micro_batch_size_per_gpu": 2},
    "micro_8": {"micro_batch_size_per_gpu": 8},
    "dynamic": {"use_dynamic_bsz": True, "max_token_len_per_gpu": 20, "infer_max_token_len_per_gpu": 20},
}
TARGETS = {"gae": {}, "samples": {"target": "sample_replacement", "levels": "midpoint", "kappa": 0.0}}


def gradients_of(model: str, batch=None, **settings) -> dict[str, torch.Tensor]:
    worker = harness.make_worker(model, **settings)
    gradients = harness.capture_gradients(worker)
    batch = harness.make_batch() if batch is None else batch
    harness.infer(worker, batch)
    harness.train(worker, batch)
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0
    return gradients


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance * scale.item())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cut", ["micro_1", "micro_2", "dynamic"])
def test_gradients_do_not_depend_on_how_the_mini_batch_is_cut(model, cut, target):
    whole = gradients_of(model, engine=CUTS["micro_8"], value=TARGETS[target])
    assert_same(gradients_of(model, engine=CUTS[cut], value=TARGETS[target]), whole)


@pytest.mark.parametrize("mode", ["seq-mean-token-sum", "seq-mean-token-mean"])
def test_other_aggregations_do_not_depend_on_the_cut_either(model, mode):
    critic = {"loss_agg_mode": mode}
    whole = gradients_of(model, engine=CUTS["micro_8"], critic=critic)
    assert_same(gradients_of(model, engine=CUTS["micro_1"], critic=critic), whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_remove_padding": False},
        {"enable_gradient_checkpointing": True},
        {"value": {"rows_per_chunk": 1}},
        {"value": {"keep_on": "cpu"}},
    ],
    ids=["padded", "gradient_checkpointing", "one_row_a_chunk", "kept_on_cpu"],
)
def test_how_it_is_computed_does_not_change_the_gradients(model, settings):
    assert_same(gradients_of(model, **settings), gradients_of(model))


@pytest.mark.parametrize("family", ["quantile_ensemble", "value_flow", "scalar_ensemble", "robust_bellman"])
def test_the_updates_mean_prediction_is_the_mean_of_the_values_over_valid_tokens(model, family):
    sizes = {"num_heads": 3 if family in ("scalar_ensemble", "robust_bellman") else None, "num_quantiles": None}
    settings = {} if family == "quantile_ensemble" else {"value": {"family": family, **sizes}}
    worker = harness.make_worker(model, **settings)
    batch = harness.make_batch()
    values = response_from_nested(values_of(worker, batch), batch["response_mask"])
    metrics = harness.train(worker, batch)
    rows = zip(values.unbind(), batch["response_mask"].unbind(), strict=True)
    valid = [value for row, mask in rows for value, inside in zip(row.tolist(), mask.tolist(), strict=True) if inside]
    assert sum(metrics["critic/vpred_mean"]) == pytest.approx(sum(valid) / len(valid), abs=1e-6)


def test_what_leaves_the_worker_does_not_grow_with_the_number_of_quantiles(model):
    def bytes_out(num_quantiles: int) -> tuple[int, set[str]]:
        worker = harness.make_worker(model, value={"num_quantiles": num_quantiles})
        batch = harness.make_batch()
        outputs = [harness.infer(worker, batch)]
        data = batch.clone()
        tu.assign_non_tensor(
            data,
            global_batch_size=8, mini_batch_size=8, epochs=1, seed=0, dataloader_kwargs={"shuffle": False},
            temperature=1.0, gamma=1.0, lam=1.0, global_steps=1,
        )  # fmt: skip
        outputs.append(worker.train_mini_batch(data))
        total, names = 0, set()
        for output in outputs:
            for name, value in output.items():
                if isinstance(value, torch.Tensor):
                    values = value.values() if value.is_nested else value
                    total += values.numel() * values.element_size()
                    names.add(name)
            metrics = tu.get(output, "metrics")
            total += sum(len(value) if isinstance(value, list) else 1 for value in metrics.values())
        return total, names

    few, names = bytes_out(4)
    many, _ = bytes_out(64)
    assert names == {"values"}
    assert few == many


def test_the_head_computes_in_fp32_under_bf16(model):
    bf16 = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    worker = harness.make_worker(model, mixed_precision=bf16)
    seen = {}
    head = worker.engine.module.score
    head.register_forward_hook(lambda module, inputs, output: seen.update(weight=module.weight.dtype, out=output.dtype))
    harness.infer(worker, harness.make_batch())
    assert seen == {"weight": torch.float32, "out": torch.float32}
    layer = worker.engine.module.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.update(layer=output.dtype))
    harness.infer(worker, harness.make_batch())
    assert seen["layer"] == torch.bfloat16


def test_heads_start_apart_and_quantiles_of_a_head_start_together(model):
    weight = harness.full(harness.make_worker(model, value={"num_heads": 3}).engine.module.score.weight)
    heads = weight.unflatten(0, (3, 5))
    assert (heads == heads[:, :1]).all()
    assert torch.corrcoef(heads[:, 0]).triu(1).abs().max() < 0.95


def test_a_two_layer_head_is_trained_whole_and_no_cut_changes_its_gradients(model):
    value = {"head_width": 8, "head_activation": "tanh"}
    whole = gradients_of(model, engine=CUTS["micro_8"], value=value)
    assert {name for name in whole if "score" in name} == {
        f"score.{layer}.{kind}" for layer in ("hidden", "out") for kind in ("weight", "bias")
    }
    assert_same(gradients_of(model, engine=CUTS["micro_1"], value=value), whole)


def test_lora_trains_adapters_and_the_whole_head_only(model):
    worker = harness.make_worker(model, lora_rank=2, lora_alpha=4)
    before = {name: harness.full(p).clone() for name, p in worker.engine.module.named_parameters()}
    batch = harness.make_batch()
    for step in (1, 2):  # adapters start at B = 0: A moves only in the second step
        harness.infer(worker, batch)
        harness.train(worker, batch, step=step)
    moved = {
        name for name, p in worker.engine.module.named_parameters() if not torch.equal(harness.full(p), before[name])
    }
    heads = {name for name in moved if "score" in name}
    assert len(heads) == 2
    assert not any("lora" in name for name in heads)
    assert moved - heads == {name for name in before if "lora_" in name}


def test_several_epochs_update_the_critic_several_times_on_targets_from_before(model, monkeypatch):
    worker = harness.make_worker(model)
    built, steps = [], []
    build, step = worker._build_targets, worker.engine.optimizer_step
    monkeypatch.setattr(worker, "_build_targets", lambda *args: built.append(1) or build(*args))
    monkeypatch.setattr(worker.engine, "optimizer_step", lambda: steps.append(1) or step())
    batch = harness.make_batch()
    harness.infer(worker, batch)
    harness.train(worker, batch, epochs=3)
    assert (len(built), len(steps)) == (1, 3)


def test_metrics_of_an_update_have_their_names(model):
    terms = ("risk", "cvar", "gain", "shift", "shape", "curvature", "consistency")
    worker = harness.make_worker(model, value={"coef": dict.fromkeys(terms, 0.01)})
    batch = harness.make_batch()
    harness.infer(worker, batch)
    names = set(harness.train(worker, batch))
    expected = {f"critic/loss/{term}" for term in ("quantile", *terms)}
    expected |= {f"critic/quantile/{q}" for q in ("q10", "q50", "q90", "crossing_fraction", "spread")}
    expected |= {"critic/vf_loss", "critic/vpred_mean", "critic/ensemble/std", "critic/multiplier/shape_low"}
    assert expected <= names


def test_a_collapsed_flow_is_logged_with_its_metric_and_a_healthy_one_is_not(model, caplog):
    settings = {"value": {"family": "value_flow", "num_heads": None, "num_quantiles": None}}
    worker = harness.make_worker(model, **settings)
    batch = harness.make_batch()
    harness.infer(worker, batch)
    assert "critic/flow/collapsed" not in harness.train(worker, batch)
    with torch.no_grad():
        # The field v(e, 0) = -e sends every noise to 0: its coefficients are those of -e in the cosine basis.
        bias = worker.engine.module.score.bias
        full = harness.full(bias)
        basis = worker.family.basis.double()
        solution = torch.linalg.lstsq(basis, -worker.family.noises.double()[:, None]).solution[:, 0]
        full.zero_()
        full.unflatten(0, (basis.shape[1], -1))[:, 0] = solution.float()
        worker.engine.module.score.weight.mul_(0)
        (bias.to_local() if hasattr(bias, "to_local") else bias).copy_(full)
    harness.infer(worker, batch)
    with caplog.at_level("WARNING"):
        metrics = harness.train(worker, batch)
    assert metrics["critic/flow/collapsed"] == [1.0]
    assert "the value flow has collapsed" in caplog.text


def test_reward_std_over_sequences():
    rewards = harness.jagged([torch.tensor([1.0, 2.0]), torch.tensor([5.0]), torch.tensor([100.0, 0.0])])
    mask = harness.jagged([torch.tensor([1, 0]), torch.tensor([1]), torch.tensor([0, 0])])
    # Totals 3 and 5 count, the masked row's 100 does not: the standard deviation of (3, 5) is 1.
    assert reward_std(rewards, mask) == pytest.approx(1.0)


def test_resume_continues_bitwise(model, tmp_path: Path):
    first, second = harness.make_batch(seed=1), harness.make_batch(seed=2)
    settings = {"value": TARGETS["samples"]}

    def update(worker, batch, step):
        harness.infer(worker, batch)
        harness.train(worker, batch, step=step)

    straight = harness.make_worker(model, **settings)
    update(straight, first, 1)
    straight.save_checkpoint(str(tmp_path / "critic"), global_step=1)
    update(straight, second, 2)
    resumed = harness.make_worker(model, **settings)
    resumed.load_checkpoint(str(tmp_path / "critic"))
    update(resumed, second, 2)

    for (name, a), (_, b) in zip(
        straight.engine.module.named_parameters(), resumed.engine.module.named_parameters(), strict=True
    ):
        assert torch.equal(harness.full(a), harness.full(b)), name
    states = [worker.engine.optimizer.state_dict()["state"] for worker in (straight, resumed)]
    for key, state in states[0].items():
        for field, value in state.items():
            assert torch.equal(harness.full(value), harness.full(states[1][key][field])), (key, field)
    assert straight.engine.lr_scheduler.state_dict() == resumed.engine.lr_scheduler.state_dict()
