"""The run store: one folder per run, self-describing, readable without rlroute, and written from outside the router.

``runs/<id>/`` holds ``config.json``, ``environment.json``, ``metrics.jsonl``, ``loads.jsonl`` and, once the run has
ended, ``summary.json``, and in ``checkpoint-<step>/`` its weights; a run without a summary is unfinished and resumes
from there. A *compact* file holds many ended runs, one JSON object a line, for publication.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from rlroute import lock
from rlroute.config import SCHEMA, RunConfig
from rlroute.errors import StoreError
from rlroute.foreign import open_regular
from rlroute.provenance import environment, utc_now
from rlroute.reading import Row, read_described, read_json, read_part, read_rows, read_run, refuse_link
from rlroute.schema import Asked, LoadRow, RunRecord, TrainRow
from rlroute.seal import seal
from rlroute.values import flatten

State = Literal["empty", "running", "interrupted", "stopped early", "set aside", "finished", "diverged", "damaged"]
"""What has become of a run: see :func:`state`."""
ENDED: frozenset[State] = frozenset({"finished", "diverged", "damaged"})
"""The states of a run that has a summary, and is not trained again."""
_PARTS = {"evals": "eval", "train": "train"}
TRACEBACK = "traceback.txt"
"""In the folder of a run that failed by a defect: see :mod:`rlroute.training.defects`."""
STOPPED = "stopped"
"""In the folder of a run that a search has stopped: an empty file."""
COMPACT_ROWS = 100
"""How many load and training rows of a run a compact file keeps at most."""
LOCK_SECONDS = 60.0


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a StoreError that names ``path``."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, whatever happens in between.

    Raises:
        StoreError: the folder cannot be written; what was there before stays.
    """
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file bit by bit; it takes the place of what was there once the block has ended well.

    Raises:
        StoreError: the folder cannot be written, or what is there is no file; it stays.
    """
    with storing(path):
        if path.exists() and not path.is_file():  # a device would give way to the file
            raise OSError(errno.EINVAL, "it is there, and no regular file")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)  # of a process that was killed, whose number this one has got
        try:
            with os.fdopen(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file atomically.

    Raises:
        StoreError: the folder cannot be written, or a value is not finite.
    """
    write_atomically(path, _to_json(value, path, indent=1) + "\n")


def _to_json(value: Mapping[str, object], path: Path, indent: int | None = None) -> str:
    """Return JSON that strict readers read, in one line where there is no ``indent``.

    Raises:
        StoreError: a number is not finite; the message names its field and ``path``.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent, separators=None if indent else (",", ":"))
    except ValueError:
        for name, leaf in flatten(value):
            if isinstance(leaf, float) and not math.isfinite(leaf):
                raise StoreError(
                    f"{path}: {name} = {leaf}: want a finite number, or null where there is none"
                ) from None
        raise


def _open(path: Path, flags: int) -> IO[str]:
    """Open a regular file as text to write to, which is no link and keeps what it holds."""
    return os.fdopen(open_regular(path, flags), "w", encoding="utf-8")


class RunFolder:
    """The folder of one run, held by one process at a time.

    Args:
        store: the run store's folder.
        config: the run's configuration.
        seed: the run's seed.
    """

    def __init__(self, store: Path, config: RunConfig, seed: int) -> None:
        self.id = config.run_id(seed)
        self.path = store / self.id

    def create(self) -> None:
        """Make the folder, and find out whether it can be written.

        Raises:
            StoreError: it cannot.
        """
        with storing(self.path):
            refuse_link(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            lock.make(self.path)

    @contextmanager
    def lock(self, patience: float = LOCK_SECONDS) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process ends, however it ends.

        Args:
            patience: seconds to wait for another process, such as the dying worker of a launcher that was killed.

        Raises:
            HeldError: another process still holds it.
            StoreError: the folder cannot be written.
        """
        self.create()
        with storing(self.path / lock.FILE):
            file = lock.take(self.path, self.id, patience)
        try:
            yield
        finally:
            lock.let_go(file)

    def wait(self, say: Callable[[str], None], patience: float) -> None:
        """Wait for as long as another process trains the run, and say so.

        Args:
            say: told which process that is, and again whenever its records have stood still for so long.
            patience: seconds.
        """
        lock.wait(self.path, self.id, lambda: state(self.path) == "running", say, patience)

    @property
    def ended(self) -> bool:
        """Whether the run has finished or diverged."""
        return state(self.path) in ENDED

    @property
    def made_from(self) -> Row | None:
        """What the run was made from when it was begun; None where nothing says so."""
        if not (self.path / "config.json").exists():
            return None
        made = read_described(self.path).get("made_from")
        return None if made is None else dict(made)

    def describe(
        self,
        config: RunConfig,
        seed: int,
        backend: str,
        command: str | None,
        group: Row,
        made: Row,
        asked: Asked | None = None,
    ) -> None:
        """Write config.json and environment.json; ``group`` says how many processes train together."""
        identity = {"id": self.id, "router": config.router_name, "seed": seed, "config_hash": config.content_hash()}
        described = {"schema": SCHEMA, **identity, "command": command, "config": config.to_dict(), "made_from": made}
        write_json(self.path / "config.json", described | ({} if asked is None else {"asked": asked}))
        here = environment(config.train.device, backend, config.train.threads)
        write_json(self.path / "environment.json", {**here, **group, "begun": utc_now()})
        with storing(self.path):
            for name in ("metrics", "loads"):
                _open(self.path / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT).close()

    def note_environment(self, config: RunConfig, backend: str, parallel: Row, notes: Sequence[str] = ()) -> None:
        """Note in environment.json what has changed since the run was begun, as "before, then now", and what happened.

        A table that wants one environment for all its runs then sees that this run had two.
        """
        path = self.path / "environment.json"
        noted = read_part(self.path, "environment") or {}
        for name, value in {**environment(config.train.device, backend, config.train.threads), **parallel}.items():
            if str(noted.get(name)).rpartition(", then ")[2] != str(value):
                noted[name] = f"{noted.get(name)}, then {value}"
        known = list(dict.fromkeys([*noted.get("notes", ()), *notes]))
        write_json(path, noted | ({"notes": known} if known else {}))

    def append(self, name: str, row: Mapping[str, object]) -> None:
        """Append one line to ``name``.jsonl.

        Raises:
            StoreError: it cannot be written, or a value is not finite.
        """
        path = self.path / f"{name}.jsonl"
        line = _to_json(row, path) + "\n"
        with storing(path), _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
            file.write(line)

    def rewind(self, step: int) -> None:
        """Forget the rows after ``step``, which a resumed run will write again; a torn last line goes too."""
        for path in (self.path / "metrics.jsonl", self.path / "loads.jsonl"):
            if path.exists():
                kept = [row for row in read_rows(path, torn_ok=True) if row["step"] <= step]
                write_atomically(path, "".join(_to_json(row, path) + "\n" for row in kept))

    def set_aside(self, reason: str | None) -> None:
        """Note why the run failed, for whoever looks at the store; None forgets it. Training it again is the way on.

        A run that has ended stays as it is, whoever has ended it in the meantime.
        """
        path = self.path / "failed.json"
        if reason is not None and not self.ended:
            write_json(path, {"id": self.id, "reason": reason})
        if reason is None or self.ended:
            with storing(path):
                path.unlink(missing_ok=True)
                (self.path / TRACEBACK).unlink(missing_ok=True)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write the record's seal and summary.json: from now on the run counts as ended."""
        ended = {"summary": json.loads(_to_json(summary, self.path / "summary.json"))}
        write_json(self.path / "seal.json", seal(self._written() | ended))
        write_json(self.path / "summary.json", summary)
        self.set_aside(None)

    def _written(self) -> Row:
        """Return the parts of the record that this run has written: they are its own, and held to no schema."""
        with storing(self.path):
            texts = {n: (self.path / f"{n}.json").read_text(encoding="utf-8") for n in ("config", "environment")}
            lines = {n: (self.path / f"{n}.jsonl").read_text(encoding="utf-8") for n in ("metrics", "loads")}
        rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in lines.items()}
        by_kind = {part: [r for r in rows["metrics"] if r["kind"] == kind] for part, kind in _PARTS.items()}
        return {name: json.loads(text) for name, text in texts.items()} | by_kind | {"loads": rows["loads"]}

    def read(self) -> RunRecord:
        """Return the ended run's record."""
        return read_run(self.path)


def state(folder: Path) -> State:
    """Return what has become of a run, of which there may be nothing yet.

    ``running``: a process holds it. ``interrupted``: it was begun, and the same command goes on. ``set aside``: it
    failed, for the reason that :func:`failure` returns. ``stopped early``: by a search. ``damaged``: it has ended, but
    its summary cannot be read.
    """
    if (folder / "summary.json").exists():
        return _outcome(folder / "summary.json")
    if lock.held(folder):
        return "running"
    marks: tuple[tuple[str, State], ...] = (
        ("failed.json", "set aside"),
        (STOPPED, "stopped early"),
        ("config.json", "interrupted"),
    )
    return next((name for file, name in marks if (folder / file).exists()), "empty")


def _outcome(summary: Path) -> State:
    try:
        status = read_json(summary).get("status")
    except StoreError:
        return "damaged"
    return next((end for end in ENDED if end == status), "damaged")


def mark(path: Path) -> None:
    """Leave an empty file, which is no link, by its name to be found.

    Raises:
        StoreError: it cannot be written.
    """
    with storing(path):
        _open(path, os.O_WRONLY | os.O_CREAT).close()


def write_compact(records: Iterable[RunRecord], path: Path) -> None:
    """Write runs as a compact file, with their load and training rows thinned."""
    lines = []
    for record in records:
        whole = ("config", "environment", "summary", "evals", *(["seal"] if record.seal else []))
        parts: Row = {name: getattr(record, name) for name in whole}
        lines.append(_to_json(parts | {"loads": _thin(record.loads), "train": _thin(record.train)}, path))
    write_atomically(path, "".join(line + "\n" for line in lines))


def _thin(rows: Sequence[LoadRow | TrainRow]) -> list[LoadRow | TrainRow]:
    stride = -(-len(rows) // COMPACT_ROWS) or 1
    return [row for index, row in enumerate(rows, start=1) if index % stride == 0 or index == len(rows)]
