# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of two folders, compared by their files."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from verl_dvpo.saved.vocabulary import Difference, first_difference, highest_id, read_vocabulary


def write(folder: Path, model: models.Model, added: tuple[str, ...] = ()) -> Path:
    """A folder with the ``tokenizer.json`` that the tokenizers library writes."""
    folder.mkdir()
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def words(*tokens: str) -> models.Model:
    return models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token=tokens[0])


def test_what_the_library_writes_is_read(tmp_path):
    bpe = write(tmp_path / "bpe", models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), ("<end>",))
    unigram = write(tmp_path / "unigram", models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    assert read_vocabulary(bpe) == {0: "a", 1: "b", 2: "ab"}
    assert read_vocabulary(unigram) == {0: "<unk>", 1: "a"}
    assert (highest_id(bpe), highest_id(unigram)) == (3, 1)


def test_an_older_file_and_none(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "c": 5}))
    assert read_vocabulary(tmp_path) == {0: "a", 5: "c"}
    assert highest_id(tmp_path) == 5
    (tmp_path / "empty").mkdir()
    assert read_vocabulary(tmp_path / "empty") is None
    assert highest_id(tmp_path / "empty") is None
    assert first_difference(tmp_path, tmp_path / "empty") is None


def test_the_first_id_with_two_meanings(tmp_path):
    one = write(tmp_path / "one", words("u", "a", "b", "c"))
    assert first_difference(one, write(tmp_path / "same", words("u", "a", "b", "c"))) is None
    longer = write(tmp_path / "longer", words("u", "a", "b", "c", "d"))
    assert first_difference(one, longer) is None
    renamed = write(tmp_path / "renamed", words("u", "a", "b", "c"), ("<think>",))
    assert first_difference(longer, renamed) is None, "added tokens are no difference"
    other = write(tmp_path / "other", words("u", "a", "c", "b"))
    assert first_difference(one, other) == Difference(2, "b", "c")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "x"}}}', '{"model": {"vocab": 3}}']
)
def test_a_file_that_is_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="is not a tokenizer's vocabulary"):
        read_vocabulary(tmp_path)
