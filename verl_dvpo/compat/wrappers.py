# SPDX-License-Identifier: Apache-2.0
"""Functions that stand in place of verl's: each takes the original, and functions of upper layers, and returns ours."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any


def check_first(
    original: Callable[..., None], check: Callable[[Any], None], announce: Callable[[Any], None]
) -> Callable[..., None]:
    """Runs ``check`` on the configuration before verl's own validation, and ``announce`` when both have passed."""

    def validate_config(config: Any, *args: Any, **kwargs: Any) -> None:
        check(config)
        original(config, *args, **kwargs)
        announce(config)

    return validate_config


def choose_manager(original: Callable[[Any], type], choose: Callable[[Any, type], type]) -> Callable[[Any], type]:
    """Lets ``choose(config, class)`` replace the reward manager's class that verl has resolved."""

    def resolve_reward_manager_cls(config: Any) -> type:
        return choose(config, original(config))

    return resolve_reward_manager_cls


def run_within(
    original: Callable[..., Any], context: Callable[[Mapping[str, Any]], AbstractContextManager]
) -> Callable[..., Any]:
    """Runs an agent loop within ``context(trajectory)``."""

    async def _run_agent_loop(self: Any, sampling_params: Any, trajectory: Any, **kwargs: Any) -> Any:
        with context(trajectory):
            return await original(self, sampling_params, trajectory, **kwargs)

    return _run_agent_loop


def score_with(
    original: Callable[..., Any], fields: Callable[[Any, Sequence[Any], dict[str, Any]], dict[str, Any]]
) -> Callable[..., Any]:
    """Sends reward workers ``fields(config, outputs, kwargs)`` instead of ``kwargs``."""

    async def _compute_score(self: Any, outputs: Any, kwargs: Any) -> None:
        await original(self, outputs, fields(self.config, outputs, kwargs))

    return _compute_score


def log_rewards(
    original: Callable[..., Any],
    is_wanted: Callable[[Any], bool],
    metrics_of: Callable[[Sequence[dict[str, Any]]], dict[str, float]],
    relabel: Callable[[Any, Sequence[str], Sequence[dict[str, Any]]], list[float] | None],
) -> Callable[..., Any]:
    """Adds ``metrics_of(rewards)`` to the metrics of a step where ``is_wanted(config)``.

    Where ``relabel(config, keys, rewards)`` returns scores, these replace the rewards' own before.
    """
    from verl_dvpo.compat.queue import reward_infos, shift_rewards

    def _balance_batch(self: Any, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if is_wanted(self.config):
            infos = reward_infos(batch)
            given = metrics_of(infos)  # first: it stops at rewards that failed
            scores = relabel(self.config, batch.keys, infos)
            if scores is not None:
                shift_rewards(batch, [new - info.get("score", new) for new, info in zip(scores, infos, strict=True)])
                given = metrics_of([{**info, "score": new} for new, info in zip(scores, infos, strict=True)])
            metrics.update(given)
        return original(self, batch, metrics, *args, **kwargs)

    return _balance_batch
