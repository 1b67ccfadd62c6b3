# SPDX-License-Identifier: Apache-2.0
"""Puts the changes of the table in place."""

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from verl_dvpo.compat.entry import Entry, Kind, Moment
from verl_dvpo.compat.table import ENTRIES
from verl_dvpo.compat.versions import SUPPORTED, installed

#: Marks what stands in place of a symbol of theirs.
MARK = "__verl_dvpo__"


def install() -> None:
    """Applies what is due while verl is imported, and hooks the rest behind the import of its module.

    A second call changes nothing.
    """
    from wrapt import register_post_import_hook

    for entry in ENTRIES:
        if entry.moment is Moment.START and _is_wanted(entry):
            resolve(entry.ours)()
        elif entry.moment is Moment.IMPORT:
            register_post_import_hook(_hook(entry), entry.after or entry.module)


def apply_in_this_process(moment: Moment) -> None:
    """Applies the entries of ``moment`` in this process; verl's modules are changed in it for good."""
    for entry in ENTRIES:
        if entry.moment is moment:
            put(entry, importlib.import_module(entry.module))


def _hook(entry: Entry) -> Callable[[ModuleType], None]:
    def hook(module: ModuleType) -> None:
        if _is_wanted(entry):
            put(entry, module)

    return hook


def _is_wanted(entry: Entry) -> bool:
    return entry.platform is None or os.environ.get("VERL_PLATFORM", "").strip().lower() == entry.platform


def put(entry: Entry, module: Any) -> None:
    """Puts one change in place, unless it is there.

    Args:
        entry: of the table.
        module: the module of its symbol, or the one of ``after``.

    Raises:
        ImportError: this version of verl lacks the symbol.
    """
    if ":" not in entry.ours:
        importlib.import_module(entry.ours)  # its decorators register
        return
    if entry.kind is Kind.REGISTER:
        resolve(entry.ours)(module)
        return
    *path, name = entry.name.split(".")
    try:
        owner = functools.reduce(getattr, path, module)
        original = getattr(owner, name)
    except AttributeError as error:
        raise ImportError(_lacks(entry)) from error
    if hasattr(original, MARK):
        return
    ours = resolve(entry.ours)(original, *map(resolve, entry.hands))
    if callable(original):
        ours = functools.wraps(original)(ours)
    setattr(ours, MARK, entry.symbol)
    setattr(owner, name, ours)


def resolve(name: str) -> Any:
    """Imports and returns the object called ``module:qualified.name``."""
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def _lacks(entry: Entry) -> str:
    fitting = ", ".join(SUPPORTED)
    return f"verl is {installed()!r}, without {entry.symbol}; this verl-dvpo fits {fitting}; install one of them"
