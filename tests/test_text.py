"""How figures become text."""

import math

import pytest

from rlroute.experiments.statistics import Interval
from rlroute.experiments.text import (
    NOTHING,
    escape,
    listed,
    markdown,
    of_interval,
    plus_minus,
    short,
    si,
    three_digits,
    two_digits,
    with_ends,
)


@pytest.mark.parametrize("tight", [False, True])
def test_a_table_keeps_its_shape_whatever_its_cells_hold(tight):
    lines = markdown(["", "a|b"], [["x\ny", 1], ["\\", ""]], tight=tight).split("\n")
    assert len(lines) == 4
    assert {line.replace("\\|", "").count("|") for line in lines} == {3}


def test_columns_stand_where_they_are_told():
    assert markdown("abc", []).split("\n")[1] == "| --- | ---: | ---: |"
    assert markdown("abc", [], "><>", tight=True).split("\n")[1] == "|---:|---|---:|"


def test_what_is_not_known_is_not_made_up():
    assert of_interval(None) == NOTHING and listed([]) == "none"
    assert of_interval(Interval(1.0, None, None, 1)) == "1.0000" and with_ends(1.0, None, None) == "1.00"
    assert two_digits(math.inf) == two_digits(math.nan) == "∞"


def test_digits():
    assert plus_minus(0.5, 0.25, 2, "+") == "+0.50 ± 0.25" and with_ends(1, 0.5, 2) == "1.00 (0.50 to 2.00)"
    assert [si(value) for value in (0, 12, 1234, 2.5e6, 3e15)] == ["0", "12", "1.23 k", "2.5 M", "3 P"]
    assert [si(value) for value in (-114, -2500, 0.4)] == ["-114", "-2.5 k", "0.4"]
    assert [si(value) for value in (999.4, 999.9, 999_900, 23_211.4)] == ["999", "1 k", "1 M", "23.2 k"]
    assert [short(value) for value in (2.0, 0.5, 0.333)] == ["2", "0.5", "0.33"]
    assert [three_digits(value) for value in (0.01234, 99.96, 12345.6)] == ["0.0123", "100", "12,346"]
    assert [two_digits(value) for value in (0.0123, 12345.6, 1.26e-5)] == ["0.012", "12,346", "1e-05"]
    assert escape("a | b \\ c\nd") == "a \\| b \\\\ c d"
