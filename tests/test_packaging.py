# SPDX-License-Identifier: Apache-2.0
"""A wheel holds everything that a checkout has."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_every_package_is_listed():
    tomllib = pytest.importorskip("tomllib") if sys.version_info >= (3, 11) else pytest.importorskip("tomli")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in ROOT.glob("verl_dvpo/**/__init__.py")
        if "__pycache__" not in file.parts
    }
    assert listed == found | {"verl_dvpo.config"}
