# SPDX-License-Identifier: Apache-2.0
"""Studies: a matrix of runs through verl's ``main_ppo``, and a report with confidence intervals on what came of it."""
