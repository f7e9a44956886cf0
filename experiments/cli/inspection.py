"""The command ``inspect``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import RUNS, command_line, one_run, refuse_others
from rlroute.experiments.cli.folders import check_ending, make_way
from rlroute.experiments.cli.output import show_grid
from rlroute.foreign import printable
from rlroute.limits import Between, Count, Positive, Whole

if TYPE_CHECKING:
    from rlroute.experiments.checkpoints.trained import TrainedRun
    from rlroute.experiments.inspection.drops import Drops
    from rlroute.experiments.inspection.inspection import Inspection
    from rlroute.experiments.terminal import Grid

DROPS = "drops"
WORTH_TOKENS, ORDERS = 2048, 5
SHOWN = (".html", ".json")
CAPACITIES = (1.0, 1.25, 2.0)
"""Factors that are tried where neither the user nor the run names one."""


def inspect(
    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[drops] RUN")],
    store: Path = RUNS,
    tokens: Count = 8192,
    worth_tokens: Whole = WORTH_TOKENS,
    capacity: tuple[Positive, ...] = (),
    orders: Annotated[int, Between(2, 1000)] = ORDERS,
    out: tuple[Path, ...] = (),
    json: bool = False,
) -> None:
    """Look inside a trained run: per site its experts' loads, what domains and tokens they are chosen for, which are
    chosen together, since when, and what the loss is without them.

    `inspect drops RUN` shows what the outputs of a sequence owe to the others in its batch under a capacity, where
    pairs are dropped, and whether anything changes dropless.

    Args:
        what: the run's id or the start of it; before it `drops`, if that is wanted.
        store: the run store.
        tokens: about how many validation tokens are looked at.
        worth_tokens: not of `drops`: on so many of them experts are masked, one after the other; 0: they are not.
        capacity: of `drops`: capacity factors, beside dropless; by default the run's own, or 1, 1.25 and 2.
        orders: of `drops`: so often are the same sequences put into batches.
        out: files to write, by the ends of their names: .html is a page, .json all figures.
        json: print all figures as JSON, and no table.
    """
    drops = _check(what, out)
    if drops:
        takes = "--tokens, --capacity, --orders, --out and --json"
        refuse_others(f"inspect {DROPS}", takes, {"worth_tokens": worth_tokens}, {"worth_tokens": WORTH_TOKENS})
    else:
        given, plain = {"capacity": capacity, "orders": orders}, {"capacity": (), "orders": ORDERS}
        refuse_others("inspect RUN", "--tokens, --worth-tokens, --out and --json", given, plain)
    from rlroute.experiments.checkpoints.trained import open_routed
    from rlroute.records import write_atomically

    for path in out:
        make_way(path)
    run = open_routed(one_run(store, what[-1]), store)
    shown = _drops(run, tokens, capacity, orders) if drops else _inside(run, tokens, worth_tokens)
    for path in out:
        write_atomically(path, (shown.html if path.suffix == ".html" else shown.json)())
    if json:
        print(shown.json(), end="")
        return
    shown.tables()
    if out:
        print(f"in {', '.join(map(str, out))}")


class Shown(NamedTuple):
    """What was found, as it is wanted: the texts of files, and what prints tables."""

    json: Callable[[], str]
    html: Callable[[], str]
    tables: Callable[[], None]


def _check(what: tuple[str, ...], out: tuple[Path, ...]) -> bool:
    """Refuse words and files that cannot be, before the work; return whether drops are wanted.

    Raises:
        ConfigError: naming the first.
        MissingDependencyError: a page is wanted, and Plotly is not installed.
    """
    drops = len(what) == 2 and what[0] == DROPS
    if len(what) != 1 and not drops:
        raise ConfigError(f"inspect {' '.join(what)}: want [{DROPS}] RUN")
    for path in out:
        check_ending(path, SHOWN, "--out ")
    return drops


def _inside(run: TrainedRun, tokens: int, worth_tokens: int) -> Shown:
    from rlroute.experiments.inspection import page, text
    from rlroute.experiments.inspection.inspection import inspect_run

    found = inspect_run(run, tokens, worth_tokens)
    return Shown(
        lambda: text.to_json(run.id, found, command_line()),
        lambda: page.render(found, command_line()),
        lambda: _show_inside(found),
    )


def _drops(run: TrainedRun, tokens: int, capacity: tuple[float, ...], orders: int) -> Shown:
    from rlroute.experiments.inspection import page, text
    from rlroute.experiments.inspection.drops import measure_drops
    from rlroute.experiments.inspection.tokens import Speller

    own, spell = run.config.model.capacity_factor, Speller(run.config.data)
    factors = capacity or (CAPACITIES if own is None else (own,))
    found = measure_drops(
        run.model, run.batches(tokens), run.device, [*factors, None], orders=orders, seed=run.seed, step=run.last_step
    )
    return Shown(
        lambda: text.to_json(run.id, found, command_line()),
        lambda: page.render_drops(run.id, found, spell, command_line()),
        lambda: _show_drops(run.id, found, spell),
    )


def _show_inside(found: Inspection) -> None:
    from rlroute.experiments.inspection import text

    _say(text.headline(found))
    _table(text.sites_grid(found), text.LEGEND)
    for number, (name, sites) in enumerate(list(found.families.items())[: text.MOST_SITES]):
        _say(f"Site {name}")
        _table(text.experts_grid(found, sites), "" if number else text.EXPERTS_LEGEND)
    if len(found.families) > text.MOST_SITES:
        _say(f"{len(found.families) - text.MOST_SITES} further sites are in the page and the figures (--out)")
    if (pairs := text.pairs_grid(found)) is not None:
        _table(pairs, text.PAIRS_LEGEND)
    _table(text.history_grid(found), text.HISTORY_LEGEND + (f" {text.KEEP}" if text.few(found) else ""))
    if (recorded := text.recorded_grid(found)) is not None:
        _table(recorded, text.RECORDED_LEGEND)
    if (worth := text.worth_grid(found)) is not None:
        _table(worth, text.WORTH_LEGEND)
    if (regret := text.regret_grid(found)) is not None:
        _table(regret, text.REGRET_LEGEND)
    else:
        _say(text.without_regret(found))


def _show_drops(run: str, found: list[Drops], spell: Callable[[int], str]) -> None:
    from rlroute.experiments.inspection import text

    _say(text.drops_said(run, found))
    _table(text.drops_grid(found), text.DROPS_LEGEND)
    for field, legend in text.PLACES.items():
        _table(text.places_grid(found, field), legend)
    for line in text.examples(found, spell):
        print(printable(line))


def _say(line: str) -> None:
    print(printable(line), end="\n\n")


def _table(grid: Grid, legend: str) -> None:
    show_grid(grid)
    print(f"\n{legend}\n" if legend else "")
