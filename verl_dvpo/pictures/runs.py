# SPDX-License-Identifier: Apache-2.0
"""Reads what there is to draw of runs: what their critics wrote, their settings, and which runs belong together."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dvpo.pictures.curves import metrics_file
from verl_dvpo.saved.values import Dump, dump_files, read_dump

#: How studies name their runs: the last part is the seed.
SEED = re.compile(r"__s\d+$")


@dataclass(frozen=True)
class Run:
    """A run's folder, and what its critic wrote.

    Attributes:
        name: of the group that it belongs to.
        folder: of the run.
        dumps: by step.
    """

    name: str
    folder: Path
    dumps: tuple[Dump, ...] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those that the last file with some names, by their dotted names."""
        named = (dump.facts["settings"] for dump in reversed(self.dumps) if "settings" in dump.facts)
        return next(named, {})

    @property
    def has_metrics(self) -> bool:
        """True where verl's logger ``file`` wrote metrics."""
        return metrics_file(self.folder).is_file()


def group_runs(texts: Sequence[str]) -> dict[str, list[Path]]:
    """Turns the command's arguments into groups of folders, in order.

    ``NAME=FOLDER`` puts a folder, or all that a pattern with ``*`` matches, into the group NAME. A folder alone is a
    group of its own, but folders that differ in a last ``__s<seed>`` alone, as a study's do, are one.

    Raises:
        ValueError: a folder does not exist.
    """
    groups: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, pattern = ("", "", text) if Path(text).is_dir() else text.partition("=")
        folders = [Path(found) for found in sorted(glob.glob(pattern or name)) if Path(found).is_dir()]
        if not folders:
            raise ValueError(
                f"run is {text!r}; the folder of a run, or NAME=FOLDER, is allowed; there is no such folder"
            )
        for folder in folders:
            groups.setdefault(name if equals else _name(folder, groups), []).append(folder)
    return groups


def _name(folder: Path, groups: Mapping[str, Sequence[Path]]) -> str:
    whole = folder.resolve()
    stem = SEED.sub("", whole.name)
    if stem != whole.name or stem not in groups:
        return stem or str(whole)
    return f"{whole.parent.name}/{stem}"


def read_run(name: str, folder: Path, *, first_step: int = 0) -> Run:
    """Reads what a run's critic wrote from a step on.

    Raises:
        ValueError: one of the files is broken.
    """
    dumps = (read_dump(path) for path in dump_files(folder))
    return Run(name, folder, tuple(dump for dump in dumps if dump.step >= first_step))
