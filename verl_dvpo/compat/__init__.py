# SPDX-License-Identifier: Apache-2.0
"""Every place where code of verl, Ray or vLLM is wrapped or replaced."""
