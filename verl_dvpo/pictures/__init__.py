# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a critic believes: figures, a page, images for loggers. matplotlib draws; the extra bench has it."""
