# SPDX-License-Identifier: Apache-2.0
"""The guard: a change of one line of verl is found and named, a change of words is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from verl_dvpo.compat import fingerprints, start, versions
from verl_dvpo.compat.__main__ import main
from verl_dvpo.compat.fingerprints import Tree, check, installed_trees, record, verl_tree
from verl_dvpo.compat.source import SymbolNotFoundError, fingerprint
from verl_dvpo.compat.table import ENTRIES
from verl_dvpo.compat.versions import SUPPORTED


def test_the_installed_packages_are_those_that_the_table_was_written_against():
    report = check()
    assert not report.findings, "\n".join(map(str, report.findings))
    assert report.compared > 100


def test_every_claimed_version_has_a_fingerprint_of_every_symbol():
    recorded = json.loads(fingerprints.FILE.read_text())
    for entry in ENTRIES:
        for symbol in entry.symbols():
            package = symbol.split(".")[0]
            if package == "verl":
                assert set(entry.versions) <= recorded[symbol].keys() <= set(SUPPORTED), symbol
            else:
                assert recorded[symbol], symbol
    assert recorded.keys() == {symbol for entry in ENTRIES for symbol in entry.symbols()}


WRAPPED = [
    ("utils/config.py", "checks passed successfully", "checks passed", "verl.utils.config:validate_config"),
    (
        "utils/seqlen_balancing.py",
        "assert len(seqlen_list) >= k_partitions",
        "assert len(seqlen_list) > k_partitions",
        "verl.utils.seqlen_balancing:get_seqlen_balanced_partitions",
    ),
    (
        "trainer/ppo/v1/trainer_base.py",
        "def _balance_batch(self, batch: KVBatchMeta, metrics",
        "def _balance_batch(self, metrics, batch: KVBatchMeta",
        "verl.trainer.ppo.v1.trainer_base:PPOTrainer._balance_batch",
    ),
]


@pytest.mark.parametrize(("file", "old", "new", "symbol"), WRAPPED)
def test_one_changed_line_fails_and_names_the_entry(verl_copy, change, capsys, file, old, new, symbol):
    assert main(["check", "--verl", str(verl_copy.root)]) == 0
    change(file, old, new)
    assert main(["check", "--verl", str(verl_copy.root)]) == 1
    first, *_, last = capsys.readouterr().out.splitlines()[1:]
    assert first.startswith(f"{symbol} ({verl_copy.version}): its source has changed; read it again, mend verl_dvpo.")
    assert last.endswith("1 differ")


def test_words_and_form_do_not_count(verl_copy, change):
    change(
        "utils/seqlen_balancing.py",
        "    assert len(seqlen_list) >= k_partitions, ",
        "    # a comment\n\n    assert (len(seqlen_list)   >= k_partitions), ",
    )
    change("utils/seqlen_balancing.py", "    Calculates partitions", "    Finds partitions")
    assert not check([verl_copy]).findings


def test_a_symbol_that_is_gone(verl_copy, change):
    change("utils/config.py", "def validate_config(", "def validate_configuration(")
    (finding,) = check([verl_copy]).findings
    assert finding.symbol == "verl.utils.config:validate_config"
    assert finding.problem == "it is not there"


def test_a_version_that_nothing_is_recorded_for(verl_copy):
    report = check([Tree("verl", verl_copy.root, "0.99.0")])
    assert {finding.problem for finding in report.findings} == {"nothing is recorded for this version"}
    assert len(report.findings) == report.compared > 100


def test_recording_makes_the_check_pass(verl_copy, change, tmp_path):
    change("utils/config.py", "def validate_config(", "def validate_config(extra, ")
    file = tmp_path / "fingerprints.json"
    file.write_text(json.dumps({"verl.gone:symbol": {"0.9.1": "0"}}))
    written = record([verl_copy], file=file)
    report = check([verl_copy], file=file)
    assert (report.findings, report.compared) == ([], written)
    assert "verl.gone:symbol" not in json.loads(file.read_text())


def test_a_tree_is_found_by_its_root_and_by_its_package(verl_copy):
    assert verl_tree(verl_copy.root) == verl_tree(verl_copy.root / "verl") == verl_copy
    (verl_copy.root / "verl" / "version" / "version").write_text("0.10.0.dev\n")
    assert verl_tree(verl_copy.root).version == "0.10.0.dev0"  # as setuptools writes it
    with pytest.raises(ValueError, match=r"--verl is '/nowhere'; allowed is"):
        verl_tree(Path("/nowhere"))


def test_the_command_imports_neither_verl_nor_torch():
    code = (
        "import sys; from verl_dvpo.compat.__main__ import main; code = main(['check']); "
        "loaded = {'verl', 'torch', 'ray', 'vllm'} & sys.modules.keys(); sys.exit(code or sorted(loaded) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 differ" in done.stdout
    assert {tree.package for tree in installed_trees()} >= {"verl", "ray"}


def test_another_commit_of_a_version_under_development_is_refused_with_what_it_changes(verl_copy, change, monkeypatch):
    tree = Tree("verl", verl_copy.root, verl_copy.version)
    monkeypatch.setattr(versions, "installed", lambda: "0.10.0.dev0")
    monkeypatch.setattr(start, "check", lambda: check([tree]))
    start.check_version()
    change("utils/config.py", "checks passed successfully", "checks passed")
    with pytest.raises(ValueError, match=r"^verl is '0\.10\.0\.dev0' of another .*validate_config; .* fits 0\.9"):
        start.check_version()
    monkeypatch.setenv(versions.OVERRIDE_ENV, "1")
    start.check_version()


SOURCE = '''
import os as system
if True:
    from a.b import c
try:
    VALUE = 1
except ImportError:
    VALUE = 2

class Outer:
    """Text."""
    field: int = 3
    class Inner:
        def method(self, x):
            """Text."""
            return x + 1  # comment
    @property
    def both(self):
        return 1
    @both.setter
    def both(self, value):
        pass
'''


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("system", "import os", "import io"),
        ("c", "from a.b", "from a.d"),
        ("VALUE", "VALUE = 2", "VALUE = 4"),
        ("Outer.field", "int = 3", "int = 4"),
        ("Outer.Inner.method", "x + 1", "x - 1"),
        ("Outer.Inner", "x + 1", "x - 1"),
        ("Outer.both", "pass", "return 2"),
    ],
)
def test_what_a_symbol_can_be(tmp_path, name, old, new):
    for folder, text in (
        ("as_is", SOURCE),
        ("reworded", SOURCE.replace("Text.", "Other text.").replace("# comment", "")),
        ("changed", SOURCE.replace(old, new)),
    ):
        (tmp_path / folder / "pkg").mkdir(parents=True)
        (tmp_path / folder / "pkg" / "__init__.py").write_text(text)
    as_is, reworded, changed = (
        fingerprint(tmp_path / folder, f"pkg:{name}") for folder in ("as_is", "reworded", "changed")
    )
    assert as_is == reworded != changed
    others = {"system", "c", "VALUE", "Outer.field", "Outer.Inner.method", "Outer.both"} - {name}
    unrelated = [other for other in others if not other.startswith(name)]
    assert all(
        fingerprint(tmp_path / "as_is", f"pkg:{other}") == fingerprint(tmp_path / "changed", f"pkg:{other}")
        for other in unrelated
    )


@pytest.mark.parametrize("symbol", ["pkg:Outer.nothing", "pkg:nothing", "pkg.other:VALUE"])
def test_what_is_not_there(tmp_path, symbol):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE)
    with pytest.raises(SymbolNotFoundError):
        fingerprint(tmp_path, symbol)
