"""docs/records.md follows from the types to which files are held, and names every field that is stored."""

import dataclasses
import json

import pytest

from rlroute import schema
from rlroute.experiments.claims.ledger import CLAIMS
from rlroute.experiments.comparison import registration as of_judgements
from rlroute.experiments.comparison.judge import judge
from rlroute.experiments.comparison.judgement import Judged, Seen, Spent
from rlroute.experiments.comparison.ladder import reduce
from rlroute.experiments.comparison.ladder_file import LadderOf
from rlroute.experiments.launch.jobs import Launch
from rlroute.foreign import hold
from tests import record_page
from tests.test_ladder import rungs
from tests.tiny import DATA, MODEL, TRAIN


def test_the_page_of_records_follows_from_the_schema():
    assert record_page.PAGE.read_text() == record_page.page(), "run python -m tests.record_page"


def test_every_field_of_the_schema_stands_on_the_page_with_its_meaning():
    described = {cls.__name__ for _, types in record_page.IN_STORE for cls in types} - {
        cls.__name__ for cls in record_page.CONFIGURATIONS
    }
    typed = {name for name, value in vars(schema).items() if isinstance(value, type) and hasattr(value, "__total__")}
    assert typed == described
    types = [cls for _, types in record_page.FILES for cls in types]
    assert not [(cls, field) for cls in types for field, _, text in record_page.fields(cls) if not text]


@pytest.mark.parametrize("cls", [cls for _, types in record_page.FILES for cls in types], ids=lambda cls: cls.__name__)
def test_what_is_described_are_all_fields_that_are_stored(cls):
    """Of configurations, those of their dictionaries."""
    named = {name for name, _, _ in record_page.fields(cls)}
    if dataclasses.is_dataclass(cls):
        assert named == {field.name for field in dataclasses.fields(cls)}
    else:
        bases = [base for base in cls.__orig_bases__ if hasattr(base, "__total__")]
        assert all(any(base in types for _, types in record_page.FILES) for base in bases)
        assert named == {*cls.__annotations__}.difference(*(base.__annotations__ for base in bases))


def test_what_commands_store_beside_runs_has_the_fields_that_are_described(tmp_path):
    """A judgement, its registration, a ladder; what claims store is written by types that mypy holds."""
    how = Launch(store=tmp_path, launcher="local")
    shared = {"data": DATA, "model": MODEL, "train": TRAIN}
    found = judge("hash", how=how, max_seeds=3, say=lambda line: None, **shared)
    made = found.to_dict()
    hold(json.loads(json.dumps(made)), Judged)
    assert made.keys() == {*Judged.__annotations__} and made["cost"].keys() == {*Spent.__annotations__}
    assert made["looks"][0].keys() == {*Seen.__annotations__}
    assert made["registration"].keys() == {*of_judgements.Registration.__annotations__}
    assert made["registration"]["plan"].keys() == {*of_judgements.Plan.__annotations__}
    ladder = reduce(rungs(1.0, 1.3), ["a", "b"], ["run"], None).to_dict()
    assert ladder.keys() == {*LadderOf.__annotations__}
    claim = next(iter(CLAIMS.values()))
    assert claim.to_dict().keys() - {"base", "rule"} == {field.name for field in dataclasses.fields(claim)}
    page = record_page.PAGE.read_text()
    assert all(f"## {name}\n" in page for name, _ in record_page.FILES) and "`base`" in page and "`rule`" in page
