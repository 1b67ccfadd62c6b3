# SPDX-License-Identifier: Apache-2.0
"""Holds the tasks that ship: their data, models and rewards."""
