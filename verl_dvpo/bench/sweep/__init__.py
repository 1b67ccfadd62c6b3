# SPDX-License-Identifier: Apache-2.0
"""Reports on Hydra sweeps of ``verl_dvpo.train``: one table and one figure over what was swept."""
