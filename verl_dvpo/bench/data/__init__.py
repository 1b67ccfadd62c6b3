# SPDX-License-Identifier: Apache-2.0
"""The public sets of the papers' domains in verl's schema, their rewards, and labels by majority vote.

``schema.py`` says what a set is; ``mathematics.py``, ``knowledge.py``, ``dialogue.py`` and ``noisy.py`` describe
them, and ``registry.py`` lists them. ``sources.py`` reads files and the hub, ``prepare.py`` writes parquet files.
``answers.py`` and ``equivalence.py`` find and compare answers, ``reward.py`` is verl's reward function, and
``votes.py`` labels prompts by the answers of a model.
"""
