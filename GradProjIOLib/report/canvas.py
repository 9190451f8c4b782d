"""Figures that are drawn into files alone: no pyplot, no window, no global state."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**options: Any) -> Figure:
    """A figure on matplotlib's Agg canvas; `options` are those of `matplotlib.figure.Figure`.

    The import of matplotlib fails where MPLBACKEND names a window system that it does not know. A notebook hands
    its own on to the commands that are started from it, so the variable is hidden during the import.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure
