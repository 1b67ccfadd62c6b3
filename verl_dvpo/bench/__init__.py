# SPDX-License-Identifier: Apache-2.0
"""The workbench: tasks, studies and the critic lab. Nothing outside this folder imports it."""
