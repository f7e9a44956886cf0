"""The commands that read what is there: ``routers``, ``runs``, ``table``, ``report``, ``verify``, ``export`` and
``export-tokens``.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import tyro

from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import make_folder, select
from rlroute.experiments.cli.include import name_broken
from rlroute.limits import Count


def routers(markdown: bool = False) -> None:
    """List the routers: where each comes from, its paper, what it learns from and its fields.

    Args:
        markdown: as a page, each field with its meaning: docs/routers.md.
    """
    from rlroute.experiments.report.listing import routers_text
    from rlroute.experiments.report.router_page import routers_page

    name_broken()
    print(routers_page() if markdown else routers_text())


def runs(path: tyro.conf.Positional[Path] = Path("runs"), run: tyro.conf.Positional[str] = "") -> None:
    """List the runs of a store (or of a compact file), or inspect one: RUN is its id or the start of it."""
    from rlroute.experiments.report.listing import run_text, runs_text

    print(run_text(path, run) if run else runs_text(path))


def table(
    path: tyro.conf.Positional[Path] = Path("runs"),
    reference: str | None = None,
    csv: bool = False,
    timings: bool = True,
    only: tuple[str, ...] = (),
) -> None:
    """Print the table of stored runs, as Markdown or CSV; a pure function of the records.

    Args:
        path: a run store or a compact file.
        reference: the entry that differences are taken to.
        csv: CSV instead of Markdown.
        timings: --no-timings leaves out the columns that differ from run to run.
        only: ids (or their starts) of the runs to take; all if none are given.
    """
    from rlroute.experiments.comparison.table import build_table
    from rlroute.experiments.comparison.text import to_csv, to_markdown

    built = build_table(select(path, only), reference)
    print(to_csv(built, timings=timings) if csv else to_markdown(built, timings=timings))


def report(
    path: tyro.conf.Positional[Path] = Path("runs"),
    out: Path = Path("results/report.html"),
    reference: str | None = None,
    only: tuple[str, ...] = (),
) -> None:
    """Write one self-contained HTML page about stored runs: table, curves, expert loads, quality against balance,
    provenance.

    Args:
        path: a run store or a compact file.
        out: the page.
        reference: the entry that differences are taken to.
        only: ids (or their starts) of the runs to take; all if none are given.
    """
    from rlroute.experiments.report.page import write_report

    write_report(select(path, only), out, reference=reference)
    print(f"report in {out}")


def verify(
    path: tyro.conf.Positional[Path] = Path("runs"), rerun: int = 0, seed: int = 0, evaluate: bool = False
) -> None:
    """Compute again what stored runs say, from their configurations, the code and the data at hand; say what differs.

    Silent where all is as it says; else a line for each finding, and exit code 1.

    Args:
        path: a run store or a compact file.
        rerun: so many runs are trained once more as well, and every figure is held against the record bit for bit.
        seed: which runs these are; those that say they diverged come first.
        evaluate: stored weights are evaluated once more as well.
    """
    from rlroute.experiments.cli.training import compare
    from rlroute.experiments.verify.store import verify as verified

    default = inspect.signature(compare).parameters["seeds"].default
    findings = verified(path, seeds=default, reruns=rerun, draw=seed, evaluate=evaluate)
    for finding in findings:
        print(finding)
    if findings:
        sys.exit(1)


def export(out: tyro.conf.Positional[Path], path: Path = Path("runs"), only: tuple[str, ...] = ()) -> None:
    """Write the ended runs of a store into one compact file for publication.

    Args:
        out: the compact file, one JSON object a line.
        path: the run store.
        only: ids (or their starts) of the runs to take; all if none are given.
    """
    from rlroute.records import write_compact

    records = select(path, only)
    write_compact(records, out)
    print(f"{len(records)} runs in {out}")


def export_tokens(
    run: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path] = Path("results/tokens.npz"),
    path: Path = Path("runs"),
    tokens: Count = 16_384,
) -> None:
    """Write the last MoE layer of a trained run as a table that TokenBandit-v0 plays: what each expert would cost each
    token.

    Args:
        run: the run's id or the start of it.
        out: the table, a .npz file.
        path: the run store.
        tokens: about how many validation tokens.
    """
    from rlroute.experiments.play.token_table import token_table
    from rlroute.records import storing

    records = select(path, (run,))
    if len(records) > 1:
        raise ConfigError(f"run {run!r}: {len(records)} start so, the first {records[0].id}")
    make_folder(out.parent)
    table = token_table(records[0], path, tokens)
    with storing(out):
        table.save(out)
    print(
        f"{len(table.x_ND)} tokens in {out}; loss uniform {table.uniform:.4f}, fixed {table.fixed:.4f}, oracle "
        f"{table.oracle:.4f}"
    )
