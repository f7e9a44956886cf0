"""What several commands share: options, the choice of stored runs, and how results are published."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

import tyro

from rlroute.config import DataConfig, ModelConfig, StartConfig, TrainConfig
from rlroute.errors import ConfigError, MissingDependencyError, StoreError
from rlroute.experiments.cli.folders import make_folder
from rlroute.experiments.cli.output import show_grid, show_table
from rlroute.experiments.launch.jobs import Launch
from rlroute.extras import missing
from rlroute.foreign import printable
from rlroute.limits import NonNegative, Share, Whole, check_fields, checked, option

if TYPE_CHECKING:
    from rlroute.experiments.comparison.compare import Comparison
    from rlroute.experiments.recipes.sizes import Preset
    from rlroute.schema import RunRecord, Summary


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all runs of a command have in common."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class Recipe(TypedDict):
    """What all entries of a comparison share, by the names under which ``build_comparison`` and what stands on it take
    it.
    """

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    tuned: bool
    said: set[str]


@dataclass(frozen=True, kw_only=True)
class From:
    """From which weights runs start."""

    origin: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN")] = None
    """Start from the weights of another run, in place of those of the seed: its folder, or its id in the store."""
    from_step: Whole | None = None
    """Of its checkpoint; none: the last. A run keeps the others with --keep all."""
    from_optimizer: Literal["fresh", "carried"] = "fresh"
    """carried: the optimizer's moments go on too; a run keeps them with --keep state."""
    upcycle: bool = False
    """That run is a dense model: its MLPs, or pieces of --model.d-expert where that is narrower, become the experts."""
    upcycle_noise: NonNegative = 0.0
    """Noise added to each such expert's weights, over their spread."""
    upcycle_drop: Share = 0.0
    """Share of each such expert's hidden units that is drawn anew."""
    from_router: Literal["kept", "fresh"] = "kept"
    """kept: what that checkpoint holds of the routers is taken where it has a place; fresh: they start anew."""

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal, or there is nothing that it could say something about.
        """
        check_fields(self, None)
        if self.origin is None:
            refuse_others("runs that start from no other", "none: say --from RUN", self, From())

    def find(self, store: Path) -> StartConfig | None:
        """Return the start that is meant, None where none is; its run is then in the store.

        Raises:
            ConfigError, StoreError, CheckpointError: there is none like that.
        """
        from rlroute.experiments.launch.origin import find_start

        if self.origin is None:
            return None
        choices = {n.removeprefix("from_"): v for n, v in vars(self).items() if n not in ("origin", "from_step")}
        return find_start(run_folder(self.origin, store), store, self.from_step, **choices)


def run_folder(run: str, store: Path) -> Path:
    """Return the folder of a run that is named by it, or by its id in the store as ``rlroute runs`` takes it.

    Raises:
        ConfigError: there is none, or several are called so.
    """
    from rlroute.experiments.report.runs import find

    if (Path(run) / "config.json").is_file():
        return Path(run)
    ids = find(sorted(path.parent.name for path in store.glob("*/config.json")), run)
    if len(ids) != 1:
        several = f"{len(ids)} runs are called so in {store}, the first {ids[0]}" if ids else f"not a run of {store}"
        raise ConfigError(f"run {run!r}: {several}; legal are a run's folder, and an id or the start of one")
    return store / ids[0]


Store = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
"""The run store (or compact file) of a command that reads nothing else; of the others it is ``--store``."""
RUNS = Path("runs")
LAUNCH, SHARED, FROM = Launch(), Shared(), From()
"""The defaults of commands that train."""


def with_checked_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that refuses an option which its annotation does not allow, before any work.

    Its dataclasses say themselves what they hold.
    """
    hints, signature = get_type_hints(command, include_extras=True), inspect.signature(command)

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        for name, value in signature.bind(*arguments, **options).arguments.items():
            if isinstance(value, Launch | From):
                value.check()
            elif not is_dataclass(value):
                checked(value, hints[name], option(name))
        command(*arguments, **options)

    return run


def select(store: Path, only: tuple[str, ...]) -> tuple[list[RunRecord], list[str]]:
    """Return the ended runs of a store that ``only`` names, whatever they are; or, where it names none, the largest
    group of comparable ones, and a line for each lot of others.

    Raises:
        StoreError: there are none, or none of a name, or they are trials of a search.
    """
    from rlroute.experiments.comparison.groups import largest_group
    from rlroute.experiments.launch.spec import SEARCH
    from rlroute.experiments.report.runs import find
    from rlroute.reading import read_runs

    if os.path.exists(store / SEARCH):
        raise StoreError(f"{store} holds trials of a search, which stopped some of them early: they make no comparison")
    records = read_runs(store)
    named = {word: find((record.id for record in records), word) for word in only}
    lacking = [word for word, found in named.items() if not found]
    if lacking or not records:
        wanted = f" whose id starts with {' or '.join(map(repr, lacking))}" if lacking else ""
        raise StoreError(f"{store} holds no ended run{wanted}")
    chosen = set(chain.from_iterable(named.values()))
    return ([record for record in records if record.id in chosen], []) if only else largest_group(records)


def say_edited(records: Sequence[RunRecord]) -> None:
    """Say on stderr, a line for each run, of which records something was edited after their runs had ended: whoever
    reads a table of them has to know.
    """
    from rlroute.experiments.comparison.entries import grouped
    from rlroute.experiments.verify.store import edited

    for first, *others in grouped(edited(records), lambda finding: finding.run).values():
        more = f"; {len(others)} findings more" if others else ""
        print(printable(f"rlroute: {first}{more}: rlroute verify looks closer"), file=sys.stderr)


def one_run(store: Path, word: str) -> RunRecord:
    """Return the ended run of a store that a word names.

    Raises:
        StoreError: there is none.
        ConfigError: there are several.
    """
    records, _ = select(store, (word,))
    if len(records) > 1:
        raise ConfigError(f"run {word!r}: {len(records)} start so, the first {records[0].id}")
    return records[0]


def open_results(out: Path) -> dict[str, Mapping[str, Any]]:
    """Make a folder of results, and return what its report will show of other commands' results.

    Raises:
        StoreError: some of them cannot be read.
    """
    from rlroute.experiments.dashboard.published import read_results

    make_folder(out)
    return read_results(out)


def publish(found: Comparison, out: Path, results: Mapping[str, Mapping[str, Any]], store: Path) -> None:
    """Print the table of a comparison, after a list of all runs where others are left out; write it and the report, for
    which the table does not wait. Runs of the store that did not end are in the report.
    """
    from rlroute.experiments.comparison.text import pairs_to_csv, to_csv, to_markdown
    from rlroute.experiments.dashboard.follow import unended
    from rlroute.experiments.report.page import write_report
    from rlroute.experiments.report.runs import list_records, to_grid
    from rlroute.records import write_atomically

    built = found.table
    say_edited(found.runs)
    for row in built.rows:
        if row.marks:
            print(f"rlroute: {row.label} is marked: {row.marks}", file=sys.stderr)
    write_atomically(out / "table.md", to_markdown(built))
    write_atomically(out / "table.csv", to_csv(built))
    write_atomically(out / "verdicts.csv", pairs_to_csv(found.pairs))
    if found.left_out:
        show_grid(to_grid(list_records(found.records)))
    show_table(built)
    where = f"table in {out}/table.md and table.csv, verdicts of all pairs in verdicts.csv"
    try:
        write_report(
            found.runs,
            out / "report.html",
            reference=built.reference,
            left_out=found.left_out,
            margin=built.margin,
            results=results,
            ladder=found.ladder,
            unended=unended(store),
        )
        print(f"{where}, report in {out}/report.html")
    except ImportError as error:
        (out / "report.html").unlink(missing_ok=True)  # that of another table
        known = isinstance(error, MissingDependencyError)
        print(f"{where}, no report: {error if known else missing('the report', error.name or 'it')}")


def refuse_others(what: str, takes: str, given: object, default: object) -> None:
    """Refuse options that do not apply, which are those that differ from their defaults.

    Args:
        what: what they do not apply to.
        takes: the options that it takes.
        given, default: values by option, or dataclasses of them.

    Raises:
        ConfigError: naming the first.
    """
    mine, plain = (vars(values) if is_dataclass(values) else values for values in (given, default))
    assert isinstance(mine, dict) and isinstance(plain, dict)
    for name, value in mine.items():
        if value != plain[name]:
            said = f" {value}" if isinstance(value, str | int | float | Path) else ""
            raise ConfigError(f"{option(name)}{said} does not apply to {what}, which takes {takes}")


def refuse_several(command: str, launch: Launch) -> None:
    """Refuse, of a command that trains one run, what says how several are, or what a process of its own would take.

    Raises:
        ConfigError: naming the first.
    """
    if launch.concurrency is not None:
        raise ConfigError(f"--concurrency {launch.concurrency}: {command} trains one run")
    if not launch.uses_ray(1):
        replace(launch, launcher="local").check()


def command_line() -> str:
    return shlex.join(["rlroute", *sys.argv[1:]])


def with_preset(preset: str | None, shared: Shared) -> Preset:
    """Return a preset with what the command line says in place of its own, or what is given where none is named.

    Raises:
        ConfigError: no preset is called that.
    """
    from rlroute.experiments.recipes import sizes

    return sizes.with_preset(preset, shared.data, shared.model, shared.train, said_of_parts())


def recipe(preset: str | None, shared: Shared, tuned: bool) -> tuple[Recipe, str]:
    """Return what a command trains everyone with, and the entry that its preset has ("": none); nothing is tuned for a
    preset.

    Raises:
        ConfigError: no preset is called that, or tuned settings are asked for beside it.
    """
    size = with_preset(preset, shared)
    if preset is not None and tuned and "tuned" in said():
        raise ConfigError("--tuned does not apply to a preset, for which nothing is tuned")
    parts: Recipe = {
        "data": size.data,
        "model": size.model,
        "train": size.train,
        "tuned": tuned and preset is None,
        "said": said("train"),
    }
    return parts, size.entry


def said(part: str = "") -> set[str]:
    """Return the options on the command line by their fields' names; of a part, as ``train``, those of its fields."""
    words = (word.partition("=")[0].removeprefix("--") for word in sys.argv[1:] if word.startswith("--"))
    prefix = f"{part}." if part else ""
    return {word.removeprefix(prefix).replace("-", "_") for word in words if word.startswith(prefix)}


def said_of_parts() -> dict[str, set[str]]:
    """Return the options of :class:`Shared` on the command line, by part."""
    return {part: said(part) for part in vars(SHARED)}


def score(summary: Summary) -> str:
    """Say what a run came to."""
    final = summary["final"]
    return f"{final['bits_per_byte']:.4f} bits per byte" if final else str(summary["diverged"])
