# SPDX-License-Identifier: Apache-2.0
"""Finds the answer in a response, and compares letters and short texts. Pure text, no dependency."""

import re
import unicodedata

_BOX = re.compile(r"\\f?boxed\s*\{")
_STATED = re.compile(r"(?i:answer)\W*(?:(?i:is|option|choice)\W+)*([A-Z])(?![\w'’])(?!(?<=[AI]) [a-z])")
_BARE_LETTER = re.compile(r"[^\w]*([A-Z])(?![A-Za-z]).*", re.DOTALL)
_LONELY_LETTER = re.compile(r"[^\w]*([A-Z])[^\w]*")
_LINE = re.compile(r"(?im)^[\W_]*(?:the\s+)?(?:final\s+)?answer\s*(?:is\b)?\W*?[:\s]\s*(\S.*)$")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PUNCTUATION = re.compile(r"(?P<keep>(?<=\d)\.(?=\d)|(?<!\S)-(?=\d))|[\W_]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def after_thinking(response: str) -> str:
    """Returns what follows the last ``</think>``; nothing if ``<think>`` was opened and never closed."""
    _, closed, rest = response.rpartition("</think>")
    if closed:
        return rest
    return "" if "<think>" in response else response


def last_boxed(text: str) -> str | None:
    """Returns the inside of the last ``\\boxed{...}`` that is closed; None if there is none."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            if text[place] in "{}" and (place == start or text[place - 1] != "\\"):
                depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start:place].strip()
    return None


def chosen_letter(response: str, options: int = 0) -> str | None:
    """Returns the letter that a response chooses; None if it chooses none.

    The last box counts, else the last statement such as ``Answer: C`` or ``the answer is (C)``, else a letter that
    stands alone in the last line.

    Args:
        response: with or without a part in ``<think>``.
        options: number of options, from 1 to 26; a later letter is no choice. 0 allows all.
    """
    text = _TEXT_COMMAND.sub(r"\1", after_thinking(response))
    boxed = last_boxed(text)
    if boxed is not None:
        found = _BARE_LETTER.fullmatch(boxed)
        letter = found.group(1) if found else None
    elif stated := _STATED.findall(text):
        letter = stated[-1]
    else:
        lines = text.strip().splitlines()
        lonely = _LONELY_LETTER.fullmatch(lines[-1]) if lines else None
        letter = lonely.group(1) if lonely else None
    if letter is not None and options and ord(letter) - ord("A") >= options:
        return None
    return letter


def short_answer(response: str) -> str | None:
    """Returns the last box, else the rest of the last line that begins with ``Answer:``, else the last line."""
    text = after_thinking(response).strip()
    if not text:
        return None
    boxed = last_boxed(text)
    if boxed is not None:
        return _TEXT_COMMAND.sub(r"\1", boxed) or None
    stated = _LINE.findall(text)
    return (stated[-1] if stated else text.splitlines()[-1]).strip(" *_`") or None


def normalised(text: str) -> str:
    """Returns a text without case, accents, punctuation, articles and doubled spaces; signs and decimals stay."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(each for each in plain if not unicodedata.combining(each))
    plain = _THOUSANDS.sub("", plain)
    plain = _PUNCTUATION.sub(lambda match: match["keep"] or " ", plain)
    return " ".join(_ARTICLES.sub(" ", plain).split()) or " ".join(plain.split())
