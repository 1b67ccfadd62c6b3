# SPDX-License-Identifier: Apache-2.0
"""One thread: the models here are too small to share, and threads that wait for each other crawl on a busy machine."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
