# SPDX-License-Identifier: Apache-2.0
"""A copy of the files of verl that the table names, to be changed by tests."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from verl_dvpo.compat.fingerprints import Tree, installed_trees
from verl_dvpo.compat.table import ENTRIES


@pytest.fixture
def verl_copy(tmp_path: Path) -> Tree:
    (installed,) = [tree for tree in installed_trees() if tree.package == "verl"]
    modules = {symbol.partition(":")[0] for entry in ENTRIES for symbol in entry.symbols()}
    for module in sorted(each for each in modules if each.split(".")[0] == "verl"):
        base = installed.root.joinpath(*module.split("."))
        file = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        target = tmp_path / file.relative_to(installed.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "verl" / "version").mkdir()
    (tmp_path / "verl" / "version" / "version").write_text(installed.version + "\n")
    return Tree("verl", tmp_path, installed.version)


@pytest.fixture
def change(verl_copy: Tree) -> Callable[[str, str, str], None]:
    """Replaces the first occurrence of a text in a file of the copy."""

    def replace(file: str, old: str, new: str) -> None:
        path = verl_copy.root / "verl" / file
        text = path.read_text()
        assert old in text, f"{file} no longer has {old!r}"
        path.write_text(text.replace(old, new, 1))

    return replace
