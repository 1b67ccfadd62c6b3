# SPDX-License-Identifier: Apache-2.0
"""Critics on several architectures on Megatron-core (over gloo): two updates against transformers alone, in float64."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from critic import harness, models, plain

#: A model of ``models.MODELS`` -> changes of its configuration: two ranks can share the heads, and no token is padding,
#: since transformers gives the row of that token in the embedding no gradient, and megatron-core does.
COMMON: dict[str, Any] = {"num_key_value_heads": 2, "pad_token_id": None}
SAVED: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3_moe": COMMON | {"norm_topk_prob": True},
    "qwen2_moe": COMMON,
    "mixtral": COMMON,
}
#: Overrides of megatron-core's configuration without which mbridge 0.15.1 makes another function of the model.
NEEDED = {"qwen2_moe": {"moe_shared_expert_gate": True}, "mixtral": {"moe_router_pre_softmax": False}}
EXPERTS = {"expert_model_parallel_size": 2}
TENSOR = {"tensor_model_parallel_size": 2}
#: World size -> name of a case -> model, and settings of its worker.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "llama": {"model": "llama"},
        "qwen2": {"model": "qwen2"},
        "qwen3_moe": {"model": "qwen3_moe"},
        "qwen3_moe_padded": {"model": "qwen3_moe", "packed": False},
        **{name: {"model": name, "override_transformer_config": needed} for name, needed in NEEDED.items()},
    },
    2: {
        "qwen2_tensor": {"model": "qwen2", **TENSOR},
        "qwen3_moe_tensor": {"model": "qwen3_moe", **TENSOR},
        "qwen3_moe_experts": {"model": "qwen3_moe", **EXPERTS, "resumed": {}},
        "qwen3_moe_experts_padded": {"model": "qwen3_moe", "packed": False, **EXPERTS},
    },
}
NAMES = [(size, name) for size, cases in CASES.items() for name in cases]
FUSED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj$")
#: Parts of names in transformers, and in files of Mixtral.
MIXTRAL = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the models, and what the ranks write."""
    path = tmp_path_factory.mktemp("seen")
    for name, changes in SAVED.items():
        models.save(path / name, name, **changes)
    return path


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[tuple[int, str], list[Seen]]:
    """(World size, case) -> what each rank saw."""
    processes = [process for size in CASES for process in start(folder, size)]
    assert all_ended(processes)
    files = {
        size: [torch.load(folder / f"{size}_{rank}.pt", weights_only=False) for rank in range(size)] for size in CASES
    }
    return {(size, name): [file[name] for file in files[size]] for size, name in NAMES}


def start(folder: Path, size: int) -> Iterator[subprocess.Popen]:
    """Starts the processes of one world size."""
    cases = {name: {**case, "model": str(folder / case["model"])} for name, case in CASES[size].items()}
    listed = folder / f"{size}.json"
    listed.write_text(json.dumps(cases))
    script = Path(__file__).parent / "megatron_cpu" / "model_ranks.py"
    port = str(harness.free_port())
    path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    for rank in range(size):
        yield subprocess.Popen(
            [sys.executable, str(script), str(listed), str(folder / f"{size}_{rank}.pt"), str(rank), str(size), port],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VERL_PLATFORM": "cpu"},
        )


def all_ended(processes: list[subprocess.Popen], seconds: float = 600.0) -> bool:
    """Waits until all processes have ended well, and ends all once one has not: the others would wait for it."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):
            break
        time.sleep(0.2)
    good = all(process.poll() == 0 for process in processes)
    for process in processes:
        process.kill()
        process.wait()
    return good


def learned(model: Path, weights: dict[str, Tensor], folder: Path) -> str:
    """Writes the weights of a backbone as a model that transformers reads."""
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    backbone = {name: tensor.contiguous() for name, tensor in weights.items() if not name.startswith("score.")}
    save_file(backbone, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def each_expert(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives each expert's weights names of their own, as files have them; transformers has those of a layer in one."""
    found = {}
    for name, gradient in gradients.items():
        if match := FUSED.match(name):
            for number, own in enumerate(gradient):
                parts = {"gate": own.chunk(2)[0], "up": own.chunk(2)[1]} if match[2] == "gate_up" else {"down": own}
                found |= {f"{match[1]}.{number}.{part}_proj.weight": tensor for part, tensor in parts.items()}
        else:
            found[name] = gradient
    return found


def as_in_files(gradients: dict[str, Tensor], model: str) -> dict[str, Tensor]:
    """Gives weights the names that they have in files."""
    named = each_expert(gradients)
    for ours, theirs in MIXTRAL.items() if model == "mixtral" else ():
        named = {name.replace(ours, theirs): gradient for name, gradient in named.items()}
    return named


@pytest.mark.parametrize("case", NAMES, ids=lambda case: case[1])
def test_two_updates(seen, folder, case, tmp_path: Path):
    """Values and gradients of both; the first update begins with the weights on the disk."""
    ranks = seen[case]
    model = folder / CASES[case[0]][case[1]]["model"]
    batch = harness.make_batch()
    by_data_rank = {rank["data_rank"]: rank for rank in reversed(ranks)}
    for update in (0, 1):
        weights = ranks[0]["weights"][update]
        path = str(model) if update == 0 else learned(model, weights, tmp_path / "learned")
        backbone = plain.backbone_of(path)
        head = {name: weights[f"score.{name}"].double() for name in ("weight", "bias")}
        expected = torch.cat(plain.values_of(plain.states_of(backbone, head, batch))).detach()
        values = torch.cat([by_data_rank[number]["values"][update] for number in sorted(by_data_rank)])
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)

        gradients = as_in_files(plain.gradients_of(backbone, head, batch), model.name)
        scale = max(gradient.abs().max().item() for gradient in gradients.values())
        assert scale > 1e-4
        for rank in ranks:
            captured = rank["gradients"][update]
            assert captured.keys() == gradients.keys()
            for name, want in gradients.items():
                torch.testing.assert_close(
                    captured[name].double(), want, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
                )
    (first, second), last = ranks[0]["weights"], ranks[0]["last"]
    assert all(not torch.equal(first[name], second[name]) for name, gradient in gradients.items() if gradient.any())
    assert all(not torch.equal(last[name], second[name]) for name, gradient in gradients.items() if gradient.any())


def test_a_resumed_critic_with_divided_experts_has_the_weights_of_one_that_was_not_disturbed(seen):
    for rank in seen[2, "qwen3_moe_experts"]:
        for name, weight in rank["last"].items():
            assert torch.equal(rank["loaded"][name], rank["weights"][1][name]), name
            assert torch.equal(rank["resumed"][name], weight), name
            assert not torch.equal(rank["loaded"][name], weight), name
