# SPDX-License-Identifier: Apache-2.0
"""A critic that chooses its density and its risk weight, in the worker: scores, metrics, and its checkpoint."""

import pytest
import torch

from critic import harness
from verl_dvpo.distributional.metrics import crps

AUTO = {
    "num_quantiles": "auto",
    "levels": "midpoint",
    "kappa": 0.0,
    "target": "sample_replacement",
    "constraint_statistics": "level",
    "risk_form": "readout",
    "coef": {"risk": "auto"},
    "auto": {"sizes": [1, 3, 9], "risks": [0.0, 0.3, 1.0], "every": 2, "memory": 0.5, "tolerance": 1.0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def chosen(worker) -> dict:
    return {name: value.tolist() for name, value in worker.family.state().items()}


def update(worker, step):
    batch = harness.make_batch(seed=step)
    harness.infer(worker, batch)
    return batch, harness.train(worker, batch, step=step)


def test_a_batch_is_scored_with_what_was_said_of_it_before_its_update(model):
    """CRPS of all levels against the discounted sum of valid rewards, over valid tokens, by a loop."""
    worker = harness.make_worker(model, value=AUTO)
    batch = harness.make_batch()
    harness.infer(worker, batch)
    kept, start, scores = worker._kept.values.clone(), 0, []
    for rewards, mask in zip(batch["rm_scores"].unbind(), batch["response_mask"].unbind(), strict=True):
        for t in range(len(mask)):
            valid = [k for k in range(t, len(mask)) if mask[k]]
            value = sum(0.9**n * rewards[k].item() for n, k in enumerate(valid))
            if mask[t]:
                scores.append(crps(kept[start + t].double(), torch.tensor(value, dtype=torch.float64)).item())
        start += len(mask)
    metrics = harness.train(worker, batch)
    assert metrics["critic/auto/crps_9"] == [pytest.approx(sum(scores) / len(scores), abs=1e-6)]
    assert metrics["critic/auto/num_quantiles"] == [9.0]  # every second update


def test_a_resumed_critic_chooses_what_the_other_one_does(model, tmp_path):
    straight = harness.make_worker(model, value=AUTO)
    for step in (1, 2, 3):
        update(straight, step)
    assert chosen(straight)["updates"] == 3
    straight.save_checkpoint(str(tmp_path / "critic"), global_step=3)
    resumed = harness.make_worker(model, value=AUTO)
    fresh = chosen(resumed)
    resumed.load_checkpoint(str(tmp_path / "critic"))
    assert chosen(resumed) == chosen(straight) != fresh
    for step in (4, 5, 6):
        batch, metrics = update(straight, step)
        again = update(resumed, step)[1]
        auto = [name for name in metrics if name.startswith("critic/auto/")]
        assert len(auto) == 2 * 3 + 3 + 2
        assert {name: metrics[name] for name in auto} == {name: again[name] for name in auto}
        values = [harness.infer(worker, batch)["values"].values() for worker in (straight, resumed)]
        assert torch.equal(*values)
    assert chosen(straight) == chosen(resumed)
    assert chosen(straight)["size"] < 9  # something was chosen


def test_a_checkpoint_of_other_candidates_is_refused(model, tmp_path):
    harness.make_worker(model, value=AUTO).save_checkpoint(str(tmp_path / "critic"), global_step=1)
    other = {**AUTO, "auto": {**AUTO["auto"], "sizes": [3, 9]}}
    with pytest.raises(ValueError, match=r"\[3, 9\].* \[1, 3, 9\]"):
        harness.make_worker(model, value=other).load_checkpoint(str(tmp_path / "critic"))


def test_a_stage_that_sees_no_values_cannot_choose(model, monkeypatch):
    worker = harness.make_worker(model, value=AUTO)
    monkeypatch.setattr(type(worker.engine), "has_outputs", False)
    with pytest.raises(ValueError, match=r"critic\.value has a setting 'auto', but this rank"):
        harness.update(worker, harness.make_batch())
