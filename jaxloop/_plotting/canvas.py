"""A figure that a notebook shows once, and that pyplot does not know.

    figure = LoopFigure(layout="constrained")

Imported only when a picture is drawn, because matplotlib is an extra.
"""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class LoopFigure(Figure):
    """A figure of its own, which pyplot neither keeps nor shows a second time."""

    def _repr_png_(self) -> bytes:
        # If the notebook has imported pyplot, IPython draws figures by itself and does not ask.
        image = io.BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()
