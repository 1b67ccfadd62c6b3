# SPDX-License-Identifier: Apache-2.0
"""Writes a page's equations as MathML while the site is built, so that no page needs a script or a font for them."""

import html
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\\?\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)


def with_mathml(page: str) -> str:
    r"""Returns the HTML with each ``\(...\)`` and ``\[...\]`` that arithmatex marked turned into MathML.

    Raises:
        ValueError: an equation cannot be read, or a command in it is not known.
    """
    page = BLOCK.sub(lambda found: _mathml(found[1], display="block"), page)
    return INLINE.sub(lambda found: _mathml(found[1], display="inline"), page)


def _mathml(equation: str, *, display: str) -> str:
    latex = html.unescape(equation).strip()
    try:
        mathml = convert(latex, display=display)
    except Exception as error:  # latex2mathml has several, without a common parent
        raise ValueError(f"equation is {latex!r}; it must be LaTeX that latex2mathml reads; {error!r}") from error
    unknown = re.search(r"\\[a-zA-Z]+", mathml)
    if unknown:
        raise ValueError(f"equation is {latex!r}; latex2mathml does not know {unknown[0]}; write it otherwise")
    return mathml
