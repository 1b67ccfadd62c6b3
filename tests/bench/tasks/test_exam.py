# SPDX-License-Identifier: Apache-2.0
"""Compares the exam with hand-worked papers, the teacher with counts, and the reward with a loop over characters."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from verl.utils.tokenizer import hf_tokenizer

import verl_dvpo.plugin  # noqa: F401  (puts verl_dvpo.config on the search path)
from verl_dvpo.bench.tasks.commands import exam_data
from verl_dvpo.bench.tasks.exam import (
    DOUBTS,
    FULL,
    LONGEST_RESPONSE,
    MARKS,
    Paper,
    Sum,
    Teacher,
    demonstrator,
    draw_paper,
    score,
    shaky_facts,
    split,
    work,
)
from verl_dvpo.bench.tasks.prepare import prepare
from verl_dvpo.bench.tasks.registry import EXAM, ModelSize
from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.bench.tasks.tokenizer import encode_prompt

SUMS = st.builds(Sum, st.integers(0, 9), st.integers(0, 9), st.sampled_from(sorted(MARKS)))
PAPERS = st.lists(SUMS, min_size=1, max_size=6).map(lambda sums: Paper(tuple(sums)))
PAPER = Paper((Sum(3, 8, "!"), Sum(4, 7, "."), Sum(2, 5, ":")))


def draw_many(count: int, seed: int = 0) -> list[Paper]:
    rng = np.random.default_rng([seed, 9])
    return [draw_paper(rng, shaky_facts(seed)) for _ in range(count)]


def points_of(response: str, paper: Paper) -> int:
    """The points of a well-formed response, character by character."""
    points, signs = 0, {".": (".", ","), ":": (":", ";"), "!": ("!", "?")}
    for place, one in enumerate(paper.sums):
        said = response[3 * place : 3 * place + 3]
        if said[:2] == f"{one.x + one.y:02d}" and said[2] in signs[one.mark]:
            points += {".": 1, ":": 2, "!": 4}[one.mark]
    return points


def test_paper_by_hand():
    assert PAPER.prompt == "38!47.25:"
    assert work(PAPER) == PAPER.example.truth == "11!11.07:"
    assert PAPER.example.source == "exam"


@pytest.mark.parametrize(
    ("response", "points", "well_formed"),
    [
        ("11!11.07:", 7, 1.0),
        ("11?11,07;", 7, 1.0),  # doubt costs nothing
        ("11!10,07:", 6, 1.0),
        ("10!11.06:", 1, 1.0),
        ("11!", 4, 1.0),  # what is missing earns nothing
        ("11.11.07:", 3, 1.0),  # another mark is another answer
        ("11!11.07:00.", 0, 0.0),
        ("11!11.7:", 0, 0.0),
        ("11!11.07", 0, 0.0),
        ("11!11.07: ", 0, 0.0),
        ("", 0, 0.0),
    ],
)
def test_reward_by_hand(response, points, well_formed):
    assert score([response], PAPER.example.truth) == {
        "score": points / 10,
        "acc": pytest.approx(points / 7),
        "well_formed": well_formed,
    }


@given(PAPERS, st.integers(0, 2**32 - 1))
def test_reward_is_that_of_a_loop(paper, seed):
    rng = np.random.default_rng(seed)
    teacher = Teacher(shaky_facts(0), rng, habit=0.5, slip=0.2)
    response = work(paper, teacher)[: 3 * int(rng.integers(1, len(paper.sums) + 1))]
    found = score([response], paper.example.truth)
    assert found["well_formed"] == 1.0
    assert found["score"] == points_of(response, paper) / FULL
    assert found["acc"] == points_of(response, paper) / sum(MARKS[one.mark] for one in paper.sums)


def test_papers_offer_what_they_say_and_differ_much():
    papers = draw_many(3000)
    offered = np.array([sum(MARKS[one.mark] for one in paper.sums) for paper in papers])
    counts = np.array([len(paper.sums) for paper in papers])
    assert (offered.min(), offered.max(), counts.min(), counts.max()) == (2, FULL, 2, 6)
    assert offered.std() > 2
    # uniform over 2, ..., 6: five standard deviations of a share of 3000 are 5 * sqrt(0.2 * 0.8 / 3000) = 0.037
    assert np.bincount(counts)[2:] / 3000 == pytest.approx([0.2] * 5, abs=0.037)
    assert max(len(work(paper)) for paper in papers) == LONGEST_RESPONSE == 18


def test_share_of_shaky_facts_varies_between_papers_about_one_half():
    shaky = shaky_facts(0)
    assert len(shaky) == 27
    assert all(0 <= x <= y <= 9 for x, y in shaky)
    assert shaky != shaky_facts(1)
    shares = np.array([np.mean([one.fact in shaky for one in paper.sums]) for paper in draw_many(4000)])
    # The share of a paper is uniform, so its mean is 1/2, and of n facts none is shaky with probability 1/(n + 1):
    # (1/3 + 1/4 + 1/5 + 1/6 + 1/7) / 5 = 0.2186, five standard deviations of a share of 4000 are 0.033
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert (shares == 0).mean() == pytest.approx(0.2186, abs=0.033)
    assert (shares == 1).mean() == pytest.approx(0.2186, abs=0.033)


def test_error_rates_and_doubts_are_those_asked_for():
    teacher = Teacher(frozenset({(0, 0), (7, 8)}), np.random.default_rng(0), habit=0.8, slip=0.1)
    # 6000 draws: five standard deviations are 5 * sqrt(0.16 / 6000) = 0.026 and 5 * sqrt(0.09 / 6000) = 0.019
    shaky = np.array([teacher.answer(Sum(8, 7, ".")) for _ in range(6000)])
    assert set(shaky) == {14, 15}
    assert (shaky == 14).mean() == pytest.approx(0.8, abs=0.026)
    assert {teacher.answer(Sum(0, 0, ".")) for _ in range(300)} == {0, 1}
    other = np.array([teacher.answer(Sum(2, 2, ".")) for _ in range(6000)])
    assert (other == 4).mean() == pytest.approx(0.9, abs=0.019)
    assert (other == 3).mean() == pytest.approx(0.05, abs=0.014)
    assert {teacher.answer(Sum(0, 1, ".")) for _ in range(300)} == {0, 1, 2}
    for mark, doubt in DOUBTS.items():
        wrong = [teacher.mark(Sum(2, 2, mark), 3) for _ in range(6000)]
        right = [teacher.mark(Sum(2, 2, mark), 4) for _ in range(6000)]
        assert set(wrong) == set(right) == {mark, doubt}
        assert wrong.count(doubt) / 6000 == pytest.approx(0.9, abs=0.019)
        assert right.count(doubt) / 6000 == pytest.approx(0.1, abs=0.019)


@pytest.mark.parametrize("name", ["habit", "slip"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_probabilities_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Teacher(frozenset(), np.random.default_rng(0), **{"habit": 0.5, "slip": 0.5, name: value})


def test_split_is_disjoint_and_its_validation_depends_on_its_size_and_the_seed_alone():
    one, other = split(3, num_train=200, num_val=50), split(3, num_train=10, num_val=50)
    assert one.val == other.val
    assert other.train == one.train[:10]
    prompts = [example.prompt for example in (*one.train, *one.val)]
    assert len(set(prompts)) == 250
    assert split(4, num_train=1, num_val=50).val != one.val
    assert not one.shifted
    with pytest.raises(ValueError, match="num_val is 0"):
        split(0, num_train=1, num_val=0)


def test_demonstrations_are_answers_to_papers_outside_the_validation():
    held_out = split(0, num_train=1, num_val=400)
    prompts = {example.prompt for example in held_out.val}
    demonstrate = demonstrator(0, held_out, habit=0.75, slip=0.03)
    rng = np.random.default_rng(1)
    earned = []
    for _ in range(1500):
        prompt, response = demonstrate(rng)
        assert prompt not in prompts
        assert len(prompt) == len(response)
        paper = Paper(tuple(Sum(int(prompt[i]), int(prompt[i + 1]), prompt[i + 2]) for i in range(0, len(prompt), 3)))
        found = score([response], paper.example.truth)
        assert found["well_formed"] == 1.0
        earned.append(found["acc"])
    # Half the sums are right with probability 1/4 and half with 0.97, on average over papers: 0.61.
    assert np.mean(earned) == pytest.approx(0.61, abs=0.04)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = dataclasses.replace(EXAM.warm_start, steps=2, batch_size=4)
    return prepare(EXAM, tmp_path_factory.mktemp("exam") / "data", num_train=30, num_val=20, config=config)


def test_the_model_of_the_set_is_small(folder):
    model = AutoModelForCausalLM.from_pretrained(folder.model)
    # By hand, H = 128, 2 layers, 4 heads and 2 key-value heads of 32: attention 2 * 128*128 + 2 * 128*64, feed-forward
    # 3 * 128*320, norms 2*128 + 2*32; embedding and head 2 * 104*128, last norm 128:
    # 2 * (49152 + 122880 + 320) + 26624 + 128 = 371456
    assert sum(parameter.numel() for parameter in model.parameters()) == 371_456


def test_prompts_and_responses_fit_the_settings(folder, monkeypatch):
    monkeypatch.setenv("VERL_DVPO_EXAM_DIR", str(folder.path))
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("dvpo_trainer", overrides=["platform=cpu", "algorithm=ppo", "+task=exam"])
    assert config.data.train_files == str(folder.file("exam", "train"))
    assert config.actor_rollout_ref.model.path == config.critic.model.path == str(folder.model)
    tokenizer = hf_tokenizer(str(folder.model))
    longest = encode_prompt(tokenizer, work(Paper((Sum(9, 9, "!"),) * 6)))
    assert len(longest) <= config.data.max_prompt_length
    assert config.data.max_response_length >= LONGEST_RESPONSE + 1
    limits = config.data.max_prompt_length + config.data.max_response_length
    assert limits <= config.actor_rollout_ref.rollout.max_model_len <= EXAM.max_positions


def test_verls_reward_scores_the_rows(folder):
    for name in ("train", "val"):
        frame = pd.read_parquet(folder.file("exam", name))
        assert len(frame) == {"train": 30, "val": 20}[name]
        for row in frame.itertuples():
            (message,) = row.prompt
            points = dict(zip(".:!", (1, 2, 4), strict=True))
            found = compute_score(row.data_source, row.reward_model["ground_truth"], row.reward_model["ground_truth"])
            assert found["acc"] == 1.0
            assert found["score"] * 10 == pytest.approx(sum(points[mark] for mark in message["content"][2::3]))


def test_command_makes_the_tiny_variant(tmp_path, capsys):
    exam_data(out=tmp_path / "exam", tiny=True, steps=1, num_val=17)
    assert str(tmp_path / "exam") in capsys.readouterr().out
    assert len(pd.read_parquet(tmp_path / "exam" / "val.parquet")) == 17


@pytest.mark.parametrize("fields", [{"hidden_size": 0}, {"num_layers": -1}, {"num_heads": 3}])
def test_impossible_sizes_are_named(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} is {fields[name]}"):
        ModelSize(**fields)
