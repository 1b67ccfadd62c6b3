# SPDX-License-Identifier: Apache-2.0
"""A worker whose model has one output: the distributional critic starts at its value."""

import pytest
import torch
from critic import harness
from export.reading import ids, states, worker_values
from transformers import Qwen3Config, Qwen3ForSequenceClassification, Qwen3ForTokenClassification

SCALARS = {"token_classifier": Qwen3ForTokenClassification, "reward_model": Qwen3ForSequenceClassification}


@pytest.mark.parametrize("architecture", SCALARS)
def test_a_scalar_critic_gives_a_distribution_its_value(architecture, tmp_path):
    cls = SCALARS[architecture]
    path = harness.save_model(tmp_path / "scalar", architecture=cls, num_labels=1, pad_token_id=0)
    source = cls.from_pretrained(path).eval()
    worker = harness.make_worker(path)
    fresh = harness.make_worker(path, value={"head_from": "seed"})
    hidden = [source.model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ids()]
    expected = [source.score(row)[:, 0].detach() for row in hidden]
    for got, row in zip(worker_values(worker), states(expected), strict=True):
        torch.testing.assert_close(got, row, rtol=1e-5, atol=1e-6)
    different = [a - b for a, b in zip(worker_values(fresh), states(expected), strict=True)]
    assert torch.cat(different).abs().max() > 1e-3
    # Quantiles keep the family's first spread, and heads their distances.
    for worker_ in (worker, fresh):
        bias = harness.full(worker_.engine.module.score.bias).unflatten(0, (2, 5))
        torch.testing.assert_close(bias - bias.mean(), torch.linspace(-0.01, 0.01, 5).expand(2, 5), rtol=0, atol=1e-6)
    weights = [harness.full(w.engine.module.score.weight).unflatten(0, (2, 5))[:, 0] for w in (worker, fresh)]
    torch.testing.assert_close(weights[0][1] - weights[0][0], weights[1][1] - weights[1][0], rtol=1e-5, atol=1e-6)


def test_a_scalar_head_that_cannot_be_used_is_said_so(tmp_path, caplog):
    path = harness.save_model(tmp_path / "scalar", architecture=Qwen3ForTokenClassification, num_labels=1)
    with caplog.at_level("WARNING"):
        harness.make_worker(path, value={"family": "hl_gauss", "num_heads": None, "num_quantiles": None})
    assert "'hl_gauss' cannot start at a scalar's value; the head is drawn from head_seed" in caplog.text


def test_a_head_of_several_outputs_is_refused(tmp_path):
    path = harness.save_model(tmp_path / "labels", architecture=Qwen3ForTokenClassification, num_labels=3)
    with pytest.raises(ValueError, match=r"with score.* of shape \(3,"):
        harness.make_worker(path)
    assert isinstance(Qwen3Config.from_pretrained(path), Qwen3Config)
