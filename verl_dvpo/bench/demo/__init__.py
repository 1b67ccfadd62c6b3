# SPDX-License-Identifier: Apache-2.0
"""The demo: a small model, made on the spot, that can add a little and has room to learn."""
