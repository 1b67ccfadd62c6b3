# SPDX-License-Identifier: Apache-2.0
"""Tests of ``noise.correction.kind=majority``: votes by hand, and rewards as verl stores them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from samples import question
from tensordict import TensorDict

from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.compat.wrappers import log_rewards
from verl_dvpo.noise.config import noise_config
from verl_dvpo.noise.majority import majority, relabelled
from verl_dvpo.noise.metrics import is_wanted, noise_metrics
from verl_dvpo.noise.reward import ANSWER, with_noise

SUM = r";([^;]*)$"


def settings(**noise: Any) -> Any:
    correction = {"kind": "majority", "answer_pattern": SUM} | noise.pop("correction", {})
    return OmegaConf.create({"noise": {"kind": "none", "correction": correction} | noise})


def info(answer: str | None, score: float, clean: float = 0.0) -> dict[str, Any]:
    return {"score": score, "clean_score": clean, "corrupted": float(score != clean), ANSWER: answer}


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7", "7", "8"], "7"),
        (["8", "7", "7", "8", "7"], "7"),
        (["7", "8"], None),
        (["7", "7", "8", "8", "9"], None),
        (["7"], "7"),
        ([], None),
    ],
)
def test_the_answer_with_more_votes_than_any_other_wins(answers, winner):
    assert majority(answers) == winner


def test_the_vote_by_hand():
    """Prompt a: 7 wins over 8, against the given rewards. Prompt b: a tie. Prompt c: nobody has an answer."""
    keys = ["a_0_0", "a_1_0", "b_0_0", "a_2_0", "b_1_0", "c_0_0", "c_1_0", "d_0_0"]
    infos = [
        info("7", 0.0), info("8", 1.0), info("1", 1.0), info("7", 0.0), info("2", 0.0), info(None, 1.0), info(None, 0.0)
    ]  # fmt: skip
    infos.append({"score": 0.25, "timeout": True})  # the reward manager's own answer
    assert relabelled(settings(), keys, infos) == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.25]
    assert relabelled(settings(low=-1.0, high=3.0), keys, infos)[:2] == [3.0, -1.0]
    assert relabelled(settings(correction={"kind": "clip", "answer_pattern": None}), keys, infos) is None


def test_a_response_without_an_answer_has_no_vote_and_loses():
    keys = ["a_0_0", "a_1_0", "a_2_0", "a_3_0"]
    infos = [info(None, 1.0), info(None, 1.0), info(None, 1.0), info("5", 0.0)]
    assert relabelled(settings(), keys, infos) == [0.0, 0.0, 0.0, 1.0]


def test_parts_of_one_response_are_one_vote():
    keys = ["a_0_0", "a_0_1", "a_0_2", "a_1_0", "a_2_0"]
    infos = [info("7", 1.0), info("7", 1.0), info("7", 1.0), info("8", 0.0), info("8", 0.0)]
    assert relabelled(settings(), keys, infos) == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_a_name_of_a_prompt_may_have_underscores():
    keys = ["00000001-a_b_0_0", "00000001-a_b_1_0", "00000001-a_c_0_0", "00000001-a_c_1_0"]
    infos = [info("7", 0.0), info("7", 0.0), info("9", 0.0), info("8", 0.5)]
    assert relabelled(settings(), keys, infos) == [1.0, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_right_answers_in_the_majority_are_rewarded_whatever_the_noise(rate):
    config = settings(kind="flip", rate=rate)
    noisy = with_noise(compute_score, noise_config(config.noise), "rules")
    verdicts = [True, False, True]
    infos = [noisy(**question(5, right=right, session=session)) for session, right in enumerate(verdicts)]
    assert [each["score"] for each in infos] == [abs(right - rate) for right in verdicts]
    assert infos[0][ANSWER] == infos[2][ANSWER] != infos[1][ANSWER]
    scores = relabelled(config, ["u_0_0", "u_1_0", "u_2_0"], infos)
    assert scores == [1.0, 0.0, 1.0]
    metrics = noise_metrics([each | {"score": new} for each, new in zip(infos, scores, strict=True)])
    assert metrics["noise/majority_right/mean"] == 1.0
    assert metrics["noise/noisy_score/mean"] == pytest.approx(2 / 3 if rate == 0.0 else 1 / 3)


@pytest.mark.parametrize(
    ("correction", "text", "answer"),
    [
        ({}, "7+6=13;933", '"933"'),
        ({}, "no answer", None),
        ({}, "empty;", None),
        ({"answer_pattern": r"\d+$"}, "so 41, no, 42", '"42"'),
        ({"answer_pattern": None}, "the whole response", '"the whole response"'),
        ({"answer_pattern": None, "answer_key": "well_formed"}, "whatever", "0.0"),
    ],
)
def test_where_the_answer_comes_from(correction, text, answer):
    noisy = with_noise(compute_score, noise_config(settings(correction=correction).noise), "rules")
    assert noisy(**question(5, right=True, text=text))[ANSWER] == answer
    validation = noisy(**question(5, right=True, text=text, validate=True))
    assert ANSWER not in validation


def test_the_trainer_gets_the_rewards_of_the_vote(monkeypatch):
    """Rewards sit at the last token; what a reward manager has added to them stays."""
    import transfer_queue as tq

    infos = [info("7", 0.0, 1.0), info("7", 0.0, 1.0), info("8", 1.0)]
    rows = [torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, -0.25]), torch.tensor([0.5])]  # the last two: a penalty
    rows[2] += 0.5
    stored: dict[str, Any] = {
        "extra_fields": [{"reward_extra_info": each} for each in infos],
        "rm_scores": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
    }

    def put(keys: list[str], partition_id: str, fields: TensorDict) -> None:
        assert (len(keys), partition_id, fields.batch_size) == (3, "train", torch.Size([3]))
        stored.update(dict(fields.items()))

    monkeypatch.setattr(tq, "kv_batch_get", lambda keys, partition_id, select_fields: {
        name: stored[name] for name in select_fields
    })  # fmt: skip
    monkeypatch.setattr(tq, "kv_batch_put", put)
    balance = log_rewards(lambda self, batch, metrics: batch, is_wanted, noise_metrics, relabelled)
    batch = SimpleNamespace(keys=["p_0_0", "p_1_0", "p_2_0"], partition_id="train")
    logged: dict[str, float] = {}
    balance(SimpleNamespace(config=settings(kind="flip", rate=0.3)), batch, logged)
    after = [row.tolist() for row in stored["rm_scores"].unbind()]
    assert after == [[0.0, 0.0, 1.0], [0.0, 0.75], [0.0]]
    assert logged["noise/score/mean"] == pytest.approx(2 / 3)
    assert logged["noise/majority_right/mean"] == 1.0
    # without a majority nothing is written
    before = stored["rm_scores"]
    balance(SimpleNamespace(config=OmegaConf.create({"noise": {"kind": "flip", "rate": 0.3}})), batch, {})
    assert stored["rm_scores"] is before


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        ({"kind": "clip", "answer_pattern": ";"}, "noise.correction.answer_pattern is ';'; it must be null with"),
        ({"answer_pattern": "("}, "noise.correction.answer_pattern is '('; it must be a regular expression that"),
        ({"answer_key": ""}, "noise.correction.answer_key is ''; it must be a name, a string that is not empty;"),
        ({"low": 0.0, "answer_pattern": None}, "noise.correction.low is 0.0; it must be null with"),
    ],
)
def test_what_does_not_fit_is_refused(correction, message):
    with pytest.raises(ValueError, match="noise") as refused:
        noise_config(settings(correction=correction).noise)
    assert str(refused.value).startswith(message)
