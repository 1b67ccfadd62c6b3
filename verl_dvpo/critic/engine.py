# SPDX-License-Identifier: Apache-2.0
"""The part that all engines of the critic share: the family's head, and the samples that inference keeps.

Shape legend: B sequences, T response positions, L response tokens of a micro-batch laid end to end, L' a block of them,
D outputs of the head, S numbers kept per token, C numbers a token that the loss is made of.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from verl_dvpo.critic.checkpoints import ENGINE, refuse_other_engine
from verl_dvpo.critic.head import TwoLayerHead, ValueHead, build_head
from verl_dvpo.critic.packing import ResponseTokens
from verl_dvpo.families.registry import build_family

#: The key under which the engines are registered; verl's own value engine is ``value_model``.
MODEL_TYPE = "distributional_value_model"


class Reader(Protocol):
    """Reads the head's outputs for the worker: all response tokens of a micro-batch together, or blocks of them."""

    def decode(self, outputs: Tensor, micro_batch: TensorDict, places: slice) -> dict[str, Tensor]:
        """Reads a block's outputs (L', D) in inference: name -> (L', ...)."""

    def assemble(
        self, decoded: dict[str, Tensor], micro_batch: TensorDict, tokens: ResponseTokens
    ) -> dict[str, Tensor]:
        """Makes the model output of an inference pass from name -> (L, ...)."""

    def losses(self, outputs: Tensor, micro_batch: TensorDict, tokens: ResponseTokens, places: slice) -> Tensor:
        """Computes a block's losses (L', C) from its outputs (L', D); the first is what is minimised."""

    def reads_blocks(self) -> bool:
        """Tells whether the losses of this update may be computed block by block."""


class DistributionalEngine:
    """Stands before one of verl's engines among the bases of ours.

    ``model_config.value`` holds the family's settings. An engine takes the number of outputs and the head's first
    weights from the family, and knows nothing else of it.
    """

    #: Set by the worker; None returns the raw outputs, also in inference.
    reader: Reader | None = None
    model_config: Any
    _kept: Tensor | None = None

    @property
    def has_outputs(self) -> bool:
        """True where this rank computes the head's outputs; false on a pipeline stage before the last."""
        return True

    @property
    def all_have_outputs(self) -> bool:
        """True where every rank of the critic computes outputs."""
        return True

    def saved_facts(self) -> dict[str, Any]:
        """Returns what a checkpoint's manifest notes of the engine, for ``refuse_saved``."""
        return {ENGINE: "fsdp"}

    def refuse_saved(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Raises ValueError where a checkpoint with these facts in its manifest cannot be loaded into this engine."""
        refuse_other_engine(folder, facts, "fsdp")

    def _new_head(self, hidden_size: int) -> ValueHead | TwoLayerHead:
        settings = self.model_config.value
        return build_head(
            hidden_size,
            build_family(settings),
            seed=settings.head_seed,
            width=settings.head_width,
            activation=settings.head_activation,
        )

    def infer_batch(self, data: TensorDict, loss_function: Callable | None = None) -> dict[str, Any]:
        """Runs verl's inference pass; what the reader calls ``kept`` stays here, on every rank with outputs."""
        output = super().infer_batch(data, loss_function)  # type: ignore[misc]
        self._kept = output["model_output"].pop("kept", None) if self.has_outputs else None
        return output

    def take_kept(self) -> Tensor:
        """Hands over the jagged (B, T, S) of the last inference pass, once."""
        kept, self._kept = self._kept, None
        assert kept is not None, "infer_batch with a reader comes first"
        return kept

    def _block_reader(
        self, micro_batch: TensorDict, tokens: ResponseTokens, decoded: list[dict[str, Tensor]], *, split: bool
    ) -> Callable[[Tensor, slice], Tensor] | None:
        """Returns what the head does with each block of outputs; None where it hands them over.

        In inference each block adds to ``decoded`` what was read of it.

        Args:
            micro_batch: that the outputs belong to.
            tokens: of it.
            decoded: filled.
            split: whether ranks compute parts of these tokens and hand them to each other.
        """
        reader = self.reader
        if reader is None or self.model_config.value.tokens_per_block is None or not reader.reads_blocks():
            return None
        if torch.is_grad_enabled():
            return lambda outputs, places: reader.losses(outputs, micro_batch, tokens, places)
        if split:  # the reader adds up statistics, of all tokens on each rank of the group
            return None

        def decode(outputs: Tensor, places: slice) -> Tensor:
            decoded.append(reader.decode(outputs, micro_batch, places))
            return outputs[:, :0]

        return decode

    def _read_output(
        self, read: Tensor, micro_batch: TensorDict, tokens: ResponseTokens, decoded: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Makes the model output of what the head's reader returned, (L, C) in training, and of ``decoded``."""
        if torch.is_grad_enabled():
            return {"losses": torch.nested.nested_tensor_from_jagged(read, micro_batch["responses"].offsets())}
        assert self.reader is not None
        whole = {name: torch.cat([block[name] for block in decoded]) for name in decoded[0]}
        return self.reader.assemble(whole, micro_batch, tokens)

    def _model_output(self, outputs: Tensor, micro_batch: TensorDict, tokens: ResponseTokens) -> dict[str, Tensor]:
        """Makes the model output from (L, D): decoded in inference, jagged (B, T, D) as ``outputs`` in training."""
        if self.reader is not None and not torch.is_grad_enabled():
            decoded = self.reader.decode(outputs, micro_batch, slice(0, len(outputs)))
            return self.reader.assemble(decoded, micro_batch, tokens)
        return {"outputs": torch.nested.nested_tensor_from_jagged(outputs, micro_batch["responses"].offsets())}
