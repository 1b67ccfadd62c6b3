# SPDX-License-Identifier: Apache-2.0
"""The glossary explains each metric that the code names, and each that a real update of the worker logs."""

import ast
import fnmatch
import importlib.util
from pathlib import Path

import pytest
from critic import harness
from site_pages import metrics
from site_pages.meanings import OURS, VERLS

AUTO = {
    "num_quantiles": "auto",
    "levels": "midpoint",
    "kappa": 0.0,
    "target": "sample_replacement",
    "constraint_statistics": "level",
    "risk_form": "readout",
    "coef": {"risk": "auto"},
    "auto": {"sizes": [1, 3, 9], "risks": [0.0, 1.0], "every": 1, "memory": 0.5, "tolerance": 1.0},
}
UPDATES = [
    {"share_every": 1},
    AUTO,
    {"family": "robust_bellman", "num_heads": 3, "num_quantiles": None, "heads_see": "bootstrap"},
    {"family": "hl_gauss", "num_heads": None, "num_quantiles": None, "num_bins": 7},
    {
        "family": "value_flow",
        "num_heads": None,
        "num_quantiles": None,
        "num_noises": 4,
        "num_frequencies": 4,
        "euler_steps": 2,
    },
]


def test_every_name_in_the_code_is_explained():
    unexplained = metrics.unexplained()
    assert not unexplained, f"say what {', '.join(unexplained)} means in scripts/site_pages/meanings.py"
    assert len(metrics.logged()) > 30


def test_every_explained_name_is_in_the_code():
    assert not metrics.without_code()


def test_a_new_name_would_be_missed(monkeypatch):
    monkeypatch.delitem(OURS, "critic/ensemble/std")
    assert [line.split(" ")[0] for line in metrics.unexplained()] == ["ensemble/std"]


def test_names_of_verl_are_in_verl():
    """Where verl puts a name together, its last part is there."""
    folder = Path(importlib.util.find_spec("verl").origin).parent
    files = [
        folder / "trainer/ppo/metric_utils.py",
        *(folder / "workers").rglob("*.py"),
        *folder.glob("trainer/ppo/**/*.py"),
    ]
    strings = {
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    missing = [name for name in VERLS if name not in strings and name.rpartition("/")[2] not in strings]
    assert [
        name for name in missing if name != "critic/vf_loss"
    ] == []  # our worker gives this name to the family's loss


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return harness.save_model(tmp_path_factory.mktemp("model"))


def test_every_metric_of_an_update_is_explained(model):
    """Five critics update the real worker once each."""
    seen: set[str] = set()
    for value in UPDATES:
        worker = harness.make_worker(model, value=value)
        batch = harness.make_batch()
        harness.infer(worker, batch)
        seen |= {name if "/" in name else f"critic/{name}" for name in harness.train(worker, batch)}
    unexplained = sorted(name for name in seen if metrics.entry_of(name) is None)
    assert not unexplained, f"say what {', '.join(unexplained)} means in scripts/site_pages/meanings.py"
    for expected in (
        "share/quantile",
        "auto/crps_3",
        "ensemble/below_mean",
        "hl_gauss/out_of_support",
        "flow/one_step_gap",
    ):
        assert f"critic/{expected}" in seen
    of_the_worker = [entry for entry in OURS if entry.startswith("critic/") and "staleness" not in entry]
    unseen = [entry for entry in of_the_worker if not any(fnmatch.fnmatchcase(name, entry) for name in seen)]
    assert set(unseen) <= {"critic/flow/collapsed", "critic/quantile/sigma"}  # a warning, and an option of the actor's
