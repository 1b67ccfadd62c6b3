# SPDX-License-Identifier: Apache-2.0
"""The critic on FSDP and FSDP2: verl's engine with one fp32 head of D outputs.

Packing, sequence parallelism, micro-batches, checkpoints and LoRA of the backbone are verl's. Three things differ: the
module that is loaded, the wrapping of its head, and outputs, which are computed for response tokens only, D of each.

Shape legend: B sequences, T response positions, L response tokens of a micro-batch laid end to end, L' those of them in
this rank's part of the sequence, D outputs of the head.
"""

import warnings
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import fsdp2_load_full_state_dict, get_init_weight_context_manager
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.ulysses import gather_outputs_and_unpad, get_ulysses_sequence_parallel_rank
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_dvpo.critic.checkpoints import data_only
from verl_dvpo.critic.engine import MODEL_TYPE, DistributionalEngine
from verl_dvpo.critic.first_head import fill_head, refuse_lost_adapter
from verl_dvpo.critic.head import head_name, load_backbone
from verl_dvpo.critic.head_call import HeadCall, Parts
from verl_dvpo.critic.packing import ResponseTokens
from verl_dvpo.families.registry import build_family


def _no_generation(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("a critic does not generate")


# FSDP1 broadcasts a module's first state over an accelerator's backend only, so the CPU has FSDP2.
@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cuda", "npu", "cpu"])
@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp"], device=["cuda", "npu"])
class FSDPDistributionalEngine(DistributionalEngine, FSDPEngineWithLMHead):
    """verl's FSDP engine around a backbone with a head of ``family.num_outputs`` outputs."""

    def _build_module(self) -> Any:
        refuse_lost_adapter(self.model_config.local_path, self.model_config.lora_adapter_path)
        config = self.engine_config.model_dtype
        dtype = PrecisionType.to_dtype(config) if config is not None else torch.float32
        init_context = get_init_weight_context_manager(
            use_meta_tensor=not self.model_config.hf_config.tie_word_embeddings, mesh=self.device_mesh
        )
        with init_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "newly initialized: score.weight": we initialise it ourselves
            module: Any
            module, scalar = load_backbone(
                self.model_config.local_path,
                self.model_config.hf_config,
                dtype=dtype,
                trust_remote_code=self.model_config.trust_remote_code,
            )
            apply_monkey_patch(
                model=module,
                use_remove_padding=self.use_remove_padding,
                ulysses_sp_size=self.ulysses_sequence_parallel_size,
                use_fused_kernels=False,
            )
            module.to(dtype)
            if self.model_config.enable_gradient_checkpointing:
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            hidden_size = module.config.get_text_config().hidden_size
            head = self._new_head(hidden_size)
            fill_head(
                head,
                build_family(self.model_config.value),
                self.model_config.value,
                path=self.model_config.local_path,
                config=self.model_config.hf_config,
                scalar=scalar,
            )
            setattr(module, head_name(module), head)
            self._head = head  # itself, below FSDP's and PEFT's wrappers
        return module

    def _build_lora_module(self, module: Any) -> Any:
        """Adapters on the backbone; the head is trained whole, so it is kept out of their sight."""
        name = head_name(module)
        head = getattr(module, name)
        setattr(module, name, nn.Identity())
        if not hasattr(module, "prepare_inputs_for_generation"):
            # verl's `_build_lora_module` gives PEFT the task type CAUSAL_LM, whose wrapper reads this attribute of a
            # generating model and calls it only in `generate`.
            module.prepare_inputs_for_generation = _no_generation
        module = super()._build_lora_module(module)
        setattr(module.get_base_model(), name, head)
        return module

    def _build_fsdp_module(self, module: Any) -> Any:
        """Wraps the backbone as verl does and the head on its own, in fp32 whatever ``param_dtype`` is."""
        owner = module.get_base_model() if hasattr(module, "get_base_model") else module
        name = head_name(owner)
        head = getattr(owner, name)
        setattr(owner, name, nn.Identity())
        module = super()._build_fsdp_module(module)
        setattr(owner, name, self._wrap_head(head, module))
        return module

    def _wrap_head(self, head: nn.Module, module: nn.Module) -> nn.Module:
        if isinstance(module, FSDPModule):
            offload = self._offload_policy()
            state = head.state_dict()
            fp32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
            kwargs = {} if offload is None else {"offload_policy": offload}
            fully_shard(
                head,
                mesh=self.device_mesh,
                mp_policy=fp32,
                reshard_after_forward=self.engine_config.reshard_after_forward,
                **kwargs,
            )
            fsdp2_load_full_state_dict(head, state, self.device_mesh, offload)
            return head
        assert isinstance(module, FSDP)
        fp32_v1 = MixedPrecision(
            param_dtype=torch.float32, reduce_dtype=torch.float32, buffer_dtype=torch.float32, cast_forward_inputs=False
        )
        wrapped = FSDP(
            head,
            device_id=get_device_id(),
            mixed_precision=fp32_v1,
            sync_module_states=True,
            device_mesh=self.device_mesh,
            use_orig_params=self.engine_config.use_orig_params,
        )
        state_type = FSDP.get_state_dict_type(module)
        FSDP.set_state_dict_type(wrapped, state_type.state_dict_type, state_type.state_dict_config)
        return wrapped

    def _offload_policy(self) -> Any:
        if not self._uses_fsdp2_cpu_offload_policy:
            return None
        from verl.utils.fsdp_utils import CPUOffloadPolicy

        return CPUOffloadPolicy(pin_memory=True)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Loads verl's files of this rank as data: a pickle in one of them raises, and does not run."""
        with data_only():
            super().load_checkpoint(*args, **kwargs)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """Prepares inputs as verl does, and tells the head which states to compute: those of response tokens."""
        inputs, args = super().prepare_model_inputs(micro_batch)
        tokens = ResponseTokens.of(micro_batch)
        places, first, parts = tokens.states, 0, None
        if not tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            places = tokens.in_padded(micro_batch, inputs["input_ids"].shape[-1])
        elif self.use_ulysses_sp:
            length = micro_batch["input_ids"].values().shape[0] + args["pad_size"]
            size, rank = self.ulysses_sequence_parallel_size, get_ulysses_sequence_parallel_rank()
            parts = Parts.of(tokens.states, length, size, rank)
            places, first = parts.own(tokens.states)
        decoded: list[dict[str, Tensor]] = []
        read = self._block_reader(micro_batch, tokens, decoded, split=self.use_ulysses_sp)
        block = self.model_config.value.tokens_per_block if read is not None else None
        self._head.call = HeadCall(places, first, read, block)
        args |= {"tokens": tokens, "parts": parts, "read": read, "decoded": decoded}
        return inputs, args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any = None
    ) -> dict[str, Tensor]:
        """Returns outputs at response tokens, jagged (B, T, D), or what was read of them; in inference decoded."""
        self._head.call = None
        tokens, blocks = output_args["tokens"], output_args["decoded"]
        read = self._of_all_ranks(output.logits, output_args["parts"])
        if output_args["read"] is None:
            return self._model_output(read, micro_batch, tokens)
        return self._read_output(read, micro_batch, tokens, blocks)

    def _of_all_ranks(self, own: Tensor, parts: Parts | None) -> Tensor:
        """(L', ...) -> (L, ...): gathers what the ranks of a sequence-parallel group computed."""
        if parts is None:
            return own
        return parts.joined(gather_outputs_and_unpad(parts.padded(own), gather_dim=0))
