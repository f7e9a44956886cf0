"""Our routers equal the published classes of transformers: the same weights, inputs and biases give the same experts
and gates.
"""

import re
from importlib.util import find_spec

import pytest

from tests import ROOT
from tests.parity import HEAD, SHIFTS, T, measure
from tests.published import AWAITED, NO_ROUTERS, ROWS, Row, found

pytestmark = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.published)
def test_experts_and_gates_are_those_of_the_published_class(row: Row) -> None:
    for shift in SHIFTS:
        apart = measure(row, shift)
        assert apart.sets == 0 and apart.gates <= 1e-6
        all_tied = shift < 0 and "outside=zero" in row.entry and "bias_rate" in row.entry  # forbidden experts score 0
        assert apart.tied == T if all_tied else apart.tied <= 2


@pytest.mark.parametrize(
    ("published", "wrong"),
    [
        ("mixtral.MixtralTopKRouter", "topk:normalize=false"),
        ("minimax_m2.MiniMaxM2TopKRouter", "topk:score=sigmoid,bias_rate=0.001,order=choose_first"),
        ("deepseek_v3.DeepseekV3TopkRouter", "topk:score=sigmoid,bias_rate=0.001,route_scale=2.5"),
        ("laguna.LagunaTopKRouter", "topk:score=sigmoid,bias_rate=0.001"),
    ],
)
def test_an_entry_that_is_not_the_same_is_far_away(published: str, wrong: str) -> None:
    row = next(row for row in ROWS if row.published == published)
    apart = measure(row._replace(entry=wrong), 0.0)
    assert apart.gates > 1e-3


def test_every_class_that_looks_like_a_router_is_accounted_for() -> None:
    known = [*dict.fromkeys(row.published for row in ROWS), *AWAITED, *NO_ROUTERS]
    assert len(known) == len(set(known))
    looks, listed = set(found()), set(known)
    assert not looks - listed, "these are in no list of tests/published.py"
    assert not listed - looks, "transformers has these no longer"
    assert len({row.published for row in ROWS}) >= 69


def test_the_page_has_every_row() -> None:
    """Not its figures, which are the machine's."""
    page = (ROOT / "docs" / "parity.md").read_text()
    for row in ROWS:
        assert re.search(re.escape(f"| {row.published} | {row.said} | `{row.entry}` |") + r" [0-9.e+-]+ \|\n", page)
    for name, what in (AWAITED | NO_ROUTERS).items():
        assert f"| {name} | {what} |" in page
    assert page.count("\n| ") == len(ROWS) + len(AWAITED) + len(NO_ROUTERS) + 1 + bool(AWAITED) + bool(NO_ROUTERS)
    assert HEAD.partition("\n\n")[2].partition("{")[0] in page
