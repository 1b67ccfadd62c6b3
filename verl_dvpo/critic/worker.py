# SPDX-License-Identifier: Apache-2.0
"""The critic's worker: (B, T) values go out, the numbers that targets need stay.

One step of training, on each rank: ``infer_batch`` decodes the head's outputs micro-batch by micro-batch, keeps what
the family needs later and returns ``values``. ``train_mini_batch`` builds the targets of the whole update once from
what was kept, then runs verl's own loop over epochs, mini-batches and micro-batches with the family's loss.

Shape legend: B sequences, T response positions, L response tokens laid end to end, nnz all tokens laid end to end,
D outputs of the head, S numbers kept per token.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.metric.utils import AggregationType, Metric
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from verl_dvpo.critic import checkpoints
from verl_dvpo.critic.dumps import PLAN, ValueDump
from verl_dvpo.critic.engine import MODEL_TYPE
from verl_dvpo.critic.packing import ResponseTokens
from verl_dvpo.critic.readings import OPTIONS, read_states
from verl_dvpo.critic.shares import TermShares, is_due
from verl_dvpo.critic.store import (
    KeptSamples,
    Targets,
    build_targets,
    masked_sums,
    mean_statistics,
    prompt_keys,
    reward_std,
)
from verl_dvpo.distributional.advantage_config import AdvantageConfig
from verl_dvpo.families.base import FamilyConfig
from verl_dvpo.families.registry import build_family
from verl_dvpo.saved.facts import base_name

logger = logging.getLogger(__name__)

#: Set on the batch by ``train_mini_batch``: the row of each sequence in this rank's batch.
ROW = "dvpo_row"


class DistributionalCriticWorker(TrainingWorker):
    """verl's training worker around a ``ValueFamily``."""

    model_config: Any
    engine: Any
    loss_fn: Any

    def __init__(self, config: TrainingWorkerConfig) -> None:
        # Frozen for users; verl's trainer names the model type in `_setup`.
        object.__setattr__(config, "model_type", MODEL_TYPE)
        super().__init__(config)
        self.settings: FamilyConfig = self.model_config.value
        self.family = build_family(self.settings)
        self.engine.reader = self
        self._options = AdvantageConfig()
        self._statistics: dict[str, Tensor] = {}
        self._kept: KeptSamples | None = None
        self._targets: Targets | None = None
        self._shares: TermShares | None = None
        self._dump: ValueDump | None = None
        self._run: dict[str, Any] = {}
        self._columns: tuple[str, ...] = ()  # names of what ``losses`` returns

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[attr-defined]
    def set_loss_fn(self, loss_fn: Any) -> None:
        """Takes the critic's configuration from verl's ``partial(value_loss, config=...)``; the loss is our family's.

        Args:
            loss_fn: what verl's trainer hands every critic.
        """
        self.loss_fn = partial(self._loss, loss_fn.keywords["config"])

    # ------------------------------------------------------------------ checkpoints

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[attr-defined]
    def note_run(self, facts: dict[str, Any]) -> None:
        """Takes what the manifests of the next checkpoints say of the run: seeds, hash of its configuration."""
        self._run = dict(facts)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[attr-defined]
    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Saves as verl does, and last a manifest that vouches for every file; without it the folder does not load."""
        folder = Path(local_path)
        checkpoints.unseal(folder)
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        hidden_size = self.model_config.hf_config.get_text_config().hidden_size
        facts = {**self._run, "step": global_step, "base_model": base_name(self.model_config.path)}
        facts |= self.engine.saved_facts()
        manifest = checkpoints.describe_critic("checkpoint", self.settings, self.family.num_outputs, hidden_size, facts)
        checkpoints.seal(folder, manifest, self.family)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[attr-defined]
    def load_checkpoint(
        self, local_path: str | None, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Loads as verl does, once every file on every rank has been found whole and of this family.

        Raises:
            ValueError: a file is missing or changed, or another family or other sizes were saved; nothing was loaded.
        """
        if local_path is not None:
            checkpoints.verify(Path(local_path), self.settings, self.family.num_outputs, self.engine.refuse_saved)
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
        if local_path is not None:
            checkpoints.load_state(Path(local_path), self.family)

    # ------------------------------------------------------------------ inference

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict:
        """Runs verl's inference pass and keeps what targets need.

        Returns:
            ``values``, jagged (B, prompt + response), and the fields of the options on ``data``, jagged (B, T).
        """
        self._options = tu.pop(data, key=OPTIONS, default=AdvantageConfig())
        self._statistics = {}
        self._dump = self._new_dump(data)
        output = super().infer_batch(data)
        if self.engine.has_outputs:
            self._kept = KeptSamples(self.engine.take_kept(), data, self._statistics)
        return output

    def _new_dump(self, data: TensorDict) -> ValueDump | None:
        """Begins a dump where the trainer's plan asks for one: on the first rank that has outputs, of its own rows."""
        plan = tu.pop(data, key=PLAN, default=None)
        writes = self.engine.get_data_parallel_rank() == 0 and self.engine.is_mp_src_rank_with_outputs()
        if plan is None or not writes:
            return None
        data[ROW] = torch.arange(data.shape[0])
        return ValueDump(plan, self.family, data, self.settings.dump_sequences)

    def reads_blocks(self) -> bool:
        """Tells whether losses may be computed block by block: not where the terms' shares need all outputs at once."""
        return self._shares is None

    def decode(self, outputs: Tensor, micro_batch: TensorDict, places: slice) -> dict[str, Tensor]:
        """Reads (L', D) at ``places`` among the micro-batch's response tokens: name -> (L', ...).

        ``values``, ``kept`` (L', S), and what options of the actor's advantage read of each state.
        """
        states = outputs.float()
        kept = self.family.keep(states)
        readings = read_states(self.family, states, self._options)
        self._accumulate(states, readings, micro_batch["response_mask"].values()[places])
        if self._dump is not None:
            self._dump.add(states, micro_batch[ROW], ResponseTokens.of(micro_batch).rows[places])
        values = self.family.values_from_kept(kept)
        return {"values": values, "kept": kept.cpu() if self.settings.keep_on == "cpu" else kept, **readings}

    def assemble(
        self, decoded: dict[str, Tensor], micro_batch: TensorDict, tokens: ResponseTokens
    ) -> dict[str, Tensor]:
        """Makes jagged tensors: ``values`` (B, prompt + response), 0 at the prompt, all others (B, T, ...)."""
        responses, input_ids = micro_batch["responses"], micro_batch["input_ids"]
        values = decoded["values"].new_zeros(input_ids.values().shape[0])
        values[tokens.states] = decoded["values"]
        others = {name: tensor for name, tensor in decoded.items() if name != "values"}
        return {"values": torch.nested.nested_tensor_from_jagged(values, input_ids.offsets())} | {
            name: torch.nested.nested_tensor_from_jagged(tensor, responses.offsets().to(tensor.device))
            for name, tensor in others.items()
        }

    def _accumulate(self, states: Tensor, readings: dict[str, Tensor], mask: Tensor) -> None:
        measured = self.family.statistics(states)
        if "value_sigma" in readings:
            measured["quantile/sigma"] = readings["value_sigma"]
        for name, value in masked_sums(measured, mask).items():
            self._statistics[name] = self._statistics[name] + value if name in self._statistics else value

    # ------------------------------------------------------------------ update

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """Builds the targets of the whole update from what was kept, then runs verl's loop.

        ``data`` needs, beside verl's own fields, ``rm_scores`` or ``token_level_rewards``, and the scalars ``gamma``,
        ``lam`` and ``global_steps`` of the trainer.

        What was kept is found by the sequences' tokens, in any order. Where a sequence was not inferred on some rank,
        as after a restart of the worker, all ranks infer the batch again, with the weights that the critic has now.

        Raises:
            RuntimeError: a sequence was not inferred, and this engine has ranks without outputs.
        """
        if not self.engine.has_outputs:
            if self.family.state():
                raise ValueError(
                    "critic.value has a setting 'auto', but this rank, a pipeline stage before the last, sees no "
                    "values to choose from; use one pipeline stage for the critic, or numbers in place of 'auto'"
                )
            return super().train_mini_batch(data)
        kept, again = self._kept_of(data)
        statistics = mean_statistics(kept.statistics, self._sum_over_ranks)
        rewards = data["token_level_rewards"] if "token_level_rewards" in data else data["rm_scores"]
        warnings = self.family.warnings(statistics, reward_std(rewards, data["response_mask"], self._sum_over_ranks))
        for text in warnings.values():
            logger.warning("critic: %s", text)
        metrics = {f"critic/{name}": value for name, value in statistics.items()}
        metrics |= {f"critic/{name}": 1.0 for name in warnings} | {"critic/inferred_again": float(again)}
        if self._dump is not None:
            tokenizer = getattr(self.model_config, "tokenizer", None)
            self._dump.write(data, rewards, gamma=tu.get(data, "gamma"), tokenizer=tokenizer)
        self._targets = self._build_targets(data, kept, rewards)
        target_means = mean_statistics(self._targets.statistics, self._sum_over_ranks)
        metrics |= {f"critic/{name}": value for name, value in target_means.items()}
        metrics |= {f"critic/multiplier/{k}": v.item() for k, v in self._targets.multipliers.items()}
        data[ROW] = torch.arange(data.shape[0])
        output = super().train_mini_batch(data)
        if self._shares is not None:
            metrics |= {f"critic/share/{k}": v for k, v in self._shares.shares(self._sum_over_ranks).items()}
        metrics |= {f"critic/{name}": value for name, value in self.family.adapt(target_means).items()}
        self._kept = self._targets = self._shares = self._dump = None
        if output is None:
            return output
        logged = tu.get(output, "metrics") | {name: [value] for name, value in metrics.items()}
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": logged})

    def _kept_of(self, data: TensorDict) -> tuple[KeptSamples, bool]:
        """Returns what was kept of the sequences in ``data``, and whether they had to be inferred again."""
        kept = self._kept.of(data) if self._kept is not None else None
        missing = self._sum_over_ranks(torch.tensor([float(kept is None)], device=get_device_id()))
        if missing.item() == 0:  # one wait an update: all ranks have to go the same way
            assert kept is not None
            return kept, False
        if not self.engine.all_have_outputs:
            raise RuntimeError(
                "the critic's update got sequences that its last inference pass did not see; with pipeline stages it "
                "cannot infer them again; start the run again from its last checkpoint"
            )
        logger.warning("critic: sequences of this update were not inferred before it; they are inferred again")
        again = tu.get_tensordict({name: data[name] for name in data.keys() if isinstance(data[name], Tensor)})  # noqa: SIM118
        tu.assign_non_tensor(again, compute_loss=False, temperature=1.0)
        self.infer_batch(again)
        kept = self._kept.of(data) if self._kept is not None else None
        assert kept is not None
        return kept, True

    def _build_targets(self, data: TensorDict, kept: KeptSamples, rewards: Tensor) -> Targets:
        step = tu.pop(data, key="global_steps")
        self._shares = TermShares() if is_due(self.settings.share_every, step) else None
        lam = self.settings.lam if self.settings.lam is not None else tu.pop(data, key="lam")
        return build_targets(
            self.family,
            kept,
            rewards,
            data["response_mask"],
            gamma=tu.pop(data, key="gamma"),
            lam=lam,
            rows_per_chunk=self.settings.rows_per_chunk,
            generator=self._generator(step, kept.values.device),
            reduce=self._sum_over_ranks,
            prompts=prompt_keys(data["prompts"]) if self.family.sees_prompts else None,
        )

    def _generator(self, step: int, device: torch.device) -> torch.Generator:
        """Seeds by the seed, the step and the data-parallel rank alone, so that a resumed run draws the same."""
        rank = self.engine.get_data_parallel_rank()
        return torch.Generator(device).manual_seed((self.settings.target_seed * 1_000_003 + step) * 65_537 + rank)

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor, group=self.engine.get_data_parallel_group())
        return tensor

    def _loss(
        self, config: Any, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Computes the family's loss on one micro-batch, aggregated by verl's rules over the whole mini-batch."""
        assert self._targets is not None, "train_mini_batch builds them"
        tokens = ResponseTokens.of(data)
        mask = data["response_mask"].to_padded_tensor(0)

        def aggregate(term: Tensor) -> Tensor:
            return agg_loss(
                loss_mat=tokens.padded(term, mask.shape),
                loss_mask=mask.bool(),
                loss_agg_mode=config.loss_agg_mode,
                dp_size=data["dp_size"],
                batch_num_tokens=data["batch_num_tokens"],
                global_batch_size=data["global_batch_size"],
                loss_scale_factor=config.loss_scale_factor,
            )

        with torch.autocast(device_type=mask.device.type, enabled=False):
            if "losses" in model_output:
                losses = model_output["losses"].values()
            else:
                outputs = model_output["outputs"].values().float()
                losses = self.losses(outputs, data, tokens, slice(0, len(outputs)))
                if self._shares is not None:
                    targets = self._targets.of(data[ROW], tokens.rows, tokens.columns)
                    multipliers = self._targets.multipliers
                    self._shares.add(outputs, lambda leaf: self.family.loss(leaf, targets, multipliers), aggregate)
            aggregated = [aggregate(column) for column in losses.unbind(-1)]
        values = torch.stack([value.detach() for value in aggregated]).tolist()  # one wait for the device
        # Each micro-batch holds its share of the mini-batch's mean, so shares add up (as in verl's value_loss).
        metrics = {
            f"critic/{name}": Metric(value=value, aggregation=AggregationType.SUM)
            for name, value in zip(self._columns, values, strict=True)
        }
        return aggregated[0], metrics

    def losses(self, outputs: Tensor, micro_batch: TensorDict, tokens: ResponseTokens, places: slice) -> Tensor:
        """Computes (L', C) from (L', D): the family's loss, then without gradient each of its terms and the value."""
        assert self._targets is not None, "train_mini_batch builds them"
        with torch.autocast(device_type=outputs.device.type, enabled=False):
            targets = self._targets.of(micro_batch[ROW], tokens.rows[places], tokens.columns[places])
            loss = self.family.loss(outputs.float(), targets, self._targets.multipliers)
            terms = {f"loss/{name}": term.detach() for name, term in loss.terms.items()}
            terms["vpred_mean"] = self.family.value(outputs.detach().float())
        self._columns = ("vf_loss", *terms)
        return torch.stack([loss.total, *terms.values()], dim=-1)
