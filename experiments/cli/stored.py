"""The commands that read what is there: ``routers``, ``presets``, ``runs``, ``table``, ``report``, ``verify``,
``export``, ``export-tokens`` and ``export-clusters``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlroute.errors import ConfigError, StoreError
from rlroute.experiments.cli.common import RUNS, Store, one_run, refuse_others, say_edited, select
from rlroute.experiments.cli.folders import check_ending, make_way
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.cli.output import show_grid, show_table
from rlroute.experiments.verdicts import MARGIN
from rlroute.foreign import printable
from rlroute.limits import Count, Experts, Positive, Seed, Whole


def routers(markdown: bool = False) -> None:
    """List the routers: where each comes from, its paper, what it learns from and its fields.

    Args:
        markdown: as a page, each field with its meaning: docs/routers.md.
    """
    from rlroute.experiments.report.listing import routers_text
    from rlroute.experiments.report.router_page import routers_page

    name_broken()
    print(routers_page() if markdown else routers_text())


def presets(markdown: bool = False) -> None:
    """List the published models that --preset knows: experts, router, parameters here and as published. NAME-tiny is
    the same router in a model that trains on a CPU in minutes.

    Args:
        markdown: as a page: docs/presets.md.
    """
    from rlroute.experiments.report.preset_page import presets_grid, presets_page

    if markdown:
        print(presets_page())
    else:
        show_grid(presets_grid())


def runs(store: Store = RUNS, run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")] = "") -> None:
    """List the runs of a store (or of a compact file) and what has become of each, or inspect one. Those that cannot be
    read are listed with the others, and named in the end.

    Args:
        store: a run store or a compact file.
        run: the run's id as it is listed, the whole of it, or the start.
    """
    from rlroute.experiments.report.runs import list_runs, run_text, to_grid

    if run:
        print(printable(run_text(store, run)))
        return
    listed = list_runs(store)
    show_grid(to_grid(listed))
    for one in listed:
        if one.state == "set aside":
            print(printable(f"{one.id} was set aside: {one.reason}"))
        for alarm in one.alarms if one.state == "running" else ():
            print(printable(f"alarm: {alarm}"))
    damaged = [f"{one.id}: {one.reason}" for one in listed if one.state == "damaged"]
    if damaged:
        raise StoreError(f"{len(damaged)} of {len(listed)} runs cannot be read: {'; '.join(damaged)}")


def table(
    store: Store = RUNS,
    reference: str | None = None,
    margin: Positive = MARGIN,
    csv: bool = False,
    timings: bool = True,
    only: tuple[str, ...] = (),
    check: bool = False,
    write: bool = False,
    rerun: Whole = 0,
    seed: Seed = 0,
) -> None:
    """Print the table of stored runs, as Markdown or CSV; a pure function of the records. Where not all of them are
    comparable it is that of the largest group, and says what it leaves out.

    Of a Markdown page with tables (docs/verify.md), --check says where one is not what its runs give, and what is wrong
    with these; silent where all is right, else exit code 1. --write puts in what they give.

    Args:
        store: a run store or a compact file; or a Markdown page.
        reference: the entry that differences are taken to.
        margin: a difference below it does not matter, in bits per byte.
        csv: CSV instead of Markdown.
        timings: --no-timings leaves out the columns that differ from run to run.
        only: ids (or their starts) of the runs to take; the largest comparable group if none are given.
        check: hold the tables of a page against their runs.
        write: write the tables of a page anew.
        rerun: with --check, so many runs of each table are trained once more from their records alone: every figure bit
            for bit on the same kind of CPU, the final bits per byte within 1 % elsewhere.
        seed: which runs these are.
    """
    _refuse_seed(seed, rerun)
    if check or write or rerun:
        given = {"reference": reference, "margin": margin, "csv": csv, "timings": timings, "only": only}
        plain = {"reference": None, "margin": MARGIN, "csv": False, "timings": True, "only": ()}
        refuse_others("the tables of a page", "what their markers say", given, plain)
        _of_page(store, check, write, rerun, seed)
        return
    from rlroute.experiments.comparison.ladder_file import read_ladder
    from rlroute.experiments.comparison.table import build_table
    from rlroute.experiments.comparison.text import to_csv

    records, left_out = select(store, only)
    built = build_table(records, reference, left_out, margin, read_ladder(store))
    say_edited(records)
    if not csv:
        show_table(built, timings)
        return
    _say_left_out(left_out)
    print(to_csv(built, timings=timings))


def _refuse_seed(seed: int, rerun: int) -> None:
    if seed and not rerun:
        raise ConfigError(f"--seed {seed} wants --rerun N: it says which runs are trained once more")


def _of_page(page: Path, check: bool, write: bool, rerun: int, seed: int) -> None:
    """Check or write the tables of a page."""
    from rlroute.experiments.comparison import page_tables as tables

    if check == write or (rerun and not check):
        raise ConfigError("of a page want --check, with or without --rerun N, or --write")
    if write:
        print(f"{tables.write_page(page)} tables changed in {page}")
        return
    findings = tables.check_page(page, rerun, seed)
    for finding in findings:
        print(printable(finding))
    if findings:
        sys.exit(1)


def report(
    store: Store = RUNS,
    out: Path = Path("results/report.html"),
    reference: str | None = None,
    margin: Positive = MARGIN,
    only: tuple[str, ...] = (),
    results: Path = Path("results"),
) -> None:
    """Write one self-contained HTML page about stored runs, with the views of `rlroute dashboard`: table, verdicts,
    curves, expert loads, quality against balance and speed, progress, and every run with its provenance.

    Args:
        store: a run store or a compact file.
        out: the page.
        reference: the entry that differences are taken to.
        margin: a difference below it does not matter, in bits per byte.
        only: ids (or their starts) of the runs to take; the largest comparable group if none are given.
        results: the folder of what other commands published; what is not there is taken from rlroute's own records.
    """
    from rlroute.experiments.comparison.ladder_file import read_ladder
    from rlroute.experiments.dashboard.follow import unended
    from rlroute.experiments.dashboard.published import read_results
    from rlroute.experiments.report.page import write_report

    make_way(out)
    records, left_out = select(store, only)
    known, found = read_ladder(store), read_results(results)
    write_report(
        records,
        out,
        reference=reference,
        left_out=left_out,
        margin=margin,
        results=found,
        ladder=known,
        unended=[] if only else unended(store),
    )
    say_edited(records)
    _say_left_out(left_out)
    print(f"report in {out}")


def verify(
    store: Store = RUNS, rerun: Whole = 0, seed: Seed = 0, evaluate: bool = False, sources: Path | None = None
) -> None:
    """Compute again what stored runs say, from their configurations, the code and the data at hand; say what differs.

    Silent where all is as it says; else a line for each finding, and exit code 1.

    Args:
        store: a run store or a compact file.
        rerun: so many runs are trained once more as well, and every figure is held against the record bit for bit.
        seed: which runs these are; those that say they diverged come first.
        evaluate: stored weights are evaluated once more as well.
        sources: the store of the runs from whose weights others start; the store itself by default.
    """
    _refuse_seed(seed, rerun)
    if evaluate and store.is_file():
        raise ConfigError(f"--evaluate does not apply to {store}: a compact file holds no weights")
    from rlroute.experiments.verify.store import verify as verified

    findings = verified(store, reruns=rerun, draw=seed, evaluate=evaluate, sources=sources)
    for finding in findings:
        print(finding)
    if findings:
        sys.exit(1)


def export(
    out: tyro.conf.Positional[Path],
    store: Path = RUNS,
    only: tuple[str, ...] = (),
    weights: str = "",
    form: Literal["moe", "transformers"] = "moe",
) -> None:
    """Write the ended runs of a store into one compact file for publication: those that make one table, or those that
    --only names. With --weights, write the trained weights of one run.

    Args:
        out: the compact file, one JSON object a line; of weights a .safetensors file, or a new folder.
        store: the run store.
        only: ids (or their starts) of the runs to take; the largest comparable group if none are given.
        weights: the id of a run, or the start of it, whose weights are wanted.
        form: moe: its mixture of experts in one file, docs/export.md says what is in it; transformers: the whole model
            as a checkpoint that a class of transformers loads, where one expresses it.
    """
    if weights:
        _export_weights(out, store, only, weights, form)
        return
    if form != "moe":
        raise ConfigError("--form applies to --weights alone")
    from rlroute.records import write_compact

    make_way(out)
    records, left_out = select(store, only)
    write_compact(records, out)
    say_edited(records)
    _say_left_out(left_out)
    print(f"{len(records)} runs in {out}")


def _export_weights(out: Path, store: Path, only: tuple[str, ...], run: str, form: str) -> None:
    if only:
        raise ConfigError("--only does not apply to --weights, which names the run itself")
    if form == "moe":
        check_ending(out, [".safetensors"])
        make_way(out)
    if form == "transformers" and os.path.lexists(out):
        raise ConfigError(f"{out} is there already: want a new folder")
    from rlroute.experiments.checkpoints.classes import export_class
    from rlroute.experiments.checkpoints.moe_file import moe_file
    from rlroute.experiments.checkpoints.trained import open_routed
    from rlroute.records import replacing

    trained = open_routed(one_run(store, run), store)
    if form == "moe":
        files, what = {out: moe_file(trained)}, "its mixture"
    else:
        made = export_class(trained)
        files, what = {out / name: data for name, data in made.files.items()}, made.config["architectures"][0]
    for path, data in files.items():
        make_way(path)
        with replacing(path) as file:
            file.write(data)
    print(f"{trained.id}, step {trained.last_step}: {what} in {out}")


def export_tokens(
    run: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path] = Path("results/tokens.npz"),
    store: Path = RUNS,
    tokens: Count = 16_384,
) -> None:
    """Write the last MoE layer of a trained run as a table that TokenBandit-v0 plays: what each expert would cost each
    token.

    Args:
        run: the run's id or the start of it.
        out: the table, a .npz file.
        store: the run store.
        tokens: about how many validation tokens.
    """
    from rlroute.experiments.play.token_table import token_table
    from rlroute.records import storing

    make_way(out)
    record = one_run(store, run)
    table = token_table(record, store, tokens)
    with storing(out):
        table.save(out)
    print(
        f"{len(table.x_ND)} tokens in {out}; loss uniform {table.uniform:.4f}, fixed {table.fixed:.4f}, oracle "
        f"{table.oracle:.4f}"
    )


def export_clusters(
    run: tyro.conf.Positional[str],
    out: Annotated[Path, tyro.conf.Positional] = Path("results/clusters.npy"),
    store: Path = RUNS,
    form: Literal["clustered", "balanced", "dispersed"] = "balanced",
    experts: Experts | None = None,
    k: Count | None = None,
    seed: Seed = 0,
) -> None:
    """Write a table of experts from clusters of a trained run's token embeddings: `hash:table=file,file=OUT` routes by
    it.

    Args:
        run: the run's id or the start of it; the dense model has embeddings too.
        out: the table, a .npy file.
        store: the run store.
        form: clustered: a token's expert is its cluster's; balanced: likewise, while there is room in it; dispersed:
            the tokens of a cluster are spread over all experts.
        experts: clusters, and experts; as many as the run's.
        k: experts of a token; as many as the run's.
        seed: of the first centres.
    """
    import numpy as np

    from rlroute.experiments.checkpoints.clusters import cluster_table
    from rlroute.experiments.checkpoints.trained import open_run
    from rlroute.records import replacing

    check_ending(out, [".npy"])
    make_way(out)
    trained = open_run(one_run(store, run), store)
    experts, k = experts or trained.config.model.num_experts, k or trained.config.model.k
    if k > experts:
        raise ConfigError(f"--k {k}: legal are 1 to --experts {experts}")
    embed_VD, counts_V = trained.model.embed.weight.detach().float().numpy(), trained.corpus.token_counts_V
    table_VLK = cluster_table(embed_VD, counts_V, experts, k, form, seed)
    with replacing(out) as file:
        np.save(file, table_VLK)
    load_E = np.bincount(table_VLK.reshape(-1), counts_V.repeat(k), minlength=experts)
    print(
        f"{k} of {experts} experts for each of {len(table_VLK)} tokens in {out}, MaxVio "
        f"{load_E.max() / load_E.mean() - 1:.2f} over the training corpus; as an entry: "
        f"hash:table=file,file={out}"
    )


def _say_left_out(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"left out: {line}", file=sys.stderr)
