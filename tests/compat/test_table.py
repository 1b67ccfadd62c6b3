# SPDX-License-Identifier: Apache-2.0
"""The table is whole: nothing of ours touches verl, vLLM or Ray without a row."""

import ast
import functools
import importlib
from pathlib import Path

import pytest
from introspection import HAS_MEGATRON, called_by_position, overridden

import verl_dvpo
from verl_dvpo.compat import apply
from verl_dvpo.compat.entry import Entry, Kind, Moment
from verl_dvpo.compat.table import ENTRIES, entry

PACKAGE = Path(verl_dvpo.__file__).parent
NEED_MEGATRON = ("verl_dvpo.critic.megatron", "verl_dvpo.critic.megatron_bridge")
LISTED = {symbol for each in ENTRIES for symbol in each.symbols()}


def test_every_override_is_in_the_table():
    found = overridden()
    assert len(found) > 50
    assert not {symbol: sorted(ours) for symbol, ours in found.items() if symbol not in LISTED}


def test_every_override_in_the_table_is_one_of_ours():
    listed = {
        symbol
        for each in ENTRIES
        if each.kind is Kind.OVERRIDE
        for symbol in (f"{each.symbol}.{member}" for member in each.members)
        if HAS_MEGATRON or ".megatron." not in each.symbol
    }
    assert listed <= overridden().keys()


def test_every_call_by_position_is_in_the_table():
    found = called_by_position()
    assert len(found) > 15
    assert not {symbol: sorted(ours) for symbol, ours in found.items() if symbol not in LISTED}


@pytest.mark.parametrize("each", ENTRIES, ids=lambda each: f"{each.symbol}-{each.kind.value}")
def test_names_of_ours_resolve_and_rows_say_what_and_why(each: Entry):
    for name in (each.ours, *each.hands):
        if not HAS_MEGATRON and name.partition(":")[0] in NEED_MEGATRON:
            pytest.skip("megatron-core is not installed")
        if ":" in name:
            assert callable(apply.resolve(name))
        else:
            importlib.import_module(name)
    assert each.what
    assert each.why
    assert set(each.versions)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_only_the_trainer_and_compat_import_transfer_queue():
    importers = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "transfer_queue" for name in imports(file))
    }
    assert {each for each in importers if not each.startswith("compat/")} == {"trainer.py"}


def test_compat_imports_nothing_above_it():
    for file in (PACKAGE / "compat").glob("*.py"):
        ours = {name for name in imports(file) if name.split(".")[0] == "verl_dvpo"}
        assert all(name.startswith("verl_dvpo.compat") for name in ours), file.name


def test_what_the_plugin_imports_is_light():
    """``import verl`` runs it in every process."""
    parts = ("apply", "table", "entry", "applied", "subclasses", "calls", "versions")
    light = ("plugin.py", *(f"compat/{name}.py" for name in parts))
    heavy = {"torch", "verl", "ray", "vllm", "transformers", "transfer_queue"}
    for name in light:
        assert not heavy & {each.split(".")[0] for each in imports(PACKAGE / name)}, name


def test_changes_are_in_place_where_their_module_is_imported():
    """The plug-in was loaded with verl; a second registration changes nothing."""
    wraps = [
        each
        for each in ENTRIES
        if each.moment is Moment.IMPORT and each.kind in (Kind.WRAP, Kind.REPLACE) and each.platform is None
    ]
    assert len(wraps) >= 5
    importlib.import_module("verl")
    for each in wraps:
        module = importlib.import_module(each.module)
        once = functools.reduce(getattr, each.name.split("."), module)
        assert once.__verl_dvpo__ == each.symbol
        assert once.__wrapped__.__module__.startswith("verl.")
        apply.put(each, module)
        assert functools.reduce(getattr, each.name.split("."), module) is once
        assert not hasattr(once.__wrapped__, apply.MARK)


def test_a_symbol_that_a_version_lacks_is_named_with_the_versions_that_fit():
    validate = entry("verl.utils.config:validate_config")
    with pytest.raises(ImportError, match=r"without verl\.utils\.config:validate_config; this verl-dvpo fits 0\.9\.0"):
        apply.put(validate, object())


def test_an_unknown_symbol_has_no_entry():
    with pytest.raises(KeyError):
        entry("verl.utils.config:nothing")
