# SPDX-License-Identifier: Apache-2.0
"""A critic of one's own, outside verl-dvpo."""
