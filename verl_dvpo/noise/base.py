# SPDX-License-Identifier: Apache-2.0
"""Base of the settings in ``noise.*``: the types of fields and what every kind shares.

The description of a type says what is allowed; the errors of ``verl_dvpo.noise.config`` quote it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PREFIX = "noise"


def _compiles(pattern: str | None) -> str | None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"it must be a regular expression that compiles, and re says: {error}") from error
    return pattern


Number = Annotated[float, Field(description="a finite number")]
Amount = Annotated[float, Field(ge=0.0, description="a finite number of at least 0")]
Share = Annotated[float, Field(ge=0.0, le=1.0, description="a number in [0, 1]")]
Name = Annotated[str, Field(min_length=1, description="a name, a string that is not empty")]
ShareOrNull = Annotated[float | None, Field(ge=0.0, le=1.0, description="a number in [0, 1], or null")]
NumberOrNull = Annotated[float | None, Field(description="a finite number, or null")]
StepOrNull = Annotated[int | None, Field(ge=0, description="an integer of at least 0, or null")]
Scope = Annotated[
    Literal["sample", "response", "prompt"], Field(description="one of 'sample', 'response' and 'prompt'")
]
NameOrNull = Annotated[str | None, Field(min_length=1, description="a name, a string that is not empty, or null")]
Pattern = Annotated[str | None, AfterValidator(_compiles), Field(description="a regular expression, or null")]
Switch = Annotated[bool, Field(description="true or false")]


class Settings(BaseModel):
    """Reads fields strictly: no unknown name, no text for a number, no infinity; the result cannot be changed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Where(Settings):
    """Chooses the samples on which noise acts; a sample must pass every condition that is not null.

    Attributes:
        prompt_matches: regular expression, searched in the text of the prompt's last user message.
        data_source: names; the sample's ``data_source`` must be one of them.
        share: share in [0, 1] of the prompts, chosen by a hash of ``seed`` and the prompt: the same ones in the whole
            run, and those of a smaller share are among those of a larger one.
    """

    prompt_matches: Pattern = None
    data_source: Annotated[
        tuple[str, ...] | None, Field(strict=False, min_length=1, description="a list of names, or null")
    ] = None
    share: ShareOrNull = None


class Correction(Settings):
    """Repairs noisy rewards before the algorithm sees them; ``verl_dvpo.noise.correction`` has the equations.

    Attributes:
        kind: ``none``, ``backward``, ``forward``, ``clip`` or ``majority``.
        false_positive: share in [0, 1] of the wrong responses that pass; null takes the noise's own, where it is
            known. For ``backward``.
        false_negative: share in [0, 1] of the right responses that fail; null as above. For ``backward`` and
            ``forward``.
        low: lowest reward of ``clip``; null takes ``noise.low``.
        high: highest reward of ``clip``; null takes ``noise.high``.
        answer_key: key in the reward function's dict with the response's extracted answer, for ``majority``; without
            it the whole response is its answer.
        answer_pattern: regular expression, searched in the response; its first group, or else the whole match, is the
            answer in place of ``answer_key``, and a response without a match has none. For ``majority``.
    """

    kind: Annotated[
        Literal["none", "backward", "forward", "clip", "majority"],
        Field(description="one of 'none', 'backward', 'forward', 'clip' and 'majority'"),
    ] = "none"
    false_positive: ShareOrNull = None
    false_negative: ShareOrNull = None
    low: NumberOrNull = None
    high: NumberOrNull = None
    answer_key: Name = "pred"
    answer_pattern: Pattern = None

    @field_validator("false_positive", "false_negative", "low", "high", "answer_pattern")
    @classmethod
    def _used(cls, value: float | str | None, info: ValidationInfo) -> float | str | None:
        kind: Any = info.data.get("kind", "none")
        users = {
            "false_positive": ("backward",),
            "false_negative": ("backward", "forward"),
            "low": ("clip",),
            "high": ("clip",),
            "answer_pattern": ("majority",),
        }[str(info.field_name)]
        if value is not None and kind not in users:
            raise ValueError(f"it must be null with {PREFIX}.correction.kind={kind}, which does not use it")
        return value


class NoiseConfig(Settings):
    """Holds what all kinds of noise share; by itself, clean rewards.

    Attributes:
        seed: integer >= 0. Runs with equal seeds draw the same numbers for the same samples, whatever the kind and
            rate: the flips at rate 0.3 are among those at 0.5.
        low: reward of a wrong response.
        high: reward of a right response, above ``low``.
        where: samples on which the noise acts; others stay clean.
        from_step: first training step at which it acts; verl counts from 1; null: from the start.
        until_step: last training step at which it acts; null: to the end.
        correction: what is done against it.
    """

    seed: Annotated[int, Field(ge=0, description="an integer of at least 0")] = 0
    low: Number = 0.0
    high: Number = 1.0
    where: Annotated[Where, Field(description="fields, as in noise.where.share=0.5")] = Where()
    from_step: StepOrNull = None
    until_step: StepOrNull = None
    correction: Annotated[Correction, Field(description="fields, as in noise.correction.kind=clip")] = Correction()

    @field_validator("high")
    @classmethod
    def _above_low(cls, high: float, info: ValidationInfo) -> float:
        if "low" in info.data and not info.data["low"] < high:
            raise ValueError(f"it must be above {PREFIX}.low, which is {info.data['low']}")
        return high

    @field_validator("until_step")
    @classmethod
    def _not_before_its_start(cls, until: int | None, info: ValidationInfo) -> int | None:
        start = info.data.get("from_step")
        if until is not None and start is not None and until < start:
            raise ValueError(f"it must be at least {PREFIX}.from_step, which is {start}")
        return until
