# SPDX-License-Identifier: Apache-2.0
"""The age of the samples that the critic learns from, worked out by hand."""

import pytest

from verl_dvpo.trainer import staleness


@pytest.mark.parametrize(
    ("begun", "version", "expected"),
    [
        ([4, 4, 4], 4, {"critic/staleness/mean": 0.0, "critic/staleness/max": 0.0}),  # the weights of now
        ([4, 2, 3], 4, {"critic/staleness/mean": 1.0, "critic/staleness/max": 2.0}),
        ([4, None, 1], 4, {"critic/staleness/mean": 1.5, "critic/staleness/max": 3.0}),  # padding has no version
        ([None], 4, {}),
        ([], 4, {}),
    ],
)
def test_age_in_updates_of_the_policy(begun, version, expected):
    tags = [{} if each is None else {"min_global_steps": each} for each in begun]
    assert staleness(tags, version) == expected
