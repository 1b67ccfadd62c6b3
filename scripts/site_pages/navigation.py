# SPDX-License-Identifier: Apache-2.0
"""Fits the navigation of ``mkdocs.yml`` to the pages that exist, so that a new page breaks nothing."""

from collections.abc import Collection
from typing import Any

#: Folders whose pages are reached by links.
BY_LINKS = ("files/", "results/", "figures/", "algorithms/")


def named(nav: Any) -> set[str]:
    """Returns the pages that a navigation names."""
    if isinstance(nav, str):
        return {nav}
    entries = nav.values() if isinstance(nav, dict) else nav
    return set().union(*(named(entry) for entry in entries))


def missing(nav: Any, existing: Collection[str]) -> list[str]:
    """Returns the pages that exist, that the navigation does not name and that need to be named."""
    return sorted(page for page in existing if page not in named(nav) and not page.startswith(BY_LINKS))


def fitted(nav: list[Any], existing: Collection[str]) -> list[Any]:
    """Returns the navigation without pages that do not exist, with those that it does not name under "More"."""
    more = missing(nav, existing)
    kept = [entry for entry in (_kept(entry, existing) for entry in nav) if entry]
    return [*kept, {"More": more}] if more else kept


def _kept(entry: Any, existing: Collection[str]) -> Any:
    if isinstance(entry, str):
        return entry if entry in existing else None
    if isinstance(entry, list):
        return [part for part in (_kept(part, existing) for part in entry) if part]
    kept = {title: _kept(part, existing) for title, part in entry.items()}
    return {title: part for title, part in kept.items() if part}
