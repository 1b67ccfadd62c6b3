# SPDX-License-Identifier: Apache-2.0
"""Without an accelerator every test runs on verl_dvpo's CPU platform; verl asks for it when it is first imported."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("TQ_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def loggers_speak() -> Iterator[None]:
    """Switches loggers on again after each test; a configuration of logging switches off those it does not name."""
    yield
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
