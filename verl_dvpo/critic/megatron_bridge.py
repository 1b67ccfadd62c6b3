# SPDX-License-Identifier: Apache-2.0
"""Between Megatron-core and Hugging Face weights: mbridge for the backbone, a file of its own for the head."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from verl.utils.megatron_utils import unwrap_model

from verl_dvpo.saved.head_file import FILE as HEAD_FILE
from verl_dvpo.saved.head_file import copy_head, read_head, save_head


class BridgeWithHead:
    """mbridge's bridge, except that the last stage's output layer is ours.

    mbridge knows a vocabulary's layer and a layer of one output only, so it never sees ours: the layer is taken off
    while backbone weights are loaded or saved.

    Args:
        bridge: mbridge's, for the backbone.
        new_layer: builds the output layer from megatron-core's configuration.
        start: the folder that training starts from; any other must hold a head.
    """

    def __init__(self, bridge: Any, new_layer: Callable[[Any], nn.Module], *, start: str) -> None:
        self.inner = bridge
        self._new_layer = new_layer
        self._start = start

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_model(self, *, post_model_creation_callbacks: Sequence[Callable], **settings: Any) -> list[nn.Module]:
        """Builds mbridge's model, with our output layer in the place of its own."""
        callbacks = [*post_model_creation_callbacks, self._attach]
        return self.inner.get_model(post_model_creation_callbacks=callbacks, **settings)

    def _attach(self, model: Any, pre_process: bool, post_process: bool, config: Any, hf_config: Any) -> None:
        if post_process:
            model.output_layer = self._new_layer(config)
            model.register_forward_pre_hook(_note_layout, with_kwargs=True)

    def load_weights(self, models: list[nn.Module], weights_path: str, memory_efficient: bool = False) -> None:
        """Loads the backbone, then the head where the folder has one.

        Raises:
            ValueError: the folder holds a head of another shape, or none although training does not start from it.
        """
        with without_output_layers(models):
            self.inner.load_weights(models, weights_path, memory_efficient=memory_efficient)
        self._forget_vocabulary()
        folder = Path(weights_path)
        if (folder / HEAD_FILE).exists():
            for layer in output_layers(models):
                copy_head(layer.plain_state(), read_head(folder), folder)
        elif weights_path != self._start:
            raise ValueError(f"{weights_path} holds no {HEAD_FILE}; a critic resumes from a critic's checkpoint only")

    def _forget_vocabulary(self) -> None:
        """Takes the language model's output layer out of the index of the files that mbridge will save.

        mbridge writes a file once it has all of its weights, and this one never comes.
        """
        files = self.inner.safetensor_io
        (name,) = self.inner._weight_name_mapping_mcore_to_hf("output_layer.weight")
        for index in (files.index, files.origin_index.get("weight_map", {})):
            index.pop(name, None)

    def save_weights(self, models: list[nn.Module], weights_path: str, memory_efficient: bool = False) -> None:
        """Saves the backbone as a Hugging Face folder, and the head beside it."""
        with without_output_layers(models):
            self.inner.save_weights(models, weights_path, memory_efficient=memory_efficient)
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        if first and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            for layer in output_layers(models):
                save_head(Path(weights_path), layer.plain_state())
        torch.distributed.barrier()


def _note_layout(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Tells the output layer where verl has put each sequence of the micro-batch that comes."""
    packed = kwargs.get("packed_seq_params")
    model.output_layer.starts = None if packed is None else packed.cu_seqlens_q_padded[:-1]


def output_layers(models: Sequence[nn.Module]) -> list[Any]:
    """Returns the output layers among this rank's model chunks: one on the last stage, none elsewhere."""
    return [chunk.output_layer for chunk in _last_chunks(models)]


@contextmanager
def without_output_layers(models: Sequence[nn.Module]) -> Iterator[None]:
    """Takes the output layers off for a while."""
    chunks = _last_chunks(models)
    layers = [chunk.output_layer for chunk in chunks]
    for chunk in chunks:
        chunk.output_layer = nn.Identity()
    try:
        yield
    finally:
        for chunk, layer in zip(chunks, layers, strict=True):
            chunk.output_layer = layer


def _last_chunks(models: Sequence[nn.Module]) -> list[Any]:
    return [chunk for chunk in unwrap_model(list(models)) if getattr(chunk, "post_process", False)]
