# SPDX-License-Identifier: Apache-2.0
"""The plugin and Ray as they are: a plugin that cannot be imported, a Ray that cannot start, and both when mended."""

import os
import shutil
from pathlib import Path

import pytest

from verl_dvpo.doctor.all import chosen
from verl_dvpo.doctor.checks import Machine, run_checks

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_a_broken_plugin_and_a_ray_that_cannot_start_are_found_and_work_when_mended(tmp_path):
    (tmp_path / "wrapt").mkdir()
    (tmp_path / "wrapt" / "__init__.py").write_text("raise ImportError('wrapt is broken')")
    environment = os.environ | {
        "VERL_PLATFORM": "cpu",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "RAY_TMPDIR": "/proc/no-such-folder",
    }
    ill = {line.name: line for line in run_checks(chosen(["plugin", "ray"]), Machine(environment=environment))}
    assert ill["plugin"].state == "problem"
    assert ill["plugin"].text == "verl does not know this package: ImportError: wrapt is broken"
    assert ill["ray"].state == "problem"
    assert "/proc/no-such-folder" in ill["ray"].text
    assert "RAY_TMPDIR must be a folder" in ill["ray"].fix
    shutil.rmtree(tmp_path / "wrapt")
    environment.pop("RAY_TMPDIR")
    well = {line.name: line for line in run_checks(chosen(["ray", "plugin in Ray"]), Machine(environment=environment))}
    assert {line.state for line in well.values()} == {"ok"}
    assert "with 32 CPUs and 16 GPUs, both logical" in well["ray"].text
    assert "estimators dvpo, flowrl; trainers dvpo_colocate_async" in well["plugin in Ray"].text
