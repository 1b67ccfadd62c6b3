# SPDX-License-Identifier: Apache-2.0
"""Three domains of laptop size, made locally (arithmetic, science, dialogue), with one model that serves all."""
