"""What ``rlroute presets`` prints: the published models, counted here on PyTorch's meta device, without weights."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from rlroute.config import DataConfig, RouterConfig, RunConfig, TrainConfig
from rlroute.experiments.recipes.catalogue import CATALOGUE, Published
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.terminal import Grid
from rlroute.experiments.text import NOTHING, markdown
from rlroute.model.transformer import ModelShape, Transformer
from rlroute.registry import make_router

TERMS = {
    "balance_weight": "f.P",
    "sequence_balance_weight": "f.P in sequences",
    "device_balance_weight": "f.P over devices",
    "communication_balance_weight": "f.P over receivers",
    "z_weight": "z",
    "bias_rate": "bias",
}
"""What balances, by the field that has its weight or rate."""
HEAD = """# Published models as presets

Made by `rlroute presets --markdown`. `--preset NAME`, of `train`, `compare`, `judge`, `plan` and `bench step` (and
`preset = "NAME"` in a sweep), stands for a published model's transformer, as far as ours can express it, and in
`train`, `compare`, `plan` and sweeps, where no entry is named, for its router; `NAME-tiny` is the same router at a size
that trains on a CPU in minutes: a few layers of width 64, at most 16 experts of which at most 4 run, together 128 wide.
What is given besides goes before a preset, and nothing is tuned: data, batches and learning rates are ours.

Parameters are counted on the model as it would be built, with the vocabulary of its authors; *active* are those of a
token. *published* has the figures that the authors print. Ours agree with them to 1 %, or to one unit of the last digit
printed; a column says what is not the same here.
"""


class Counted(NamedTuple):
    """A preset's parameters, in billions: all, and those of a token as its authors count them; and what its gate is."""

    total: float
    active: float
    gate: str


@cache
def count(published: Published) -> Counted:
    """Count the parameters of a published model, every expert and router of it."""
    run, model = _run(published), published.model
    shape = ModelShape(vocab_size=published.vocab_size, seq_len=1, seed=0, backend="reference")
    with torch.device("meta"):
        made = Transformer(model, shape, lambda site: make_router(run.router_at(site.site), site))
    total = sum(p.numel() for p in made.parameters())
    runs = model.k * (getattr(run.router, "real_share", 1.0) if model.copy_experts else 1.0)
    idle = sum(site.pair_parameters * (site.router.shape.num_real_experts - runs) for site in made.routed)
    input_only = 0 if published.input_counts else made.embed.weight.numel()
    return Counted(total / 1e9, (total - idle - input_only) / 1e9, made.routers[0].gate_meaning)


def _run(published: Published) -> RunConfig:
    return build_entry(published.entry, DataConfig(), published.model, TrainConfig())


def agrees(here: float, printed: str, rounded_to: float | None = None) -> bool:
    """Whether a figure is a printed one: within 1 %, or one unit of the last digit that is printed; or none is."""
    if not printed:
        return True
    unit = rounded_to or 0.1 ** len(printed.partition(".")[2])
    return abs(here - float(printed)) <= max(0.01 * float(printed), unit + 1e-9)


def presets_grid() -> Grid:
    """Return the list as a table."""
    head = ["preset", "E", "k", "shared", "order", "gate", "balance", "layers", "total", "active"]
    head += ["published", "difference", "what differs", "source"]
    left = ("order", "gate", "balance", "what differs", "source")
    spare = ("source", "what differs", "gate", "order", "balance", "shared", "difference", "layers")
    return Grid(head, [_line(name, published) for name, published in CATALOGUE.items()], left, spare)


def presets_page() -> str:
    """Return docs/presets.md."""
    grid = presets_grid()
    sides = "".join("<" if grid.stands_left(title) else ">" for title in grid.head)
    return f"{HEAD}\n{markdown(grid.head, grid.lines, sides)}"


def _line(name: str, published: Published) -> list[str]:
    model, counted, config = published.model, count(published), _run(published).router
    assert config is not None
    apart = [
        f"{here / float(printed) - 1:+.1%}" if printed else NOTHING
        for here, printed in ((counted.total + published.beside, published.total), (counted.active, published.active))
    ]
    return [
        name,
        str(model.num_experts),
        str(model.k),
        str(model.num_shared_experts or NOTHING),
        getattr(config, "order", "score_first").replace("_", " "),
        counted.gate,
        balance(config, published.balance),
        str(model.num_layers),
        f"{counted.total:.4g} B",
        f"{counted.active:.3g} B",
        f"{published.total} B, {published.active + ' B' if published.active else NOTHING}",
        ", ".join(apart),
        published.differs or NOTHING,
        published.source,
    ]


def balance(config: RouterConfig, otherwise: str) -> str:
    """Return what balances a router's loads: its configuration, and what is said besides."""
    terms = [f"{text} {getattr(config, name):g}" for name, text in TERMS.items() if getattr(config, name, 0)]
    return ", ".join([*terms, otherwise] if otherwise else terms) or NOTHING
