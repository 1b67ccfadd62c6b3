# SPDX-License-Identifier: Apache-2.0
"""Adds a distributional critic to verl's three trainers: ``trainer.v1.trainer_mode=dvpo_sync`` and its async sisters.

They differ from verl's in six ways: our worker plays the critic's role, values reach the estimator ``dvpo``, gamma,
lam and the step reach the critic, rewards are checked before anything learns from them, the critic may write what it
believes of a few answers (``critic.value.dump_every``), and the run is watched over (``verl_dvpo.guarded``).
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import response_to_nested

from verl_dvpo.compat.start import check_version
from verl_dvpo.critic.dumps import FIELDS as DUMP_FIELDS
from verl_dvpo.critic.dumps import PLAN, DumpPlan, shown_settings
from verl_dvpo.critic.readings import OPTIONS
from verl_dvpo.critic.shares import is_due
from verl_dvpo.estimator import advantage_config
from verl_dvpo.flowrl import NAME as FLOWRL
from verl_dvpo.flowrl import flowrl_rewards
from verl_dvpo.guarded import GuardedTrainer
from verl_dvpo.saved.facts import run_facts

#: The estimators that get the critic's values from the trainer.
ESTIMATORS = ("dvpo", FLOWRL)

#: The fields of a sample that verl's engines read. A worker call that names none fetches all, and what the rollout
#: keeps beside tensors (prompts as text, the reward's ground truth, metrics) costs more than the model's passes do.
MODEL_FIELDS = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "prompts",
    "responses",
    "response_mask",
    "loss_mask",
    "routed_experts",
)
CRITIC_FIELDS = (*MODEL_FIELDS, "rm_scores", "token_level_rewards")
ACTOR_FIELDS = (
    *MODEL_FIELDS,
    "advantages",
    "old_log_probs",
    "ref_log_prob",
    "rollout_log_probs",
    "rollout_is_weights",
    "teacher_ids",
    "teacher_logprobs",
)


def in_order(keys: list[str]) -> list[int]:
    """Finds the positions that sort verl's names of samples, ``<uid>_<number of the answer>_<number of its part>``."""

    def place(i: int) -> tuple[str, int, int]:
        uid, session, part = keys[i].rsplit("_", 2)
        return uid, int(session), int(part)

    return sorted(range(len(keys)), key=place)


def staleness(tags: list[dict[str, Any]], version: int) -> dict[str, float]:
    """Measures how old the samples are that the critic learns from, in updates of the policy since they were begun.

    Args:
        tags: of the samples in TransferQueue; ``min_global_steps`` is the version of the weights that began a sample.
        version: of the weights now.
    """
    own = [tag for tag in tags if not tag.get("is_padding", False)]
    begun = [tag["min_global_steps"] for tag in own if tag.get("min_global_steps") is not None]
    ages = [max(0, version - each) for each in begun]
    if not ages:
        return {}
    return {"critic/staleness/mean": sum(ages) / len(ages), "critic/staleness/max": float(max(ages))}


class DistributionalCriticMixin(GuardedTrainer, PPOTrainer):
    """Adds the differences to any of verl's trainers; ``base_mode`` is that trainer's own name."""

    base_mode: str

    def __init__(self, config: DictConfig) -> None:
        check_version()
        # verl compares the mode's name in several places, `_build_replay_buffer` among them.
        mode = config.trainer.v1.trainer_mode
        with open_dict(config):
            self.settings = config.trainer.v1.get(mode, {})
            config.trainer.v1.trainer_mode = self.base_mode
        super().__init__(config)
        self.options = advantage_config(config.algorithm)
        self.fetched = itertools.count()

    def _build_replay_buffer(self) -> Any:
        """Builds verl's buffer; it asks TransferQueue every ``poll_interval`` seconds instead of every 2."""
        buffer = super()._build_replay_buffer()
        if (interval := self.settings.get("poll_interval")) is not None:
            buffer.poll_interval = interval
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        """Gives the critic's role to our worker."""
        super()._init_resource_pool_mgr()
        if Role.Critic in self.role_worker_mapping:
            from verl_dvpo.critic.worker import DistributionalCriticWorker

            workers: dict[Role, Any] = self.role_worker_mapping
            workers[Role.Critic] = ray.remote(DistributionalCriticWorker)

    def _fetch_one_gen_batch(self) -> TensorDict:
        """Fetches prompts as verl does; their names begin with their place in the data, which `in_order` sorts by."""
        batch = super()._fetch_one_gen_batch()
        names = [f"{self.global_steps:08d}-{next(self.fetched):08d}-{uid}" for uid in batch["uid"]]
        tu.assign_non_tensor_stack(batch, "uid", names)
        return batch

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Balances as verl does, from an order that does not depend on which answer came first; sums of floats do."""
        batch.reorder(in_order(batch.keys))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _asking_for(self, batch: KVBatchMeta, fields: tuple[str, ...]) -> KVBatchMeta:
        """Names in ``batch`` the fields that the next worker call fetches; absent ones are passed over.

        ``worker_fields`` of the trainer mode's settings adds to them, for losses and models of the user's own.
        """
        images = ("multi_modal_inputs",) if self.processor is not None else ()
        batch.fields = list(dict.fromkeys((*fields, *images, *self.settings.get("worker_fields", ()))))
        return batch

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_old_log_prob(self._asking_for(batch, MODEL_FIELDS), metrics)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_ref_log_prob(self._asking_for(batch, MODEL_FIELDS), metrics)

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Computes values as verl does, and beside them what the options of the advantage and the pictures read."""
        asked: dict[str, Any] = {OPTIONS: self.options} if self.options.fields else {}
        if self._dump_due():
            folder, config = self.config.trainer.default_local_dir, OmegaConf.to_container(self.config, resolve=True)
            assert isinstance(config, dict)
            asked[PLAN] = DumpPlan(self.global_steps, folder, shown_settings({str(k): v for k, v in config.items()}))
        batch.extra_info.update(asked)
        batch = super()._compute_values(self._asking_for(batch, MODEL_FIELDS), metrics)
        for name in asked:
            del batch.extra_info[name]  # no other worker's business
        return batch

    def _dump_due(self) -> bool:
        """Tells if the critic writes what it says of a few answers of this step."""
        every = OmegaConf.select(self.config, "critic.value.dump_every", default=0)
        return self.use_critic and is_due(every, self.global_steps)

    def on_step_end(self) -> None:
        """Ends a step as verl does; pictures of the values that were written go to the loggers that take images."""
        super().on_step_end()
        if self._dump_due():
            from verl_dvpo.pictures.loggers import log_values

            log_values(self.logger.logger, Path(self.config.trainer.default_local_dir), self.global_steps)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._update_actor(self._asking_for(batch, ACTOR_FIELDS), metrics)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Computes advantages as verl does, but for the estimators that need values."""
        self._enter("advantages")
        if self.config.algorithm.adv_estimator not in ESTIMATORS:
            scores = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
            self._check_rewards(batch, scores["rm_scores"].to_padded_tensor(0.0))
            return super()._compute_advantage(batch, metrics)

        # 1. fetch (B, T) fields only
        fields = ["uid", "response_mask", "rm_scores", "rollout_log_probs", "old_log_probs", "ref_log_prob", "values"]
        fields += self.options.fields
        stored = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        jagged_mask = stored["response_mask"]
        data = DataProto(batch=stored.to_padded_tensor())
        data.non_tensor_batch["uid"] = np.array(data.batch.pop("uid").tolist(), dtype=object)
        self._check_rewards(batch, data.batch["rm_scores"])
        self._check_values(data.batch["values"])

        # 2. rewards, with the KL penalty where asked for
        outputs = ["advantages", "returns"]
        data.batch["token_level_scores"] = data.batch["rm_scores"]
        data.batch["token_level_rewards"] = data.batch["rm_scores"]
        if self.config.algorithm.use_kl_in_reward:
            data, kl_metrics = apply_kl_penalty(
                data, kl_ctrl=self.kl_ctrl_in_reward, kl_penalty=self.config.algorithm.kl_penalty
            )
            metrics.update(kl_metrics)
            outputs.append("token_level_rewards")
        if self.config.algorithm.adv_estimator == FLOWRL:
            rewards = flowrl_rewards(data.batch, data.non_tensor_batch["uid"], self.config.algorithm)
            data.batch["token_level_rewards"] = rewards
            outputs.append("token_level_rewards")

        # 3. importance weights between rollout and trainer, where asked for
        outputs += self._correct_rollout(data, metrics)

        # 4. advantages from values, by the registered estimator
        estimator = core_algos.get_adv_estimator_fn(self.config.algorithm.adv_estimator)
        data.batch["advantages"], data.batch["returns"] = estimator(
            token_level_rewards=data.batch["token_level_rewards"],
            response_mask=data.batch["response_mask"],
            values=data.batch["values"],
            gamma=self.config.algorithm.gamma,
            lam=self.config.algorithm.lam,
            config=self.config.algorithm,
            index=data.non_tensor_batch["uid"],
            fields={name: data.batch[name] for name in self.options.fields},
            metrics=metrics,
        )

        # 5. back to TransferQueue
        written = {name: response_to_nested(data.batch[name], jagged_mask) for name in outputs}
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(written, batch_size=len(batch))
        )

    def _correct_rollout(self, data: DataProto, metrics: dict) -> list[str]:
        """Applies verl's rollout correction and returns the names of the fields that it changed or added."""
        config = self.config.algorithm.get("rollout_correction")
        if config is None or "rollout_log_probs" not in data.batch or config.get("bypass_mode", False):
            return []
        corrected, correction_metrics = compute_rollout_correction_and_add_to_batch(data, config)
        metrics.update(correction_metrics)
        data.batch = corrected.batch
        return ["response_mask"] + (["rollout_is_weights"] if "rollout_is_weights" in data.batch else [])

    def _check_rewards(self, batch: KVBatchMeta, scores: torch.Tensor) -> None:
        """Raises ValueError, naming the samples, where a reward in ``scores`` (B, T) is not a finite number."""
        bad = ~torch.isfinite(scores).all(dim=-1)
        if bad.any():
            uids = [key for key, is_bad in zip(batch.keys, bad.tolist(), strict=True) if is_bad]
            raise ValueError(
                f"step {self.global_steps}: the reward function returned a value that is not finite for {len(uids)} "
                f"of {len(batch.keys)} samples; uids: {', '.join(uids[:8])}. Nothing was updated or saved."
            )

    def _save_checkpoint(self) -> None:
        """Saves as verl does; the critic's manifest learns of the run's seeds and configuration first."""
        if self.use_critic:
            config = OmegaConf.to_container(self.config, resolve=True)
            assert isinstance(config, dict)
            self.critic_wg.note_run(run_facts({str(name): section for name, section in config.items()}))
        super()._save_checkpoint()

    def _check_values(self, values: torch.Tensor) -> None:
        """Raises ValueError where one of ``values`` (B, T) is not a finite number."""
        if not torch.isfinite(values).all():
            share = 1.0 - torch.isfinite(values).float().mean().item()
            raise ValueError(
                f"step {self.global_steps}: the critic's values are not finite at {share:.0%} of the tokens; nothing "
                "was updated or saved in this step; go on from an earlier checkpoint with a smaller critic.optim.lr"
            )

    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Updates the critic as verl does, with gamma, lam and the step, from which it builds its targets."""
        batch.extra_info.update(
            gamma=self.config.algorithm.gamma,
            lam=self.config.algorithm.lam,
            global_steps=self.global_steps * self.parameter_sync_step + self.local_trigger_step,
        )
        metrics.update(staleness(batch.tags, self.global_steps - 1))
        fields = (*CRITIC_FIELDS, *DUMP_FIELDS) if self._dump_due() else CRITIC_FIELDS
        return super()._update_critic(self._asking_for(batch, fields), metrics)


@register_trainer("dvpo_sync")
class DVPOTrainerSync(DistributionalCriticMixin, PPOTrainerSync):
    """Lets rollout and training take turns on the same devices."""

    base_mode = "sync"


@register_trainer("dvpo_colocate_async")
class DVPOTrainerColocateAsync(DistributionalCriticMixin, PPOTrainerColocateAsync):
    """Works as ``dvpo_sync``, with rollouts that may stop and go on after an update."""

    base_mode = "colocate_async"


@register_trainer("dvpo_separate_async")
class DVPOTrainerSeparateAsync(DistributionalCriticMixin, PPOTrainerSeparateAsync):
    """Gives rollout and training devices of their own."""

    base_mode = "separate_async"
