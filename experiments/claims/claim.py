"""What a claim is: a statement of somebody's, the entries that are trained for it, and the numbers that decide it.

All of it is data, written before the first run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

from rlroute.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from rlroute.errors import ConfigError
from rlroute.experiments.comparison.budget import with_budget
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.recipes.sizes import find_preset
from rlroute.experiments.verdicts import LEVEL, MARGIN
from rlroute.seal import of_part

Tier = Literal["quick", "long", "gpu"]
RULE = (
    f"a part holds where the t interval of its values, one a seed, lies between its bounds (of confidence "
    f"{1 - LEVEL:.0%}; {1 - 2 * LEVEL:.0%}, which is two one-sided tests, where there are two bounds), and is refuted "
    f"where that of confidence 1 - {LEVEL:g} / parts lies outside; the claim holds where all of its parts do, and is "
    "refuted where one is"
)


P = TypeVar("P", DataConfig, ModelConfig, TrainConfig)


class Base(NamedTuple):
    """What all runs of a claim share, but for what its arms say."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig


_GPU = find_preset("gpu-30m")
BASES: dict[Tier, Base] = {
    "quick": Base(
        DataConfig(),
        ModelConfig(),
        TrainConfig(steps=300, lr=1.6e-2, warmup_steps=30, eval_every=50, log_every=1, checkpoint_every=300),
    ),
    "long": Base(
        DataConfig(),
        ModelConfig(num_layers=2, num_experts=32),
        TrainConfig(steps=4800, batch_size=16, lr=8e-3, warmup_steps=200, eval_every=200, checkpoint_every=1200),
    ),
    "gpu": Base(_GPU.data, _GPU.model, _GPU.train),
}
"""Quick: the default comparison, cut to 300 steps, with the learning rate that its learned routers were tuned to; every
step is logged.
"""


@dataclass(frozen=True)
class Arm:
    """Something that is trained.

    Attributes:
        entry: as of ``compare``.
        given: fields of data, model and train in which it differs from the claim's base.
    """

    entry: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def on(self, base: Base) -> RunConfig:
        """Return its configuration.

        Raises:
            ConfigError: an illegal entry, or a field that none of the parts has.
        """
        known = {f.name for part in base for f in fields(part)}
        if unknown := self.given.keys() - known:
            raise ConfigError(
                f"arm {self.entry!r} has no field {min(unknown)!r}: legal are those of data, model and train"
            )
        return build_entry(self.entry, *(self._given(base.data), self._given(base.model), self._given(base.train)))

    def _given(self, part: P) -> P:
        return replace(part, **{f.name: self.given[f.name] for f in fields(part) if f.name in self.given})


def _said(part: Any) -> dict[str, Any]:
    """Return the fields of a part of a configuration that are not its defaults."""
    plain = asdict(type(part)())
    return {name: value for name, value in asdict(part).items() if value != plain[name]}


def arm(entry: str, **given: Any) -> Arm:
    """Return an arm: an entry, and what of data, model and train is given besides."""
    return Arm(entry, given)


@dataclass(frozen=True)
class Part:
    """One number of a claim, and what the claim says of it.

    Attributes:
        says: it in words.
        measure: a name of :data:`rlroute.experiments.claims.measures.MEASURES`.
        of: what each arm's value counts in it; of a measure of two runs the first arm is held against the second.
        above, below: between which bounds the claim has the true value; none: there is no bound.
    """

    says: str
    measure: str
    of: Mapping[str, float]
    above: float | None = None
    below: float | None = None


def less(measure: str, one: str, other: str, says: str, by: float = 0.0) -> Part:
    """Return a part that says that one arm's value is below the other's, ``by`` so much at least."""
    return Part(says, measure, {one: 1.0, other: -1.0}, below=-by)


def more(measure: str, one: str, other: str, says: str, by: float = 0.0) -> Part:
    """Return a part that says that one arm's value is above the other's, ``by`` so much at least."""
    return Part(says, measure, {one: 1.0, other: -1.0}, above=by)


def no_worse(one: str, other: str, says: str, margin: float = MARGIN) -> Part:
    """Return a part that says that one arm's loss is above the other's by less than the margin, if at all."""
    return Part(says, "bits", {one: 1.0, other: -1.0}, below=margin)


def alike(one: str, other: str, says: str, margin: float = MARGIN, measure: str = "bits") -> Part:
    """Return a part that says that two arms differ by less than the margin."""
    return Part(says, measure, {one: 1.0, other: -1.0}, above=-margin, below=margin)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published statement, and what decides here whether it holds.

    Attributes:
        id: its number in the ledger.
        statement: what is claimed.
        source: by whom.
        anchor: the figures there.
        here: the setting here, and in what it differs from the source's.
        tier: what it takes: minutes on two cores, hours, or a GPU.
        arms: what is trained, by a name for each.
        parts: what decides.
        seeds: of every arm.
        equal_flops: the arm whose training FLOPs all arms get; none: all get the same tokens.
        lacks: what rlroute lacks that the claim needs; without arms and parts.
    """

    id: str
    statement: str
    source: str
    anchor: str
    tier: Tier
    here: str = ""
    arms: Mapping[str, Arm] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    equal_flops: str | None = None
    lacks: str = ""

    def configs(self) -> dict[str, RunConfig]:
        """Return the arms' configurations.

        Raises:
            ConfigError: an arm is illegal.
        """
        found = [arm.on(BASES[self.tier]) for arm in self.arms.values()]
        if self.equal_flops is not None:
            found = with_budget(found, "flops", self.arms[self.equal_flops].on(BASES[self.tier]), None)
        return dict(zip(self.arms, found, strict=True))

    def deliberate(self, arms: Iterable[str]) -> frozenset[str]:
        """Return the fields of data, model and train in which arms may differ, as ``model.k``: those that they give."""
        parts = BASES[self.tier]._asdict().items()
        named = {f.name: f"{name}.{f.name}" for name, part in parts for f in fields(part)}
        return frozenset(named[field] for arm in arms for field in self.arms[arm].given)

    def to_dict(self) -> dict[str, Any]:
        """Return what is registered: plain values, with the base and the rule."""
        base = BASES[self.tier]
        return asdict(self) | {
            "seeds": list(self.seeds),
            "arms": {name: asdict(arm) for name, arm in self.arms.items()},
            "parts": [asdict(part) for part in self.parts],
            "base": {name: _said(part) for name, part in base._asdict().items()},
            "rule": RULE,
        }

    @property
    def sha256(self) -> str:
        """Of the claim as it is written."""
        return of_part(self.to_dict())
