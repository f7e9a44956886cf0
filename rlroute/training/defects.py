"""What is kept of a run that failed by a defect, mostly of its router: the traceback in its folder, and one line."""

import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rlroute.config import RunConfig
from rlroute.errors import DefectError, RlrouteError, StoreError
from rlroute.faults import explain
from rlroute.records import TRACEBACK, write_atomically
from rlroute.registry import router_file


class Defects:
    """Turns a defect that its ``with`` block raises into one line, and keeps its traceback; a block that ends well
    removes that of an earlier try.

    Args:
        config: of the run; its routers' files are where the place of a defect is looked for first.
        folder: the run's, which is there.
        ours: whether an error came of the block's own doing; another is let through.

    Raises:
        DefectError: in place of any error that is none of rlroute's own, at the end of the block.
    """

    def __init__(
        self, config: RunConfig, folder: Path, ours: Callable[[BaseException], bool] = lambda error: True
    ) -> None:
        self.config, self.path, self.ours = config, folder / TRACEBACK, ours

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        elif not isinstance(error, RlrouteError | KeyboardInterrupt) and self.ours(error):
            files = [file for file in map(router_file, self.config.router_names) if file]
            raise DefectError(explain(error, files) + self._keep(error)) from error

    def _keep(self, error: BaseException) -> str:
        """Write an error's traceback; return what to say of it."""
        text = "".join(traceback.format_exception(error)).encode(errors="backslashreplace").decode()
        try:
            write_atomically(self.path, text)
        except StoreError:  # a full disk may be what failed
            return ""
        return f"; its traceback is in {self.path.name}"
