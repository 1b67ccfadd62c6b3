# SPDX-License-Identifier: Apache-2.0
"""The numbers of docs/results.md about the weights' first step, from the runs that are kept beside it."""

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_script_gives_the_page_s_numbers(tmp_path):
    with tarfile.open(ROOT / "docs" / "results" / "weights" / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    script = ROOT / "examples" / "studies" / "weights_act.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "weights")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "dvpo_weighted__heavy_prompt__one_answer__s0: step 12, score 0.702" in lines
    assert "dvpo_weighted: 8 runs, rank correlation -0.81, p 0.015" in lines
    assert lines[-1] == "ppo_gaussian_weighted: 8 runs, rank correlation -0.31, p 0.450"
    page = (ROOT / "docs" / "results.md").read_text()
    for number in ("−0.81 over eight seeds, p 0.015", "(−0.31, p 0.45)"):
        assert number in page
