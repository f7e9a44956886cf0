"""Every view of stored runs, in one place: a function from what is there, and what a reader has chosen, to a figure or
a table. The dashboard and the report show the same ones.

What is not there is said in a line: a view returns a text then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlroute.experiments.comparison.ladder_file import Ladder
from rlroute.experiments.report import sheets
from rlroute.experiments.report.board import ALIVE, FIRST, Board, Group
from rlroute.experiments.report.choice import ALL, Choice
from rlroute.experiments.report.curves import curves_figure, health_figure
from rlroute.experiments.report.differences import forest_figure, verdict_sheet
from rlroute.experiments.report.ladder_page import losses_figure, multipliers_figure
from rlroute.experiments.report.loads import loads_figure
from rlroute.experiments.report.regret import regret_figure, regrets
from rlroute.experiments.report.sheet import Sheet
from rlroute.experiments.report.signals import LOGARITHMIC, MEASURES, signals_figure, signals_of
from rlroute.experiments.report.tradeoff import tradeoff_figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Listing:
    """A text to be read as it is, such as a configuration."""

    text: str


NO_RUNS = "No run of this store has a row yet: rlroute compare trains some."
NO_LOADS = "No entry has loads of experts on record: none has experts, or none came as far as an evaluation."
NO_LADDER = "No ladder was climbed in this store: rlroute ladder does, and keeps it there (docs/ladder.md)."
NO_RUN = "No run of this store is called so: the runs are listed under Runs."


@dataclass(frozen=True)
class View:
    """A view.

    Attributes:
        title: what stands over it.
        caption: how to read it.
        draw: what makes it.
        result: the name of what another command published, if it shows that: of :attr:`Board.results`.
        pickers: what of :class:`~rlroute.experiments.report.choice.Choice` it heeds.
    """

    title: str
    caption: str
    draw: Callable[[Board, Choice], Figure | Sheet | Listing | str]
    pickers: tuple[str, ...] = ()
    result: str = ""

    def said(self, board: Board) -> str:
        """Return the caption, and whose the published results are that it shows."""
        return " ".join(filter(None, (self.caption, str(board.results.get(self.result, {}).get("origin", "")))))


# What each draws


def _progress(board: Board, choice: Choice) -> Sheet | str:
    return sheets.progress_sheet(board.groups, board.others) if board.groups else NO_RUNS


def _curves(board: Board, choice: Choice) -> Figure | str:
    groups = choice.drawn(board)
    if not any(run.last for group in groups for run in group.runs):
        return NO_RUNS
    return curves_figure(groups, board.styles, choice.axis, choice.kinds)


def _loads(board: Board, choice: Choice) -> Figure | str:
    if choice.entry == ALL:
        having = with_loads(board)
        return loads_figure(having) if having else NO_LOADS
    group = chosen_group(board, choice)
    if group is None or not any(run.loads for run in group.runs):
        return NO_LOADS
    return loads_figure([group], chosen_site(group, choice))


def routed(board: Board) -> list[Group]:
    """Return the entries that have experts and a run."""
    return [group for group in board.groups if group.sites and any(run.last for run in group.runs)]


def with_loads(board: Board) -> list[Group]:
    """Return the entries all of whose loads can be drawn."""
    return [group for group in routed(board) if group.runs[0].loads]


def chosen_group(board: Board, choice: Choice) -> Group | None:
    """Return the entry whose loads are drawn; None where nobody has any."""
    groups = routed(board)
    return next((group for group in groups if group.hash == choice.entry), groups[0] if groups else None)


def chosen_site(group: Group, choice: Choice) -> str:
    """Return the routed site whose loads are drawn, or those that are shown as one."""
    return choice.site if choice.site in group.sites else next(iter(group.sites))


def _health(board: Board, choice: Choice) -> Figure | str:
    groups = [group for group in choice.drawn(board) if group.sites and any(run.evals for run in group.settled)]
    return health_figure(groups, board.styles, choice.axis) if groups else NO_LOADS


def _tradeoff(board: Board, choice: Choice) -> Figure | str:
    if isinstance(board.table, str):
        return board.table
    return tradeoff_figure(board.table, board.entries, board.styles, {group.label for group in choice.drawn(board)})


def _forest(board: Board, choice: Choice) -> Figure | str:
    if isinstance(board.table, str):
        return board.table
    drawn = {group.label for group in choice.drawn(board)}
    figure = forest_figure(board.table, board.entries, board.styles, drawn)
    return figure or "There is one entry alone: nothing to take differences to."


def _verdicts(board: Board, choice: Choice) -> Sheet | str:
    entries = [board.entries[group.label] for group in choice.drawn(board) if group.label in board.entries]
    if len(entries) < 2:
        return "Verdicts are about two entries with runs of the same seeds that have ended: there are none here."
    return verdict_sheet(entries, board.margin)


def _results(board: Board, choice: Choice) -> Sheet | str:
    return board.table if isinstance(board.table, str) else sheets.results_sheet(board.table)


def _regret(board: Board, choice: Choice) -> Figure | str:
    groups = [group for group in choice.drawn(board) if regrets(group)]
    if not groups:
        return "No run that is drawn says the regret of its routes: it is measured as a run ends (docs/regret.md)."
    return regret_figure(groups, board.styles)


def _of_ladder(draw: Callable[[Ladder], Figure | Sheet]) -> Callable[[Board, Choice], Figure | Sheet | str]:
    return lambda board, choice: draw(board.ladder) if isinstance(board.ladder, Ladder) else board.ladder or NO_LADDER


def _gradients(board: Board, choice: Choice) -> Figure | str:
    record = board.results.get("gradients")
    if record is None:
        return "No record of the gradient instrument: rlroute gradients writes one into results/gradients."
    measure = choice.measure if choice.measure in MEASURES else next(iter(MEASURES))
    return signals_figure(signals_of(record, measure), MEASURES[measure], log=measure in LOGARITHMIC, first=FIRST)


def _claims(board: Board, choice: Choice) -> Sheet | str:
    grid = board.results.get("claims")
    return "No record of the claims: rlroute claims run writes one." if grid is None else sheets.claims_sheet(grid)


def _runs(board: Board, choice: Choice) -> Sheet | str:
    if not board.groups and not board.others:
        return NO_RUNS
    return sheets.runs_sheet(board.groups, board.others)


def _facts(board: Board, choice: Choice) -> Sheet | str:
    run = board.run(choice.run)
    return sheets.facts_sheet(run) if run else NO_RUN


def _evals(board: Board, choice: Choice) -> Sheet | str:
    run = board.run(choice.run)
    return sheets.evals_sheet(run) if run and run.evals else "It was not evaluated yet."


def _one_curve(board: Board, choice: Choice) -> Figure | str:
    run = board.run(choice.run)
    if run is None or run.last is None:
        return "It has no row yet."
    (group,) = (group for group in board.groups if group.hash == run.hash)
    whole = run if run.state in ALIVE else replace(run, state="interrupted")  # also one that diverged, by itself
    return curves_figure([Group(group.label, (whole,))], board.styles, choice.axis, choice.kinds)


def _config(board: Board, choice: Choice) -> Listing | str:
    run = board.run(choice.run)
    return Listing(sheets.config_text(run)) if run and run.config else "Its configuration is not known."


VIEWS: dict[str, View] = {
    "progress": View(
        "Progress",
        "Runs of each entry. Bits per byte and MaxVio (its worst layer): last evaluations, means over seeds; tokens "
        "per second: of a run; left: of the run that takes longest, in training time.",
        _progress,
    ),
    "results": View("Results", "", _results),
    "forest": View(
        "Differences to the reference",
        "Paired by seed, with 95% Student-t intervals; small marks are single seeds. A filled mark holds also when "
        "corrected for all comparisons of this table (Holm, 5%); p is the corrected one. Shaded: less than the margin.",
        _forest,
        ("entries",),
    ),
    "verdicts": View(
        "Verdict of every pair",
        "The row against the column, paired by seed: better (lower) or worse, equivalent within the margin, both, or "
        "unresolved; with the difference in bits per byte and half its 95% interval. Each by itself, uncorrected.",
        _verdicts,
        ("entries",),
    ),
    "curves": View(
        "Loss while training",
        "Evaluations: mean over the seeds that finished, bands are 95% Student-t intervals. Thin: mean training loss, "
        "at as many bytes a token as the validation tokens have; and each run that goes on. FLOPs are known once a "
        "run has ended.",
        _curves,
        ("entries", "axis", "kinds"),
    ),
    "balance": View(
        "Quality against balance and throughput",
        "Lower is better; further left is more even, further right is faster. Large: mean over seeds with its 95% "
        "interval; small: single seeds. Dotted: the Pareto front of each panel; ringed: on the front of loss, balance "
        "and speed together, of all causal entries. Speeds are those of the runs, which may have shared a machine.",
        _tradeoff,
        ("entries",),
    ),
    "loads": View(
        "What the experts did",
        "Share of the routed pairs in a training batch that each expert got, before drops, over the fair share 1/E. "
        "Where every head is routed, its experts stand after those of the heads before it.",
        _loads,
        ("entry", "site"),
    ),
    "health": View(
        "Balance, entropy, dead experts and drops",
        "Evaluations: mean over seeds, bands are 95% Student-t intervals; entropies are means over layers. Without a "
        "capacity nothing is dropped.",
        _health,
        ("entries", "axis"),
    ),
    "regret": View(
        "Regret by confidence",
        "How much lower the loss would be on the best routes of as many experts through the last layer, and how many "
        "routes are better than the one taken (a half: it is as good as any), by tenths of a sample of validation "
        "tokens, from the least confident on. Means over seeds with 95% Student-t intervals.",
        _regret,
        ("entries",),
    ),
    "losses": View(
        "Loss against compute",
        "The lowest mean loss over widths at each budget of the ladder, with its 95% interval over seeds, and the law "
        "through these points.",
        _of_ladder(losses_figure),
    ),
    "multipliers": View(
        "Compute multipliers",
        "How much more compute, and time, the ladder's reference needs for the same loss: right of the dotted line an "
        "entry is ahead.",
        _of_ladder(multipliers_figure),
    ),
    "rungs": View("Rungs of the ladder", "", _of_ladder(sheets.ladder_sheet)),
    "said": View("What has to be said of the ladder", "", _of_ladder(sheets.notes_sheet)),
    "gradients": View(
        "How good each router's learning signal is",
        "What the gradient instrument measured, by size of the model and step of training. The names under the figure "
        "show and hide entries.",
        _gradients,
        ("measure",),
        "gradients",
    ),
    "claims": View(
        "Claims",
        "What papers say, and what was found here: holds, refuted or inconclusive; the effect with its 95% interval.",
        _claims,
        result="claims",
    ),
    "runs": View("Runs", "Every run, in whatever state.", _runs),
    "facts": View("This run", "", _facts),
    "one": View("Its loss", "", _one_curve, ("axis", "kinds")),
    "evals": View("Its evaluations", "", _evals),
    "config": View("Its configuration", "", _config),
}
"""All views by their names."""
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "": ("Now", ("progress", "curves")),
    "table": ("Table", ("results", "forest")),
    "verdicts": ("Verdicts", ("verdicts", "balance")),
    "experts": ("Experts", ("loads", "health")),
    "ladder": ("Ladder", ("losses", "multipliers", "rungs", "said")),
    "signals": ("Signals", ("regret", "gradients")),
    "claims": ("Claims", ("claims",)),
    "runs": ("Runs", ("runs",)),
}
"""The pages of the dashboard: title, and the views that each has; a run has a page of its own."""
RUN_PAGE = ("facts", "one", "evals", "config")
