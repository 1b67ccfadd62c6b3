# SPDX-License-Identifier: Apache-2.0
"""Base of the settings in ``noise.*``: the types of fields and what every kind shares.

The description of a type says what is allowed; the errors of ``verl_dvpo.noise.config`` quote it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PREFIX = "noise"

Number = Annotated[float, Field(description="a finite number")]
Amount = Annotated[float, Field(ge=0.0, description="a finite number of at least 0")]
Share = Annotated[float, Field(ge=0.0, le=1.0, description="a number in [0, 1]")]
Name = Annotated[str, Field(min_length=1, description="a name, a string that is not empty")]
Scope = Annotated[
    Literal["sample", "response", "prompt"], Field(description="one of 'sample', 'response' and 'prompt'")
]
NameOrNull = Annotated[str | None, Field(min_length=1, description="a name, a string that is not empty, or null")]
Switch = Annotated[bool, Field(description="true or false")]


class Settings(BaseModel):
    """Reads fields strictly: no unknown name, no text for a number, no infinity; the result cannot be changed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class NoiseConfig(Settings):
    """Holds what all kinds of noise share.

    Attributes:
        seed: integer >= 0. Runs with equal seeds draw the same numbers for the same samples, whatever the kind and
            rate: the flips at rate 0.3 are among those at 0.5.
    """

    seed: Annotated[int, Field(ge=0, description="an integer of at least 0")] = 0
