# SPDX-License-Identifier: Apache-2.0
"""The versions of verl that this package was tested with; see docs/support.md for what was run."""

import importlib.metadata
from typing import Any

#: Version of verl -> the source that was tested.
SUPPORTED = {
    "0.9.0": "the release",
    "0.9.1": "the release",
    "0.10.0.dev0": "main at commit 1dda039b9c6311889a9c9a26040677e1254814f9 of 2026-08-22",
}

#: Set to 1, it lets a version outside the table start; for trying a new one.
OVERRIDE_ENV = "VERL_DVPO_ANY_VERL"


def installed() -> str:
    """Returns the version of the installed verl."""
    return importlib.metadata.version("verl")


def lacks_agents(config: Any) -> set[str]:
    """Names the agent loops of ours that the installed verl cannot run with ``config``.

    verl 0.9.0 gives an agent loop the means to join turns only where ``data.continuous_token.enable`` is true; later
    versions always do.
    """
    if installed() != "0.9.0" or config.data.get("continuous_token", {}).get("enable", False):
        return set()
    return {"dialogue_agent"}


def fitting() -> str:
    """Says which versions fit."""
    named = [version if source == "the release" else f"{version} ({source})" for version, source in SUPPORTED.items()]
    return f"this verl-dvpo fits {', '.join(named)}"
