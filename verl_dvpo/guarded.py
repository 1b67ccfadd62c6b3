# SPDX-License-Identifier: Apache-2.0
"""Keeps a run of verl's trainers safe: `Watch` over its parts, and checkpoints that are whole or not there."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, open_dict
from ray.exceptions import RayActorError

from verl_dvpo.health import RESUME, RunEndedError, Watch, health_config
from verl_dvpo.saved import checkpoints

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
else:  # the import of verl's trainers brings ours, which derive from the class below
    PPOTrainer = object

#: The settings that say how many checkpoints are kept, and the part that each is about.
KEPT = {"max_actor_ckpt_to_keep": "actor", "max_critic_ckpt_to_keep": "critic"}


class GuardedTrainer(PPOTrainer):
    """Tells its `Watch` what it is doing, and saves and loads with care."""

    def __init__(self, config: DictConfig) -> None:
        self.health = health_config(config.trainer.get("value"))
        self.watch = Watch(self.health.stall_seconds)
        self.last_saved: int | None = None
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        """Builds verl's buffer; while it waits for answers, each that comes is a sign of progress."""
        buffer: Any = super()._build_replay_buffer()
        buffer._wait_for_next_poll = self._counting(buffer, buffer._wait_for_next_poll)
        return buffer

    def _counting(self, buffer: Any, wait: Callable[..., float]) -> Callable[..., float]:
        def wait_for_next_poll(partition_id: str, last_debug_time: float) -> float:
            states = (buffer.pending_keys, buffer.running_keys, buffer.finished_keys, buffer.failure_keys)
            self.watch.sign([len(keys[partition_id]) for keys in (*states, buffer.partitions)])
            return wait(partition_id, last_debug_time)

        return wait_for_next_poll

    def _enter(self, phase: str) -> None:
        self.watch.moved(phase, getattr(self, "global_steps", 0))

    def init(self) -> None:
        """Starts the parts as verl does, watched over."""
        with self.watch:
            super().init()

    def fit(self, agent_loop_manager: Any) -> None:
        """Trains as verl does, watched over."""
        with self.watch:
            super().fit(agent_loop_manager)

    def on_step_begin(self) -> None:
        self._enter("generation")
        super().on_step_begin()

    def on_sample_begin(self) -> None:
        self._enter("generation")
        super().on_sample_begin()

    def _compute_old_log_prob(self, batch: Any, metrics: dict) -> Any:
        self._enter("log_probs")
        return super()._compute_old_log_prob(batch, metrics)

    def _compute_values(self, batch: Any, metrics: dict) -> Any:
        self._enter("values")
        return super()._compute_values(batch, metrics)

    def _update_critic(self, batch: Any, metrics: dict) -> Any:
        self._enter("critic_update")
        return super()._update_critic(batch, metrics)

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        self._enter("actor_update")
        return super()._update_actor(batch, metrics)

    def on_step_end(self) -> None:
        self._enter("weight_transfer")
        super().on_step_end()

    def _validate(self) -> dict[str, float]:
        self._enter("validation")
        return super()._validate()

    def _load_checkpoint(self) -> None:
        """Loads as verl does, the latest checkpoint that is whole instead of the latest."""
        self._enter("load")
        trainer = self.config.trainer
        given = {"critic": self.use_critic, "read": self.health.verify_checkpoints}
        if trainer.resume_mode == "auto":
            self.last_saved = checkpoints.choose(Path(trainer.default_local_dir), **given)
        elif trainer.resume_mode == "resume_path":
            path = trainer.resume_from_path
            if reason := checkpoints.problem(Path(path), **given):
                raise ValueError(
                    f"trainer.resume_from_path is {path!r}; a whole checkpoint is allowed: {reason}; give another, or "
                    "trainer.resume_mode=auto, which takes the latest that is whole"
                )
        super()._load_checkpoint()

    def _save_checkpoint(self) -> None:
        """Saves as verl does; the one before is removed when the new one is whole, and a failed one at once."""
        self._enter("checkpoint")
        folder = Path(self.config.trainer.default_local_dir)
        try:
            with self._room_for_two() as single:
                super()._save_checkpoint()
        except Exception as error:
            if checkpoints.latest(folder) != self.global_steps:
                shutil.rmtree(checkpoints.folder_of(folder, self.global_steps), ignore_errors=True)
            if isinstance(error, (RayActorError, RunEndedError)):
                raise  # the disk has no part in it
            raise RunEndedError(self._not_saved(folder, error)) from error
        whole = checkpoints.latest(folder) == self.global_steps
        if single and whole and self.last_saved not in (None, self.global_steps):
            checkpoints.remove(checkpoints.folder_of(folder, self.last_saved), single)
        self.last_saved = self.global_steps

    def _not_saved(self, folder: Path, error: Exception) -> str:
        good = "none" if self.last_saved is None else f"step {self.last_saved}"
        return (
            f"step {self.global_steps}, saving a checkpoint: trainer.default_local_dir is {str(folder)!r}; a folder "
            f"that can be written, with room for two checkpoints, is allowed; {_last_line(error)}; the unfinished "
            f"checkpoint is removed, the last good one is: {good}; make room or name another folder, then {RESUME}"
        )

    @contextmanager
    def _room_for_two(self) -> Iterator[tuple[str, ...]]:
        """Lets verl keep the checkpoint before until the new one is whole; yields the parts that keep one only."""
        trainer = self.config.trainer
        before = {name: trainer.get(name) for name in KEPT}
        with open_dict(trainer):
            alone = trainer.get("remove_previous_ckpt_in_save", False)
            single = tuple(KEPT[name] for name, number in before.items() if alone or number == 1)
            trainer.update({name: 2 for name, part in KEPT.items() if part in single})
            trainer.remove_previous_ckpt_in_save = False
            try:
                yield single
            finally:
                trainer.update(before)
                trainer.remove_previous_ckpt_in_save = alone


def _last_line(error: Exception) -> str:
    """The line of an error that says what happened; Ray puts the worker's traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
