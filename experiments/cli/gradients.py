"""The command ``gradients``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from rlroute.experiments.cli.common import command_line
from rlroute.experiments.cli.folders import make_folder
from rlroute.experiments.cli.include import name_broken
from rlroute.experiments.cli.output import show
from rlroute.limits import Positive, Size

if TYPE_CHECKING:
    from rlroute.experiments.gradients.instrument import Sweep, Unmeasured


def gradients(
    entries: tyro.conf.Positional[tuple[str, ...]] = (),
    experts: str = "4",
    k: str = "1",
    layers: str = "1,2",
    tokens: str = "3",
    one_at_a_time: bool = False,
    train_steps: str = "0,50",
    draws: int = 1000,
    samples: int = 32,
    warm_up: int = 20,
    seeds: int = 4,
    gate_form: Literal["own", "unit"] = "own",
    attention: bool = False,
    corpus: str = "synth:documents=512,vocab=32,domains=4",
    d_model: Size = 32,
    batch_size: Size = 32,
    lr: Positive = 8e-3,
    out: Path = Path("results/gradients"),
) -> None:
    """Measure the learning signal at the router's logits: what training micro-batches give ENTRIES against the exact
    gradient.

    Args:
        entries: routers or estimators, as `reinforce:baseline=ema`; by default every router that takes all
            sizes, and the estimators of reinforce.
        experts: numbers of experts, as `2,4`; this and the next four make a sweep over all combinations.
        k: experts per token.
        layers: MoE layers of the model.
        tokens: tokens of the measured micro-batch, one sequence. Exact to 4096 joint choices: for k = 1, E^(tokens *
            layers).
        one_at_a_time: vary one of these four sizes at a time, the others at their first value.
        train_steps: measure after so many steps of real training.
        draws: micro-batches drawn per measurement, where what they can give is not enumerated as well.
        samples: sampled joint choices of a conditional gradient, beyond 4096.
        warm_up: steps for running means and value heads before a measurement.
        seeds: seeds 0 to seeds - 1: weights, data, measured tokens and draws.
        gate_form: own: the router's gate; unit: value 1/k, gradient of the router's gate.
        attention: give each attention as many experts, and a router of its own.
        corpus: what is trained and measured on.
        d_model: width of the model, and of an expert.
        batch_size: sequences of a training step, each as long as --tokens.
        lr: peak learning rate of that training.
        out: folder for gradients.md, gradients.json and gradients.html.
    """
    import torch

    from rlroute.experiments.gradients import instrument

    name_broken(*entries)
    numbers = instrument.parse_numbers
    sweep = instrument.Sweep(
        entries=entries or instrument.default_entries(),
        experts=numbers("experts", experts),
        k=numbers("k", k),
        layers=numbers("layers", layers),
        tokens=numbers("tokens", tokens),
        one_at_a_time=one_at_a_time,
        train_steps=numbers("train_steps", train_steps),
        draws=draws,
        samples=samples,
        warm_up=warm_up,
        seeds=seeds,
        gate_form=gate_form,
        attention=attention,
        corpus=corpus,
        d_model=d_model,
        batch_size=batch_size,
        lr=lr,
    )
    sweep, left_out = (sweep, []) if entries else instrument.without_refusals(sweep)
    make_folder(out)
    torch.set_num_threads(1)
    show(_publish_gradients(sweep, left_out, out))
    print(f"table in {out}/gradients.md, all figures in {out}/gradients.json, page in {out}/gradients.html")


def _publish_gradients(sweep: Sweep, left_out: list[Unmeasured], out: Path) -> str:
    """Measure, write the table, the figures and the page, and return the table's text."""
    from rlroute.experiments.gradients import page
    from rlroute.experiments.gradients.instrument import run
    from rlroute.experiments.report.style import new_figure
    from rlroute.records import write_atomically
    from rlroute.training.data import load_corpus

    new_figure("", "", 100)  # without Plotly this fails now rather than after the work
    rows, unmeasured = run(sweep, lambda text: print(text, file=sys.stderr, flush=True))
    unmeasured = left_out + unmeasured
    text = page.to_markdown(rows, unmeasured)
    provenance = load_corpus(sweep.corpus).provenance
    write_atomically(out / "gradients.md", text + "\n")
    write_atomically(out / "gradients.json", page.to_json(sweep, rows, unmeasured, command_line(), provenance))
    write_atomically(out / "gradients.html", page.render(rows, unmeasured, sweep, command_line()))
    return text
