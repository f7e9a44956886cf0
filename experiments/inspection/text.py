"""What was seen inside a run, as tables and as JSON.

Shape suffixes: E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rlroute.experiments.inspection.drops import SAME, Drops
from rlroute.experiments.inspection.inspection import PAIRS, Inspection, SiteView, as_one
from rlroute.experiments.terminal import Grid
from rlroute.experiments.text import NOTHING, decimals, of_interval, rounded

LEGEND = (
    "Loads are the chosen pairs of each expert before any drop: MaxVio is the highest over the fair share, minus 1;"
    " load entropy is over log E, 1 is even; dead experts have less than 0.05 of the fair share. Routing entropy: "
    "of the router's distributions, over log E. NMI: mutual information between the expert of a pair and its "
    "token's domain (or id), over the mean of both entropies; in brackets that of shuffled labels, which is what "
    "chance shows. Explained: the same information over the entropy of the domains, 1 where an expert says which "
    "domain its token is of. Where every head is routed: the experts of all, the highest MaxVio, all dead ones, means."
)
EXPERTS_LEGEND = (
    "Main domain: the one of whose pairs the expert has the largest share, and that share. Favourite tokens: those "
    "of whose occurrences the largest share chose the expert."
)
PAIRS_LEGEND = (
    "Tokens that chose both experts; their share of the tokens of the less loaded one; and lift: how many they are "
    "over how many there would be if as many pairs were spread as loads are."
)
HISTORY_LEGEND = (
    "Saturation: the share of the final choices that a checkpoint makes already, on the same tokens (OLMoE, arXiv "
    "2409.02060). Changed: tokens whose set of experts is another than at the checkpoint before. Unsettled: tokens "
    "whose set is not yet that of the end, or will leave it again. Means over sites. Step 0 has the initial "
    "weights."
)
RECORDED_LEGEND = (
    "Recorded: the share of what was chosen in a training step, on its own tokens, that the final model chooses "
    "there too; explored choices included."
)
KEEP = (
    "The run kept the weights of its end alone: --keep all keeps those of every checkpoint "
    "(--train.checkpoint-every), which shows how routes settle in between."
)
WORTH_LEGEND = (
    "How much loss (nats a token, 95 % intervals over sequences) is added where an expert is masked: its logit is "
    "minus infinity, and tokens choose among the others, as if it had never been built. Best: each token's so many "
    "best experts at once, at all sites (DeepSeekMoE, arXiv 2401.06066): the more that costs, the less redundant "
    "they are."
)
REGRET_LEGEND = (
    "Regret: the loss of the route taken through the last MoE layer minus that of the best of all sets of as many "
    "experts, with the gates that the router gives them, as the run's record has it; by tenths of the tokens, from the "
    "least confident prediction on (the highest probability of a next token, mean). Better: the share of other sets "
    "with a lower loss, 0.5 where the choice is as good as any."
)
DROPS_LEGEND = (
    "The same validation windows in batches of other windows, drawn anew for each order; capacities in shares of an"
    f" expert's fair load. Changed: tokens of which a logit moves by more than {SAME:g} of the largest against the "
    "first order. Rerouted: another set of experts is chosen at some site. Flipped: the likeliest next token is "
    "another. KL: of the first order's next-token distribution from another's. Spread: the standard deviation of a "
    "window's loss over orders."
)
ENDS = ("lowest site", "highest site")
MOST_SITES = 4
"""Whose experts are listed one by one on a terminal, those that are shown as one together; a page has all."""

PLACES = {
    "by_position": "Pairs dropped by equal parts of the sequence, over all sites.",
    "by_row": "Pairs dropped by the sequence's place in its batch.",
}

SITES: dict[str, Callable[[SiteView], str]] = {
    "site": lambda of: str(of.site),
    "E": lambda of: str(len(of.load_E)),
    "MaxVio": lambda of: decimals(of.max_vio),
    "load entropy": lambda of: decimals(of.load_entropy),
    "dead": lambda of: str(of.dead),
    "routing entropy": lambda of: decimals(of.router_entropy),
    "dropped": lambda of: percent(of.dropped),
    "domain NMI": lambda of: NOTHING if of.domains is None else over_chance(of.domains.nmi, of.domains.chance),
    "explained": lambda of: NOTHING if of.domains is None else decimals(of.domains.explained),
    "token NMI": lambda of: over_chance(of.tokens.nmi, of.tokens.chance),
}
DROPS: dict[str, Callable[[Drops], str]] = {
    "capacity": lambda of: factor_text(of.factor),
    "dropped": lambda of: percent(of.dropped),
    "changed": lambda of: percent(of.changed),
    "rerouted": lambda of: percent(of.rerouted),
    "flipped": lambda of: percent(of.flipped),
    "largest move": lambda of: f"{of.moved:.1e}" if of.moved else "0",
    "KL": lambda of: decimals(of.divergence, 5),
    "loss": lambda of: decimals(of.loss, 4),
    "spread": lambda of: decimals(of.spread, 5),
}


def percent(share: float | None) -> str:
    """Return a share in percent, or a dash where there is none."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def over_chance(nmi: float | None, chance: float | None) -> str:
    """Return a mutual information and what chance shows."""
    return f"{decimals(nmi)} ({decimals(chance)})"


def factor_text(factor: float | None) -> str:
    """Return a capacity factor in words."""
    return "dropless" if factor is None else f"{factor:g}"


def headline(found: Inspection) -> str:
    """Return what was inspected, in a line."""
    domains = f"; {len(found.domains)} {found.meaning}" if found.domains else "; the corpus says no domains"
    return (
        f"{found.run}: {found.router} after {found.step:,} steps, on {found.tokens:,} validation tokens, loss "
        f"{found.loss:.4f} nats{domains}"
    )


def sites_grid(found: Inspection) -> Grid:
    """Return a line for each site, or for those that are shown as one."""
    shown = [as_one(name, sites) for name, sites in found.families.items()]
    lines = [[cell(of) for cell in SITES.values()] for of in shown]
    return Grid(list(SITES), lines, spare=("load entropy", "explained", "dead"))


def experts_grid(found: Inspection, sites: Sequence[SiteView]) -> Grid:
    """Return a line for each expert of sites that are shown as one: load, main domain, favourite tokens, and what it is
    worth.
    """
    worth = found.worth is not None and sites[0].site in found.worth.experts
    lines = [
        _expert(found, site, expert, expert_name(head, expert, len(sites)))
        for head, site in enumerate(sites)
        for expert in range(len(site.load_E))
    ]
    head = ["expert", "load / fair", *(["main domain"] if found.domains else []), "favourite tokens"]
    left = ("main domain", "favourite tokens")
    return Grid(head + (["loss without it"] if worth else []), lines, left=left, spare=("favourite tokens",))


def expert_name(head: int, expert: int, heads: int) -> str:
    """Return what an expert is called among those of so many heads that are shown as one."""
    return str(expert) if heads == 1 else f"{head}.{expert}"


def _expert(found: Inspection, site: SiteView, expert: int, name: str) -> list[str]:
    fair = sum(site.load_E) / len(site.load_E)
    worth = [] if found.worth is None else found.worth.experts.get(site.site, [])
    line = [name, decimals(site.load_E[expert] / fair if fair else None, 2)]
    if found.domains:
        line.append(main_domain(found.domains, [row[expert] for row in site.by_domain_LE]))
    line.append(" ".join(f"{token} {share:.0%}" for token, share in site.favourites[expert][:3]) or NOTHING)
    return line + ([of_interval(worth[expert], "+")] if worth else [])


def main_domain(names: Sequence[str], share_L: Sequence[float]) -> str:
    """Return the domain of whose pairs an expert has the largest share, and that share."""
    best = max(range(len(names)), key=lambda label: share_L[label])
    return f"{names[best]} {share_L[best]:.0%}" if share_L[best] else NOTHING


def pairs_grid(found: Inspection) -> Grid | None:
    """Return the most connected pairs of experts of each site; None where no token has two."""
    shown = []
    for sites in found.families.values():
        pairs = [(site.site, pair) for site in sites for pair in site.pairs]
        shown += sorted(pairs, key=lambda of: -of[1].lift)[:PAIRS]
    lines = [
        [str(site), f"{pair.one} + {pair.other}", f"{pair.tokens:,}", percent(pair.share), decimals(pair.lift, 2)]
        for site, pair in shown
    ]
    return Grid(["site", "experts", "tokens", "share", "lift"], lines, left=("experts",)) if lines else None


def few(found: Inspection) -> bool:
    """Whether only the weights of the end are there."""
    return len(found.history.steps) < 3


def history_grid(found: Inspection) -> Grid:
    """Return how routes settled: a line for each checkpoint."""
    sites, lines = list(found.history.sites.values()), []
    for at, step in enumerate(found.history.steps):
        saturation = [of.saturation[at] for of in sites]
        changed = [share for of in sites if (share := of.changed[at]) is not None]
        ends = [min(saturation), max(saturation)] if len(sites) > 1 else []
        line = [_mean(saturation), *ends, _mean(changed), _mean([of.unsettled[at] for of in sites])]
        lines.append([f"{step:,}", *map(percent, line)])
    return Grid(["step", "saturation", *(ENDS if len(sites) > 1 else ()), "changed", "unsettled"], lines)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def recorded_grid(found: Inspection) -> Grid | None:
    """Return what recorded choices have in common with the final model's; None where nothing was recorded."""
    lines = []
    for at, step in enumerate(found.history.recorded):
        shares = [of_site[at] for of_site in found.history.agreed.values()]
        ends = [min(shares), max(shares)] if len(shares) > 1 else []
        lines.append([f"{step:,}", percent(_mean(shares)), *map(percent, ends)])
    head = ["step", "recorded", *(ENDS if len(found.history.agreed) > 1 else ())]
    return Grid(head, lines) if lines else None


def worth_grid(found: Inspection) -> Grid | None:
    """Return what is lost without the best and without the shared experts; None where it was not measured."""
    if found.worth is None:
        return None
    lines = [
        [f"the {best} best of each token" if best > 1 else "the best of each token", of_interval(lost, "+")]
        for best, lost in found.worth.best.items()
    ]
    if found.worth.shared is not None:
        lines.append(["the shared experts", of_interval(found.worth.shared, "+")])
    means = [one.mean for of_site in found.worth.experts.values() for one in of_site]
    if means:
        lines.append(["one expert, mean of all", f"{sum(means) / len(means):+.4f}"])
        lines.append(["one expert, the dearest", f"{max(means):+.4f}"])
    return Grid([f"without ({found.worth_tokens:,} tokens, loss {found.worth.loss:.4f})", "loss added"], lines)


def regret_grid(found: Inspection) -> Grid | None:
    """Return the regret of routes by the confidence of predictions; None where the record has none."""
    if not isinstance(regret := found.regret, dict):
        return None
    head = [f"tenth of {regret['tokens']} tokens", "confidence", "regret (nats)", "better"]
    parts = zip(regret["confidence_C"], regret["nats_C"], regret["better_C"], strict=True)
    lines = [[str(tenth), decimals(c), decimals(n, 4), decimals(b)] for tenth, (c, n, b) in enumerate(parts, 1)]
    return Grid(head, [*lines, ["all", "", decimals(regret["nats"], 4), decimals(regret["better"])]])


def without_regret(found: Inspection) -> str:
    """Return why there is no regret; nothing where there is."""
    if isinstance(found.regret, dict):
        return ""
    return f"No regret: {found.regret or 'the record does not say'}."


def drops_said(run: str, found: Sequence[Drops]) -> str:
    """Return what the batch changes, in a line."""
    said = [
        f"{factor_text(of.factor)}: {percent(of.changed)} of tokens get other logits in another batch, "
        f"{percent(of.flipped)} another likeliest next token"
        if of.changed
        else f"{factor_text(of.factor)}: nothing changes (the largest move of a logit is {of.moved:.1g} of the largest)"
        for of in found
    ]
    looks = any(of.factor is None and of.rerouted for of in found)
    return f"{run}, capacity {'; '.join(said)}" + ("; so its routing itself looks at the batch" if looks else "")


def drops_grid(found: Sequence[Drops]) -> Grid:
    """Return a line for each capacity factor."""
    lines = [[cell(of) for cell in DROPS.values()] for of in found]
    return Grid(list(DROPS), lines, spare=("largest move", "loss", "rerouted"))


def places_grid(found: Sequence[Drops], field: str) -> Grid:
    """Return the share that is dropped by place: ``by_position`` in the sequence, or ``by_row`` of a batch."""
    capped = [of for of in found if of.factor is not None]
    count = len(getattr(capped[0], field)) if capped else 0
    name = "part" if field == "by_position" else "row"
    lines = [[factor_text(of.factor), *map(percent, getattr(of, field))] for of in capped]
    return Grid(["capacity", *(f"{name} {place + 1}" for place in range(count))], lines)


def examples(found: Sequence[Drops], spell: Callable[[int], str]) -> list[str]:
    """Return what each capacity makes of one token, in a line."""
    return [
        f"capacity {factor_text(of.factor)}, window {of.example.window}, position {of.example.position}: next "
        + ", ".join(f"{spell(token)} {share:.0%}" for token, share in of.example.said)
        for of in found
        if of.example is not None
    ]


def to_json(run: str, found: Inspection | Sequence[Drops], command: str) -> str:
    """Return everything as JSON; numbers have six digits, and what is not defined is null."""
    data: Any = asdict(found) if isinstance(found, Inspection) else {"drops": [asdict(of) for of in found]}
    return json.dumps(rounded({"command": command, "run": run} | data), separators=(",", ":")) + "\n"
