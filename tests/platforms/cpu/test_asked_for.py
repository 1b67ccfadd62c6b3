# SPDX-License-Identifier: Apache-2.0
"""A run on the CPU is known as one before verl looks for an accelerator, so that nothing has to be replaced."""

import logging
import sys

import pytest
from test_configs import compose_config
from verl.plugin.platform import platform_manager

from verl_dvpo import preflight
from verl_dvpo.platforms.cpu.platform import PlatformCPU, asked_for


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("cpu", [], True),
        (" CPU ", [], True),
        (None, ["algorithm=ppo", "platform=cpu"], True),
        (None, ["+platform=cpu"], True),
        (None, ["platform=gpu"], False),
        (None, ["trainer.platform=cpu", "platform=cpu2"], False),
        ("nvidia", [], False),
    ],
)
def test_by_variable_or_by_override(name, arguments, expected, monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    if name is not None:
        monkeypatch.setenv("VERL_PLATFORM", name)
    assert asked_for(arguments) is expected


def test_the_command_line_decides_before_anything_is_composed(monkeypatch, caplog):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr(sys, "argv", ["main_ppo", "algorithm=dvpo", "platform=cpu"])
    monkeypatch.setattr(platform_manager, "_current_platform", None)
    caplog.set_level(logging.INFO)
    assert isinstance(platform_manager.get_platform(), PlatformCPU)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_checking_a_second_configuration_says_nothing(monkeypatch, caplog):
    """As a study does, once for each run."""
    monkeypatch.setattr(platform_manager, "_current_platform", PlatformCPU())
    caplog.set_level(logging.INFO)
    for _ in range(2):
        preflight.check(
            compose_config("dvpo_trainer", "platform=cpu", "algorithm=grpo", "trainer.v1.trainer_mode=sync")
        )
    assert [record.message for record in caplog.records if "platform" in record.message.lower()] == []
