"""The command line, run in this process or in one of its own: tiny runs, what they print, and what they leave."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, NamedTuple
from unittest import mock

from rlroute.experiments.cli.main import main
from tests import ROOT
from tests.tiny import STEPS

TINY = (
    *("--data.spec", "synth:documents=64,length=64", "--data.seq-len", "16", "--data.eval-tokens", "128"),
    *("--model.num-layers", "1", "--model.d-model", "16", "--model.num-heads", "2"),
    *("--model.num-experts", "4", "--model.d-expert", "8", "--train.batch-size", "4", "--train.warmup-steps", "2"),
    *("--train.log-every", "1", "--train.eval-every", "4", "--train.checkpoint-every", "4"),
    *("--train.steps", str(STEPS)),
)
"""The settings of `tests.tiny` in words."""
ENTRIES = ("dense", "hash", "switch")
COMPARE = ("compare", *ENTRIES, *TINY, "--seeds", "2", "--launcher", "local")


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def rlroute(*arguments: object, terminal: bool = False) -> Done:
    """Run the command line in this process, on a terminal or not; what it does not catch itself is raised."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    argv = ["rlroute", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def start(
    folder: Path, *arguments: object, path: str = str(ROOT), stdout: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start the command line in a process and a process group of its own, with ``folder`` as its working directory."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlroute", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def ran(*arguments: object) -> str:
    """Run a command that has to succeed and return what it printed."""
    done = rlroute(*arguments)
    assert done.code == 0, done.err
    return done.out


def refused(done: Done) -> str:
    """Assert that a command ended as bad input must, and return its one line; before it stands at most what was
    begun.
    """
    assert done.code == 2, done
    *begun, line = done.err.splitlines()
    assert line.startswith("error: "), done.err
    assert [" into " in other for other in begun] in ([], [True]), done.err
    return line


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return what every file under a folder holds; None for what is no file, such as a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def stamps(folder: Path) -> dict[str, int]:
    """Return when every file under a folder was last written; a run's lock is touched by whoever looks at the run."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


def rows(folder: Path, kind: str) -> list[dict]:
    """Return a run's train or eval rows."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def cells(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its titles."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def table(store: Path) -> str:
    """Return the table of a store without the timings, and without what was typed in which state of the repository."""
    lines = ran("table", store, "--no-timings").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("- **Command**", "- **Commit**")))
