# SPDX-License-Identifier: Apache-2.0
"""verl on a machine without an accelerator: a platform, and vLLM's CPU build as the rollout.

Nothing outside this folder imports it but ``verl_dvpo.plugin``, by name, and only when the environment
variable ``VERL_PLATFORM`` is ``cpu`` (the Hydra group ``platform=cpu`` sets it for every Ray worker).
"""
