# SPDX-License-Identifier: Apache-2.0
"""Freezes a study's hypotheses and settings at its first run, and refuses to go on with others.

    <out>/frozen/hypotheses.yaml  copy of the hypotheses file, to the byte
    <out>/frozen/study.yaml       what determines runs and analysis: the study without out and minutes_per_run
    <out>/frozen/frozen.json      the sha256 of both, when it was, and the git revision of the hypotheses file

A study without hypotheses is not frozen: its axes may grow.
"""

import difflib
import fcntl
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import yaml

from verl_dvpo.bench.common import write_json, write_text
from verl_dvpo.bench.study.config import Study
from verl_dvpo.bench.study.hypotheses import Hypotheses
from verl_dvpo.saved.facts import git

FOLDER = "frozen"
HYPOTHESES, STUDY, FACTS = "hypotheses.yaml", "study.yaml", "frozen.json"
#: Fields of a study that change neither a run nor the analysis.
_FREE = {"out", "minutes_per_run", "hypotheses"}


class StudyChangedError(ValueError):
    """Says that the hypotheses or settings of a study are others than at its first run.

    Attributes:
        diff: unified diff from the frozen text to the present one.
    """

    def __init__(self, message: str, diff: str) -> None:
        super().__init__(message)
        self.diff = diff


def check_frozen(study: Study) -> None:
    """Compares a study with what its first run froze.

    Raises:
        StudyChangedError: hypotheses or settings differ from the frozen ones, or were removed.
        ValueError: the study has ended runs that were made without hypotheses.
    """
    folder = study.out / FOLDER
    if (folder / FACTS).is_file():
        _compare(folder, _texts(study))
    elif study.hypotheses is not None:
        _refuse_late_hypotheses(study)


def freeze(study: Study) -> None:
    """Freezes a study with hypotheses at its first run; later, and without hypotheses, it only checks.

    Raises:
        ValueError: as ``check_frozen``.
    """
    if study.hypotheses is None:
        return check_frozen(study)
    folder = study.out / FOLDER
    (study.out / ".locks").mkdir(parents=True, exist_ok=True)
    with open(study.out / ".locks" / FOLDER, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that start together, one freezes
        check_frozen(study)
        if not (folder / FACTS).is_file():
            _write(folder, _texts(study), study.hypotheses)
    return None


def facts_of(folder: Path) -> dict[str, Any] | None:
    """Returns what ``frozen.json`` of a study's folder says; None for a study that is not frozen."""
    path = folder / FOLDER / FACTS
    return json.loads(path.read_text()) if path.is_file() else None


def study_text(study: Study) -> str:
    """Returns the part of a study that determines its runs and their analysis, as YAML without its comments."""
    content = study.model_dump(mode="json", exclude=_FREE, exclude_defaults=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _texts(study: Study) -> dict[str, str]:
    hypotheses = study.hypotheses
    if hypotheses is None:
        text = ""
    elif hypotheses.file is not None:
        text = hypotheses.file.read_text()
    else:
        text = yaml.safe_dump(hypotheses.model_dump(mode="json", exclude={"file"}), sort_keys=False)
    return {HYPOTHESES: text, STUDY: study_text(study)}


def _compare(folder: Path, texts: dict[str, str]) -> None:
    diff = "".join(
        line if line.endswith("\n") else line + "\n"
        for name, text in texts.items()
        for line in difflib.unified_diff(
            (folder / name).read_text().splitlines(keepends=True),
            text.splitlines(keepends=True),
            f"{FOLDER}/{name}",
            f"{name} now",
        )
    )
    if diff:
        raise StudyChangedError(
            f"study is changed since its first run, which froze its hypotheses and settings in {folder}; what was "
            "frozen is allowed; restore it, or choose another out",
            diff,
        )


def _refuse_late_hypotheses(study: Study) -> None:
    ended = sorted(path.parent.name for path in study.out.glob("runs/*/run.json"))
    if ended:
        raise ValueError(
            f"hypotheses is new to {study.out}, where {len(ended)} runs have ended, {ended[0]} among them; hypotheses "
            "are written before the first run; choose another out, or remove hypotheses"
        )


def _write(folder: Path, texts: dict[str, str], hypotheses: Hypotheses) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
    facts = {
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        "frozen": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hypotheses": _revision(hypotheses),
    }
    write_json(folder / FACTS, facts)  # last: without it nothing is frozen


def _revision(hypotheses: Hypotheses) -> dict[str, Any]:
    """Returns the hypotheses file's name, and the commit of its checkout if that holds the file as it is."""
    if hypotheses.file is None:
        return {"file": None, "commit": None, "committed": False}
    file = hypotheses.file
    is_tracked = git(file.parent, "ls-files", "--error-unmatch", file.name) is not None
    return {
        "file": file.name,
        "commit": git(file.parent, "rev-parse", "HEAD") if is_tracked else None,
        "committed": is_tracked and git(file.parent, "status", "--porcelain", "--", file.name) == "",
    }
