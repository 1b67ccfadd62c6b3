# SPDX-License-Identifier: Apache-2.0
"""The head computes response tokens only; in blocks nothing changes but the memory that outputs take."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from verl.workers.config.model import HFModelConfig  # noqa: F401  (verl's engines are registered)

from critic import harness
from verl_dvpo.critic.head import TwoLayerHead, ValueHead
from verl_dvpo.critic.head_call import HeadCall, Parts


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("blocks") / "model")


def seen_of(model: str, **settings) -> dict:
    """Values, metrics and gradients of two updates."""
    torch.manual_seed(0)  # of adapters
    worker = harness.make_worker(model, **settings)
    gradients = harness.capture_gradients(worker)
    batch = harness.make_batch()
    seen: dict = {"values": [], "metrics": [], "gradients": []}
    for step in (1, 2):
        seen["values"].append(harness.infer(worker, batch)["values"].values())
        metrics = harness.train(worker, batch, step=step)
        seen["metrics"].append(
            {name: value for name, value in metrics.items() if "perf" not in name and "mfu" not in name}
        )
        seen["gradients"].append(dict(gradients))
    return seen


def numbers(metrics: dict) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in metrics.items()
        if not name.startswith(("timing", "memory", "perf"))
    }


CASES = {
    "linear": {},
    "two layers": {"value": {"head_width": 8}},
    "padded": {"use_remove_padding": False},
    "adapters": {"lora_rank": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "checkpointed backbone": {"enable_gradient_checkpointing": True},
    "sampled targets": {"value": {"target": "sample_replacement", "levels": "midpoint", "kappa": 0.0}},
    "flow": {"value": {"family": "value_flow", "num_heads": None, "num_quantiles": None}},
    "on the cpu": {"value": {"keep_on": "cpu"}},
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_change_nothing(case, model):
    settings = CASES[case]
    value = settings.get("value", {})
    whole = seen_of(model, **settings)
    blocks = seen_of(model, **{**settings, "value": {**value, "tokens_per_block": 3}})
    for step, tolerance in enumerate(
        (1e-6, 1e-4)
    ):  # Adam enlarges what rounding leaves of a gradient that is almost zero
        torch.testing.assert_close(blocks["values"][step], whole["values"][step], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            numbers(blocks["metrics"][step]), numbers(whole["metrics"][step]), rtol=1e-5, atol=1e-7
        )
        scale = max(gradient.abs().max().item() for gradient in whole["gradients"][step].values())
        assert scale > 0
        torch.testing.assert_close(
            blocks["gradients"][step], whole["gradients"][step], rtol=1e-5, atol=tolerance * scale
        )


class LargestOutput(TorchDispatchMode):
    """Notes the most elements that a tensor with D columns had."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs, self.most = outputs, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() >= 2 and result.shape[-1] == self.outputs:
            rows = result.numel() // self.outputs
            self.most = max(self.most, rows)
        return result


@pytest.mark.parametrize(("block", "most"), [(None, None), (17, 17)])
def test_rows_of_outputs_in_memory(block, most, model):
    """23 outputs, a number that no other tensor of the model has but the head's weights, whose 16 rows are fewer."""
    worker = harness.make_worker(
        model,
        value={"num_heads": 1, "num_quantiles": 23, "tokens_per_block": block},
        engine={"micro_batch_size_per_gpu": 8, "infer_micro_batch_size_per_gpu": 8},
    )
    batch = harness.make_batch()
    responses, everything = (batch[name].values().shape[0] for name in ("responses", "input_ids"))
    assert everything > responses > 23
    calls = []
    worker.engine._head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    harness.infer(worker, batch)
    harness.train(worker, batch)
    if block is None:
        assert [shape[0] for shape in calls] == [responses, responses], "prompts are left out"
    head = worker.engine._head
    head.call = HeadCall(
        torch.arange(responses), read=lambda outputs, places: outputs.sum(-1, keepdim=True), block=block
    )
    hidden = torch.randn(1, everything, 16, requires_grad=True)
    head.unshard()
    with LargestOutput(23) as noted:
        head.call(head.outputs, hidden).sum().backward()
    assert noted.most == (most or responses)


@pytest.mark.parametrize("head", [ValueHead(4, 6), TwoLayerHead(4, 5, 6, "tanh")], ids=["linear", "two layers"])
@pytest.mark.parametrize("block", [None, 1, 2, 5, 100])
def test_a_call_against_a_loop(head, block):
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 4, requires_grad=True)
    states = torch.tensor([0, 3, 4, 9, 13])
    weights = torch.randn(8)
    seen = []

    def read(outputs, places):
        seen.append(places)
        return (outputs.square() * weights[places, None]).sum(-1, keepdim=True)

    head.call = HeadCall(states, first=2, read=read, block=block)
    (got,) = torch.autograd.grad(head(hidden).sum(), hidden)
    head.call = None

    expected = torch.zeros_like(hidden)
    for place, state in enumerate(states.tolist()):
        row, column = divmod(state, 7)
        leaf = hidden.detach()[row, column].requires_grad_()
        (head(leaf).square().sum() * weights[place + 2]).backward()
        expected[row, column] = leaf.grad
    torch.testing.assert_close(got, expected)
    assert seen[0].start == 2
    assert max(each.stop for each in seen) == 7


@pytest.mark.parametrize("block", [None, 2])
def test_a_call_without_a_token(block):
    head = ValueHead(4, 6)
    head.call = HeadCall(torch.zeros(0, dtype=torch.int64), read=lambda outputs, places: outputs[:, :2], block=block)
    assert head(torch.randn(1, 3, 4)).shape == (0, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_of_a_sequence_come_back_in_order(size):
    """What gathering does is done here by hand: parts of equal length, one after the other."""
    states = torch.tensor([1, 2, 3, 5, 6, 11])
    hidden = torch.arange(12.0)
    parts_of = [Parts.of(states, 12, size, rank) for rank in range(size)]
    handed, firsts = [], []
    for rank, share in enumerate(parts_of):
        own, first = share.own(states)
        part = hidden[rank * 12 // size : (rank + 1) * 12 // size]
        handed.append(share.padded(part[own].unsqueeze(-1)))
        firsts.append(first)
    assert len({len(each) for each in handed}) == 1
    joined = parts_of[0].joined(torch.cat(handed))
    assert joined[:, 0].tolist() == states.tolist()
    assert firsts == [int((states < rank * 12 // size).sum()) for rank in range(size)]
