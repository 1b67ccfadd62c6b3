# SPDX-License-Identifier: Apache-2.0
"""Answers sampled with vLLM, labelled by their majority, and two steps of training on those labels, through verl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from verl_dvpo.bench.data.equivalence import judge
from verl_dvpo.bench.data.votes import count_votes
from verl_dvpo.cli import main as command

pytestmark = pytest.mark.e2e

PROMPTS, ANSWERS = 16, 4
#: vLLM's CPU build on a small machine, as `platform=cpu` sets it.
SMALL = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VERL_PLATFORM": "cpu",
}


SHORT = (
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "critic.ppo_mini_batch_size=4",
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "trainer.save_freq=-1",
)


def verl_dvpo(*words: str, module: str = "verl_dvpo.cli") -> str:
    """Runs a command in a process of its own and returns what it printed."""
    run = subprocess.run(
        [sys.executable, "-m", module, *words], env={**os.environ, **SMALL}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout + run.stderr


def test_a_models_votes_become_labels_and_are_learned_from(tmp_path: Path):
    model = tmp_path / "demo" / "model"
    assert command(["demo-data", "--out", str(model.parent), "--tiny"]) == 0
    sums = [
        {"problem": f"{100 + number}+{200 + number}=", "answer": f"{300 + 2 * number}"} for number in range(PROMPTS)
    ]
    (tmp_path / "sums.json").write_text(json.dumps(sums))
    verl_dvpo("data", "math500", "--source", str(tmp_path / "sums.json"), "--out", str(tmp_path), "--instruction", "")
    prepared, votes = tmp_path / "math500.parquet", tmp_path / "votes.parquet"

    labelled = ("pseudo-labels", "--data", str(prepared), "--out", str(votes))
    said = verl_dvpo(
        *labelled, "--model", str(model), "--num-samples", str(ANSWERS), "--max-tokens", "12", "--memory-share", "0.1"
    )
    assert f"[{PROMPTS} of {PROMPTS} prompts]" in said
    samples = pq.read_table(tmp_path / "votes_samples.parquet").to_pylist()
    assert [len(row["responses"]) for row in samples] == [ANSWERS] * PROMPTS
    # the policy is nearly uniform, and equal draws would give all prompts the same beginnings
    assert len({row["responses"][0][:3] for row in samples}) > PROMPTS // 2

    rows = pq.read_table(votes).to_pylist()
    for row, sampled in zip(rows, samples, strict=True):
        vote = count_votes(sampled["responses"], grader="math")
        assert (row["reward_model"]["ground_truth"], row["vote_share"]) == (vote.answer, vote.share)

    rollouts = tmp_path / "rollouts"
    verl_dvpo(
        "platform=cpu",
        "+task=demo",
        f"demo.dir={model.parent}",
        "algorithm=dvpo",
        f"data.train_files={votes}",
        f"data.val_files={prepared}",
        "reward.custom_reward_function.path=pkg://verl_dvpo.bench.data.reward",
        f"trainer.rollout_data_dir={rollouts}",
        f"hydra.run.dir={tmp_path}",
        *SHORT,
        module="verl_dvpo.train",
    )
    records = [json.loads(line)["data"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["val-core/math500/acc/mean@1"] == 0.0  # the model has learned nothing
    assert [record["training/global_step"] for record in records[1:]] == [1, 2]
    learned = [json.loads(line) for file in rollouts.iterdir() for line in file.read_text().splitlines()]
    majority = {row["reward_model"]["ground_truth"] for row in rows}
    assert len(learned) == 2 * 8 * 4
    assert {one["gts"] for one in learned} <= majority
    assert [one["score"] for one in learned] == [float(judge(one["output"], one["gts"])[1]) for one in learned]
