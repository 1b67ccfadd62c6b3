# SPDX-License-Identifier: Apache-2.0
"""The age of the samples that the critic learns from, worked out by hand."""

import pytest

from verl_dvpo.trainer import staleness


@pytest.mark.parametrize(
    ("begun", "version", "expected"),
    [
        ([4, 4, 4], 4, {"critic/staleness/mean": 0.0, "critic/staleness/max": 0.0}),  # the weights of now
        ([4, 2, 3], 4, {"critic/staleness/mean": 1.0, "critic/staleness/max": 2.0}),
        ([4, None, 1], 4, {"critic/staleness/mean": 1.5, "critic/staleness/max": 3.0}),
        ([None], 4, {}),
        ([], 4, {}),
    ],
)
def test_age_in_updates_of_the_policy(begun, version, expected):
    tags = [{} if each is None else {"min_global_steps": each} for each in begun]
    assert staleness(tags, version) == expected


def test_padding_does_not_count():
    """verl copies the tag of a real sample."""
    tags = [{"min_global_steps": 3}, {"min_global_steps": 1, "is_padding": True}]
    assert staleness(tags, 4) == {"critic/staleness/mean": 1.0, "critic/staleness/max": 1.0}
