# SPDX-License-Identifier: Apache-2.0
"""Trains every value family on a token process whose return distribution is known exactly.

``verl-dvpo lab --out DIR`` runs it; docs/critic_lab.md reports its findings.
"""
