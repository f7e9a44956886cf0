"""The lines of a file that somebody else writes, on this machine or another: each look reads what is new."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rlroute.foreign import Unfit, reading
from rlroute.reading import FILE, LINE


class Tail:
    """What a file has got since it was last looked at.

    Attributes:
        path: the file, which need not be there yet.
        turns: how often it was begun anew: what its lines said before no longer holds then. A run that is taken up
            again from a checkpoint writes its file anew, without the rows that come after.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.turns = path, 0
        self._read = self._file = 0  # bytes, and which file

    def lines(self) -> Iterator[bytes]:
        """Yield the complete lines that are new; a last one that has no end yet is left for the next look.

        Raises:
            OSError: the file is no regular one, or too large; none at all where it is not there.
            Unfit: a line is too long.
        """
        try:
            with reading(self.path, FILE) as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._read:
                    self._read, self._file, self.turns = 0, status.st_ino, self.turns + 1
                file.seek(self._read)
                while chunk := file.read(LINE + 1):
                    whole, end, _ = chunk.rpartition(b"\n")
                    if not end:
                        if len(chunk) > LINE:
                            raise Unfit(f"a line has more than {LINE:,} bytes")
                        return
                    if (hole := whole.find(b"\0")) >= 0:  # a shared folder may show a file's length before its content
                        whole, end, _ = whole[:hole].rpartition(b"\n")
                    self._read += len(whole) + len(end)
                    yield from whole.split(b"\n") if end else ()
                    if hole >= 0:
                        return
                    file.seek(self._read)
        except FileNotFoundError:
            return
