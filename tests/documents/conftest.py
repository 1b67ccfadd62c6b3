# SPDX-License-Identifier: Apache-2.0
"""Puts ``scripts/`` on the path, where the makers of the site's pages are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
