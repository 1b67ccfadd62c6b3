# SPDX-License-Identifier: Apache-2.0
"""The critic on verl's Megatron engine (real processes over gloo) against the FSDP critic on the same weights."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from critic import harness
from critic.megatron_cpu import trial
from verl_dvpo.critic.config import family_config
from verl_dvpo.critic.head import build_head
from verl_dvpo.export.run import export
from verl_dvpo.export.value_model import ValueModel
from verl_dvpo.families.registry import build_family

QUANTILES = {"family": "quantile_ensemble", "num_heads": 2, "num_quantiles": 5}
TWO_LAYERS = QUANTILES | {"head_width": 12}
SCALAR = {"family": "scalar"}
BLOCKS = {"tokens_per_block": 3}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SPLIT = {"tensor_model_parallel_size": 2}
WHOLE_SEQUENCE = SPLIT | {"sequence_parallel": False}
STAGES = {"pipeline_model_parallel_size": 2}

#: World size -> name of a case -> settings of its worker. The processes of one world size are shared.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "tp1_packed": {"value": QUANTILES},
        "tp1_padded": {"value": QUANTILES, "packed": False},
        "tp1_one_output": {"value": SCALAR},
        "tp1_plain_optimizer": {"value": QUANTILES, "use_distributed_optimizer": False},
        "tp1_blocks": {"value": QUANTILES | BLOCKS},
        "tp1_recomputed": {"value": QUANTILES, "override_transformer_config": RECOMPUTE},
        "tp1_dynamic": {"value": QUANTILES, "use_dynamic_bsz": True},
    },
    2: {
        "tp2_packed": {"value": QUANTILES, **WHOLE_SEQUENCE},
        "tp2_padded": {"value": QUANTILES, "packed": False, **WHOLE_SEQUENCE},
        "tp2_sp_packed": {"value": TWO_LAYERS, **SPLIT},
        "tp2_sp_padded": {"value": QUANTILES, "packed": False, **SPLIT},
        "tp2_sp_blocks": {"value": TWO_LAYERS | BLOCKS, **SPLIT},
        "pp2_blocks": {"value": QUANTILES | BLOCKS, "packed": False, **STAGES},
        "pp2_uneven": {
            "value": QUANTILES,
            "override_transformer_config": {"num_layers_in_first_pipeline_stage": 1},
            **STAGES,
        },
        "pp2_packed": {"value": TWO_LAYERS, **STAGES},
        "pp2_padded": {"value": QUANTILES, "packed": False, **STAGES},
        "pp2_virtual": {"value": QUANTILES, "virtual_pipeline_model_parallel_size": 2, **STAGES},
        "dp2_packed": {"value": QUANTILES},
        "dp2_padded": {"value": TWO_LAYERS, "packed": False},
        "dp2_one_output": {"value": SCALAR},
        "tp2_bf16": {"value": TWO_LAYERS, "dtype": "bfloat16", **SPLIT},
    },
}
NAMES = [(size, name) for size, cases in CASES.items() for name in cases]
FP32 = [(size, name) for size, name in NAMES if "bf16" not in name]
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trial.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks write."""
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def seen(model: str, folder: Path) -> dict[tuple[int, str], list[Seen]]:
    """(World size, case) -> what each rank saw."""
    processes = [process for size, cases in CASES.items() for process in start(folder, model, size, cases)]
    assert [process.wait(timeout=900) for process in processes] == [0] * len(processes)
    files = {
        size: [torch.load(folder / f"{size}_{rank}.pt", weights_only=False) for rank in range(size)] for size in CASES
    }
    return {(size, name): [file[name] for file in files[size]] for size, name in NAMES}


def start(folder: Path, model: str, size: int, cases: dict[str, Any]) -> Iterator[subprocess.Popen]:
    """Starts the processes of one world size."""
    listed = folder / f"{size}.json"
    listed.write_text(json.dumps(cases))
    script = Path(__file__).parent / "megatron_cpu" / "ranks.py"
    port = str(harness.free_port())
    path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    for rank in range(size):
        yield subprocess.Popen(
            [
                sys.executable,
                str(script),
                model,
                str(listed),
                str(folder / f"{size}_{rank}.pt"),
                str(rank),
                str(size),
                port,
            ],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VERL_PLATFORM": "cpu"},
        )


@pytest.fixture(scope="module")
def fsdp(model: str) -> dict[str, Seen]:
    """Settings of a family -> what the FSDP critic, alone, saw of the same batch."""
    found = {}
    for value in (QUANTILES, TWO_LAYERS, SCALAR):
        own = {"num_heads": None, "num_quantiles": None} if value is SCALAR else {}
        worker = harness.make_worker(model, value=own | value)
        found[json.dumps(value)] = trial.two_updates(worker, harness.make_batch(), harness.capture_gradients)
    return found


def expected(fsdp: dict[str, Seen], case: tuple[int, str]) -> Seen:
    value = CASES[case[0]][case[1]]["value"]
    return fsdp[json.dumps({name: setting for name, setting in value.items() if name not in BLOCKS})]


def with_outputs(ranks: list[Seen], case: tuple[int, str]) -> list[Seen]:
    """The ranks that have outputs: all but a first stage's."""
    return ranks[1:] if "pp2" in case[1] else ranks


def whole(ranks: list[Seen], name: str, index: int | None = None) -> torch.Tensor:
    """Of the whole batch: data-parallel ranks hold its halves, others hold all of it."""
    parts = {rank["data_rank"]: rank[name] if index is None else rank[name][index] for rank in reversed(ranks)}
    return torch.cat([parts[number] for number in sorted(parts)])


@pytest.mark.parametrize("case", FP32, ids=lambda case: case[1])
def test_outputs_are_those_of_fsdp(seen, fsdp, case):
    want = expected(fsdp, case)["raw"]
    got = whole(with_outputs(seen[case], case), "raw")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want.std() > 0.05


@pytest.mark.parametrize("case", FP32, ids=lambda case: case[1])
def test_gradients_are_those_of_fsdp(seen, fsdp, case):
    want = expected(fsdp, case)["gradients"]
    scale = max(gradient.abs().max().item() for gradient in want.values())
    assert scale > 0.01
    for rank in with_outputs(seen[case], case):
        assert rank["gradients"].keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(
                rank["gradients"][name],
                gradient,
                rtol=1e-5,
                atol=1e-5 * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("case", FP32, ids=lambda case: case[1])
def test_two_updates_of_the_worker_have_the_metrics_of_fsdp(seen, fsdp, case):
    want = expected(fsdp, case)
    ranks = seen[case]
    for update in range(2):
        values = whole([rank for rank in ranks if rank["values"][update] is not None], "values", update)
        torch.testing.assert_close(values, want["values"][update], rtol=1e-4, atol=1e-5)
        metrics = next(rank["metrics"][update] for rank in ranks if rank["metrics"][update] is not None)
        compared = {name for name in want["metrics"][update] if name.startswith("critic/")} | {"loss", "grad_norm"}
        for name in compared:
            assert metrics[name] == pytest.approx(want["metrics"][update][name], rel=1e-4, abs=1e-6), name
    first, second = (want["metrics"][update]["critic/vf_loss"] for update in range(2))
    assert first != pytest.approx(second, rel=1e-2), "the update must have moved something"


@pytest.mark.parametrize("case", [case for case in NAMES if case[0] == 2], ids=lambda case: case[1])
def test_only_one_rank_of_a_model_reports(seen, case):
    """Tensor-parallel ranks hold the outputs all, but the trainer gets one copy; a first stage has nothing."""
    reports = [[rank["metrics"][0] is not None, rank["values"][0] is not None] for rank in seen[case]]
    reporting = {"t": [True, False], "p": [False, True], "d": [True, True]}[case[1][0]]
    assert reports == [[one, one] for one in reporting]
    assert [rank["raw"] is not None for rank in seen[case]] == [case[1][0] != "p", True]


@pytest.mark.parametrize("case", NAMES, ids=lambda case: case[1])
def test_the_head_is_fp32(seen, case):
    for rank in with_outputs(seen[case], case):
        assert rank["head_dtypes"] == {"torch.float32"}


def test_bf16_is_within_its_rounding(seen, fsdp):
    case = (2, "tp2_bf16")
    want = expected(fsdp, case)
    torch.testing.assert_close(whole(seen[case], "raw"), want["raw"], rtol=0.05, atol=0.05)
    for name in ("score.hidden.weight", "score.out.weight", "score.out.bias"):
        gradient = want["gradients"][name]
        atol = 0.05 * gradient.abs().max().item()
        torch.testing.assert_close(seen[case][0]["gradients"][name], gradient, rtol=0.05, atol=atol)


@pytest.fixture(scope="module")
def checkpoints(seen: Any, folder: Path) -> list[Seen]:
    """What each of two ranks saw of critics that were saved and loaded."""
    return [torch.load(folder / f"2_{rank}.pt", weights_only=False)["checkpoints"] for rank in range(2)]


def test_a_critic_of_two_tensor_ranks_loads_into_two_stages(checkpoints):
    """Weights and, saved in the form for it, the optimizer's states: the next step is the same."""
    first, last = (rank["divided"] for rank in checkpoints)
    assert first["loaded"] is None
    torch.testing.assert_close(last["loaded"], first["saved"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last["resumed"], first["went_on"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first["went_on"], first["saved"], atol=1e-2)


def test_random_states_of_other_sizes_are_refused_by_name(checkpoints):
    for rank in checkpoints:
        message = rank["divided"]["refused"]
        assert "tensor_model_parallel_size 2 there and 1 here" in message
        assert "critic.checkpoint.load_contents=[model,optimizer]" in message


def test_a_resumed_critic_has_the_weights_of_one_that_was_not_disturbed(checkpoints):
    """To the bit; a fresh one has others. The optimizer has counted both steps."""
    for rank in checkpoints:
        seen = rank["resumed"]
        assert seen["resumed"].keys() == seen["undisturbed"].keys() > {"score.hidden.weight", "score.out.bias"}
        for name, weight in seen["undisturbed"].items():
            assert torch.equal(seen["resumed"][name], weight), name
            assert not torch.equal(seen["fresh"][name], weight), name
        assert seen["steps"] == {2.0}


def test_a_checkpoint_is_a_hugging_face_folder_with_the_head_beside_it(checkpoints, folder):
    """transformers reads the backbone, and the FSDP critic's names read the head: same outputs."""
    path = folder / "tp2" / "model" / "huggingface"
    backbone = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").model
    family = build_family(family_config(**TWO_LAYERS))
    head = build_head(16, family, seed=1, width=12)
    head.load_state_dict({n.removeprefix("score."): t for n, t in load_file(path / "value_head.safetensors").items()})
    batch = harness.make_batch()
    with torch.no_grad():
        states = []
        for prompt, ids in zip(batch["prompts"].unbind(), batch["input_ids"].unbind(), strict=True):
            states.append(backbone(input_ids=ids[None]).last_hidden_state[0][len(prompt) - 1 : -1])
        outputs = head(torch.cat(states))
    torch.testing.assert_close(outputs, checkpoints[0]["divided"]["saved"], rtol=1e-5, atol=1e-5)


def test_an_exported_critic_has_the_outputs_of_the_run(checkpoints, folder, tmp_path):
    """`verl-dvpo export` of a checkpoint on Megatron, loaded by ``ValueModel``."""
    source = export(folder / "tp2", tmp_path / "critic")
    assert source == folder / "tp2"
    model = ValueModel.from_pretrained(str(tmp_path / "critic"))
    batch = harness.make_batch()
    outputs = []
    with torch.no_grad():
        for prompt, ids in zip(batch["prompts"].unbind(), batch["input_ids"].unbind(), strict=True):
            outputs.append(model(ids[None], torch.ones_like(ids[None]))[0][len(prompt) - 1 : -1])
    torch.testing.assert_close(torch.cat(outputs), checkpoints[0]["divided"]["saved"], rtol=1e-6, atol=1e-6)


def test_the_optimizers_states_come_back_to_their_parameters(checkpoints):
    """An fp32 head beside a bf16 backbone: each part of each state, by the name of its parameter."""
    for rank in (rank["mixed"] for rank in checkpoints):
        assert rank["loaded"].keys() == rank["states"].keys()
        for name, states in rank["states"].items():
            for key in ("param", "exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(rank["loaded"][name][key], states[key]), (name, key)
        moved = [
            not torch.equal(rank["fresh"][name]["exp_avg"], rank["states"][name]["exp_avg"]) for name in rank["states"]
        ]
        assert all(moved)
    names = {name for rank in checkpoints for name in rank["mixed"]["states"]}
    assert {"0.module.module.output_layer.weight", "0.module.module.output_layer.hidden.weight"} <= names
