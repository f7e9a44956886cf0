"""Pictures of environments: rows of bars, as text or as pixels.

Shape suffixes: K bars, H pixel rows, W pixel columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlroute.extras import missing

BLOCKS = " ▁▂▃▄▅▆▇█"
GAP, TITLE, HEIGHT, NUMBERS = 6, 22, 60, 18
WIDTH = 640
NUMBERED = 18
"""Bars so wide have their numbers below."""
PAPER, TEXT, INK, MARK = (255, 255, 255), (60, 60, 60), (70, 110, 160), (215, 95, 30)


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
    """Return the panels one above the other, each under its title, uint8 of shape (H, W, 3); every frame of an
    environment has the same shape.

    Bars have their numbers below where there is room for them; a marked bar has its own in any case.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise missing("a picture of render_mode='rgb_array'", "pillow", "'ansi' does without") from error
    image = Image.new("RGB", (WIDTH, len(panels) * (TITLE + HEIGHT + NUMBERS) + GAP), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    for row, (title, bars, marked) in enumerate(panels):
        top = row * (TITLE + HEIGHT + NUMBERS)
        bottom, pitch = top + TITLE + HEIGHT, (WIDTH - 2 * GAP) / len(bars)
        pen.text((GAP, top + TITLE / 2), title, TEXT, font, anchor="lm")
        pen.line((GAP, bottom, WIDTH - GAP, bottom), TEXT)
        for i, height in enumerate(np.clip(bars, 0, 1) * HEIGHT):
            left, colour = GAP + i * pitch, MARK if i == marked else INK
            pen.rectangle((left + 1, bottom - max(height, 1), left + max(pitch - 2, 1), bottom - 1), colour)
            if i == marked or pitch >= NUMBERED:
                middle = (left + pitch / 2, bottom + NUMBERS / 2)
                pen.text(middle, str(i), MARK if i == marked else TEXT, font, anchor="mm")
    return np.asarray(image)
