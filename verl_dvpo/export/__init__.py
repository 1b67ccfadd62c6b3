# SPDX-License-Identifier: Apache-2.0
"""Critics outside training: a Hugging Face folder made of a run's checkpoint, and the model that loads it. No verl."""
