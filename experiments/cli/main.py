"""The command line. Every command that writes says where; bad input is one line on stderr and exit code 2.

Heavy packages are imported inside the commands, so that ``rlroute --help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rlroute.errors import RlrouteError
from rlroute.experiments.cli.folders import leaving_nothing
from rlroute.experiments.cli.include import without_includes
from rlroute.experiments.cli.output import surviving
from rlroute.experiments.cli.parsing import Command, parse
from rlroute.extras import missing, needed_beside
from rlroute.foreign import printable


def main() -> None:
    """Run the command line."""
    with suppress(ValueError):  # not of a thread
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) == signal.SIG_DFL:  # nohup has had it ignored
                signal.signal(signum, _stop)
    with surviving():
        try:
            with leaving_nothing(), _naming_defects():
                _run()
        except RlrouteError as error:
            print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
            sys.exit(2)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if not needed_beside(package):  # none of the packages that commands may do without
                raise
            print("error:", missing("this command", package), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print("stopped; what ended is kept, and the same command goes on", file=sys.stderr)
            sys.exit(128 + (stop.signum if isinstance(stop, _Stopped) else signal.SIGINT))


@contextmanager
def _naming_defects() -> Iterator[None]:
    """As of the registry, where a command has imported it: without it there is no router, nor torch."""
    try:
        yield
    except Exception:
        if registry := sys.modules.get("rlroute.registry"):
            with registry.naming_defects():
                raise
        raise


class _Stopped(KeyboardInterrupt):
    """A signal that ends a process, taken for Ctrl-C: what was started is ended."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _stop(signum: int, frame: object) -> None:
    raise _Stopped(signum)


def _run() -> None:
    if sys.argv[1:] == ["--version"]:
        print(_version())
        return
    try:
        import tyro  # noqa: F401  (the commands say with it how they are called)
    except ImportError as error:
        raise missing("the command line", "tyro") from error
    from rlroute.experiments.cli.common import with_checked_options

    description = (
        "Compare the routers of mixture-of-experts transformers inside identical models. "
        "--include FILE, of every command and as often as needed, brings in a router from a file anywhere."
    )
    parse(without_includes(sys.argv[1:]), [with_checked_options(command) for command in commands()], description)()


def commands() -> tuple[Command, ...]:
    """Return what the command line offers, in the order in which its help lists it."""
    from rlroute.experiments.cli.benches import bench
    from rlroute.experiments.cli.check import check
    from rlroute.experiments.cli.claims import claims
    from rlroute.experiments.cli.dashboard import dashboard
    from rlroute.experiments.cli.data import data, plan
    from rlroute.experiments.cli.finetune import finetune
    from rlroute.experiments.cli.games import play
    from rlroute.experiments.cli.gradients import gradients
    from rlroute.experiments.cli.imports import import_
    from rlroute.experiments.cli.inspection import inspect
    from rlroute.experiments.cli.judge import judge
    from rlroute.experiments.cli.ladder import ladder
    from rlroute.experiments.cli.stored import (
        export,
        export_clusters,
        export_tokens,
        presets,
        report,
        routers,
        runs,
        table,
        verify,
    )
    from rlroute.experiments.cli.traces import trace
    from rlroute.experiments.cli.training import compare, sweep, train, tune
    from rlroute.experiments.cli.upcycle import upcycle
    from rlroute.experiments.cli.upload import wandb

    return (
        train,
        compare,
        finetune,
        judge,
        upcycle,
        claims,
        ladder,
        plan,
        data,
        sweep,
        routers,
        presets,
        check,
        runs,
        table,
        report,
        dashboard,
        verify,
        export,
        export_tokens,
        export_clusters,
        import_,
        tune,
        play,
        bench,
        gradients,
        trace,
        inspect,
        wandb,
    )


def _version() -> str:
    from rlroute import __version__
    from rlroute.commit import commit_of

    commit, dirty = commit_of()
    return f"rlroute {__version__} (commit {commit or 'unknown'}{', with uncommitted changes' if dirty else ''})"
