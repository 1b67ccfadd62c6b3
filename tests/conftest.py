# SPDX-License-Identifier: Apache-2.0
"""Without an accelerator every test runs on verl_dvpo's CPU platform; verl asks for it when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("TQ_NUM_THREADS", "2")
