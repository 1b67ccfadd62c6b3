# SPDX-License-Identifier: Apache-2.0
"""The house stands as docs/architecture.md draws it: dependencies point one way, files are short."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest
from importlinter.cli import lint_imports

from verl_dvpo.compat.entry import Moment
from verl_dvpo.compat.table import ENTRIES

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "verl_dvpo"
FOLDERS = ("verl_dvpo", "tests", "benchmarks", "scripts", "examples", "config", "docker")
CONTRACTS = (
    "layers",
    "circles",
    "workbench",
    "noise-and-platforms",
    "compat",
    "pure-torch",
    "without-verl",
    "transfer-queue",
)
LONGEST = 400


def python_files(*folders: str) -> list[pathlib.Path]:
    return [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in f.parts]


@pytest.mark.parametrize("contract", CONTRACTS)
def test_imports_keep_the_contract(contract, monkeypatch, capsys):
    """Each contract of ``[tool.importlinter]`` in pyproject.toml holds."""
    monkeypatch.chdir(ROOT)
    status = lint_imports("pyproject.toml", limit_to_contracts=(contract,), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_every_contract_is_checked():
    text = (ROOT / "pyproject.toml").read_text()
    assert [line.split('"')[1] for line in text.splitlines() if line.startswith('id = "')] == list(CONTRACTS)


def strings(file: pathlib.Path) -> list[str]:
    """Lists every string of a file that is not a docstring."""
    tree = ast.parse(file.read_text())
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare
    ]


def test_nobody_outside_the_workbench_names_it():
    """A name in a string is an import too: a registry, ``_target_`` or ``importlib`` resolves it later.

    The table of compat lists the workbench's ties to verl for its reader; the next test sees that it imports none.
    """
    listing = {PACKAGE / "compat" / "calls.py", PACKAGE / "compat" / "subclasses.py"}
    files = [f for f in python_files("verl_dvpo") if (PACKAGE / "bench") not in f.parents and f not in listing]
    found = {str(f.relative_to(ROOT)): [s for s in strings(f) if "verl_dvpo.bench" in s] for f in files}
    assert not {name: texts for name, texts in found.items() if texts}


def test_the_table_applies_nothing_of_the_workbench():
    named = [entry for entry in ENTRIES if "verl_dvpo.bench" in " ".join((entry.ours, *entry.hands))]
    assert named
    assert {entry.moment for entry in named} == {Moment.NONE}


def test_nobody_but_trainer_and_compat_names_transfer_queue():
    allowed = [PACKAGE / "trainer.py", *python_files("verl_dvpo/compat")]
    files = [f for f in python_files("verl_dvpo") if f not in allowed]
    found = {str(f.relative_to(ROOT)): [s for s in strings(f) if s.split(".")[0] == "transfer_queue"] for f in files}
    assert not {name: texts for name, texts in found.items() if texts}


def test_only_the_mathematics_libraries_are_imported_by_the_mathematics():
    """``distributional`` and ``families`` import torch, numpy, the standard library and each other, nothing else."""
    allowed = {"torch", "numpy", "verl_dvpo", *sys.stdlib_module_names}
    found = set()
    for file in python_files("verl_dvpo/distributional", "verl_dvpo/families"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {(file.name, alias.name.split(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add((file.name, node.module.split(".")[0]))
    assert len(found) > 10
    assert not {(file, name) for file, name in found if name not in allowed}


def test_no_file_is_longer_than_a_head_can_hold():
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in python_files(*FOLDERS)}
    assert len(lengths) > 100
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_every_python_file_has_its_licence():
    files = python_files(*FOLDERS)
    first = {str(f.relative_to(ROOT)): f.read_text().splitlines()[:1] for f in files if f.stat().st_size}
    assert not [name for name, line in first.items() if line != ["# SPDX-License-Identifier: Apache-2.0"]]


def test_drawing_of_imports_is_up_to_date():
    """Another process builds the graph, so that no module imported by other tests matters."""
    command = [sys.executable, "scripts/draw_imports.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, "run python scripts/draw_imports.py and commit docs/architecture.md\n" + done.stderr


def test_drawing_shows_imports_and_names(tmp_path):
    """On a made-up package: a full arrow for an import, a dotted one for a name, none inside one part."""
    spec = importlib.util.spec_from_file_location("draw_imports", ROOT / "scripts" / "draw_imports.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    package = tmp_path / "verl_dvpo"
    for name, text in {
        "__init__.py": "",
        "plugin.py": 'NAMES = ("verl_dvpo.critic.worker", "verl.trainer")',
        "critic/__init__.py": "",
        "critic/worker.py": "from verl_dvpo.critic import head",
        "critic/head.py": "",
        "bench/__init__.py": "",
        "bench/lab/__init__.py": "def run():\n    import verl_dvpo.critic.worker",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert draw.named(package, {"plugin", "critic", "bench.lab"}) == {("plugin", "critic")}
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'scripts')!r}, {str(tmp_path)!r}]\n" + (
        f"import pathlib, draw_imports as d; print(d.drawing(pathlib.Path({str(package)!r})))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    arrows = [line.strip() for line in shown.stdout.splitlines() if "->" in line]
    assert arrows == ["bench_lab --> critic", "plugin -.-> critic"]
