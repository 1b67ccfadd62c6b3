# SPDX-License-Identifier: Apache-2.0
"""Prints an estimate as a page of text."""

from typing import Any

from verl_dvpo.estimate.memory import GIB

PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "outputs", "turn", "between")


def show(found: dict[str, Any]) -> str:
    """Writes what `result.result` put together."""
    return "\n".join([*_head(found), "", *_roles(found), "", *_flops(found), "", *_gpus(found), "", *_notes(found)])


def _head(found: dict[str, Any]) -> list[str]:
    actor, critic = found["actor"], found["critic"]
    lines = [
        f"{found['recipe']}: {found['gpus']} GPUs, {found['sequences']} answers a step, "
        f"{found['prompt']} + {found['response']:.0f} tokens each",
        f"actor   {actor['model']}, {actor['parameters'] / 1e9:.2f} billion parameters",
    ]
    if critic:
        many = f"{critic['outputs']} outputs per token"
        lines.append(f"critic  {critic['model']}, {critic['parameters'] / 1e9:.2f} billion parameters, {many}")
    return lines


def _roles(found: dict[str, Any]) -> list[str]:
    lines = ["GiB on each GPU" + "".join(f"{part:>12}" for part in PARTS)]
    for name, role in found["roles"].items():
        lines.append(f"{name:<15}" + "".join(f"{role[part] / GIB:>12.1f}" for part in PARTS))
    return lines


def _flops(found: dict[str, Any]) -> list[str]:
    counts = found["flops"]
    each = ", ".join(f"{name} {count / 1e15:.1f}" for name, count in counts.items())
    return [f"PFLOP a step: {sum(counts.values()) / 1e15:.1f} ({each})"]


def _gpus(found: dict[str, Any]) -> list[str]:
    titles = ("peak GiB", "of", "in phase", "cache GiB", "sequences", "rollout s", "train s", "step s")
    lines = [f"{'':<10}" + "".join(f"{title:>15}" if title == "in phase" else f"{title:>11}" for title in titles)]
    for name, each in found["by_gpu"].items():
        phase = max(each["phases"], key=each["phases"].get)
        seconds, sampler = each["seconds"], each["sampler"]
        training = sum(value for what, value in seconds.items() if what not in ("rollout", "step"))
        numbers = [f"{each['peak'] / GIB:.1f}", f"{each['memory'] / GIB:.1f}", phase]
        numbers += [f"{sampler['cache'] / GIB:.1f}", str(sampler["sequences"])]
        numbers += [f"{value:.0f}" for value in (seconds["rollout"], training, seconds["step"])]
        cells = "".join(f"{cell:>15}" if cell == phase else f"{cell:>11}" for cell in numbers)
        lines.append(f"{name:<10}{cells}  {'' if each['fits'] else 'does not fit'}".rstrip())
    return lines


def _notes(found: dict[str, Any]) -> list[str]:
    return [
        f"turn: all that a model has in its own update; between: what stays while others work. Seconds at "
        f"{found['utilisation']:.0%} of",
        "the bf16 peak, answers of the mean length given; formulas and what they leave out: docs/estimate.md",
    ]
