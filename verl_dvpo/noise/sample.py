# SPDX-License-Identifier: Apache-2.0
"""What identifies a sample: content and place, nothing that another run, order or number of workers would change.

A sample's key is (data source, prompt, ground truth, response, training step, rollout number): verl's ``uid`` is drawn
anew in every run, and is used in messages only. What follows from it:

- A run that is repeated or resumed corrupts the same response to the same prompt at the same step in the same way.
- Two responses of one group draw independently even where their texts are equal: they differ by rollout number.
- Two rows of the data with equal prompt and ground truth that meet in one step with equal responses share their draw.
- In asynchronous modes the step is the one at which the prompt was handed out; a prompt that a resumed run hands out
  again at the step of its first time draws the same.
"""

import json
from dataclasses import dataclass
from typing import Any

#: Where the reward manager leaves `Origin` for the wrapped reward, inside ``extra_info``; the user's never sees it.
ORIGIN = "verl_dvpo_noise"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a response comes from; what the reward manager knows and a reward function is not told.

    Attributes:
        validate: whether it belongs to a validation.
        prompt: the messages, in canonical form (see `canonical`).
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
    """One response with everything that its reward may depend on."""

    data_source: str
    ground_truth: str
    response: str
    origin: Origin
    extra_info: dict[str, Any]

    def key(self, scope: str) -> tuple[str | int, ...]:
        """What a draw of this scope depends on, beside the seed. Scopes: `verl_dvpo.noise.config.SCOPES`."""
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
    """A string that is equal for equal content: JSON with sorted keys; arrays as lists.

    What JSON cannot hold stands as the name of its type: two images are alike here.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__
