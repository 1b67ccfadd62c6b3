# SPDX-License-Identifier: Apache-2.0
"""The critic on Megatron-core: verl's value engine with one fp32 head of D outputs on the last pipeline stage.

Parallelism, packing, schedules, the optimizer and checkpoints are verl's. Three things differ: the last stage's output
layer, the bridge to Hugging Face weights, which leaves that layer to us, and outputs, which are computed for response
tokens only, D of each.

Shape legend: B sequences, T response positions, L response tokens of a micro-batch laid end to end, D outputs of the
head.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils.device import get_device_id
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithValueHead

from verl_dvpo.critic.engine import MODEL_TYPE, DistributionalEngine
from verl_dvpo.critic.megatron_bridge import BridgeWithHead, output_layers
from verl_dvpo.critic.megatron_config import refuse_saved, saved_facts
from verl_dvpo.critic.megatron_head import MicroBatchCall, OutputLayer
from verl_dvpo.critic.packing import ResponseTokens


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

    def saved_facts(self) -> dict[str, Any]:
        return saved_facts(self.engine_config)

    def refuse_saved(self, folder: Path, facts: Mapping[str, Any]) -> None:
        refuse_saved(folder, facts, self.engine_config, self.checkpoint_config.load_contents)

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

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: Any,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Any,
    ) -> tuple[Any, Callable]:
        """Runs verl's pass of one micro-batch, and tells the head which states to compute: those of response tokens.

        With context parallelism verl gathers outputs of whole sequences over the ranks, and the head computes them all.
        """
        layers = [] if self.engine_config.context_parallel_size > 1 else output_layers([model])
        own = {
            "logits_processor_func": logits_processor_func,
            "postprocess_micro_batch_func": postprocess_micro_batch_func,
        }
        if not layers:
            return super().forward_step(batch_iter, model, **own)
        micro_batch = next(batch_iter).to(get_device_id())
        (layer,) = layers
        asked = layer.asked = self._asked(micro_batch, split=layer.sequence_parallel)
        try:
            _, finish = super().forward_step(iter([micro_batch]), model, **own)
        finally:
            layer.asked = None
        return asked, finish

    def _asked(self, micro_batch: TensorDict, *, split: bool) -> MicroBatchCall:
        tokens = ResponseTokens.of(micro_batch)
        asked = MicroBatchCall(tokens, tokens.in_sequences(micro_batch), None, None)
        asked.read = self._block_reader(micro_batch, tokens, asked.decoded, split=split)
        asked.block = None if asked.read is None else self.model_config.value.tokens_per_block
        return asked

    def prepare_model_outputs(  # type: ignore[override]
        self, output: MicroBatchCall | Tensor, data: TensorDict
    ) -> dict[str, Tensor]:
        """Returns outputs at response tokens, jagged (B, T, D), or what was read of them; in inference decoded.

        Args:
            output: of ``forward_step``; where the head computed whole sequences, its outputs, jagged (B, sequence, D).
            data: the micro-batch.
        """
        if isinstance(output, Tensor):
            tokens = ResponseTokens.of(data)
            return self._model_output(output.values()[tokens.states], data, tokens)
        assert output.computed is not None, "the last stage computes"
        if output.read is None:
            return self._model_output(output.computed, data, output.tokens)
        return self._read_output(output.computed, data, output.tokens, output.decoded)

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
