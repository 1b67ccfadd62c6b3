# SPDX-License-Identifier: Apache-2.0
"""Compares the tokenizers that two models keep in their folders, by the files alone."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Difference:
    """An id that means one token to one tokenizer and another token to the other.

    Attributes:
        id: of the tokens.
        first: what it means to the first tokenizer.
        second: what it means to the second.
    """

    id: int
    first: str
    second: str


def read_vocabulary(folder: Path) -> dict[int, str] | None:
    """Reads id -> token, without the tokens that were added later; None where no file that is read here is there.

    Reads ``tokenizer.json`` or ``vocab.json``. A SentencePiece file alone is not read.

    Raises:
        ValueError: one of the two is not what tokenizers write.
    """
    for name, inner in (("tokenizer.json", True), ("vocab.json", False)):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            vocabulary = content["model"]["vocab"] if inner else content
            if isinstance(vocabulary, dict):
                return {int(place): token for token, place in vocabulary.items()}
            return {place: token for place, (token, _) in enumerate(vocabulary)}  # a unigram model's, with scores
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a tokenizer's vocabulary ({error!r}); save the tokenizer again") from error
    return None


def highest_id(folder: Path) -> int | None:
    """Finds the highest id that a tokenizer gives, added tokens included; None without a vocabulary that can be read.

    Raises:
        ValueError: see ``read_vocabulary``.
    """
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        return None
    added: list[int] = []
    if (folder / "tokenizer.json").is_file():
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = [token["id"] for token in content.get("added_tokens", [])]
    return max([*vocabulary, *added], default=None)


def first_difference(one: Path, other: Path) -> Difference | None:
    """Finds the lowest id that both tokenizers have and that means different tokens to them.

    Tokens that one of them lacks, and those added later (special tokens), are no difference.

    Returns:
        None where there is no difference, or a folder has no vocabulary that can be read.

    Raises:
        ValueError: see ``read_vocabulary``.
    """
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    first, second = read_vocabulary(one), read_vocabulary(other)
    if first is None or second is None:
        return None
    differing = [place for place in first.keys() & second.keys() if first[place] != second[place]]
    if not differing:
        return None
    place = min(differing)
    return Difference(place, first[place], second[place])
