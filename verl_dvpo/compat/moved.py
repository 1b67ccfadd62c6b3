# SPDX-License-Identifier: Apache-2.0
"""Finds what has another name in another version of verl."""

from collections.abc import Callable
from typing import Any


def merge_context(loop: Any) -> Callable[..., Any]:
    """Returns the method of an agent loop that adds messages of others than the assistant to its tokens.

    Args:
        loop: an ``AgentLoopBase``. verl 0.9.1 calls the method ``ct_merge_context_msg``; 0.9.0 and main at the tested
            commit call it ``ct_merge_non_assistant_msg``.
    """
    method = getattr(loop, "ct_merge_context_msg", None)
    return method if method is not None else loop.ct_merge_non_assistant_msg
