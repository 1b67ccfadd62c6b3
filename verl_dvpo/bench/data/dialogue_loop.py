# SPDX-License-Identifier: Apache-2.0
"""Rolls the set service_dialogue out with its simulated user; ``prepare.py`` writes the file that registers it."""

from verl_dvpo.bench.data.dialogue import user
from verl_dvpo.bench.tasks.agent_loop import DialogueAgentLoop
from verl_dvpo.bench.tasks.task import User


class ServiceDialogueAgentLoop(DialogueAgentLoop):
    """Speaks with the user whose goal is the row's ground truth."""

    def find_user(self, source: str, truth: str) -> User:
        """Returns the user of a row; ``truth`` is the goal in JSON."""
        return user(truth)
