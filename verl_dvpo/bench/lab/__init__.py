# SPDX-License-Identifier: Apache-2.0
"""The critic lab: every value family trained on a token process whose return distribution is known exactly.

``python -m verl_dvpo.bench.lab --out DIR`` runs it; docs/critic_lab.md says what it found. Needs the extra ``lab``
(scipy, matplotlib); nothing else in the package imports it.
"""
