# SPDX-License-Identifier: Apache-2.0
"""The tokenizer as verl loads and uses it: from its file, through the chat template."""

import string

import numpy as np
import pytest
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.tokenizer.chat_template import initialize_system_prompt, initialize_turn_separator
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from verl_dvpo.bench.tasks.addition import Problem, Teacher, draw_problem, work
from verl_dvpo.bench.tasks.conversation import encode
from verl_dvpo.bench.tasks.model import build_config
from verl_dvpo.bench.tasks.tokenizer import build_tokenizer, encode_prompt, messages


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tokenizer as verl's loader gives it from a model folder, where the architecture could change its class."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_config(tokenizer).save_pretrained(folder)
    return hf_tokenizer(str(folder))


def test_every_demonstration_survives_a_round_trip_one_token_a_character(saved):
    rng = np.random.default_rng(0)
    teacher = Teacher(rng, habit=0.8, slip=0.2)
    for _ in range(1000):
        problem = draw_problem(rng)
        for text in (problem.prompt, work(problem, teacher)):
            ids = saved.encode(text, add_special_tokens=False)
            assert len(ids) == len(text)
            assert saved.unk_token_id not in ids
            assert saved.decode(ids) == text


def test_printable_ascii_survives_a_round_trip(saved):
    text = string.digits + string.ascii_letters + string.punctuation + " \n  user assistants"
    assert saved.decode(saved.encode(text, add_special_tokens=False)) == text
    assert saved.encode("é", add_special_tokens=False) == [saved.unk_token_id]


def test_the_file_gives_the_same_tokens_as_the_builder(saved):
    built = build_tokenizer()
    assert saved.get_vocab() == built.get_vocab()
    text = "<|im_start|>user\n347+586=<|im_end|>\n"
    assert saved.encode(text) == built.encode(text)
    assert build_config(saved).vocab_size == max(saved.get_vocab().values()) + 1
    assert (saved.eos_token, saved.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_prompt_by_hand(saved):
    tokens = saved.convert_ids_to_tokens(encode_prompt(saved, "347+586="))
    expected = ["<|im_start|>", "user", "\n", *"347+586=", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert tokens == expected


@pytest.mark.parametrize("problem", [Problem(347, 586), Problem(100, 999)])
def test_rollout_sends_the_tokens_of_the_warm_start(saved, problem):
    builder = create_continuous_token_builder(saved, hf_model_type="qwen3")
    rollout_ids = builder.build_initial_tokens(messages(problem.prompt))
    ids, labels = encode(build_tokenizer(), [problem.prompt, "1+1=2;2"])
    trained_prompt = [token for token, label in zip(ids, labels, strict=True) if label == -100]
    assert trained_prompt == rollout_ids
    assert ids[: len(rollout_ids)] == rollout_ids
    assert saved.convert_ids_to_tokens(ids[len(rollout_ids) :]) == [*"1+1=2;2", "<|im_end|>"]
    assert labels[len(rollout_ids) :] == ids[len(rollout_ids) :]


def test_verl_finds_no_system_prompt_and_the_newline_between_turns(saved):
    assert initialize_system_prompt(saved) == []
    assert saved.decode(initialize_turn_separator(saved)) == "\n"


def test_the_model_has_room_for_what_the_tokenizer_declares():
    assert build_config(build_tokenizer()).max_position_embeddings == 128
    assert build_config(build_tokenizer(max_length=256)).max_position_embeddings == 256
