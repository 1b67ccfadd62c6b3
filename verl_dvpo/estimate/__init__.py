# SPDX-License-Identifier: Apache-2.0
"""Estimates memory and time of a run from its configuration and its models' ``config.json``: ``verl-dvpo estimate``.

``shapes`` counts parameters, ``memory`` bytes, ``speed`` operations and seconds; ``settings`` reads a configuration,
and ``result`` puts them together. Nothing here imports verl, Ray or vLLM; the size of the critic's head needs torch.
Formulas and their sources: docs/estimate.md.
"""
