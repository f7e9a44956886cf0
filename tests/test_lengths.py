"""The comparison at several lengths: docs/lengths.md shows what its runs give, and these are what it says they are."""

import pytest

from rlroute.experiments.comparison.entries import check_comparable
from rlroute.experiments.recipes.tuned import TUNING_SEEDS, settings_of
from tests import ROOT, lengths_figure

LENGTHS = lengths_figure.lengths()


def test_the_page_shows_what_is_published():
    assert lengths_figure.table(LENGTHS) in (ROOT / "docs" / "lengths.md").read_text()
    if len(LENGTHS) > 1:
        assert lengths_figure.FIGURE.read_text() == lengths_figure.figure(LENGTHS)


def test_the_figure_has_every_entry_at_every_length():
    drawn = lengths_figure.figure({1200: LENGTHS[1200], 4800: LENGTHS[1200]})
    names = (*lengths_figure.FIXED, *lengths_figure.LEARNED)
    assert all(f">{name}</text>" in drawn for name in names)
    assert drawn.count("<circle") == 2 * len(names) and drawn.count("<polyline") == len(names)


@pytest.mark.parametrize("steps", LENGTHS)
def test_every_entry_is_tuned_for_its_length_and_no_token_is_seen_twice(steps):
    entries = LENGTHS[steps]
    assert entries.keys() == {lengths_figure.REFERENCE, *lengths_figure.FIXED, *lengths_figure.LEARNED}
    check_comparable(list(entries.values()))
    seeds = {tuple(run.config["seed"] for run in entry.runs) for entry in entries.values()}
    (common,) = seeds
    assert len(common) >= 3 and not {*common} & {*TUNING_SEEDS}
    for run in (run for entry in entries.values() for run in entry.runs):
        config = run.config["config"]
        assert settings_of(config) == "tuned" and run.environment["dirty"] is False
        assert (config["train"]["steps"], config["train"]["batch_size"] * config["data"]["seq_len"]) == (steps, 2048)
        assert config["data"]["order"] == "epochs" and run.summary["tokens"] <= run.summary["data"]["train_tokens"]
