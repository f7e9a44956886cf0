"""What a run of Weights & Biases is given: its name, group and tags, its rows, and at the end tables and heatmaps.

:mod:`rlroute.sink` does so while a run is trained; :func:`push` with the record of one that has ended.

Shape suffixes: L routed sites, E experts, N rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlroute.alarms import alarms_of
from rlroute.reading import site_keys
from rlroute.schema import RunRecord
from rlroute.sites import families
from rlroute.values import flatten

if TYPE_CHECKING:
    import numpy as np

Where = Literal["offline", "online"]
PATIENCE, PUSHING = 30.0, 600.0
"""Seconds that wandb may take to begin or to end: beside a run that is trained, and where all wait for it alone."""
MOST_STEPS, PIXELS = 200, 6
"""Columns of a heatmap, and the side of a cell in pixels."""
LONGEST_TAG = 64


def begin(mode: Where, described: Mapping[str, Any], folder: Path, patience: float = PATIENCE) -> Any:
    """Open the wandb run of a run, new or as far as it has come.

    Args:
        mode: offline, for ``wandb sync``, or online.
        described: what config.json holds.
        folder: where wandb keeps its files, in ``wandb/``.
        patience: seconds that it may take to begin, and to end.

    Raises:
        PermissionError: online, and there is no key.
        Exception: whatever wandb raises.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if mode == "online" and not wandb.login(prompt=False):  # init would ask for it in a terminal
        raise PermissionError("no API key; `wandb login` or WANDB_API_KEY gives one, offline needs none")
    return wandb.init(
        mode=mode,
        id=legal_id(described["id"]),
        name=described["id"],
        group=group_of(described),
        job_type=legal_id(described["id"].rpartition("-s")[0]),
        tags=tags_of(described),
        project=os.environ.get("WANDB_PROJECT", "rlroute"),
        config=described["config"] | {name: described[name] for name in ("seed", "config_hash")},
        dir=str(folder.absolute()),
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            init_timeout=patience,
            finish_timeout=patience,
        ),
    )


def legal_id(run_id: str) -> str:
    """Return a run's id as wandb takes it; its end, which tells runs apart, is kept."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", run_id)[-128:]


def group_of(described: Mapping[str, Any]) -> str:
    """Return the group: the runs that were asked for together. Seeds may be added to a comparison; a run that was asked
    for by itself is in the group of its router.
    """
    asked, command = described.get("asked"), described["command"]
    if asked is None:
        return str(described["router"])
    if "registration" in asked:
        return f"judgement-{asked['registration'][:8]}"
    if len(asked["entries"]) * len(asked["seeds"]) > 1:
        return f"comparison-{_short(json.dumps(sorted(asked['entries'])))}"
    return str(described["router"]) if command is None else f"sweep-{_short(command)}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def tags_of(described: Mapping[str, Any]) -> list[str]:
    """Return the tags: routers, budget, gate form, experts, corpus and device."""
    config = described["config"]
    data, model, train = (config[part] for part in ("data", "model", "train"))
    found = [
        *described["router"].split("+"),
        f"budget {train.get('budget', 'tokens')}",
        f"gate {model.get('gate_form', 'own')}",
        f"{model['num_experts']} experts, k {model['k']}",
        f"{train['steps']} steps",
        str(data["spec"]),
        str(train.get("device", "cpu")),
    ]
    return [tag[:LONGEST_TAG] for tag in dict.fromkeys(found)]


# Rows


def leaves(value: Any, name: str, sites: Sequence[int | str]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a row or a summary by their paths below ``name``, as ``eval/load_LE/1.attention/3``; lists
    over the routed sites go by the keys of these, others by number.
    """
    return flatten(value, name, keys=partial(_keys, sites))


def _keys(sites: Sequence[int | str], name: str, values: list[Any]) -> Iterable[int | str]:
    """Return the keys of a list: sites where it is over sites, or over those with experts on devices; else numbers."""
    parent, _, last = name.rpartition("/")
    if last.endswith(("_L", "_LE")) or parent.rpartition("/")[2] in ("terms", "weights"):
        for keys in (sites, [site for site in sites if isinstance(site, int)]):
            if len(keys) == len(values):
                return keys
    return range(len(values))


def log_row(run: Any, first: int, name: str, row: Mapping[str, Any], sites: Sequence[int | str]) -> None:
    """Log the numbers of a row under its kind, unless the run has got beyond its step: ``train/loss``, ``eval/loss``,
    ``loads/load_LE/0/3``.
    """
    if row["step"] >= first:
        rest = {key: value for key, value in row.items() if key not in ("kind", "step")}
        named = leaves(rest, row.get("kind", name), sites)
        run.log({key: leaf for key, leaf in named if isinstance(leaf, int | float)}, step=row["step"])


# The end


def conclude(
    run: Any,
    first: int,
    summary: Mapping[str, Any],
    loads: Sequence[Mapping[str, Any]],
    sites: Sequence[int | str],
    standing: Iterable[str],
) -> None:
    """Log the final metrics by site as a table and the loads over time as heatmaps, and update the summary.

    Args:
        run: wandb's.
        first: the step from which on it takes rows.
        summary: what summary.json holds.
        loads: rows of loads.jsonl.
        sites: the keys of the routed sites.
        standing: the kinds of the alarms that stand at the end.
    """
    import wandb

    media: dict[str, Any] = {}
    if columns := by_site(summary["final"] or {}, sites):
        data = [list(row) for row in zip(*columns.values(), strict=True)]
        media["tables/final"] = wandb.Table(columns=list(columns), data=data)
    for site, (shares_NE, steps) in loads_by_site(loads, sites).items():
        caption = (
            f"site {site}: a row for each expert, columns from step {steps[0]} to {steps[-1]}; black: no pair, white: "
            "twice the fair share or more"
        )
        media[f"heatmaps/load/{site}"] = wandb.Image(heatmap(shares_NE), caption=caption)
    if media and summary["steps"] >= first:
        run.log(media, step=summary["steps"])
    said = {name: leaf for name, leaf in leaves(summary, "", sites) if leaf is not None}
    run.summary.update(said | {"alarms": ", ".join(dict.fromkeys(standing))})


def by_site(final: Mapping[str, Any], sites: Sequence[int | str]) -> dict[str, list[Any]]:
    """Return the columns of a table with a row for each routed site: what an evaluation has by site."""
    lists = {name: value for name, value in final.items() if name.endswith("_L") and isinstance(value, list)}
    columns = {name.removesuffix("_L"): value for name, value in lists.items() if len(value) == len(sites)}
    return {"site": list(map(str, sites))} | columns if columns else {}


def loads_by_site(
    loads: Sequence[Mapping[str, Any]], sites: Sequence[int | str]
) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Return the loads of each site, shape (N, E), or of those that are shown as one side by side, and the steps of
    their rows: at most so many, evenly spread.
    """
    import numpy as np

    stride = -(-len(loads) // MOST_STEPS) or 1
    rows = [row for row in loads[::-stride][::-1] if row["load_LE"]]  # the last is among them
    steps = [row["step"] for row in rows]
    return {
        name: (np.concatenate([np.array([row["load_LE"][i] for row in rows]) for i in at], axis=1) / len(at), steps)
        for name, at in families(sites).items()
        if rows
    }


def heatmap(shares_NE: np.ndarray) -> np.ndarray:
    """Return loads as the bytes of a picture: a row for each expert, a column for each step; grey is the fair share."""
    import numpy as np

    experts = shares_NE.shape[1]
    grey_EN = np.clip(shares_NE.T * experts / 2, 0, 1)
    return np.kron((255 * grey_EN).round().astype(np.uint8), np.ones((PIXELS, PIXELS), np.uint8))


def push(record: RunRecord, mode: Where, folder: Path) -> None:
    """Upload the record of a run that has ended, as it would have been while it was trained.

    Args:
        record: the run's.
        mode: offline, for ``wandb sync``, or online, where steps that wandb has are left out.
        folder: where wandb keeps its files, in ``wandb/``.

    Raises:
        PermissionError: online, and there is no key.
        Exception: whatever wandb raises.
    """
    sites = site_keys(record.config["config"]["model"])
    run = begin(mode, record.config, folder, PUSHING)
    first = run.step
    rows = [("metrics", row) for row in (*record.train, *record.evals)] + [("loads", row) for row in record.loads]
    for name, row in sorted(rows, key=lambda named: named[1]["step"]):
        log_row(run, first, name, row, sites)
    standing = [alarm.kind for alarm in alarms_of(record) if alarm.until is None]
    conclude(run, first, record.summary, record.loads, sites, standing)
    run.finish(exit_code=0)
