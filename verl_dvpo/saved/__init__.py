# SPDX-License-Identifier: Apache-2.0
"""Reads and writes what lies on a disk: manifests, whole-or-nothing writes, and checks. No verl, no Ray, no model."""
