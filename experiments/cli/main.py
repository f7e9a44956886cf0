"""The command line. Every command that writes says where; bad input is one line on stderr and exit code 2.

Heavy packages are imported inside the commands, so that ``rlroute --help`` answers at once.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

from rlroute.errors import MissingDependencyError, RlrouteError
from rlroute.foreign import printable


def main() -> None:
    """Run the command line."""
    with suppress(ValueError):  # not of a thread
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) == signal.SIG_DFL:  # nohup has had it ignored
                signal.signal(signum, _stop)
    try:
        _run()
    except RlrouteError as error:
        print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("stopped; what ended is kept, and the same command goes on", file=sys.stderr)
        sys.exit(128 + (stop.signum if isinstance(stop, _Stopped) else signal.SIGINT))


class _Stopped(KeyboardInterrupt):
    """A signal that ends a process, taken for Ctrl-C: what was started is ended."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _stop(signum: int, frame: object) -> None:
    raise _Stopped(signum)


def _run() -> None:
    try:
        import tyro
    except ImportError as error:
        raise MissingDependencyError("the command line needs the extra 'cli': pip install 'rlroute[cli]'") from error
    from rlroute.experiments.cli.benches import bench
    from rlroute.experiments.cli.common import with_checked_options
    from rlroute.experiments.cli.games import play
    from rlroute.experiments.cli.gradients import gradients
    from rlroute.experiments.cli.stored import export, export_tokens, report, routers, runs, table, verify
    from rlroute.experiments.cli.training import compare, sweep, train, tune

    app = tyro.extras.SubcommandApp()
    for command in (
        train,
        compare,
        sweep,
        routers,
        runs,
        table,
        report,
        verify,
        export,
        export_tokens,
        tune,
        play,
        bench,
        gradients,
    ):
        app.command(with_checked_options(command))
    app.cli(
        prog="rlroute",
        description="Compare the routers of mixture-of-experts transformers inside identical models.",
    )
