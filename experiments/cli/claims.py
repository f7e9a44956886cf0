"""The command ``claims``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rlroute.errors import StoreError
from rlroute.experiments.cli.common import LAUNCH, command_line, refuse_others
from rlroute.experiments.cli.folders import make_folder
from rlroute.experiments.cli.output import show_grid
from rlroute.experiments.launch.jobs import Launch
from rlroute.foreign import printable
from rlroute.limits import option

if TYPE_CHECKING:
    from rlroute.experiments.claims.outcomes import Outcome

OUT = Path("results")
UNSAID = {"ids": (), "tier": None, "results": None, "page": None, "check": False, "out": OUT}
TAKES = {
    "list": ("tier", "results"),
    "run": ("ids", "tier", "check", "out", "store", "launching"),
    "table": ("results", "page", "check"),
}


def claims(
    what: tyro.conf.Positional[Literal["list", "run", "table"]],
    ids: tyro.conf.Positional[tuple[str, ...]] = (),
    tier: Literal["quick", "long", "gpu"] | None = None,
    results: Path | None = None,
    page: Path | None = None,
    check: bool = False,
    out: Path = OUT,
    launch: Annotated[Launch, tyro.conf.arg(name="")] = LAUNCH,
) -> None:
    """The ledger of published claims: list them, run what decides them, or print their page (docs/claims.md).

    run: registers the claims that are named, or those of a tier; trains what they need, each run once; says holds,
    refuted or inconclusive. Stopped, it says what it can, and the same command goes on. Exit code 1 where a claim has
    no verdict because a run failed or is not sound, or, with --check, where it is not what is published.

    Args:
        what: list, run or table.
        ids: of claims, of run.
        tier: of run: quick (minutes on two cores), long (hours), gpu. Of list: show these alone.
        results: of list and table: outcomes; the published ones by default.
        page: of table: the file that --check holds against them, or that is written; printed by default.
        check: of run: hold verdicts and figures against the published ones, but for those of a clock: bit for bit with
            the same core, processor, threads, PyTorch and NumPy, else effects by the published intervals. Of table:
            exit code 1 where the page, or an outcome, is not what the claims and their values give; of other outcomes
            than the published ones, clock and commit aside.
        out: of run: folder for claims.jsonl.
        launch: of run.
    """
    said = {"ids": ids, "tier": tier, "results": results, "page": page, "check": check, "out": out}
    takes = ", ".join(name if name in ("ids", "launching") else option(name) for name in TAKES[what])
    refuse_others(f"claims {what}", takes, {name: said[name] for name in said if name not in TAKES[what]}, UNSAID)
    if what == "run":
        _run(ids, tier, check, out, launch)
        return
    refuse_others(f"claims {what}", takes, launch, LAUNCH)
    if what == "list":
        _list(tier, results)
    else:
        _table(results, page, check)


def _read(results: Path | None) -> dict[str, Outcome]:
    from rlroute.experiments.claims.outcomes import PUBLISHED, read_outcomes

    return read_outcomes(results or PUBLISHED)


def _list(tier: str | None, results: Path | None) -> None:
    from rlroute.experiments.claims.page import claims_grid

    show_grid(claims_grid(_read(results), tier))


def _table(results: Path | None, page: Path | None, check: bool) -> None:
    from rlroute.experiments.claims import page as pages
    from rlroute.experiments.claims.ledger import CLAIMS
    from rlroute.experiments.claims.outcomes import faults
    from rlroute.experiments.claims.published import all_like_published
    from rlroute.records import write_atomically

    outcomes = _read(results)
    wrong = list(faults(outcomes, CLAIMS))
    if check:
        shown = [outcomes] if results is None else [outcomes, all_like_published(outcomes, _read(None))]
        held = [pages.differences(pages.page(each), page or pages.PAGE) for each in shown]
        wrong = wrong or ([] if [] in held else held[-1])
        for line in wrong:
            print(printable(line))
        sys.exit(1 if wrong else 0)
    if wrong:
        raise StoreError(wrong[0])
    text = pages.page(outcomes)
    if page is None:
        print(text, end="")
    else:
        write_atomically(page, text)
        print(f"page in {page}")


def _run(
    ids: tuple[str, ...], tier: Literal["quick", "long", "gpu"] | None, check: bool, out: Path, launch: Launch
) -> None:
    from rlroute.experiments.claims.ledger import CLAIMS, choose
    from rlroute.experiments.claims.outcomes import FILE, merge_outcomes
    from rlroute.experiments.claims.page import line
    from rlroute.experiments.claims.published import differences, held
    from rlroute.experiments.claims.run import run_claims

    chosen = choose(ids, tier)
    make_folder(out)
    published, wrong = _read(None), list[str]()

    def found(outcome: Outcome) -> None:
        known = published.get(outcome["claim"])
        merge_outcomes(out / FILE, [outcome], CLAIMS)
        print(line(outcome, known), flush=True)
        if check:
            print(printable(held(outcome, known)), flush=True)
            wrong.extend(differences(outcome, known))

    lacking = run_claims(chosen, launch, command=command_line(), found=found)
    print(f"outcomes in {out / FILE}, runs in {launch.store}/")
    for difference in wrong:
        print(printable(difference))
    for reason in lacking.values():
        print(printable(f"no verdict: {reason}"), file=sys.stderr)
    if lacking or wrong:
        sys.exit(1)
