# SPDX-License-Identifier: Apache-2.0
"""The part that all engines of the critic share: the family's head, and the samples that inference keeps.

Shape legend: B sequences, T response positions, nnz all tokens of a micro-batch laid end to end, D outputs of the
head, S numbers kept per token.
"""

from collections.abc import Callable
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from verl_dvpo.critic.head import TwoLayerHead, ValueHead, build_head
from verl_dvpo.families.registry import build_family

#: The key under which the engines are registered; verl's own value engine is ``value_model``.
MODEL_TYPE = "distributional_value_model"

#: Turns a micro-batch's outputs into the model output of an inference pass: (outputs (nnz, D), micro_batch) -> output.
Decoder = Callable[[Tensor, TensorDict], dict[str, Tensor]]


class DistributionalEngine:
    """Stands before one of verl's engines among the bases of ours.

    ``model_config.value`` holds the family's settings. An engine takes the number of outputs and the head's first
    weights from the family, and knows nothing else of it.
    """

    #: Set by the worker; None returns the raw outputs, also in inference.
    decoder: Decoder | None = None
    model_config: Any
    _kept: Tensor | None = None

    @property
    def has_outputs(self) -> bool:
        """True where this rank computes the head's outputs; false on a pipeline stage before the last."""
        return True

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
        """Runs verl's inference pass; what the decoder calls ``kept`` stays here, on every rank with outputs."""
        output = super().infer_batch(data, loss_function)  # type: ignore[misc]
        self._kept = output["model_output"].pop("kept", None) if self.has_outputs else None
        return output

    def take_kept(self) -> Tensor:
        """Hands over the jagged (B, T, S) of the last inference pass, once."""
        kept, self._kept = self._kept, None
        assert kept is not None, "infer_batch with a decoder comes first"
        return kept
