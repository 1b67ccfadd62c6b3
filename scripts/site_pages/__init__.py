# SPDX-License-Identifier: Apache-2.0
"""Pages of the documentation site that are made from the repository at each build; ``mkdocs.yml`` names the hook."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
CONFIG = ROOT / "config"
