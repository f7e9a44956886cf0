"""Pictures of environments: rows of bars, as text or as pixels, without a drawing library.

Shape suffixes: K bars, H pixel rows, W pixel columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCKS = " ▁▂▃▄▅▆▇█"
BAR, GAP, HEIGHT = 12, 4, 60
WIDTH = 640
PAPER, INK, MARK = (255, 255, 255), (70, 110, 160), (215, 95, 30)


class Panel(NamedTuple):
    """A row of bars.

    Attributes:
        title: what they show.
        bars: K heights from 0 to 1.
        marked: a bar to set off, -1 for none.
    """

    title: str
    bars: NDArray[Any]
    marked: int = -1


def ansi_frame(panels: list[Panel]) -> str:
    """Return the panels as lines of block characters; a marked bar has brackets."""
    lines = []
    for title, bars, marked in panels:
        levels = np.rint(np.clip(bars, 0, 1) * (len(BLOCKS) - 1)).astype(int)
        cells = [f"[{BLOCKS[level]}]" if i == marked else f" {BLOCKS[level]} " for i, level in enumerate(levels)]
        lines.append(f"{title:<24}|{''.join(cells)}|")
    return "\n".join(lines) + "\n"


def rgb_frame(panels: list[Panel]) -> NDArray[np.uint8]:
    """Return the panels one above the other, uint8 of shape (H, W, 3); every frame of an environment has the same
    shape.
    """
    frame = np.full((len(panels) * (HEIGHT + GAP) + GAP, WIDTH, 3), PAPER, dtype=np.uint8)
    for row, (_, bars, marked) in enumerate(panels):
        bottom = (row + 1) * (HEIGHT + GAP)
        pitch = min(BAR + GAP, (WIDTH - GAP) // len(bars)) or 1
        heights = np.rint(np.clip(bars, 0, 1) * HEIGHT).astype(int)
        for i, height in enumerate(heights):
            left = GAP + i * pitch
            colour = MARK if i == marked else INK
            frame[bottom - max(height, 1) : bottom, left : left + max(pitch - GAP, 1)] = colour
    return frame
