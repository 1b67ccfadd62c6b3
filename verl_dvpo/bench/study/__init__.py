# SPDX-License-Identifier: Apache-2.0
"""Runs studies, a matrix of runs through verl's ``main_ppo``, and reports on them with confidence intervals."""
