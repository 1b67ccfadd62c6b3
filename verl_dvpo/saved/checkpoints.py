# SPDX-License-Identifier: Apache-2.0
"""Keeps the last good checkpoint of a run and finds it again.

verl writes ``global_step_N/{actor,critic}/*.pt`` and ``global_step_N/data.pt``, and last the number of the step into
``latest_checkpointed_iteration.txt``. Three things can go wrong: a checkpoint is cut off where a process is killed; its
bytes change on the disk, which ``torch.load`` does not notice; and with room for one checkpoint verl removes the old
actor before the new critic is written.
"""

import logging
import re
import shutil
import zipfile
import zlib
from pathlib import Path

from verl_dvpo.saved.files import write_text
from verl_dvpo.saved.manifest import FILE, check_files, read_manifest

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
#: The parts of a checkpoint that verl writes on every backend that stores one file a rank.
RANK_FILE = re.compile(r"(?P<content>\w+)_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt")


def folder_of(folder: Path, step: int) -> Path:
    """The checkpoint of ``step`` in a run's folder of checkpoints."""
    return folder / f"global_step_{step}"


def saved_steps(folder: Path) -> list[int]:
    """Lists the steps that have a folder, whole or not, the latest first."""
    found = (re.fullmatch(r"global_step_(\d+)", path.name) for path in folder.glob("global_step_*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def latest(folder: Path) -> int | None:
    """Reads the step that verl would load; None where the tracker is absent or holds no number."""
    try:
        return int((folder / TRACKER).read_text())
    except (FileNotFoundError, ValueError):
        return None


def point_to(folder: Path, step: int) -> None:
    """Makes ``step`` the one that verl loads, in one move."""
    write_text(folder / TRACKER, str(step))


def problem(checkpoint: Path, *, critic: bool, read: bool = True) -> str:
    """Says why a checkpoint cannot be loaded; empty if it can.

    Args:
        checkpoint: a folder ``global_step_N``.
        critic: whether the run has a critic.
        read: read every file and compare it with its checksums; otherwise only look whether the files are there.
    """
    for part in ("actor", "critic") if critic else ("actor",):
        if not any((checkpoint / part).rglob("*")):
            return f"{checkpoint / part} is missing or empty"
        if missing := _missing_ranks(checkpoint / part):
            return missing
    if not (checkpoint / "data.pt").is_file():
        return f"{checkpoint / 'data.pt'} is missing, which is written last"
    if critic and (reason := _critic_problem(checkpoint / "critic", read=read)):
        return reason
    files = [*sorted((checkpoint / "actor").rglob("*.pt")), checkpoint / "data.pt"] if read else []
    return next(filter(None, map(_damage, files)), "")


def _critic_problem(part: Path, *, read: bool) -> str:
    """Says where the critic's files differ from their manifest, which lies with the files of rank 0.

    Files of ranks on other machines are not there to be compared.
    """
    of_rank_0 = [*part.glob("*_rank_0.pt"), *part.glob("model/huggingface/config.json")]  # FSDP's, and Megatron's
    if not (part / FILE).is_file() and not of_rank_0:
        return ""
    try:
        manifest = read_manifest(part, "checkpoint")
        here = [name for name in manifest.files if (part / name).is_file() or not RANK_FILE.fullmatch(name)]
        check_files(part, manifest, here, contents=read)
    except ValueError as error:
        return str(error)
    return ""


def _missing_ranks(part: Path) -> str:
    """Names a content that some ranks have in ``part`` and another lacks.

    Folders that are not shared hold the ranks of one machine, so only contents are compared, not the number of ranks.
    """
    ranks: dict[str, set[str]] = {}
    for path in part.glob("*.pt"):
        if match := RANK_FILE.fullmatch(path.name):
            ranks.setdefault(match["content"], set()).add(match["rank"])
    known = set().union(*ranks.values()) if ranks else set()
    for content, found in sorted(ranks.items()):
        if found != known:
            return f"{part} lacks the file {content} of rank {min(known - found, key=int)}"
    return ""


def _damage(file: Path) -> str:
    """Says what is wrong with a file that ``torch.save`` wrote: a zip archive with a checksum for each entry."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        return f"{file} cannot be read: {error}"
    return f"{file} is damaged: the checksum of {broken} is wrong" if broken else ""


def find(folder: Path, *, critic: bool, read: bool = True) -> tuple[int | None, list[str]]:
    """Looks for the latest checkpoint that loads whole, and changes nothing.

    Args:
        folder: of the checkpoints.
        critic: whether the run has a critic.
        read: as in `problem`.

    Returns:
        Its step, None where nothing was ever saved, and why each later one was passed over.

    Raises:
        ValueError: something was saved, and none of it can be loaded.
    """
    if not (folder / TRACKER).exists():
        return None, []
    pointed = latest(folder)
    reasons: list[str] = []
    for step in saved_steps(folder):
        if pointed is not None and step > pointed:
            continue  # never finished
        reason = problem(folder_of(folder, step), critic=critic, read=read)
        if not reason:
            return step, reasons
        reasons.append(reason)
    raise ValueError(
        f"trainer.default_local_dir is {str(folder)!r}; a folder with a checkpoint that loads is allowed: "
        f"{'; '.join(reasons) or 'it holds none'}; bring one back, or begin anew with trainer.resume_mode=disable"
    )


def choose(folder: Path, *, critic: bool, read: bool = True) -> int | None:
    """Points the tracker at the checkpoint that `find` finds, and returns its step; raises as it does."""
    step, reasons = find(folder, critic=critic, read=read)
    if step is not None and step != latest(folder):
        logger.warning("resuming from step %d: %s", step, "; ".join(reasons) or f"{TRACKER} held no number")
        point_to(folder, step)
    return step


def remove(checkpoint: Path, parts: tuple[str, ...]) -> None:
    """Removes parts of a checkpoint, and its folder if nothing but the place in the data is left."""
    for part in parts:
        shutil.rmtree(checkpoint / part, ignore_errors=True)
    if not any((checkpoint / part).exists() for part in ("actor", "critic")):
        shutil.rmtree(checkpoint, ignore_errors=True)
