# SPDX-License-Identifier: Apache-2.0
"""Identifies a sample by content and place, which no other run, order or number of workers changes.

A sample's key is (data source, prompt, ground truth, response, training step, rollout number). verl draws ``uid`` anew
in every run, so only messages use it. Consequences:

- A run that is repeated or resumed corrupts the same response to the same prompt at the same step in the same way.
- Two responses of one group draw independently even where their texts are equal: they differ by rollout number.
- Two rows of the data with equal prompt and ground truth that meet in one step with equal responses share their draw.
- In asynchronous modes the step is the one at which the prompt was handed out; a prompt that a resumed run hands out
  again at the step of its first time draws the same.
"""

import json
from dataclasses import dataclass
from typing import Any

#: Key of ``extra_info`` under which the reward manager hands ``Origin`` to the wrapper, which removes it.
ORIGIN = "verl_dvpo_noise"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Says where a response comes from, which verl tells reward managers and not reward functions.

    Attributes:
        validate: whether it belongs to a validation.
        prompt: the messages, in canonical form (see ``canonical``).
        length: of the response, in tokens.
        step: training step at which the prompt was handed out; -1 where verl does not say.
        session: number of the response in its group, from 0.
        uid: verl's name of the prompt in this run, for messages.
        index: the data set's name of the row, for messages.
    """

    validate: bool
    prompt: str
    length: int
    step: int = -1
    session: int = 0
    uid: str = ""
    index: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Holds one response with everything that its reward may depend on."""

    data_source: str
    ground_truth: str
    response: str
    origin: Origin
    extra_info: dict[str, Any]

    def key(self, scope: str) -> tuple[str | int, ...]:
        """Returns the key of a draw: all that it depends on, beside the seed.

        Args:
            scope: ``sample``, ``response`` or ``prompt``, as in ``verl_dvpo.noise.base.Scope``.
        """
        prompt = (self.data_source, self.origin.prompt, self.ground_truth)
        if scope == "prompt":
            return ("prompt", *prompt)
        if scope == "response":
            return ("response", *prompt, self.response)
        assert scope == "sample", scope
        return ("sample", *prompt, self.response, self.origin.step, self.origin.session)

    def __str__(self) -> str:
        return (
            f"data source {self.data_source!r}, uid {self.origin.uid!r}, index {self.origin.index!r}, "
            f"step {self.origin.step}, rollout {self.origin.session}"
        )


def canonical(value: Any) -> str:
    """Returns a string that is equal for equal content: JSON with sorted keys, arrays as lists.

    A value that JSON cannot hold becomes the name of its type, so all images are alike.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__
