# SPDX-License-Identifier: Apache-2.0
"""What a critic update costs, backbone included: every family beside scalar PPO, in turns, on the real worker.

    python benchmarks/critic_update.py                                    # CPU: 22M parameters, 4k tokens
    python benchmarks/critic_update.py --shape qwen3_0_6b                 # GPU: bf16 backbone, 32k tokens
    python benchmarks/critic_update.py --out update.json

An update is `train_mini_batch` of the critic's worker: targets of the whole batch, forward, loss, backward and
optimizer step over the same micro-batches for every family. Families take turns, and a ratio is the median over rounds
of the time of one divided by the time of scalar PPO in the same round, so that a machine's slow minutes cancel. Memory
is read in a process of its own for each family: on a GPU what torch allocated at most, on the CPU what the update added
to the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("VERL_PLATFORM", "cpu")

from verl_dvpo.families.registry import family_names

CASES: dict[str, dict[str, Any]] = {
    "ppo": {"family": "scalar"},
    "dvpo M=200": {"family": "quantile_ensemble", "num_heads": 3, "num_quantiles": 200},
    "dvpo M=200, shares": {"family": "quantile_ensemble", "share_every": 1},
    "dvpo M=50": {"family": "quantile_ensemble", "num_heads": 3, "num_quantiles": 50},
    "dvpo M=500": {"family": "quantile_ensemble", "num_heads": 3, "num_quantiles": 500},
    "dvpo_calibrated": {
        "family": "quantile_ensemble",
        "levels": "midpoint",
        "kappa": 0.0,
        "target": "sample_replacement",
        "constraint_statistics": "level",
    },
    "ppo_ensemble": {"family": "scalar_ensemble"},
    "robust_bellman": {"family": "robust_bellman"},
    "dfpo": {"family": "value_flow", "head_width": 256},
}
# Any other family goes by its own name, with its defaults.
CASES |= {name: {"family": name} for name in family_names() if name not in {case["family"] for case in CASES.values()}}


def save_backbone(folder: Path, shape: str) -> tuple[str, int]:
    """Writes a Qwen3 of that shape with random weights; returns its folder and number of parameters."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        **yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text())[shape], tie_word_embeddings=True
    )
    torch.manual_seed(0)
    model = Qwen3Model(config).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    path = folder / shape
    model.save_pretrained(path)
    return str(path), sum(parameter.numel() for parameter in model.parameters())


def make_worker(model: str, settings: dict[str, Any], tokens_per_micro_batch: int) -> Any:
    """A worker as the trainer starts it, alone in its process group."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig
    from verl.workers.utils.losses import value_loss

    from verl_dvpo.critic.config import DistributionalFSDPCriticConfig, ValueModelConfig, family_config
    from verl_dvpo.critic.worker import DistributionalCriticWorker

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", RAY_LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29600 + os.getpid() % 300))
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    model_config = ValueModelConfig(
        path=model,
        load_tokenizer=False,
        override_config={"attn_implementation": "sdpa"},
        use_remove_padding=False,
        enable_gradient_checkpointing=torch.cuda.is_available(),
    )
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        model_dtype="fp32",
        use_torch_compile=False,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=tokens_per_micro_batch,
        infer_max_token_len_per_gpu=tokens_per_micro_batch,
    )
    critic = DistributionalFSDPCriticConfig(
        strategy="fsdp2", fsdp=engine, model=model_config, value=family_config(**settings), use_dynamic_bsz=True
    )
    worker = DistributionalCriticWorker(
        TrainingWorkerConfig(
            model_type="value_model",
            model_config=critic.model,
            engine_config=critic.engine,
            optimizer_config=FSDPOptimizerConfig(lr=1e-5, clip_grad=1.0, total_training_steps=100, lr_warmup_steps=0),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    worker.set_loss_fn(partial(value_loss, config=critic))
    return worker


def make_batch(rows: int, length: int, vocabulary: int = 8192) -> Any:
    """Rows of 16 prompt tokens and ``length`` response tokens with a terminal reward of 0 or 1."""
    from verl.utils import tensordict_utils as tu

    rng = torch.Generator().manual_seed(0)

    def jagged(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    prompts = [torch.randint(0, vocabulary, (16,), generator=rng) for _ in range(rows)]
    responses = [torch.randint(0, vocabulary, (length,), generator=rng) for _ in range(rows)]
    mask = jagged([torch.ones(length, dtype=torch.int64)] * rows)
    rewards = torch.zeros(rows, length)
    rewards[:, -1] = torch.randint(0, 2, (rows,), generator=rng).float()
    return tu.get_tensordict(
        {
            "input_ids": jagged([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
            "position_ids": jagged([torch.arange(16 + length)] * rows),
            "prompts": jagged(prompts),
            "responses": jagged(responses),
            "response_mask": mask,
            "loss_mask": mask,
            "rm_scores": jagged(list(rewards)),
        }
    )


def update(worker: Any, batch: Any, step: int) -> tuple[float, float]:
    """Seconds of the inference pass and of the update after it."""
    from verl.utils import tensordict_utils as tu

    inference, training = batch.clone(), batch.clone()
    tu.assign_non_tensor(inference, compute_loss=False, temperature=1.0)
    rows = len(batch)
    tu.assign_non_tensor(
        training,
        global_batch_size=rows,
        mini_batch_size=rows,
        epochs=1,
        seed=0,
        temperature=1.0,
        dataloader_kwargs={"shuffle": False},
        gamma=1.0,
        lam=0.95,
        global_steps=step,
    )
    marks = []
    for call in (lambda: worker.infer_batch(inference), lambda: worker.train_mini_batch(training)):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        marks.append(time.perf_counter() - start)
    return marks[0], marks[1]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_memory(model: str, case: str, rows: int, length: int, tokens: int) -> float:
    """MiB at the peak of one update: torch's on a GPU, what the process grew by on the CPU."""
    worker = make_worker(model, CASES[case], tokens)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        update(worker, make_batch(rows, length), 1)
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again at what is resident now
    before = resident_kib("VmRSS")
    update(worker, make_batch(rows, length), 1)
    return (resident_kib("VmHWM") - before) / 2**10


def resident_kib(field: str) -> int:
    """VmRSS, what this process holds now, or VmHWM, the most it held since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_memories(arguments: argparse.Namespace, model: str, cases: list[str]) -> dict[str, float]:
    """Measures the memory of each case in a process of its own; on the CPU two at a time, which share no memory."""

    def peak_memory(case: str) -> float:
        command = [sys.executable, __file__, "--memory-of", case, "--model", model]
        command += [f"--{name}={getattr(arguments, name)}" for name in ("rows", "length", "micro_tokens")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout.strip().splitlines()[-1])

    with ThreadPoolExecutor(1 if torch.cuda.is_available() else 2) as pool:
        return dict(zip(cases, pool.map(peak_memory, cases), strict=True))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times every case in turns and returns rows for the table."""
    chosen = list(CASES) if arguments.all else list(dict.fromkeys(["ppo", *arguments.cases]))
    with tempfile.TemporaryDirectory() as folder:
        model, parameters = save_backbone(Path(folder), arguments.shape)
        batch = make_batch(arguments.rows, arguments.length)
        workers = {case: make_worker(model, CASES[case], arguments.micro_tokens) for case in chosen}
        times: dict[str, list[tuple[float, float]]] = {case: [] for case in workers}
        for step in tqdm(range(arguments.rounds + 1), desc="rounds, the first to warm up"):
            for case, worker in workers.items():
                times[case].append(update(worker, batch, step))
        del workers
        memory = peak_memories(arguments, model, chosen) if arguments.memory else dict.fromkeys(chosen)
        rows = []
        for case, measured in times.items():
            updates = [seconds for _, seconds in measured[1:]]
            ratios = [mine / base for mine, (_, base) in zip(updates, times["ppo"][1:], strict=True)]
            rows.append(
                {
                    "case": case,
                    "update_s": min(updates),
                    "ratio": statistics.median(ratios),
                    "ratio_low": min(ratios),
                    "ratio_high": max(ratios),
                    "inference_s": min(seconds for seconds, _ in measured[1:]),
                    "peak_mib": memory[case],
                    "rounds_s": updates,
                }
            )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "shape": arguments.shape,
        "backbone_parameters": parameters,
        "tokens": arguments.rows * arguments.length,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }


def print_table(result: dict[str, Any]) -> None:
    """The result as Markdown."""
    print(
        f"\nOne critic update: {result['backbone_parameters'] / 1e6:.0f}M parameters, {result['tokens']} response "
        f"tokens, {result['device']}, {result['threads']} threads\n"
    )
    print("| critic | update, s | times scalar PPO (lowest to highest round) | inference, s | peak memory, MiB |")
    print("| --- | --- | --- | --- | --- |")
    for row in result["rows"]:
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        spread = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        print(f"| {row['case']} | {row['update_s']:.2f} | {spread} | {row['inference_s']:.2f} | {memory} |")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``run``."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", default="qwen3_0_6b" if gpu else "small", help="a name in shapes.yaml")
    parser.add_argument("--cases", nargs="+", default=["ppo", "dvpo M=200", "dvpo M=50", "dvpo M=500"], choices=CASES)
    parser.add_argument("--all", action="store_true", help="every family")
    parser.add_argument("--rounds", type=int, default=10 if gpu else 3)
    parser.add_argument("--rows", type=int, default=32 if gpu else 16)
    parser.add_argument("--length", type=int, default=1024 if gpu else 256)
    parser.add_argument("--micro_tokens", type=int, default=8192 if gpu else 2176)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        sizes = (arguments.rows, arguments.length, arguments.micro_tokens)
        print(measure_memory(arguments.model, arguments.memory_of, *sizes))
        return
    result = run(arguments)
    print_table(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
