# SPDX-License-Identifier: Apache-2.0
"""Estimates memory and time of a run from its configuration and the model's ``config.json`` alone: ``verl-dvpo estimate``.

``shapes`` counts parameters, ``memory`` bytes, ``speed`` floating-point operations and seconds; ``run`` reads them off a
configuration. Nothing here imports verl, Ray or vLLM, and only the size of the critic's head imports torch. Formulas and
their sources: docs/estimate.md.
"""
