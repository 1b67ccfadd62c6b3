# SPDX-License-Identifier: Apache-2.0
"""Probes run in a process of their own: ``python -m verl_dvpo.doctor.probes NAME`` answers with JSON.

An import may crash, hang or end its process; here it ends this one only.
"""

import ctypes
import importlib
import json
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from verl_dvpo.doctor.checks import ANSWER

Facts = dict[str, Any]
#: ``PR_SET_PDEATHSIG`` of prctl(2).
PARENT_DEATH_SIGNAL = 1
#: Modules whose import fills verl's registries.
REGISTRIES = (
    "verl.trainer.ppo.core_algos",
    "verl.trainer.ppo.v1.trainer_base",
    "verl.workers.engine.fsdp.transformer_impl",
)


def devices() -> Facts:
    """Reads torch's version and the names of the accelerators that it sees."""
    import torch

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = torch.get_device_module(kind) if kind is not None and kind.type != "cpu" else None
    count = module.device_count() if module is not None else 0
    names = [str(module.get_device_name(i)) for i in range(count)] if module is not None else []
    return {"torch": torch.__version__, "devices": names}


def compat() -> Facts:
    """Compares the installed sources with the recorded fingerprints."""
    from verl_dvpo.compat.fingerprints import check

    report = check()
    symbols = [f"{finding.symbol} ({finding.problem})" for finding in report.findings]
    return {"compared": report.compared, "findings": symbols, "skipped": report.skipped}


def torchvision() -> Facts:
    """Imports torchvision."""
    importlib.import_module("torchvision")
    return {}


def transformers() -> Facts:
    """Imports the classes that critics, actors and their tokenizers come from."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3ForTokenClassification

    found = (AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, Qwen3ForTokenClassification)
    return {"classes": len(found)}


def vllm() -> Facts:
    """Imports vLLM and asks which device it is built for."""
    import os

    if os.environ.get("VERL_PLATFORM") == "cpu":
        from verl_dvpo.platforms.cpu import distribution

        distribution.install()
    module = importlib.import_module("vllm")
    platform = importlib.import_module("vllm.platforms").current_platform
    importlib.import_module("vllm.engine.arg_utils")
    return {"version": module.__version__, "device": platform.device_type}


def flash_attention() -> Facts:
    """Imports flash-attention."""
    importlib.import_module("flash_attn")
    return {}


def plugin() -> Facts:
    """Says what verl knows of this package after ``import verl``."""
    return registered()


def registered() -> Facts:
    """Imports verl in this process and lists what it knows of ours, what is missing, and why.

    verl logs a plugin that fails at DEBUG only, and may fail itself for want of it; so the plugin is imported again.
    """
    failure = _failure("verl")
    if "verl_dvpo.plugin" not in sys.modules:
        reason = _failure("verl_dvpo.plugin") or failure or "verl has not loaded it; see entry point"
        return {"missing": ["this package"], "reason": reason}
    algorithms, trainer, _ = (importlib.import_module(name) for name in REGISTRIES)
    engines = importlib.import_module("verl.workers.engine.base").EngineRegistry._engines
    from verl_dvpo.families.registry import family_names

    facts: Facts = {
        "estimators": _ours(algorithms.ADV_ESTIMATOR_REGISTRY),
        "trainers": _ours(trainer.TRAINER_REGISTRY),
        "engines": sorted(name for name in engines if name.startswith("distributional")),
        "families": family_names(),
    }
    return facts | {"missing": _missing(facts), "reason": failure}


def _failure(module: str) -> str:
    """Imports a module; returns what that raised, empty for nothing."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the module raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def _ours(registry: dict[Any, Any]) -> list[str]:
    return sorted(
        str(getattr(name, "value", name)) for name, made in registry.items() if made.__module__.startswith("verl_dvpo")
    )


def _missing(facts: Facts) -> list[str]:
    """Lists what a run may name and verl does not know."""
    wanted = {
        "estimators": ("dvpo", "flowrl"),
        "trainers": ("dvpo_sync", "dvpo_colocate_async", "dvpo_separate_async"),
        "engines": ("distributional_value_model",),
    }
    return [name for kind, names in wanted.items() for name in names if name not in facts[kind]]


def ray() -> Facts:
    """Starts a Ray as a run on this platform does, and asks one of its workers what verl knows there."""
    from verl_dvpo.doctor.cluster import start_and_ask

    return start_and_ask(say)


def families() -> Facts:
    """Trains each family for a moment, and answers after each."""
    from verl_dvpo.doctor.training import learn_all

    for name, outcome in learn_all():
        say({name: outcome})
    return {}


PROBES: dict[str, Callable[[], Facts]] = {
    "devices": devices,
    "compat": compat,
    "torchvision": torchvision,
    "transformers": transformers,
    "vllm": vllm,
    "flash-attn": flash_attention,
    "plugin": plugin,
    "ray": ray,
    "families": families,
}


def say(facts: Mapping[str, Any]) -> None:
    """Answers, in part or in whole; parts add up."""
    print(f"\n{ANSWER}{json.dumps(facts)}", flush=True)


def end_with_parent() -> None:
    """Lets this process end when the doctor does, however that ends; what it has begun is tidied up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def main(name: str) -> int:
    """Runs one probe and answers; what it raises is its answer too."""
    end_with_parent()
    try:
        say(PROBES[name]())
    except BaseException as error:  # an import may raise SystemExit too
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
