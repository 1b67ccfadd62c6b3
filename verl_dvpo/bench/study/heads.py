# SPDX-License-Identifier: Apache-2.0
"""Compares the width of the critics' heads in a study: a wider one has more to learn with."""

from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_dvpo.bench.study.config import Study
from verl_dvpo.bench.study.fields import check_mapping, read_yaml
from verl_dvpo.bench.study.plan import Run, compose, plan

LINEAR = "linear"


def head_of(config: DictConfig) -> str | None:
    """Returns the critic's head as ``linear`` or the width of its hidden layer; None where there is no critic."""
    if not OmegaConf.select(config, "critic.enable"):
        return None
    width = OmegaConf.select(config, "critic.value.head_width")
    return LINEAR if width is None else str(width)


def check_same_head(study: Study) -> None:
    """Raises ValueError where ``same_head`` is true and critics differ in the width of their heads.

    Algorithms without a critic do not count. Composes one configuration for each algorithm.
    """
    if not study.same_head:
        return
    heads = _heads(study, compose)
    if len(set(heads.values())) > 1:
        raise ValueError(
            f"same_head is True; one width of the head for all critics is allowed, these are {_listed(heads)}; set "
            "critic.value.head_width in the overrides of the algorithms, or same_head to false"
        )


def heads_note(study: Study) -> str:
    """Returns what the report says of the heads, read from the runs' own configurations; empty where all are alike."""
    heads = _heads(study, _recorded)
    if len(set(heads.values())) < 2:
        return ""
    return f"**Critics differ in the width of their heads: {_listed(heads)}.** A wider head has more to learn with."


def _recorded(run: Run) -> Any:
    """Returns the configuration with which a run was started; raises ValueError where it is none."""
    path = run.folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(path)
    what = f"config.yaml of run {run.name}"
    return OmegaConf.create(dict(check_mapping(read_yaml(path, what), what)))


def _heads(study: Study, config_of: Callable[[Run], Any]) -> dict[str, str]:
    """Returns algorithm -> its head, of each algorithm with a critic."""
    heads: dict[str, str] = {}
    for run in _one_of_each(study):
        try:
            head = head_of(config_of(run))
        except FileNotFoundError:  # this run has not been started
            continue
        if head is not None:
            heads.setdefault(run.algorithm.name, head)
    return heads


def _one_of_each(study: Study) -> Iterator[Run]:
    """Yields a run of each algorithm, one that has been started where there is one."""
    first: dict[str, Run] = {}
    for run in plan(study):
        known = first.setdefault(run.algorithm.name, run)
        if not (known.folder / "config.yaml").is_file() and (run.folder / "config.yaml").is_file():
            first[run.algorithm.name] = run
    yield from first.values()


def _listed(heads: dict[str, str]) -> str:
    return ", ".join(f"{name} {head}" for name, head in heads.items())
