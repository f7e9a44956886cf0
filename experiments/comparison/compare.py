"""A comparison, from entries to verdicts: what ``rlroute compare`` does, also for whoever calls it from Python."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlroute.config import Budget, DataConfig, ModelConfig, StartConfig, TrainConfig
from rlroute.experiments.comparison.budget import find_reference, refuse_two, with_budget
from rlroute.experiments.comparison.entries import make_entries
from rlroute.experiments.comparison.frames import Library, to_frame
from rlroute.experiments.comparison.groups import largest_group
from rlroute.experiments.comparison.ladder_file import Ladder, read_ladder
from rlroute.experiments.comparison.pairs import Pair, all_pairs
from rlroute.experiments.comparison.table import Table, build_table
from rlroute.experiments.comparison.text import plain_pairs, plain_rows, to_grid, to_markdown
from rlroute.experiments.launch.jobs import Job, Launch, together
from rlroute.experiments.launch.runs import run_all
from rlroute.experiments.recipes.presets import ALL, DEFAULT, all_entries, build_comparison, fitting_entries
from rlroute.experiments.verdicts import MARGIN, Seeds, Verdict
from rlroute.limits import Positive, checked
from rlroute.schema import RunRecord


@dataclass(frozen=True, repr=False)
class Comparison:
    """What came out.

    Attributes:
        table: of the largest group of comparable runs.
        runs: the records behind it.
        left_out: a line for each lot of other runs: who they are, and why they are not in the table.
        records: all runs, those that are left out too.
        ladder: the one of their store, which has compute multipliers.
    """

    table: Table
    runs: tuple[RunRecord, ...]
    left_out: tuple[str, ...]
    records: tuple[RunRecord, ...]
    ladder: Ladder | None = None

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """What is said of each entry against the table's reference, by label."""
        return {row.label: row.verdict for row in self.table.rows if row.verdict is not None}

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """What is said of each entry against each other one, in the table's order: the report's matrix as rows."""
        by_label = {entry.label: entry for entry in make_entries(self.runs)}
        return tuple(all_pairs([by_label[row.label] for row in self.table.rows], self.table.margin))

    def frame(self, library: Library | None = None, *, of: Literal["table", "pairs"] = "table") -> Any:
        """Return rows as a DataFrame at full precision: of the table, with the columns of table.csv, or of all pairs,
        with those of verdicts.csv.

        Args:
            of: which.
            library: polars or pandas; whichever is installed, polars first, if nothing is said.

        Raises:
            MissingDependencyError: it is not installed.
            ConfigError: an illegal value.
        """
        of = checked(of, Literal["table", "pairs"], "of")
        return to_frame(plain_rows(self.table) if of == "table" else plain_pairs(self.pairs), library)

    def __repr__(self) -> str:
        return to_grid(self.table).text()

    def _repr_markdown_(self) -> str:
        return to_markdown(self.table)


def tabulate(
    records: Sequence[RunRecord], reference: str | None = None, margin: float = MARGIN, ladder: Ladder | None = None
) -> Comparison:
    """Return the comparison of the largest group of comparable runs, with the compute multipliers of a ladder.

    Raises:
        ComparisonError: there are none, or no such reference.
    """
    runs, left_out = largest_group(records)
    table = build_table(runs, reference, left_out, margin, ladder)
    return Comparison(table, tuple(runs), tuple(left_out), tuple(records), ladder)


def compare(
    entries: Sequence[str] = (),
    *,
    seeds: int = 3,
    reference: str | None = None,
    margin: float = MARGIN,
    budget: Budget = "tokens",
    seconds: float | None = None,
    tuned: bool = True,
    data: DataConfig | None = None,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    start: StartConfig | None = None,
    how: Launch | None = None,
    said: Collection[str] = (),
    command: str | None = None,
) -> Comparison:
    """Train entries on the same seeds and compare them; runs that are in the store are used as they are.

    Args:
        entries: routers, `router:field=value,...`, `router+router@SITES`, or `dense`; those of the default comparison
            if there are none, and all that take the model's shape if there is but `all`.
        seeds: each entry is trained with seeds 0 to seeds - 1.
        reference: the label of the entry that differences are taken to.
        margin: bits per byte below which a difference does not matter.
        budget: what is equal: tokens, the reference's training FLOPs, or seconds.
        seconds: training time of each run under budget time.
        tuned: use each entry's tuned settings.
        data, model, train: what all entries share; the defaults of the command where nothing is said.
        start: the weights from which all start, if they are another run's.
        how: where the runs are stored and how they are launched.
        said: fields of ``train`` that were set on purpose, beyond those that differ from their defaults.
        command: the command line behind it, for the records.

    Raises:
        ConfigError, DataError, StoreError: bad input, before any work.
        ComparisonError: a run failed; the finished ones stay in the store.
    """
    seeds, margin = checked(seeds, Seeds, "--seeds"), checked(margin, Positive, "--margin")
    data, model, train = data or DataConfig(), model or ModelConfig(), train or TrainConfig()
    refuse_two(budget, train)
    how, entries = how or Launch(), (entries,) if isinstance(entries, str) else tuple(entries)
    if not entries or entries == (ALL,):
        entries = fitting_entries(all_entries() if entries else DEFAULT, data, model)
    configs = build_comparison(entries, data, model, train, tuned=tuned, said=said)
    configs = with_budget(configs, budget, find_reference(configs, reference), seconds)
    configs = [replace(config, start=start) for config in configs]
    named = list(zip(entries, configs, strict=True))
    jobs = [Job(config, seed, command, label=entry) for seed in range(seeds) for entry, config in named]
    ladder = read_ladder(how.store)  # one that is broken is refused before any work
    return tabulate(run_all(together(jobs), how), reference, margin, ladder)
