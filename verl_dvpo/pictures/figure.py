# SPDX-License-Identifier: Apache-2.0
"""Makes figures and PNGs without matplotlib's global state, so that a trainer may draw too."""

import io
import warnings
from typing import Any

DPI = 110


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """Returns a figure as PNG. Equal figures give equal bytes: there is no date and no version in them."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a token in a script without a font here
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()
