"""What is said of a run while it goes on: dead experts, collapse, exploding router logits, a stall.

An alarm is a pure function of a run's rows and of the time since the last one, so that the progress of a command,
``rlroute runs``, the dashboard and wandb say the same, of a run of today as of a stored one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlroute.reading import site_keys
from rlroute.schema import RunRecord
from rlroute.sites import families

Kind = Literal["dead experts", "collapse", "router logits", "stalled"]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """From where on there is an alarm."""

    in_a_row: int = 3
    """Rows that must agree, but for a stall: balance takes its time at the beginning of a run."""
    dead: float = 0.125
    """Share of a site's experts that are dead in an evaluation, but at least one of them."""
    collapse: float = 0.5
    """MaxVio of an evaluation over E / k - 1, where every token takes the same expert."""
    logits: float = 20.0
    """Root mean square of a site's router logits in a training step: a softmax over such is one-hot, and bfloat16
    rounds them to an eighth. Routers here are near 1.
    """
    stall: float = 10.0
    """Time since the last row over the usual time between training rows."""
    stall_seconds: float = 180.0
    """But at least so long: an evaluation or a checkpoint may come between."""
    start_seconds: float = 600.0
    """Before the first row: code, corpus and checkpoint are read, perhaps on a busy machine."""


THRESHOLDS = Thresholds()


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One thing that looks wrong, at one site where it is of a site.

    Attributes:
        kind: which of the four.
        run: the run's id.
        site: the key of the routed site, or the name of those that are shown as one; None of a stall.
        step: of the first of the rows that raised it; of a stall, of the last row.
        value: in the last row that raised it: dead experts, MaxVio, root mean square, seconds.
        threshold: the value from which on there is an alarm.
        what: the value in words.
        until: the step of the row that no longer raised it; None while it stands.
    """

    kind: Kind
    run: str
    site: str | None
    step: int
    value: float
    threshold: float
    what: str
    until: int | None = None

    def __str__(self) -> str:
        where = "" if self.site is None else f", site {self.site}"
        over = "" if self.until is None else f", over at step {self.until}"
        return f"{self.run}{where}: {self.what} (alarm from {self.threshold:g} on, since step {self.step}{over})"


class Watch:
    """Reads a run's rows as they come, and remembers its alarms.

    Args:
        run: its id.
        model: its recorded configuration, of which the sites follow.
        thresholds: from where on there is an alarm.
    """

    def __init__(self, run: str, model: Mapping[str, Any], thresholds: Thresholds | None = None) -> None:
        self.run, self.k, self.at = run, model["k"], thresholds or THRESHOLDS
        self.sites = families(site_keys(model))
        self.found: dict[tuple[Kind, str | None], Alarm] = {}
        """Each alarm by kind and site, be it over or not."""
        self.step, self.pace = 0, 0.0  # of the last row; seconds of training between two rows
        self._rows = 0
        self._streaks: dict[tuple[Kind, str | None], tuple[int, int]] = {}  # rows over a threshold; the first's step

    @property
    def standing(self) -> list[Alarm]:
        """The alarms that the last rows raised."""
        return [alarm for alarm in self.found.values() if alarm.until is None]

    def see(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Take the next row of metrics.jsonl; return what it raises that was not raised before."""
        self.step = row["step"]
        self._end("stalled", None)
        if row["kind"] == "train":
            self._rows += 1
            self.pace = row["seconds"] / self._rows
        return [alarm for measured in self._measured(row) for alarm in self._hold(*measured, self.at.in_a_row)]

    def idle(self, seconds: float) -> list[Alarm]:
        """Say how long ago the last row came, or the run was begun; return the stall, if one begins."""
        usual = max(self.at.stall * self.pace, self.at.stall_seconds if self.step else self.at.start_seconds)
        known = self.found.get(("stalled", None))
        if seconds >= usual and known is not None and known.until is not None:  # every stall is one of its own
            del self.found["stalled", None]
        return self._hold("stalled", None, seconds, usual, f"no row for {seconds:.0f} s")

    def _measured(self, row: Mapping[str, Any]) -> Iterator[tuple[Kind, str, float, float, str]]:
        """Yield kind, site, value, threshold and the value in words."""
        for site, places in self.sites.items():
            names = ("load_LE", "dead_L", "max_vio_L", "logits_L")
            loads, dead, vios, logits = (_at(row, name, places) for name in names)
            if loads and dead:
                experts = sum(map(len, loads))
                said = f"{sum(dead)} of {experts} experts are dead, each below 5% of its fair share"
                yield "dead experts", site, sum(dead), max(1, math.ceil(self.at.dead * experts)), said
            if vios and loads and (most := len(loads[0]) / self.k - 1) > 0:
                said = f"MaxVio is {max(vios):.2f}, and {most:.2f} where every token takes the same expert"
                yield "collapse", site, max(vios), self.at.collapse * most, said
            if logits:
                said = f"router logits have a root mean square of {max(logits):.3g}"
                yield "router logits", site, max(logits), self.at.logits, said

    def _hold(
        self, kind: Kind, site: str | None, value: float, threshold: float, what: str, in_a_row: int = 1
    ) -> list[Alarm]:
        """Hold a value against its threshold; return its alarm the first time that there is one."""
        if value < threshold:
            self._end(kind, site)
            return []
        length, first = self._streaks.get((kind, site), (0, self.step))
        self._streaks[kind, site] = length + 1, first
        if length + 1 < in_a_row:
            return []
        known = self.found.get((kind, site))
        step = first if known is None else known.step
        alarm = Alarm(kind=kind, run=self.run, site=site, step=step, value=value, threshold=threshold, what=what)
        self.found[kind, site] = alarm
        return [alarm] if known is None else []

    def _end(self, kind: Kind, site: str | None) -> None:
        """Note that an alarm is over, if there is one."""
        self._streaks.pop((kind, site), None)
        known = self.found.get((kind, site))
        if known is not None and known.until is None:
            self.found[kind, site] = replace(known, until=self.step)


def _at(row: Mapping[str, Any], name: str, places: Iterable[int]) -> list[Any]:
    """Return what a row's list says of some sites, as far as it does."""
    found = row.get(name, ())
    return [found[place] for place in places if place < len(found) and found[place] is not None]


def alarms_of(record: RunRecord) -> list[Alarm]:
    """Return the alarms of an ended run."""
    rows = sorted([*record.train, *record.evals], key=lambda row: row["step"])
    return alarms(record.id, record.config["config"]["model"], rows)


def alarms(
    run: str,
    model: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    idle: float | None = None,
    thresholds: Thresholds | None = None,
) -> list[Alarm]:
    """Return a run's alarms, one for each kind and site, those that are over too.

    Args:
        run: its id.
        model: its recorded configuration of the model.
        rows: of metrics.jsonl, in their order.
        idle: seconds since the last of them, of a run that goes on.
        thresholds: from where on there is an alarm.
    """
    watch = Watch(run, model, thresholds)
    for row in rows:
        watch.see(row)
    if idle is not None:
        watch.idle(idle)
    return list(watch.found.values())
