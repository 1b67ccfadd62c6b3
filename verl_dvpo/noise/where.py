# SPDX-License-Identifier: Apache-2.0
"""Decides on which samples noise acts, and at which rate: by training step, data source and prompt."""

import json
import re

from verl_dvpo.noise.base import PREFIX, NoiseConfig
from verl_dvpo.noise.draws import uniforms
from verl_dvpo.noise.kinds import HeavyTailed
from verl_dvpo.noise.sample import Sample


def acting(config: NoiseConfig, sample: Sample) -> NoiseConfig | None:
    """Returns the noise that acts on the sample: ``config``, the same with its rate elsewhere, or None.

    Raises:
        ValueError: ``config`` needs the sample's training step or its last user message, and there is none.
    """
    if not _in_steps(config, sample.origin.step):
        return None
    if _is_inside(config, sample):
        return config
    if isinstance(config, HeavyTailed) and config.rate_elsewhere > 0.0:
        return config.model_copy(update={"rate": config.rate_elsewhere})
    return None


def _is_inside(config: NoiseConfig, sample: Sample) -> bool:
    where = config.where
    if where.data_source is not None and sample.data_source not in where.data_source:
        return False
    if where.share is not None and uniforms(config.seed, ("where", *sample.key("prompt")))[0] >= where.share:
        return False
    return where.prompt_matches is None or re.search(where.prompt_matches, last_user_message(sample)) is not None


def last_user_message(sample: Sample) -> str:
    """Returns the text of the last message with role ``user``; parts of text are joined, images left out.

    Raises:
        ValueError: the prompt has no such message.
    """
    prompt = json.loads(sample.origin.prompt)
    for message in reversed(prompt if isinstance(prompt, list) else []):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            parts = content if isinstance(content, list) else []
            return "".join(str(part["text"]) for part in parts if isinstance(part, dict) and "text" in part)
    raise ValueError(
        f"the prompt is {sample.origin.prompt}; it must have a message of role 'user' with "
        f"{PREFIX}.where.prompt_matches or {PREFIX}.offset_pattern; mend the data, or set these to null"
    )


def _in_steps(config: NoiseConfig, step: int) -> bool:
    if config.from_step is None and config.until_step is None:
        return True
    if step < 0:
        raise ValueError(
            f"the training step of a sample is {step}; it must be known with {PREFIX}.from_step or "
            f"{PREFIX}.until_step; roll out with a trainer that passes global_steps on, or set both to null"
        )
    return (config.from_step is None or config.from_step <= step) and (
        config.until_step is None or step <= config.until_step
    )
