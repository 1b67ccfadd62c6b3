# SPDX-License-Identifier: Apache-2.0
"""The configuration reference has every field, with the default that Hydra reads and the type that is checked."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from site_pages import configuration, declared

from verl_dvpo.distributional.advantage_config import AdvantageConfig
from verl_dvpo.distributional.automatic import AutoConfig
from verl_dvpo.families.registry import family_class, family_names
from verl_dvpo.health import HealthConfig
from verl_dvpo.noise.kinds import KINDS

CONFIG = Path(__file__).parents[2] / "config"
FILES = sorted(file.relative_to(CONFIG).as_posix() for file in CONFIG.glob("*/*.yaml"))


def leaves(content, prefix=""):
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("path", FILES)
def test_every_field_of_a_file_has_its_default(path):
    text = (CONFIG / path).read_text()
    content = {name: value for name, value in (yaml.safe_load(text) or {}).items() if name != "defaults"}
    found = {field.path: field.value for field in configuration.fields_of(text) if field.value is not None}
    assert {name: yaml.safe_load(value) for name, value in found.items()} == dict(leaves(content))
    assert OmegaConf.create(text) is not None


def test_every_field_of_a_critic_is_on_the_page():
    """Names and types of the real classes, not of their source."""
    page = configuration.page()
    for name in family_names():
        real = {field.name for field in dataclasses.fields(family_class(name).Config)}
        read = declared.fields_of_class(family_class(name).Config.__name__)
        assert set(read) == real
        for field in real:
            assert f"| `critic.value.{field}`" in page or f"| `critic.value.{field}." in page, field


@pytest.mark.parametrize("cls", [AdvantageConfig, HealthConfig, AutoConfig])
def test_types_are_those_of_the_dataclasses(cls):
    read = declared.fields_of_class(cls.__name__)
    assert list(read) == [field.name for field in dataclasses.fields(cls)]
    for field in dataclasses.fields(cls):
        words = set(re.findall(r"\w+", read[field.name][0])) - {"or", "null", "auto", "length"}
        assert words <= set(re.findall(r"\w+", str(field.type))), field.name


def test_noises_are_those_that_are_registered():
    assert declared.noises() == {kind: model.__name__ for kind, model in KINDS.items()}
    assert declared.type_of("Flip", ["rate"]) == KINDS["flip"].model_fields["rate"].description
    assert declared.type_of("Flip", ["where", "share"]) == "a number in [0, 1], or null"


def test_a_row_by_hand():
    (row,) = [line for line in configuration.page().splitlines() if line.startswith("| `trainer.value.stall_seconds`")]
    assert row.startswith(
        "| `trainer.value.stall_seconds` | `1800` | float or null | Seconds without a sign of progress"
    )


def test_comments_and_sections_are_read():
    text = "# @package _global_\n\n# What it is.\n# Two lines.\na:\n\n  # First.\n  b: 1\n  c: 2\n\n  d: {e: 3}\n"
    assert configuration.heading_of(text) == "What it is. Two lines."
    assert [(field.path, field.value, field.comment) for field in configuration.fields_of(text)] == [
        ("a", None, "What it is. Two lines."),
        ("a.b", "1", "First."),
        ("a.c", "2", "First."),
        ("a.d", None, ""),
        ("a.d.e", "3", ""),
    ]
