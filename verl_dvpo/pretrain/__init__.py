# SPDX-License-Identifier: Apache-2.0
"""Fits a critic of any family to saved rollouts, before a run. No verl."""
