# SPDX-License-Identifier: Apache-2.0
"""One part of gpu.py, in a process of its own.

Shapes: L tokens, N heads, M quantiles, D = N·M outputs, H hidden size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quantile_loss
import torch
import yaml

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HEADS = 3
#: Of --size: a name in shapes.yaml, tokens of loss and head, rows and their length for the backbone and the update.
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "shape": "qwen3_0_6b",
        "tokens": 16384,
        "rows": 8,
        "length": 1024,
        "repeats": 5,
        "quantiles": (50, 200, 500),
    },
    "small": {"shape": "small", "tokens": 512, "rows": 2, "length": 64, "repeats": 2, "quantiles": (50, 200)},
}
STEPS = 5


def machine() -> dict[str, Any]:
    """What the tables name, without the name of the host."""
    found = quantile_loss.machine(DEVICE)
    name = torch.cuda.get_device_name() if GPU else f"{found['cpu']}, no GPU"
    facts = {"name": name, "gpu": GPU, "torch": torch.__version__, "python": platform.python_version()}
    return facts | ({"CUDA": torch.version.cuda} if GPU else {"threads": torch.get_num_threads()})


def peak_of(call: Callable[[], Any]) -> float | str:
    """MiB that torch allocated at most beyond what was there; on the CPU nobody counts."""
    if not GPU:
        return ""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def watch_of(size: dict[str, Any]) -> quantile_loss.Stopwatch:
    import time

    return quantile_loss.Stopwatch(DEVICE, size["repeats"], time.perf_counter)


def loss(size: dict[str, Any]) -> dict[str, Any]:
    """The exact loss of one head, and DVPO's whole loss of three with all its terms."""
    from verl_dvpo.distributional import quantile_huber_loss, quantile_levels

    tokens, rows = size["tokens"], []
    for m in size["quantiles"]:
        levels = quantile_levels(m, device=DEVICE)
        theta = torch.randn(tokens, m, device=DEVICE, requires_grad=True)
        z = torch.randn(tokens, m, device=DEVICE)

        def exact(t: torch.Tensor, z: torch.Tensor = z, levels: torch.Tensor = levels) -> torch.Tensor:
            return quantile_huber_loss(t, z, levels, kappa=1.0)

        config = quantile_loss.WHOLE["all terms, kappa 1"]
        whole, multipliers, _ = quantile_loss.whole_loss_calls(DEVICE, tokens, m, config)
        calls = (quantile_loss.backward_of(exact, theta), whole, multipliers)
        one, all_terms, once = (1e6 * s / tokens for s in quantile_loss.best_times(watch_of(size), *calls))
        rows.append({"M": m, "one head, µs": one, "3 heads, all terms, µs": all_terms, "multipliers, µs": once})
        rows[-1]["peak, MiB"] = peak_of(whole)
    return {"rows": rows, "note": f"Per token, of {tokens:,} tokens, fp32."}


def head(size: dict[str, Any]) -> dict[str, Any]:
    """The head with DVPO's loss on random states, in one piece and in blocks of tokens."""
    from verl_dvpo.critic.head import build_head
    from verl_dvpo.critic.head_call import HeadCall
    from verl_dvpo.families.registry import build_family, family_settings

    tokens, hidden_size = size["tokens"], shape_of(size)["hidden_size"]
    hidden = torch.randn(tokens, hidden_size, device=DEVICE, requires_grad=True)
    rows = []
    for m in size["quantiles"]:
        family = build_family(family_settings("quantile_ensemble", num_heads=HEADS, num_quantiles=m))
        targets, multipliers = targets_of(family, tokens)
        module = build_head(hidden_size, family, seed=0).to(DEVICE)
        calls = []
        for block in (None, 4096, 512):

            def read(
                outputs: torch.Tensor, places: slice, family: Any = family, z: Any = targets, mu: Any = multipliers
            ):
                here = {name: tensor[places] for name, tensor in z.items()}
                return family.loss(outputs, here, mu).total[:, None]

            def call(module: Any = module, read: Any = read, block: int | None = block) -> None:
                module.call = HeadCall(torch.arange(tokens, device=DEVICE), read=read, block=block)
                module(hidden).sum().backward()

            calls.append((block, call))
        seconds = quantile_loss.best_times(watch_of(size), *(call for _, call in calls))
        for (block, call), taken in zip(calls, seconds, strict=True):
            rows.append(
                {"D": family.num_outputs, "block": block or "all", "ms": 1e3 * taken, "peak, MiB": peak_of(call)}
            )
    return {"rows": rows, "note": f"{tokens:,} tokens, hidden size {hidden_size}, fp32."}


def targets_of(family: Any, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Targets of one sequence of ``tokens`` with random outputs and a reward at its end: name -> (L, ...)."""
    kept = family.keep(torch.randn(1, tokens, family.num_outputs, device=DEVICE))
    rewards, mask = torch.zeros(1, tokens, device=DEVICE), torch.ones(1, tokens, device=DEVICE)
    rewards[0, -1] = 1.0
    targets = family.build_targets(kept, rewards, mask, gamma=1.0, lam=0.95)
    return {name: tensor[0] for name, tensor in targets.items()}, family.multipliers(targets, mask)


def shape_of(size: dict[str, Any]) -> dict[str, Any]:
    """The backbone's sizes."""
    return yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text())[size["shape"]]


def backbone(size: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of a backbone with a scalar head and squared error, and with DVPO's heads and loss."""
    from transformers import Qwen3Config, Qwen3Model

    from verl_dvpo.critic.head import build_head
    from verl_dvpo.families.registry import build_family, family_settings

    torch.manual_seed(0)
    dtype = torch.bfloat16 if GPU else torch.float32
    config = Qwen3Config(**shape_of(size), tie_word_embeddings=True, attn_implementation="sdpa")
    model = Qwen3Model(config).to(DEVICE, dtype)
    ids = torch.randint(0, config.vocab_size, (size["rows"], size["length"]), device=DEVICE)
    tokens = ids.numel()
    cases = {"scalar, squared error": family_settings("scalar")}
    for m in size["quantiles"]:
        cases[f"{HEADS} x {m} quantiles"] = family_settings("quantile_ensemble", num_heads=HEADS, num_quantiles=m)
    calls: dict[str, Callable[[], None]] = {}
    for name, settings in cases.items():
        family = build_family(settings)
        module = build_head(config.hidden_size, family, seed=0).to(DEVICE)
        targets, multipliers = targets_of(family, tokens)

        def call(module: Any = module, family: Any = family, targets: Any = targets, mu: Any = multipliers) -> None:
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state
            outputs = module(hidden).flatten(0, 1)
            family.loss(outputs, targets, mu).total.mean().backward()
            model.zero_grad()

        calls[name] = call
    seconds = quantile_loss.best_times(watch_of(size), *calls.values())
    rows = [
        {"critic": name, "ms": 1e3 * taken, "times scalar": taken / seconds[0], "peak, MiB": peak_of(call)}
        for (name, call), taken in zip(calls.items(), seconds, strict=True)
    ]
    number = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    kind = "bf16" if GPU else "fp32"
    return {"rows": rows, "note": f"{number:.0f}M parameters in {kind}, {size['rows']} x {size['length']} tokens."}


def update(size: dict[str, Any]) -> dict[str, Any]:
    """The worker's update, by critic_update.py."""
    import critic_update

    options = argparse.Namespace(
        shape=size["shape"],
        all=False,
        cases=["ppo", "dvpo M=200", *(["dvpo M=50", "dvpo M=500"] if GPU else [])],
        rounds=5 if GPU else 2,
        rows=size["rows"],
        length=size["length"],
        micro_tokens=8192 if GPU else 160,
        memory=False,
    )
    result = critic_update.run(options)
    names = {"case": "critic", "update_s": "update, s", "ratio": "times ppo", "inference_s": "inference, s"}
    rows = [{title: row[name] for name, title in names.items()} for row in result["rows"]]
    number = result["backbone_parameters"] / 1e6
    return {"rows": rows, "note": f"{number:.0f}M parameters, {result['tokens']:,} response tokens."}


def run(size: dict[str, Any], folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Five steps of training with rollout, on the smallest model of the demo."""
    from verl_dvpo.records import read_metrics

    data, metrics = folder.resolve() / "demo", folder.resolve() / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    cli = [sys.executable, "-m", "verl_dvpo.cli", "demo-data", "--tiny", "--out", str(data)]
    subprocess.run(cli, check=True)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "dvpo_trainer", "algorithm=dvpo"]
    command += [] if GPU else ["platform=cpu"]
    command += ["+task=demo", f"demo.dir={data}", f"trainer.total_training_steps={STEPS}", "trainer.logger=[file]"]
    command += ["trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.val_before_train=false"]
    command += [
        f"trainer.default_local_dir={folder.resolve() / 'checkpoints'}",
        f"hydra.run.dir={folder.resolve()}/hydra",
    ]
    environment = {"VERL_FILE_LOGGER_PATH": str(metrics)} | ({} if GPU else {"VERL_PLATFORM": "cpu"})
    subprocess.run([*command, *overrides], check=True, env={**os.environ, **environment})
    records = [record["data"] for record in read_metrics(metrics)]
    phases = {"gen": "rollout", "values": "values", "update_critic": "critic", "update_actor": "actor", "step": "step"}
    rows = []
    for phase, title in phases.items():
        seconds = [record[f"timing_s/{phase}"] for record in records if f"timing_s/{phase}" in record]
        rows.append({"phase": title, "first, s": seconds[0], "median of the others, s": statistics.median(seconds[1:])})
    return {"rows": rows, "note": f"{len(records)} steps, the demo's tiny model."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.part == "machine":
        found: dict[str, Any] = {"machine": machine()}
    elif options.part == "run":
        found = run(size, options.folder, options.overrides)
    else:
        found = {"loss": loss, "head": head, "backbone": backbone, "update": update}[options.part](size)
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
