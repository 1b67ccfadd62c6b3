# SPDX-License-Identifier: Apache-2.0
"""Writes pictures as one page of HTML that needs nothing else: no network, no script, no other file."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from verl_dvpo.pictures.choose import MEDIAN
from verl_dvpo.saved.values import Answer

#: Red, green and blue of a rise and of a fall of the median, as the figures have them.
RISE, FALL = (0, 114, 178), (213, 94, 0)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; } h3 { margin: 1.6em 0 .3em; }
img { max-width: 100%; height: auto; display: block; }
p.note { color: #555; } table { border-collapse: collapse; font-size: .9em; }
td, th { border: 1px solid #ddd; padding: .2em .7em; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.text { font-family: ui-monospace, monospace; line-height: 2; background: #fafafa; padding: .5em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { padding: .15em .05em; border-radius: 2px; } .text .given { color: #888; }
"""

#: Forbids a browser whatever a page like this does not need.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Picture:
    """A figure of a page.

    Attributes:
        name: of its PNG file, without the ending.
        title: above it.
        text: what is seen, below the title.
        png: the figure.
        below: HTML under it.
    """

    name: str
    title: str
    text: str
    png: bytes
    below: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: pictures, and tables of name and value above them."""

    title: str
    pictures: Sequence[Picture] = ()
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text: str = ""


def page(title: str, sections: Iterable[Section]) -> str:
    """Returns the HTML of a page; figures are in it as data."""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    for picture in section.pictures:
        image = base64.b64encode(picture.png).decode()
        parts += [
            f"<h3>{escape(picture.title)}</h3>",
            f'<p class="note">{escape(picture.text)}</p>',
            f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{image}">',
            picture.below,
        ]
    for heading, rows in section.tables.items():
        cells = "\n".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
        parts.append(f"<h3>{escape(heading)}</h3>\n<table>\n{cells}\n</table>")
    return "\n".join(part for part in parts if part)


def coloured_text(answer: Answer) -> str:
    """Returns an answer's text as HTML: blue where a token raised the critic's median, orange where it lowered it.

    The strength is the change, against the widest range that the median has in the answer. The last token's change is
    that to the return that came.
    """
    at = np.flatnonzero(answer.mask).tolist()
    median = [float(answer.quantiles[token, MEDIAN]) for token in at]
    widest = max(max(median) - min(median), 1e-9)
    moves = dict(zip(at, pairwise([*median, float(answer.realised[at[-1]])]), strict=True))
    spans = []
    for token, piece in enumerate(answer.pieces or [f"{number} " for number in answer.ids.tolist()]):
        if token not in moves:
            spans.append(f'<span class="given">{escape(piece)}</span>')
            continue
        before, after = moves[token]
        red, green, blue = RISE if after >= before else FALL
        share = min(1.0, abs(after - before) / widest)
        about = f"token {token + 1}: {before:.3f} → {after:.3f}"
        style = f"background: rgba({red}, {green}, {blue}, {0.8 * share:.2f})"
        spans.append(f'<span style="{style}" title="{about}">{escape(piece)}</span>')
    prompt = f'<span class="given">{escape(answer.prompt)}</span>\n' if answer.prompt else ""
    return f'<div class="text">{prompt}{"".join(spans)}</div>'
