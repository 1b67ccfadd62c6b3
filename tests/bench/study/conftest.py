# SPDX-License-Identifier: Apache-2.0
"""Runs are composed by Hydra and checked as in earnest, on empty files that stand for data and model."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _demo_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("demo")
    for name in ("train.parquet", "val.parquet"):
        (folder / name).touch()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    monkeypatch.setenv("VERL_DVPO_DEMO_DIR", str(folder))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    assert "VERL_DVPO_DEMO_DIR" in os.environ
    return tmp_path / "study"
