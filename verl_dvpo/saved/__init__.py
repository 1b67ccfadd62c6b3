# SPDX-License-Identifier: Apache-2.0
"""What lies on a disk: manifests, whole-or-nothing writes, checks of what is read. No verl, no Ray, no model."""
