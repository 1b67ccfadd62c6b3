# SPDX-License-Identifier: Apache-2.0
"""The public names of ``verl_dvpo`` exist, and importing the package alone stays light."""

import importlib
import pathlib
import subprocess
import sys

import pytest

import verl_dvpo

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(set(verl_dvpo.__all__) - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_the_one_of_its_module(name):
    value = getattr(verl_dvpo, name)
    assert value.__module__ == verl_dvpo._HOMES[name]
    assert value is getattr(importlib.import_module(verl_dvpo._HOMES[name]), name)
    assert name in dir(verl_dvpo)


def test_star_import_gives_every_public_name():
    names: dict[str, object] = {}
    exec("from verl_dvpo import *", names)
    assert set(verl_dvpo.__all__) <= set(names)


def test_import_is_light():
    """verl imports the package from ``verl/__init__.py``: neither torch nor verl may come with it."""
    code = (
        "import sys, verl_dvpo; verl_dvpo.__version__; dir(verl_dvpo); "
        "print([m for m in ('torch', 'verl', 'ray', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", "imported with verl_dvpo"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'dvpo_los'"):
        _ = verl_dvpo.dvpo_los


def test_package_is_typed():
    assert (ROOT / "verl_dvpo" / "py.typed").is_file()
