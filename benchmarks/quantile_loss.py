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
    TERMS,
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
#: Losses whose whole cost is measured: every term, and what `algorithm=dvpo_calibrated` ships.
WHOLE = {
    **{f"all terms, kappa {kappa:g}": DVPOLossConfig(kappa=kappa, coef=dict.fromkeys(TERMS, 0.1)) for kappa in KAPPAS},
    "dvpo_calibrated": DVPOLossConfig(kappa=0.0, constraint_statistics="level"),
}


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
    """`dvpo_loss` with all eight terms in `batch` mode, N = 3, and what `dvpo_calibrated` has of them; multipliers."""
    rows = []
    for (name, config), m in itertools.product(WHOLE.items(), SIZES):
        loss, multipliers, _ = whole_loss_calls(watch.device, tokens, m, config)
        seconds, once = best_times(watch, loss, multipliers)
        rows.append({"loss": name, "M": m, "us": 1e6 * seconds / tokens, "multipliers_us": 1e6 * once / tokens})
    return rows


def whole_loss_calls(
    device: torch.device, tokens: int, m: int, config: DVPOLossConfig
) -> tuple[Callable[[], torch.Tensor], Callable[[], dict[str, torch.Tensor]], torch.Tensor]:
    """A forward and backward of `dvpo_loss`, what an update does once before it, and the (L, N, M) input of both."""
    levels = quantile_levels(m, device=device)
    theta = torch.randn(tokens, HEADS, m, device=device, requires_grad=True)
    z, mask = torch.randn(tokens, m, device=device), torch.ones(tokens, device=device)
    old = theta.detach().mean(1)

    def multipliers() -> dict[str, torch.Tensor]:
        return constraint_multipliers(old, z, mask, levels, config)

    given = multipliers()
    return backward_of(lambda t: dvpo_loss(t, z, levels, config, given).total, theta), multipliers, theta


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
        loss, _, three = whole_loss_calls(device, MEMORY_TOKENS // HEADS, m, WHOLE[f"all terms, kappa {kappa:g}"])
        rows.append({"kappa": kappa, "quantile_huber_loss": alone, "dvpo_loss": extra_memory(device, loss, three)})
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
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(rows[0]), *cells, strict=True)]
    print(f"\n{title}")
    for line in (list(rows[0]), *cells):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def growth(rows: list[dict[str, Any]], of: str, column: str) -> list[dict[str, Any]]:
    """How much the time per token grows from M = 100 to M = 500, for each of the rows' `of`."""
    at = {(row[of], row["M"]): row[column] for row in rows}
    return [{of: name, "M 100 to 500": at[name, 500] / at[name, 100]} for name in dict.fromkeys(r[of] for r in rows)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`measure`."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every table, and the machine."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    watch = Stopwatch(torch.device(options.device), options.repeats, CLOCKS[options.clock])
    pairs = exact_against_pairwise(watch, options.tokens)
    whole = whole_loss(watch, options.tokens)
    tables: dict[str, list[dict[str, Any]]] = {
        "exact against pairwise, forward + backward, per token": pairs,
        "growth of the exact loss": growth(pairs, "kappa", "exact_us"),
        f"dvpo_loss, N = {HEADS}, forward + backward, per token": whole,
        "growth of dvpo_loss": growth(whole, "loss", "us"),
        "peak memory beyond the input, in tensors of its size, gradient included, M = 200": memory(watch.device),
        "targets, B = 2, T = 8192, M = 200": targets(watch),
    }
    about = machine(watch.device) | {name: getattr(options, name) for name in ("tokens", "repeats", "clock")}
    return {"machine": about, "tables": tables}


def print_result(result: dict[str, Any]) -> None:
    """The machine and every table."""
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    for title, rows in result["tables"].items():
        print_table(title, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=pathlib.Path, help="write the numbers as JSON")
    options = parser.parse_args()
    result = measure(options)
    print_result(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
