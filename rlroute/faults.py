"""Where an error comes from, in one line: the exception, its message, and the file and line of the router that raised
it.
"""

import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 500
"""Characters of a message: some of PyTorch's fill pages, and the traceback has them all."""


@contextmanager
def noted(router: str, site: object) -> Iterator[None]:
    """Note on whatever is raised in the block which router raised it, and where it stands.

    ``sys.exit`` becomes an error like any other: the process is not the router's to end.
    """
    note = f"router {router} at site {site}"
    try:
        yield
    except SystemExit as end:
        error = RuntimeError(f"sys.exit({end.code!r})")
        error.add_note(note)
        raise error from end
    except Exception as error:
        error.add_note(note)
        raise


def place(error: BaseException, files: Collection[str] = ()) -> str | None:
    """Return file and line where an error was raised: the innermost in one of ``files``, else the innermost of all.

    A file that cannot be parsed has the place where its text is wrong. None where there is no traceback.
    """
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).exists():
        return f"{error.filename}, line {error.lineno}"
    frame = innermost(error, files) or innermost(error)
    return f"{frame.filename}, line {frame.lineno}" if frame else None


def innermost(error: BaseException, files: Collection[str] | None = None) -> traceback.FrameSummary | None:
    """Return the innermost frame that an error, or else what caused it, passed through: in one of ``files``, or of all.

    None where it passed through none.
    """
    by_cause = ([frame for frame in _frames(one) if files is None or frame.filename in files] for one in _chain(error))
    return next((frames[-1] for frames in by_cause if frames), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen ")]


def explain(error: BaseException, files: Collection[str] = ()) -> str:
    """Return an error's type, message, :func:`place` and notes in one line."""
    said = message(error)
    where = "; ".join(filter(None, (place(error, files), *notes(error))))
    return ": ".join(filter(None, (type(error).__name__, said))) + (f" ({where})" if where else "")


def notes(error: BaseException) -> list[str]:
    """Return what was noted on an error on its way, each in one line and once."""
    return list(dict.fromkeys(" ".join(str(note).split()) for note in getattr(error, "__notes__", ())))


def message(error: BaseException) -> str:
    """Return an error's message in one line that is not too long, also where it cannot say it."""
    try:
        text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    except Exception as other:  # the exception may be the router's own
        text = f"its message cannot be had: {type(other).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
