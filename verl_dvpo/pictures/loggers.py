# SPDX-License-Identifier: Apache-2.0
"""Hands pictures of a step to those of verl's loggers that take images: TensorBoard and W&B."""

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_dvpo.saved.values import dump_files, path_of, read_dump

logger = logging.getLogger(__name__)

#: Names of the images.
FAN, CALIBRATION = "critic_values/fan", "critic_values/calibration"

#: verl's names of the loggers that take images.
BACKENDS = ("tensorboard", "wandb")

#: Files, the latest, that the calibration rests on.
LATEST = 20


def log_values(backends: Mapping[str, Any], folder: Path, step: int) -> list[str]:
    """Draws what the critic wrote in a step, and logs it as images. What goes wrong is said in the log and no more.

    Args:
        backends: verl's loggers by name, as ``Tracking.logger`` has them.
        folder: of the run's checkpoints.
        step: of training.

    Returns:
        The loggers that got images.
    """
    takers = [name for name in BACKENDS if name in backends]
    if not takers or not path_of(folder, step).is_file():  # another machine may have written it, on its own disk
        return []
    try:
        images = _images(folder, step)
        for name in takers:
            {"tensorboard": _to_tensorboard, "wandb": _to_wandb}[name](backends[name], images, step)
    except ModuleNotFoundError as error:
        wanted = "pip install 'verl-dvpo[bench]', or set critic.value.dump_every=0"
        logger.warning("no picture of the critic's values of step %d: %s; %s", step, error, wanted)
        return []
    except Exception as error:  # a picture, whatever a font or a logger does, is no reason to end a run
        logger.warning("no picture of the critic's values of step %d: %s: %s", step, type(error).__name__, error)
        return []
    return takers


def _images(folder: Path, step: int) -> dict[str, Any]:
    """Draws the step's answers, and the fit of the latest steps: name -> image."""
    from PIL import Image

    from verl_dvpo.pictures.calibration import tokens_of
    from verl_dvpo.pictures.choose import choose_answers
    from verl_dvpo.pictures.fan import fan_figure
    from verl_dvpo.pictures.figure import to_png
    from verl_dvpo.pictures.figures import calibration_figure

    number = path_of(folder, step)
    files = [file for file in dump_files(folder) if file == number or _step(file) < step][-LATEST:]
    dumps = [read_dump(file) for file in files]
    figures = {}
    if shown := choose_answers(dumps[-1:], 2):
        figures[FAN] = fan_figure(shown)
    tokens = tokens_of([answer for dump in dumps for answer in dump.answers])
    if tokens.count:
        figures[CALIBRATION] = calibration_figure(tokens)
    return {name: Image.open(io.BytesIO(to_png(figure))).convert("RGB") for name, figure in figures.items()}


def _step(file: Path) -> int:
    return int(file.stem.removeprefix("step_"))


def _to_tensorboard(backend: Any, images: Mapping[str, Any], step: int) -> None:
    import numpy as np

    for name, image in images.items():
        backend.writer.add_image(name, np.asarray(image), step, dataformats="HWC")


def _to_wandb(backend: Any, images: Mapping[str, Any], step: int) -> None:
    backend.log({name: backend.Image(image) for name, image in images.items()}, step=step)
