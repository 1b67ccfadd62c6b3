# SPDX-License-Identifier: Apache-2.0
"""Images reach TensorBoard's file and W&B's folder through verl's own loggers, and come back as images."""

import io
import logging

import pytest
from pictures import made
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from verl.utils.tracking import Tracking

from verl_dvpo.pictures.loggers import CALIBRATION, FAN, log_values
from verl_dvpo.saved.values import Dump, path_of, write_dump


@pytest.fixture
def written(tmp_path):
    for step in (5, 10):
        write_dump(path_of(tmp_path, step), Dump(step, made.story().answers))
    return tmp_path


def test_tensorboards_file_holds_both_images(written, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_DIR", str(written / "tensorboard"))
    tracking = Tracking("project", "run", ["tensorboard"])
    assert log_values(tracking.logger, written, 10) == ["tensorboard"]
    tracking.finish()
    events = EventAccumulator(str(written / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == sorted([FAN, CALIBRATION])
    for name in (FAN, CALIBRATION):
        (event,) = events.Images(name)
        assert event.step == 10
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            assert (image.width, image.height) == (event.width, event.height)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn


def test_wandb_keeps_both_images_offline(written, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(written))
    tracking = Tracking("project", "run", ["wandb"])
    assert log_values(tracking.logger, written, 10) == ["wandb"]
    folder = wandb.run.dir
    tracking.finish()
    files = sorted((written / "wandb").glob("offline-run-*/files/media/images/critic_values/*.png"))
    assert str(files[0]).startswith(str(folder))
    assert [file.name.split("_")[0] for file in files] == ["calibration", "fan"]
    for file in files:
        with Image.open(file) as image:
            assert image.width > 700


def test_nothing_is_drawn_where_no_logger_takes_images_or_nothing_was_written(written, monkeypatch):
    monkeypatch.setattr("verl_dvpo.pictures.loggers._images", lambda *_: pytest.fail("drawn"))
    assert log_values({"console": None, "file": None}, written, 10) == []
    assert log_values({"tensorboard": None}, written, 11) == []


@pytest.mark.parametrize("content", [b"", b"\xff" * 40])
def test_a_broken_file_is_said_and_ends_nothing(written, content, caplog):
    path_of(written, 5).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert log_values({"tensorboard": None}, written, 10) == []
    assert "no picture of the critic's values of step 10" in caplog.text
