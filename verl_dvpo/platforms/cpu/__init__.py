# SPDX-License-Identifier: Apache-2.0
"""verl on a machine without an accelerator: a platform, and vLLM's CPU build as the rollout.

The table of ``verl_dvpo.compat`` names it, and applies it where the environment variable ``VERL_PLATFORM`` is ``cpu``,
which the Hydra group ``platform=cpu`` sets for every Ray worker. Outside this folder only the doctor imports it, to
start Ray as a run does.
"""
