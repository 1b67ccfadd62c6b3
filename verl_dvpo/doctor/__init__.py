# SPDX-License-Identifier: Apache-2.0
"""Looks for what is wrong: with the machine and the installation, or with the critic of a run. See docs/doctor.md.

``machine``, ``packages``, ``process``, ``cluster`` and ``learning`` check the machine; ``readings``, ``symptoms`` and
``heads`` judge a run. Each finding is a ``lines.Line``.
"""
