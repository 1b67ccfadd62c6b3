# SPDX-License-Identifier: Apache-2.0
"""What the distributional loss costs: exact against pairwise, the whole DVPO loss, targets, and peak memory.

    python benchmarks/quantile_loss.py                     # CPU or GPU, about a minute; prints tables
    python benchmarks/quantile_loss.py --out losses.json   # also writes every number, and the machine

Times are the best of several repeats, forward and backward, float32, per token. On a machine that others use too,
`--threads 1 --clock process` counts only the time that this process ran (which means nothing on a GPU). The exact loss
and the pairwise one take turns, and their gradients are compared before anything is timed.

The pairwise form is timed twice: on a micro-batch, whose L×M×K tensors have up to 2^25 elements (`pairwise`: how people
use it), and cut into pieces that fit a CPU's cache (`pieces`: as good as it gets with more work on it).

Shapes: L tokens, N heads, M quantiles, K = M targets; B sequences of T tokens for the targets.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import gc
import itertools
import json
import pathlib
import platform
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from verl_dvpo.distributional import (
    DVPOLossConfig,
    constraint_multipliers,
    distributional_gae,
    dvpo_loss,
    quantile_huber_loss,
    quantile_levels,
    sample_replacement_returns,
)

SIZES = (50, 100, 200, 500)
KAPPAS = (0.0, 0.1, 1.0)
HEADS = 3
PAIRWISE_ELEMENTS, PIECE_ELEMENTS = 1 << 25, 1 << 18
MEMORY_TOKENS = 1 << 16


def pairwise_loss(theta: torch.Tensor, z: torch.Tensor, tau: torch.Tensor, kappa: float) -> torch.Tensor:
    """The form that everyone writes: θ (L, M), z (L, K), τ (M,) -> (L,), by way of (L, M, K)."""
    u = z[:, None, :] - theta[:, :, None]
    size = u.abs()
    huber = size if kappa == 0 else torch.where(size <= kappa, 0.5 * u * u, kappa * (size - 0.5 * kappa)) / kappa
    return ((tau[:, None] - (u < 0).to(u.dtype)).abs() * huber).mean((-1, -2))


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


class Stopwatch(NamedTuple):
    device: torch.device
    repeats: int
    clock: Callable[[], float]


def best_times(watch: Stopwatch, *calls: Callable[[], Any]) -> list[float]:
    """Seconds of each call, the best of several rounds in which they take turns, after one round to warm up."""
    best = [float("inf")] * len(calls)
    for round_number in range(watch.repeats + 1):
        for i, call in enumerate(calls):
            synchronize(watch.device)
            start = watch.clock()
            call()
            synchronize(watch.device)
            if round_number > 0:
                best[i] = min(best[i], watch.clock() - start)
    return best


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def backward_of(loss_of: Callable[[torch.Tensor], torch.Tensor], theta: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that runs forward and backward and gives the gradient in θ."""
    return lambda: torch.autograd.grad(loss_of(theta).sum(), theta)[0]


def exact_against_pairwise(watch: Stopwatch, tokens: int) -> list[dict[str, float]]:
    rows = []
    for kappa, m in itertools.product(KAPPAS, SIZES):
        levels = quantile_levels(m, device=watch.device)
        theta, z = (torch.randn(tokens, m, device=watch.device) for _ in range(2))

        def exact_loss(t: torch.Tensor, z: torch.Tensor = z, v: torch.Tensor = levels, k: float = kappa):
            return quantile_huber_loss(t, z[: len(t)], v, kappa=k)

        def pairwise(t: torch.Tensor, z: torch.Tensor = z, v: torch.Tensor = levels, k: float = kappa):
            return pairwise_loss(t, z[: len(t)], v, k)

        sizes = [tokens, *(max(1, min(tokens, limit // (m * m))) for limit in (PAIRWISE_ELEMENTS, PIECE_ELEMENTS))]
        calls = [
            backward_of(loss, theta[:n].detach().requires_grad_())
            for loss, n in zip((exact_loss, pairwise, pairwise), sizes, strict=True)
        ]
        torch.testing.assert_close(calls[0]()[: sizes[2]], calls[2](), rtol=1e-4, atol=1e-6)
        exact_us, pairwise_us, pieces_us = (
            1e6 * seconds / n for seconds, n in zip(best_times(watch, *calls), sizes, strict=True)
        )
        rows.append(
            {
                "kappa": kappa,
                "M": m,
                "exact_us": exact_us,
                "pairwise_us": pairwise_us,
                "pieces_us": pieces_us,
                "pairwise/exact": pairwise_us / exact_us,
                "pieces/exact": pieces_us / exact_us,
            }
        )
    return rows


def whole_loss(watch: Stopwatch, tokens: int) -> list[dict[str, float]]:
    """`dvpo_loss` with all eight terms in `batch` mode, N = 3."""
    rows = []
    for kappa, m in itertools.product(KAPPAS, SIZES):
        (seconds,) = best_times(watch, whole_loss_call(watch.device, tokens, m, kappa)[0])
        rows.append({"kappa": kappa, "M": m, "us": 1e6 * seconds / tokens})
    return rows


def whole_loss_call(
    device: torch.device, tokens: int, m: int, kappa: float
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """A forward and backward of `dvpo_loss`, and its (L, N, M) input."""
    levels, config = quantile_levels(m, device=device), DVPOLossConfig(kappa=kappa)
    theta = torch.randn(tokens, HEADS, m, device=device, requires_grad=True)
    z, mask = torch.randn(tokens, m, device=device), torch.ones(tokens, device=device)
    given = constraint_multipliers(theta.mean(1), z, mask, levels, config)
    return backward_of(lambda t: dvpo_loss(t, z, levels, config, given).total, theta), theta


def memory(device: torch.device) -> list[dict[str, float]]:
    """Peak memory at M = 200, on an input so large that buffers of fixed size do not count."""
    m, rows = 200, []
    for kappa in KAPPAS:
        levels = quantile_levels(m, device=device)
        theta = torch.randn(MEMORY_TOKENS, m, device=device, requires_grad=True)
        z = torch.randn(MEMORY_TOKENS, m, device=device)

        def exact_loss(t: torch.Tensor, z: torch.Tensor = z, v: torch.Tensor = levels, k: float = kappa):
            return quantile_huber_loss(t, z, v, kappa=k)

        alone = extra_memory(device, backward_of(exact_loss, theta), theta)
        whole = extra_memory(device, *whole_loss_call(device, MEMORY_TOKENS // HEADS, m, kappa))
        rows.append({"kappa": kappa, "quantile_huber_loss": alone, "dvpo_loss": whole})
    return rows


def extra_memory(device: torch.device, call: Callable[[], torch.Tensor], like: torch.Tensor) -> float:
    """Peak memory of one call, in tensors of θ's size, beyond what was there before it (its result included).

    On the CPU it is the process's resident memory, after the allocator gave back what it had kept for reuse; NaN where
    the system does not say (Linux does).
    """
    size = like.numel() * like.element_size()
    call()  # what stays, stays before
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / size
    status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    if device.type != "cpu" or not reset.exists():
        return float("nan")
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    libc.malloc_trim(0)
    reset.write_text("5")  # the peak starts again from now
    before = _resident(status, "VmRSS")
    call()
    return (_resident(status, "VmHWM") - before) / size


def _resident(status: pathlib.Path, field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return 1024 * int(found[1])


def targets(watch: Stopwatch) -> list[dict[str, Any]]:
    """Both kinds of targets at B = 2, T = 8192, M = 200, against the loop over T for Eq 2."""
    device = watch.device
    batch, length, m = 2, 8192, 200
    rewards = torch.randn(batch, length, device=device)
    quantiles = torch.randn(batch, length, m, device=device)
    mask = (torch.rand(batch, length, device=device) < 0.9).float()
    names = ("loop over T", "distributional_gae", "sample_replacement_returns")
    seconds = best_times(
        watch,
        lambda: gae_loop(rewards, quantiles, mask, 0.95),
        lambda: distributional_gae(rewards, quantiles, mask, gamma=1.0, lam=0.95),
        lambda: sample_replacement_returns(rewards, quantiles, mask, gamma=1.0, lam=0.95),
    )
    return [{"what": name, "ms": 1e3 * value} for name, value in zip(names, seconds, strict=True)]


def gae_loop(rewards: torch.Tensor, quantiles: torch.Tensor, mask: torch.Tensor, lam: float) -> torch.Tensor:
    """Eq 2 with γ = 1, one token at a time: (B, T), (B, T, M), (B, T) -> targets (B, T, M)."""
    following = torch.zeros_like(quantiles[:, 0])
    advantage = torch.zeros_like(following)
    steps = []
    for t in reversed(range(rewards.shape[1])):
        valid = mask[:, t, None]
        step = rewards[:, t, None] + following - quantiles[:, t] + lam * advantage
        following = quantiles[:, t] * valid + (1 - valid) * following
        advantage = step * valid + (1 - valid) * advantage
        steps.append(advantage)
    return torch.stack(steps[::-1], dim=1) + quantiles


def machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpu = pathlib.Path("/proc/cpuinfo")
    if cpu.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpu.read_text())):
        name = found[1]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "cpu": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print("  ".join(f"{name:>20}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>20.4g}" if isinstance(value, float) else f"{value:>20}" for value in row.values()))


def growth(rows: list[dict[str, Any]], column: str) -> list[dict[str, float]]:
    """How much the time per token grows from M = 100 to M = 500."""
    at = {(row["kappa"], row["M"]): row[column] for row in rows}
    return [{"kappa": kappa, "M 100 to 500": at[kappa, 500] / at[kappa, 100]} for kappa in KAPPAS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=pathlib.Path, help="write the numbers as JSON")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    watch = Stopwatch(torch.device(options.device), options.repeats, CLOCKS[options.clock])

    pairs = exact_against_pairwise(watch, options.tokens)
    whole = whole_loss(watch, options.tokens)
    tables: dict[str, list[dict[str, Any]]] = {
        "exact against pairwise, forward + backward, per token": pairs,
        "growth of the exact loss": growth(pairs, "exact_us"),
        f"dvpo_loss, N = {HEADS}, all terms, per token": whole,
        "growth of dvpo_loss": growth(whole, "us"),
        "peak memory beyond the input, in tensors of its size, gradient included, M = 200": memory(watch.device),
        "targets, B = 2, T = 8192, M = 200": targets(watch),
    }
    about = machine(watch.device) | {name: getattr(options, name) for name in ("tokens", "repeats", "clock")}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    for title, rows in tables.items():
        print_table(title, rows)
    if options.out:
        options.out.write_text(json.dumps({"machine": about, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    main()
