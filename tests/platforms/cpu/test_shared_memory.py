# SPDX-License-Identifier: Apache-2.0
"""Segments of weight transfers are noted as long as they are there, by real segments of this machine."""

from multiprocessing import shared_memory

import pytest

from verl_dvpo.platforms.cpu.shared_memory import NOTE, noted, remove_noted


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return noted(lambda size, name: shared_memory.SharedMemory(name=name, create=True, size=size))


def notes(folder):
    return sorted(path.name.removeprefix(NOTE) for path in folder.iterdir())


def test_notes_do_not_grow_with_transfers(make, tmp_path):
    for step in range(5):
        segment = make(16, f"verl_dvpo_test_{step}")
        assert notes(tmp_path) == [f"verl_dvpo_test_{step}"]
        segment.close()
        segment.unlink()


def test_a_segment_that_stayed_keeps_its_note_and_is_removed_with_the_run(make, tmp_path):
    first, second = (make(16, f"verl_dvpo_test_{name}") for name in ("first", "second"))
    assert notes(tmp_path) == ["verl_dvpo_test_first", "verl_dvpo_test_second"]
    first.close()
    second.close()
    remove_noted(tmp_path)
    for name in ("first", "second"):
        with pytest.raises(FileNotFoundError):
            shared_memory.SharedMemory(name=f"verl_dvpo_test_{name}")
