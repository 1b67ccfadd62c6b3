# SPDX-License-Identifier: Apache-2.0
"""Files of a critic's values come back as they were, and what is not whole is refused."""

import dataclasses

import numpy as np
import pytest
from pictures import made
from safetensors.numpy import load, save

from verl_dvpo.saved.values import Answer, Dump, dump_files, path_of, read_dump, write_dump


def same(one: Answer, other: Answer) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Answer)]
    return all(np.allclose(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def test_a_file_comes_back_as_it_was(tmp_path):
    dump = made.story()
    path = path_of(tmp_path, dump.step)
    write_dump(path, dump)
    found = read_dump(path)
    assert (found.step, found.facts) == (10, dump.facts)
    assert len(found.answers) == 4
    assert all(map(same, found.answers, dump.answers))
    assert found.answers[3].mask.tolist() == [True, False, False, True, True]
    assert [file.name for file in path.parent.iterdir()] == ["step_10.safetensors"]  # nothing half written beside it


@pytest.mark.parametrize("answers", [(), (made.answer(1.0, 1),)], ids=["none", "one token"])
def test_no_answer_and_a_single_token(tmp_path, answers):
    write_dump(tmp_path / "step_1.safetensors", Dump(1, answers))
    assert len(read_dump(tmp_path / "step_1.safetensors").answers) == len(answers)


def test_what_was_not_known_stays_unknown(tmp_path):
    unknown = dataclasses.replace(made.answer(1.0), advantages=None, returns=None, pieces=(), prompt="")
    write_dump(tmp_path / "f", Dump(1, (unknown, unknown)))
    found = read_dump(tmp_path / "f").answers[1]
    assert found.advantages is found.returns is None
    assert found.pieces == ()


def broken(content: bytes, **changes) -> bytes:
    tensors = load(content)
    about = {"format": "verl-dvpo values 1", "step": "10", "facts": "{}", "texts": "[]"}
    texts = '[{"prompt": "", "pieces": []}]'
    about["texts"] = "[" + ", ".join([texts[1:-1]] * 4) + "]"
    about |= {name: value for name, value in changes.items() if isinstance(value, str)}
    tensors |= {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    return save({name: value for name, value in tensors.items() if changes.get(name, 0) is not None}, about)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[: len(content) // 2], "no whole file of values"),
        (lambda content: b"", "no whole file of values"),
        (lambda content: b"\xff" * 64, "no whole file of values"),
        (lambda content: broken(content, format="another"), "its format is 'another'"),
        (lambda content: broken(content, step="ten"), "no whole file of values"),
        (lambda content: broken(content, texts="[]"), "do not fit its 23 tokens"),
        (lambda content: broken(content, facts="{"), "no whole file of values"),
        (lambda content: broken(content, values=None), "no whole file of values: 'values'"),
        (lambda content: broken(content, values=np.zeros(3, np.float32)), r"values has shape \(3,\)"),
        (lambda content: broken(content, offsets=np.array([0, 9, 8, 22, 23])), "do not fit"),
        (lambda content: broken(content, levels=np.zeros(11, np.float32)), "its levels are"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, change, reason):
    path = tmp_path / "step_10.safetensors"
    write_dump(path, made.story())
    assert read_dump(path).answers
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=reason) as caught:
        read_dump(path)
    assert str(path) in str(caught.value)


def test_files_are_found_by_step_wherever_a_run_keeps_them(tmp_path):
    for step in (5, 10, 100):
        write_dump(path_of(tmp_path / "checkpoints", step), Dump(step, ()))
    (tmp_path / "checkpoints" / "values" / "step_x.safetensors").write_text("")
    names = ["step_5.safetensors", "step_10.safetensors", "step_100.safetensors"]
    for place in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "values"):
        assert [file.name for file in dump_files(place)] == names
    assert dump_files(tmp_path / "elsewhere") == []
