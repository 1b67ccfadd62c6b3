# SPDX-License-Identifier: Apache-2.0
"""docs/doctor.md lists every check and every symptom with its fix, as the registries have them."""

from pathlib import Path

from verl_dvpo.doctor.checks import CHECKS
from verl_dvpo.doctor.document import checks_table, symptoms_table

PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()


def test_the_tables_are_those_of_the_registries():
    """Run ``python -m verl_dvpo.doctor.document`` and put its tables into the page."""
    assert checks_table() in PAGE
    assert symptoms_table() in PAGE


def test_every_check_says_what_to_do():
    for each in CHECKS.values():
        assert each.about, each.name
        assert each.remedy, each.name
        assert "\n" not in each.remedy
