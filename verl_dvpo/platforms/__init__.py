# SPDX-License-Identifier: Apache-2.0
"""Platforms that verl does not bring."""
