# SPDX-License-Identifier: Apache-2.0
"""Cells of the support table that CI can afford, each against plain torch; and the table says what was found.

``python tests/matrix/table.py`` tries all cells.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch

from matrix import ranks, reference, table
from matrix.cells import CELLS, LAYOUTS, NOTES, OPTIONS, covering

ALONE = covering([cell for cell in CELLS.values() if cell.layout == "fsdp2"])
TOGETHER = [
    CELLS[name]
    for name in (
        "fsdp2_sharded packed lora dynamic checkpointing",
        "fsdp2_hybrid padded full fixed stored",
        "fsdp2_ulysses packed full dynamic stored",
        "fsdp2_ulysses packed lora fixed checkpointing",
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cells")
    table.prepare(made)
    return made


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict:
    return table.expected(folder)


@pytest.mark.parametrize("cell", ALONE, ids=lambda cell: cell.name)
def test_one_process_has_the_plain_gradient(cell, folder, wanted):
    seen = ranks.run(cell, folder, 0, port=0)
    assert reference.distance(seen, wanted[cell.lora]) <= reference.TOLERANCE


def test_two_ranks_have_the_plain_gradient(folder, wanted):
    table.run_ranks(TOGETHER, folder, 2)
    found = {cell.name: table.judge(cell, table.read(cell, folder), wanted) for cell in TOGETHER}
    assert {each["verdict"] for each in found.values()} == {"passed"}, found


def test_a_cell_that_is_wrong_does_not_pass(wanted):
    expected = wanted[True]
    for name, gradient in expected["gradients"].items():
        others = expected["gradients"] | {name: gradient * 1.01}
        far = reference.distance(expected | {"gradients": others}, expected)
        assert far == pytest.approx(0.01 * gradient.abs().max().item() / _largest(expected["gradients"].values()))
    assert max(gradient.abs().max() for gradient in expected["gradients"].values()) > 1e-3
    assert all(gradient.any() for gradient in expected["gradients"].values())
    missing = dict(list(expected["gradients"].items())[1:])
    assert reference.distance(expected | {"gradients": missing}, expected) == math.inf
    lost = [torch.full_like(value, math.nan) for value in expected["values"]]
    assert reference.distance(expected | {"values": lost}, expected) == math.inf


def _largest(tensors) -> float:
    return max(tensor.abs().max().item() for tensor in tensors)


def test_every_two_options_meet_in_the_cells_of_ci():
    for (first, one), (second, other) in itertools.combinations(itertools.product(OPTIONS, (True, False)), 2):
        if first != second:
            assert any(getattr(cell, first) is one and getattr(cell, second) is other for cell in ALONE)
    assert len(ALONE) <= 7


@pytest.mark.parametrize(
    "name", [name for name, cell in CELLS.items() if cell.excuse and name.endswith("fixed stored")]
)
def test_what_the_table_calls_impossible_is_refused(name):
    table.refusal(CELLS[name])


def test_the_table_says_what_was_found():
    results = table.load()
    assert results.keys() <= CELLS.keys()
    assert table.drawn(results) in table.PAGE.read_text(), "python tests/matrix/table.py --draw"
    for name, found in results.items():
        assert {"verdict", "date", "commit"} <= found.keys()
        verdicts = {CELLS[name].verdict} if CELLS[name].excuse else {"passed", "failed"}
        assert found["verdict"] in verdicts
    assert {cell.excuse for cell in CELLS.values()} - {None} == NOTES.keys()
    assert {cell.layout for cell in CELLS.values()} == LAYOUTS.keys()
