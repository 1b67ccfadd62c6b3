# SPDX-License-Identifier: Apache-2.0
"""Limits torch to one thread: the tensors here are small, and more threads are slower."""

import torch

torch.set_num_threads(1)
