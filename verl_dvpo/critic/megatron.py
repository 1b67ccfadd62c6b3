# SPDX-License-Identifier: Apache-2.0
"""The critic on Megatron-core: verl's value engine with one fp32 head of D outputs on the last pipeline stage.

Parallelism, packing, schedules, the optimizer and checkpoints are verl's. Three things differ: the last stage's output
layer, the bridge to Hugging Face weights, which leaves that layer to us, and outputs of (tokens, D).

Shape legend: B sequences, T response positions, L response tokens of a micro-batch laid end to end, s positions of this
rank's part of the sequence, b sequences side by side, H hidden size, D outputs of the head.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from tensordict import TensorDict
from torch import Tensor, nn
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithValueHead

from verl_dvpo.critic.engine import MODEL_TYPE, DistributionalEngine
from verl_dvpo.critic.head import TwoLayerHead, ValueHead
from verl_dvpo.critic.megatron_bridge import BridgeWithHead
from verl_dvpo.critic.packing import ResponseTokens


class OutputLayer(ValueHead):
    """A value head in the place of GPTModel's output layer: every tensor-parallel rank holds the whole head.

    Its last layer's weight is ``output_layer.weight``, a name that megatron-core's sharded state needs. A two-layer
    head's first layer is the child ``hidden``.

    Args:
        head: taken over, not copied.
        sequence_parallel: each rank computes its part of the sequence, and the outputs are gathered.
    """

    def __init__(self, head: ValueHead | TwoLayerHead, *, sequence_parallel: bool) -> None:
        last = head.out if isinstance(head, TwoLayerHead) else head
        super().__init__(last.in_features, last.out_features, device="meta")
        self.weight, self.bias = last.weight, last.bias
        self.hidden = head.hidden if isinstance(head, TwoLayerHead) else None
        self.activation = head.activation if isinstance(head, TwoLayerHead) else None
        self.sequence_parallel = sequence_parallel
        for parameter in self.parameters():
            # Each rank then sees a part of the tokens, and megatron-core adds the gradients over the ranks.
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """(s, b, H) -> (whole sequence, b, D, 1) in fp32, and no bias, as GPTModel calls its output layer.

        verl drops the last axis of a value model's outputs.
        """
        if self.hidden is not None and self.activation is not None:
            hidden = self.activation(self.hidden(hidden))
        outputs = super().forward(hidden)
        if self.sequence_parallel:
            # Every rank computes the whole loss, so that gradients are split on the way back, not added.
            outputs = gather_from_sequence_parallel_region(outputs, tensor_parallel_output_grad=False)
        return outputs.unsqueeze(-1), None

    def _apply(self, fn: Callable, recurse: bool = True) -> "OutputLayer":
        """Moves with the model, but stays fp32 where Float16Module casts the model."""

        def keep_fp32(tensor: Tensor) -> Tensor:
            sample = fn(tensor.new_empty(0))
            return fn(tensor) if sample.dtype == tensor.dtype else tensor.to(sample.device)

        return super()._apply(keep_fp32, recurse)

    def plain_state(self) -> dict[str, Tensor]:
        """Returns the weights under the names of the head that was taken over."""
        prefix = "out." if self.hidden is not None else ""
        own = {f"{prefix}{name}": tensor for name, tensor in (("weight", self.weight), ("bias", self.bias))}
        first = {} if self.hidden is None else {f"hidden.{n}": t for n, t in self.hidden.named_parameters()}
        return {name: tensor.detach() for name, tensor in (own | first).items()}


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device="cuda")
class MegatronDistributionalEngine(DistributionalEngine, MegatronEngineWithValueHead):
    """verl's Megatron engine around a backbone with a head of ``family.num_outputs`` outputs."""

    def __init__(self, model_config: Any, *args: Any, **kwargs: Any) -> None:
        model_config.model_type = "value_model"  # by this name verl knows that there is no language model's head
        super().__init__(model_config, *args, **kwargs)

    @property
    def has_outputs(self) -> bool:
        return parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    @property
    def all_have_outputs(self) -> bool:
        return parallel_state.get_pipeline_model_parallel_world_size() == 1

    def _build_tf_config(self) -> None:
        super()._build_tf_config()
        self.bridge = BridgeWithHead(self.bridge, self._new_output_layer, start=self.model_config.local_path)

    def _new_output_layer(self, config: Any) -> OutputLayer:
        return OutputLayer(self._new_head(config.hidden_size), sequence_parallel=config.sequence_parallel)

    def _build_optimizer(self) -> Any:
        optimizer = super()._build_optimizer()
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if hasattr(part, "model_param_group_index_map"):
                put_fp32_first(part.model_param_group_index_map)
        return optimizer

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Loads a checkpoint; without gradients, since megatron-core writes into views of fp32 parameters."""
        with torch.no_grad():
            super().load_checkpoint(*args, **kwargs)

    def prepare_model_outputs(self, output: Any, data: TensorDict) -> dict[str, Tensor]:
        """The head's outputs at response tokens as a jagged tensor (B, T, D); decoded in inference.

        Args:
            output: jagged (B, sequence, D).
            data: the micro-batch.
        """
        tokens = ResponseTokens.of(data)
        return self._model_output(output.values()[tokens.states], data, tokens)

    def postprocess_micro_batch_func(
        self, output: Any, data: Any, forward_only: bool, loss_function: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """verl's loss of one micro-batch; in training its outputs, (L, D) of each micro-batch, are not kept."""
        result = super().postprocess_micro_batch_func(output, data, forward_only, loss_function, *args, **kwargs)
        if not forward_only:
            result[-1]["model_output"] = {}
        return result


def put_fp32_first(index: dict[nn.Parameter, tuple[int, int]]) -> None:
    """Numbers the parameters of each group as megatron-core's distributed optimizer holds them: fp32 ones first.

    megatron-core 0.16.1 counts them as they lie in its gradient buffers, but then lists the fp32 ones before the
    others, so that beside a half-precision backbone the states of the head and of a norm would be saved as each
    other's. Training does not use the numbers.

    Args:
        index: parameter -> (group, place in it); changed in place.
    """
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter, (group, _) in index.items():
        groups.setdefault(group, []).append(parameter)
    for group, parameters in groups.items():
        ordered = sorted(parameters, key=lambda parameter: parameter.dtype != torch.float32)
        index.update({parameter: (group, place) for place, parameter in enumerate(ordered)})
