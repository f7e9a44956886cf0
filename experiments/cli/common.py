"""What several commands share: options, the choice of stored runs, and how results are published."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ComparisonError, ConfigError, MissingDependencyError, StoreError
from rlroute.experiments.launch.jobs import Launch
from rlroute.extras import missing
from rlroute.limits import checked, option

if TYPE_CHECKING:
    from rlroute.records import RunRecord


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all runs of a command have in common."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


LAUNCH, SHARED = Launch(), Shared()
"""The defaults of commands that train."""


def with_checked_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that refuses an option which its annotation does not allow, before any work.

    Its dataclasses say themselves what they hold.
    """
    hints, signature = get_type_hints(command, include_extras=True), inspect.signature(command)

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        for name, value in signature.bind(*arguments, **options).arguments.items():
            if isinstance(value, Launch):
                value.check()
            elif not is_dataclass(value):
                checked(value, hints[name], option(name))
        command(*arguments, **options)

    return run


def select(path: Path, only: tuple[str, ...]) -> list[RunRecord]:
    """Return the ended runs of a store whose ids start as ``only`` says.

    Raises:
        StoreError: there are none, or they are trials of a search.
    """
    from rlroute.experiments.launch.spec import SEARCH
    from rlroute.records import read_runs

    if os.path.exists(path / SEARCH):
        raise StoreError(f"{path} holds trials of a search, which stopped some of them early: they make no comparison")
    records = [r for r in read_runs(path) if not only or r.id.startswith(only)]
    if not records:
        wanted = f" whose id starts with {' or '.join(map(repr, only))}" if only else ""
        raise StoreError(f"{path} holds no ended run{wanted}")
    return records


def publish(records: list[RunRecord], out: Path, reference: str | None) -> tuple[str, str]:
    """Write table and report; return the table's text, and what is where. The table does not wait for what the report
    needs.
    """
    from rlroute.experiments.comparison.table import build_table
    from rlroute.experiments.comparison.text import to_csv, to_markdown
    from rlroute.experiments.report.page import write_report
    from rlroute.records import write_atomically

    built = build_table(records, reference)
    for row in built.rows:
        if row.marks:
            print(f"rlroute: {row.label} is marked: {row.marks}", file=sys.stderr)
    text = to_markdown(built)
    write_atomically(out / "table.md", text)
    write_atomically(out / "table.csv", to_csv(built))
    where = f"table in {out}/table.md and table.csv"
    try:
        write_report(records, out / "report.html", reference=reference)
    except ImportError as error:
        (out / "report.html").unlink(missing_ok=True)  # that of another table
        known = isinstance(error, MissingDependencyError)
        return text, f"{where}, no report: {error if known else missing('the report', error.name or 'it')}"
    return text, f"{where}, report in {out}/report.html"


def publish_if_comparable(records: list[RunRecord], out: Path, reference: str | None) -> None:
    """Print and write the table; of runs that differ in more than their router say so, and list them."""
    from rlroute.experiments.report.listing import records_text

    try:
        print("\n".join(publish(records, out, reference)))
    except ComparisonError as error:
        print(f"{records_text(records)}\nno table: {error}")


def make_folder(path: Path) -> None:
    """Make the folder that a command will write into, before its work."""
    from rlroute.records import storing

    with storing(path):
        path.mkdir(parents=True, exist_ok=True)


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


def fitting_entries(entries: Sequence[str], data: DataConfig, model: ModelConfig) -> tuple[str, ...]:
    """Return those of the entries, which nobody named, whose routers take the model's shapes; say who is left out."""
    from rlroute.experiments.recipes.presets import fitting
    from rlroute.training.data import load_corpus
    from rlroute.training.prepare import shapes

    config = RunConfig(data=data, model=model)
    wanted = shapes(config, load_corpus(config.data.spec, config.data.tokenizer))
    return tuple(fitting(entries, wanted, partial(print, file=sys.stderr)))


def command_line() -> str:
    return shlex.join(["rlroute", *sys.argv[1:]])
