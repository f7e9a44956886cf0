"""One self-contained HTML page about a comparison: it opens from a file, works offline and asks nobody for anything.

Like the table it is a pure function of run records. Every text out of a record is escaped, in the page and inside the
figures. A third of this file is the page's own template, kept beside the code that fills it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from rlroute.config import DENSE
from rlroute.experiments.comparison.entries import Entry, make_entries
from rlroute.experiments.comparison.table import Table, TableRow, build_table
from rlroute.experiments.comparison.text import columns, legend
from rlroute.experiments.report.figures import balance_figure, curves_figure, figure_html, loads_figure, make_styles
from rlroute.experiments.text import listed, of_interval, short
from rlroute.records import write_atomically
from rlroute.schema import RunRecord


def write_report(records: Sequence[RunRecord], path: Path, *, reference: str | None = None) -> None:
    """Write the page about ``records`` to ``path``, atomically.

    Args:
        records: finished and diverged runs.
        path: the HTML file.
        reference: label of the entry that differences are taken to, as in
            :func:`~rlroute.experiments.comparison.table.build_table`.

    Raises:
        ComparisonError: the runs are not comparable, or there is no such reference.
        MissingDependencyError: Plotly is not installed.
        StoreError: the file cannot be written.
    """
    table = build_table(records, reference)
    write_atomically(path, render(table, make_entries(records)))


def render(table: Table, entries: Sequence[Entry]) -> str:
    """Return the page.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    styles = make_styles(entries)
    by_label = {entry.label: entry for entry in entries}
    ordered = [by_label[row.label] for row in table.rows]
    routed = [entry for entry in ordered if entry.router != DENSE and entry.runs[0].loads]
    return PAGE.substitute(
        style=STYLE,
        conclusion=_conclusion_html(*conclude(table)),
        table=_table_html(table, styles),
        legend=escape(legend(table)),
        curves=figure_html(curves_figure(ordered, styles), "curves", plotlyjs=True),
        balance=figure_html(balance_figure(table, by_label, styles), "balance"),
        loads=_loads_html(routed) if routed else "<p>No entry has experts.</p>",
        notes="".join(f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in table.notes if text),
        configs="".join(_config_html(entry) for entry in ordered),
    )


# What the table says, in words


def conclude(table: Table) -> Iterable[str]:
    """Say in words what the table shows and what it does not: who is separated from the reference, who is not, who is
    unbalanced.
    """
    ranked = [row for row in table.rows if row.bits_per_byte]
    if not ranked:
        yield "Every run diverged: there is nothing to compare."
        return
    best = next((row for row in ranked if row.causal), ranked[0])
    seeds = "1 seed" if best.n == 1 else f"{best.n} seeds"
    among = "" if all(row.causal for row in ranked) else " of all that are causal"
    bits = of_interval(best.bits_per_byte)
    yield f"{best.label} has the lowest mean validation loss{among}: {bits} bits per byte over {seeds}."
    yield from _separation(table)
    yield from _balance(ranked)
    future = [row.label for row in ranked if not row.causal]
    if future:
        reason = "Such routing sees later tokens, so its loss cannot be held against the others'."
        yield f"Not causal: {listed(future)}. {reason}"
    untuned = [row.label for row in ranked if not row.tuned]
    if untuned:
        yield f"Untuned: {listed(untuned)}."
    lost = sum(row.diverged for row in table.rows)
    if lost:
        yield f"Diverged: {lost} {'run' if lost == 1 else 'runs'}, named below and left out of all figures."


def _separation(table: Table) -> Iterable[str]:
    pairs = [(row, row.difference) for row in table.rows if row.difference]
    if all(difference.half_width is None for _, difference in pairs):
        yield "One seed has no interval, so nothing here is separated from anything."
        return
    better = [_change(row) for row, difference in pairs if difference.separated and difference.mean < 0]
    worse = [_change(row) for row, difference in pairs if difference.separated and difference.mean > 0]
    yield f"Better than {table.reference}, paired by seed: {listed(better)}."
    yield f"Worse than {table.reference}: {listed(worse)}."
    others = [row.label for row, difference in pairs if not difference.separated]
    yield f"Not separated from {table.reference}: {listed(others)}."
    if better or worse:
        holds = [row.label for row, _ in pairs if row.p_holm is not None and row.p_holm < 0.05]
        yield f"Separated also when corrected for {len(pairs)} comparisons (Holm, 5%): {listed(holds)}."


def _balance(ranked: Sequence[TableRow]) -> Iterable[str]:
    routed = [row for row in ranked if row.max_vio is not None]
    dead = [
        f"{row.label} ({short(row.dead_experts)} of {row.experts}, MaxVio {row.max_vio:.2f})"
        for row in routed
        if row.dead_experts
    ]
    alive = [row.max_vio for row in routed if not row.dead_experts and row.max_vio is not None]
    if routed:
        spread = f"; all others keep every expert alive, MaxVio {min(alive):.2f} to {max(alive):.2f}" if alive else ""
        yield f"Dead experts: {listed(dead)}{spread}."


def _change(row: TableRow) -> str:
    return row.label if row.difference is None else f"{row.label} ({row.difference.mean:+.4f})"


# HTML


def _conclusion_html(first: str, *others: str) -> str:
    return f"<p>{escape(first)}</p><ul>{''.join(f'<li>{escape(other)}</li>' for other in others)}</ul>"


def _table_html(table: Table, styles: Mapping[str, Mapping[str, str]]) -> str:
    shown = columns(table)
    head = "".join(f'<th scope="col"><button type="button">{escape(title)}</button></th>' for title in shown)
    body = "".join(
        _row_html(row, table, [cell(row) for cell in shown.values()], styles[row.label]["colour"]) for row in table.rows
    )
    return f'<table id="results"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _row_html(row: TableRow, table: Table, cells: Sequence[str], colour: str) -> str:
    name, *rest = (escape(cell).replace("not separated", "not&nbsp;separated") for cell in cells)
    kind = ' class="reference"' if row.label == table.reference else ""
    chip = f'<span class="chip" style="background:{colour}"></span>'
    return f'<tr{kind}><th scope="row">{chip}{name}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'


def _loads_html(entries: Sequence[Entry]) -> str:
    figure, drawn = loads_figure(entries)
    routers = "".join(f'<option value="{i}">{escape(entry.label)}</option>' for i, entry in enumerate(entries))
    sites = "".join(f'<option value="{i}">{site}</option>' for i, site in enumerate(entries[0].sites))
    seed = entries[0].runs[0].config["seed"]
    picker = f'<label>Router <select id="router" autocomplete="off">{routers}</select></label>'
    picker += f'<label>Layer <select id="layer" autocomplete="off">{sites}</select></label>'
    shown = f'<p class="picker">{picker}<span>seed {seed}</span></p>'
    return f"{shown}{figure_html(figure, 'loads')}<script>const DRAWN = {json.dumps(drawn)};</script>"


def _config_html(entry: Entry) -> str:
    config: Any = entry.runs[0].config["config"]
    text = escape(json.dumps(config, indent=1, sort_keys=True))
    ids = escape(", ".join(run.id for run in entry.runs))
    return f"<details><summary>{escape(entry.label)}</summary><p>Runs: {ids}</p><pre>{text}</pre></details>"


STYLE = """:root { color: #1c2330; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
body { margin: 0 auto; max-width: 1200px; padding: 2.2rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .9rem; letter-spacing: -.015em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; }
p, li { max-width: 62rem; }
p { margin: .5rem 0; }
.lead { border-left: 3px solid #332288; padding-left: 1.1rem; }
.lead p { font-size: 1.12rem; }
.lead ul { margin: 0; padding-left: 1.1rem; }
.small, dd, details { font-size: .86rem; color: #4a5364; }
.small { max-width: none; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .81rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .4rem; text-align: right; border-bottom: 1px solid #e3e7ed; vertical-align: top; }
td { white-space: nowrap; }
td:nth-child(4) { white-space: normal; min-width: 8.5rem; }
th:first-child { text-align: left; min-width: 8.5rem; }
thead th { border-bottom: 2px solid #1c2330; vertical-align: bottom; }
tbody th { font-weight: 600; position: sticky; left: 0; background: #fff; }
tr.reference > * { background: #f1f3f7; }
th button { all: unset; cursor: pointer; font-weight: 600; line-height: 1.25; }
th button:focus-visible { outline: 2px solid #332288; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
.chip { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .5em; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 2.5rem; }
@media (min-width: 1100px) { .pair { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } }
.picker { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: baseline; font-size: .92rem; }
select { font: inherit; padding: .15rem .3rem; max-width: 16rem; }
dl { display: grid; grid-template-columns: minmax(9rem, 13rem) minmax(0, 1fr); gap: .35rem 1.2rem; margin: .6rem 0; }
dt { font-weight: 600; font-size: .86rem; }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .35rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: #f6f7f9; padding: .7rem; }
"""
"""Of every page."""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:;
 form-action 'none'; base-uri 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which expert for which token? A comparison of routers</title>
<style>
$style</style>
</head>
<body>
<header>
<h1>Which expert for which token?<br>Routers compared in identical transformers</h1>
<div class="lead">$conclusion</div>
</header>
<main>
<h2>Results</h2>
<div class="scroll">$table</div>
<p class="small">$legend</p>
<h2>Loss while training</h2>
<p class="small">Mean over seeds; bands are 95% Student-t intervals. Click a name to hide it, double-click to
see it alone.</p>
$curves
<div class="pair">
<section>
<h2>Quality against balance</h2>
<p class="small">Lower is better, further left is more even. Large: mean over seeds with its 95% interval; small:
single seeds.</p>
$balance
</section>
<section>
<h2>What the experts did</h2>
<p class="small">Share of the routed pairs in a training batch that each expert got, before drops,
over the fair share 1/E.</p>
$loads
</section>
</div>
<h2>How this was made, and proof that only the router differs</h2>
<dl>$notes</dl>
<h3>Configurations</h3>
$configs
</main>
<noscript><p>The figures need JavaScript; the table and the notes do not.</p></noscript>
<script>
const table = document.getElementById("results");
const units = {k: 1e3, M: 1e6, G: 1e9, T: 1e12};
function value(cell) {
  const found = cell.textContent.replaceAll(",", "").match(/^([+-]?[\\d.]+)(?: ([kMGT])\\b)?/);
  return found ? Number(found[1]) * (units[found[2]] ?? 1) : NaN;
}
function order(a, b, sign) {
  const x = value(a), y = value(b);
  if (isNaN(x) && isNaN(y)) return sign * a.textContent.localeCompare(b.textContent);
  return isNaN(x) - isNaN(y) || sign * (x - y);
}
table.tHead.addEventListener("click", (event) => {
  const head = event.target.closest("th");
  if (!head) return;
  const down = head.ariaSort === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => order(a.cells[head.cellIndex], b.cells[head.cellIndex], down ? -1 : 1));
  table.tBodies[0].append(...rows);
});
const pickers = ["router", "layer"].map((id) => document.getElementById(id)).filter(Boolean);
for (const picker of pickers) {
  picker.addEventListener("change", () => {
    const wanted = pickers.map((p) => Number(p.value));
    Plotly.restyle("loads", {visible: DRAWN.map(([router, layer]) => router === wanted[0] && layer === wanted[1])});
  });
}
</script>
</body>
</html>
""")
