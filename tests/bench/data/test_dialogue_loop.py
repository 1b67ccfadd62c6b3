# SPDX-License-Identifier: Apache-2.0
"""verl finds the dialogue's agent loop by the file beside the rows, and the loop finds the user of a row."""

import hydra
import yaml

from verl_dvpo.bench.data.dialogue import AGENT, ServiceGoal
from verl_dvpo.bench.data.dialogue_loop import ServiceDialogueAgentLoop
from verl_dvpo.bench.data.prepare import AGENTS


def test_the_agents_file_names_the_loop():
    (entry,) = yaml.safe_load(AGENTS)
    assert entry["name"] == AGENT
    assert hydra.utils.get_class(entry["_target_"]) is ServiceDialogueAgentLoop


def test_the_loop_finds_the_user_of_the_row():
    truth = ServiceGoal({"food": "thai", "day": "Friday"}, ("food",)).to_json()
    user = ServiceDialogueAgentLoop.find_user(None, "service_dialogue", truth)
    assert user.reply("ask: day") == "day: Friday"
    assert user.reply("done: food=thai; day=friday") is None
