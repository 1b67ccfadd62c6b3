# SPDX-License-Identifier: Apache-2.0
"""What inference kept stays with its sequences, however a batch comes back; what is missing is inferred again."""

import pytest
import torch
from tensordict import TensorDict

from critic import harness
from verl_dvpo.critic.store import KeptSamples


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("alignment") / "model")


def kept_of(batch: TensorDict) -> KeptSamples:
    """Keeps of each token its place in the batch and its position, so that a sample can be told from any other."""
    rows = [
        torch.stack([torch.full((len(ids),), float(row)), torch.arange(float(len(ids)))], dim=-1)
        for row, ids in enumerate(batch["responses"].unbind())
    ]
    return KeptSamples(harness.jagged(rows), batch, {})


@pytest.mark.parametrize(
    "order",
    [
        list(range(8)),
        [7, 6, 5, 4, 3, 2, 1, 0],
        [3, 0, 5],
        [2, 2, 6, 2],
        [4],
    ],
    ids=["same", "reversed", "dropped", "repeated as padding does", "one"],
)
def test_samples_follow_their_sequences(order):
    batch = harness.make_batch()
    wanted = TensorDict(
        {name: harness.jagged([batch[name].unbind()[row] for row in order]) for name in ("prompts", "responses")},
        batch_size=len(order),
    )
    found = kept_of(batch).of(wanted)
    assert found is not None
    got = torch.nested.nested_tensor_from_jagged(found.values, found.offsets).unbind()
    for place, row in enumerate(order):
        assert got[place][:, 0].tolist() == [float(row)] * len(batch["responses"].unbind()[row])
        assert got[place][:, 1].tolist() == list(range(len(got[place])))


def test_the_prompt_counts_too():
    """Two prompts with one answer are two sequences."""
    answer = torch.tensor([5, 6])
    both = TensorDict(
        {
            "prompts": harness.jagged([torch.tensor([1, 2]), torch.tensor([1])]),
            "responses": harness.jagged([answer, answer]),
        },
        batch_size=2,
    )
    swapped = TensorDict(
        {
            "prompts": harness.jagged([torch.tensor([1]), torch.tensor([1, 2])]),
            "responses": harness.jagged([answer, answer]),
        },
        batch_size=2,
    )
    found = kept_of(both).of(swapped)
    assert found is not None
    assert found.values[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    moved = TensorDict(
        {"prompts": harness.jagged([torch.tensor([1, 2, 5])]), "responses": harness.jagged([torch.tensor([6])])},
        batch_size=1,
    )
    assert kept_of(both).of(moved) is None


def outcome(worker, batch: TensorDict, prepare) -> tuple[dict, dict]:
    gradients = harness.capture_gradients(worker)
    prepare(worker)
    metrics = harness.train(worker, batch)
    return gradients, metrics


PREPARATIONS = {
    "another order": lambda worker: harness.infer(worker, reordered()),
    "a restarted worker": lambda worker: None,
    "another batch": lambda worker: harness.infer(worker, harness.make_batch(seed=1)),
    "one sequence is missing": lambda worker: harness.infer(worker, harness.make_batch(rows=slice(0, 6))),
}


def reordered() -> TensorDict:
    batch = harness.make_batch()
    names = [name for name in batch.keys() if isinstance(batch[name], torch.Tensor)]  # noqa: SIM118
    rows = {name: harness.jagged(list(reversed(batch[name].unbind()))) for name in names}
    return harness.tu.get_tensordict(rows)


@pytest.mark.parametrize("case", PREPARATIONS)
def test_an_update_has_the_gradients_of_one_whose_batch_was_inferred(case, model):
    batch = harness.make_batch()
    expected, metrics = outcome(harness.make_worker(model), batch, lambda worker: harness.infer(worker, batch))
    assert metrics["critic/inferred_again"] == [0.0]
    got, repaired = outcome(harness.make_worker(model), batch, PREPARATIONS[case])
    assert repaired["critic/inferred_again"] == [float(case != "another order")]
    assert got.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * scale)
    for name in ("critic/vf_loss", "critic/vpred_mean", "critic/multiplier/cvar", "critic/quantile/q50"):
        torch.testing.assert_close(torch.tensor(repaired[name]), torch.tensor(metrics[name]), rtol=1e-5, atol=1e-7)


def test_where_stages_have_no_outputs_a_missing_sequence_ends_the_update(model, monkeypatch):
    worker = harness.make_worker(model)
    monkeypatch.setattr(type(worker.engine), "all_have_outputs", False)
    with pytest.raises(RuntimeError, match="did not see; with pipeline stages it cannot infer them again"):
        harness.train(worker, harness.make_batch())
