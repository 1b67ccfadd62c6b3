# SPDX-License-Identifier: Apache-2.0
"""Gathers what of a study belongs into a repository: report, tables, figures and frozen hypotheses, no run's files."""

import shutil
from pathlib import Path

from verl_dvpo.bench.common import write_text
from verl_dvpo.bench.study.frozen import FACTS, FOLDER, study_text
from verl_dvpo.bench.study.report import write_report
from verl_dvpo.bench.study.results import study_in

#: Bytes that a folder of results may have.
LARGEST = 5 * 2**20


def collect(folder: str | Path, out: str | Path) -> list[Path]:
    """Writes a study's report into ``out``, with its settings and frozen hypotheses, and returns the files there.

    Raises:
        ValueError: there is no study with a finished run, ``out`` holds something else, or the files are too large.
    """
    folder, out = Path(folder), Path(out)
    study = study_in(folder)
    if out.is_dir() and any(out.iterdir()) and not (out / "report.md").is_file():
        raise ValueError(
            f"out is {str(out)!r}; a folder that is new, empty or holds an earlier report is allowed; choose another"
        )
    write_report(folder, out)
    write_text(out / "study.yaml", study_text(study))
    if (folder / FOLDER / FACTS).is_file():
        shutil.copytree(folder / FOLDER, out / FOLDER, dirs_exist_ok=True)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if size > LARGEST:
        raise ValueError(
            f"out is {str(out)!r}; at most {LARGEST // 2**20} MiB are allowed, its files have {size / 2**20:.1f}; the "
            f"largest is {max(files, key=lambda path: path.stat().st_size).name}; make the study's test_freq larger"
        )
    return files
