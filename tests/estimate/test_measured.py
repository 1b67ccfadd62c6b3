# SPDX-License-Identifier: Apache-2.0
"""Bytes and operations against what a small model allocates and computes in this process."""

import pytest
import torch
from critic import harness
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from verl_dvpo.estimate.memory import cache_per_token, head_bytes, layer_activations, training_states
from verl_dvpo.estimate.shapes import Shape, read_shape
from verl_dvpo.estimate.speed import forward_flops, recomputed_flops, update_flops

ROWS, LENGTH = 2, 64


def tiny(attention: str, dtype: torch.dtype = torch.float32, **changes: int) -> tuple[Shape, Qwen3ForCausalLM]:
    sizes = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 96, "tie_word_embeddings": False, **changes,
    }  # fmt: skip
    config = Qwen3Config(**sizes, attn_implementation=attention)
    torch.manual_seed(0)
    return read_shape(config.to_dict(), "tiny"), Qwen3ForCausalLM(config).to(dtype)


def ids() -> torch.Tensor:
    return torch.randint(0, 96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def counted(model: Qwen3ForCausalLM, *, backward: bool) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(ids(), use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def test_operations_of_a_forward_pass_are_those_that_torch_counts():
    """Eager attention computes the hidden half as well; the rotary angles are what is not counted."""
    shape, model = tiny("eager")
    expected = forward_flops(shape, LENGTH, ROWS, shape.vocabulary, causal=False)
    assert counted(model, backward=False) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_an_update_are_those_that_torch_counts(checkpointing):
    shape, model = tiny("eager")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    forward = forward_flops(shape, LENGTH, ROWS, shape.vocabulary, causal=False)
    again = recomputed_flops(shape, LENGTH, ROWS, causal=False) if checkpointing else 0.0
    expected = update_flops(forward, again)
    assert counted(model, backward=True) == pytest.approx(expected, rel=2e-3)


def test_the_cache_is_as_large_as_that_of_transformers():
    shape, model = tiny("sdpa", torch.bfloat16)
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.nbytes for tensor in tensors) == ROWS * LENGTH * cache_per_token(shape)


def saved_bytes(model: Qwen3ForCausalLM) -> int:
    """Adds up the storages, each once, that autograd keeps for the backward pass; parameters are not among them."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = model.model(ids(), use_cache=False).last_hidden_state
    found = sum(storage.nbytes() for storage in kept.values())
    assert alive.requires_grad
    return found


def test_activations_of_a_layer_are_close_to_what_autograd_keeps():
    """Two layers more save what the formula says, within a seventh: a kernel that fuses saves less than it counts."""
    shape, two = tiny("sdpa", torch.bfloat16)
    _, four = tiny("sdpa", torch.bfloat16, num_hidden_layers=4)
    measured = (saved_bytes(four) - saved_bytes(two)) / 2 / (ROWS * LENGTH)
    assert measured == pytest.approx(layer_activations(shape), rel=0.15)


def test_weights_gradients_and_optimizer_of_a_critic_are_what_its_worker_allocates(tmp_path):
    """The worker of a run: its sharded weights, their gradients as the optimizer gets them, and AdamW's moments."""
    model = harness.save_model(tmp_path / "model")
    worker = harness.make_worker(model)
    engine = worker.engine
    gradients: list[int] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients.append(sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None))

    engine.optimizer.register_step_pre_hook(look)
    harness.infer(worker, harness.make_batch())
    harness.train(worker, harness.make_batch())
    shape = read_shape(AutoConfig.from_pretrained(model).to_dict(), "tiny")
    expected = training_states(shape.critic(2 * 5), shards=1)
    assert sum(parameter.nbytes for parameter in engine.module.parameters()) == expected.weights
    assert set(gradients) == {expected.gradients}
    moments = [state[name] for state in engine.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.nbytes for moment in moments) == expected.optimizer


def test_blocks_bound_the_outputs_of_the_head():
    shape, _ = tiny("sdpa")
    assert head_bytes(shape, 1000, 600, None) == 1000 * 64 * 4 + 1000 * 600 * 12
    assert head_bytes(shape, 1000, 600, 100) == 1000 * 64 * 4 + 100 * 600 * 12
    assert head_bytes(shape, 50, 600, 100) == head_bytes(shape, 50, 600, None)
