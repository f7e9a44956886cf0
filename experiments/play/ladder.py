"""``rlroute compare --task clusters``: every router on a task whose best score is known, with experts that are learned
too.

Latent clusters (``rlroute.envs.clusters``): the router sees mu_c + sigma * noise, the experts see z, the target is Q_c
z + noise. Expert e is a linear map, learned from its tokens beside the router; one token in a wrong expert costs about
2, a merged pair of clusters costs each of its tokens half of that. Data are drawn from (seed, step), the same for every
router.

Shape suffixes: T tokens, D features, W coordinates of the experts' input, E clusters and experts, R pairs, M routing
samples.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics, seeding
from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.envs.clusters import NOISE, VOCAB_PER_EXPERT, WIDTH, Clusters
from rlroute.errors import ConfigError
from rlroute.experiments.play.agreement import agreement
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.statistics import wilson
from rlroute.experiments.text import NOTHING, between, markdown
from rlroute.kernels import gather_linear, make_plan
from rlroute.learning import adapt, learn
from rlroute.model.moe import add_beside_pairs, decide
from rlroute.registry import make_router, naming_defects
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.transfer import defined

Form = Literal["own", "unit"]
FORMS: tuple[Form, ...] = get_args(Form)
TASKS = {"uniform": Clusters(experts=8), "skewed": Clusters(experts=16, features=16, skew=1.2)}
VALIDATION, EVERY = 4096, 25
NEAR = 1.5
"""A router has arrived when its loss is at most 1.5 times that of the Bayes router."""


@dataclass(frozen=True)
class Ladder:
    """How a router is trained on the task."""

    steps: int = 800
    tokens: int = 512
    lr: float = 3e-3
    """Learning rate of Adam for the experts."""
    router_lr_scale: float = 5.0
    """The router's over the experts'."""


@dataclass(frozen=True)
class Outcome:
    """What a run reached, greedy; for routers that draw also as they draw in training.

    Attributes:
        loss, sampled_loss: mean squared error per coordinate; None where training diverged.
        overlap: share of the drawn pairs of token and expert that are greedy ones too.
        merged: clusters less the experts that are some cluster's main one.
        nmi: normalised mutual information of cluster and expert, over the chosen pairs; None where there are none.
        max_vio: highest load over the fair share, minus 1; None where nothing was chosen.
        arrived: the first step at which the loss was at most ``NEAR`` times the Bayes loss.
        pairs, without: pairs that ran per token, and the share of tokens for which none did.
    """

    loss: float | None
    merged: int
    nmi: float | None
    max_vio: float | None
    arrived: int | None
    sampled_loss: float | None = None
    overlap: float | None = None
    pairs: float = 1.0
    without: float = 0.0


class _Tokens:
    """Tokens of the task, drawn from a key."""

    def __init__(self, task: Clusters, count: int, *key: int | str) -> None:
        generator, width = seeding.numpy_generator("clusters", *key), max(WIDTH, task.experts)
        label_T = generator.choice(task.experts, size=count, p=task.prior_E)
        x_TD = task.centres()[label_T] + task.sigma * generator.standard_normal((count, task.features))
        z_TW = generator.standard_normal((count, width))
        shift_TW = (np.arange(width) - label_T[:, None]) % width
        y_TW = np.take_along_axis(z_TW, shift_TW, 1) + NOISE * generator.standard_normal((count, width))
        self.x_TD, self.z_TW, self.y_TW = (torch.from_numpy(a.astype(np.float32)) for a in (x_TD, z_TW, y_TW))
        self.label_T = torch.from_numpy(label_T)
        self.id_T = torch.from_numpy(generator.integers(VOCAB_PER_EXPERT * task.experts, size=count))

    def context(self, seed: int, step: int, explore: bool, progress: float, samples: int = 1) -> RoutingContext:
        rows_T = torch.arange(len(self.id_T)).repeat(samples)
        return RoutingContext(
            seed=seed,
            site=0,
            step=step,
            progress=progress,
            token_ids_T=self.id_T.repeat(samples),
            position_T=torch.zeros_like(rows_T),
            sequence_T=rows_T,
            mask_T=torch.ones_like(rows_T, dtype=torch.bool),
            explore=explore,
            num_samples=samples,
        )


class _Layer:
    """A router and linear experts, as the MoE layer has them."""

    def __init__(self, router: Router, experts_EWW: Tensor, form: Form) -> None:
        self.router, self.experts_EWW = router, experts_EWW
        self.config = ModelConfig(num_experts=len(experts_EWW), k=1, gate_form=form)

    def losses(self, tokens: _Tokens, context: RoutingContext) -> tuple[Tensor, RoutingDecision]:
        """Return each row's loss, shape (M * T,), and the decision."""
        x_TD, z_TW, y_TW = (rows.repeat(context.num_samples, 1) for rows in (tokens.x_TD, tokens.z_TW, tokens.y_TW))
        decision = decide(self.router, x_TD, context, self.config)
        plan = make_plan(decision)
        gated_RW = decision.gates_R[plan.pairs_R, None] * gather_linear(z_TW, plan, self.experts_EWW)
        out_TW = torch.zeros_like(y_TW).index_add(0, plan.tokens_R, gated_RW)
        out_TW = add_beside_pairs(out_TW, decision, z_TW)
        return (out_TW - y_TW).square().mean(1), decision


@naming_defects()  # here: between processes an error loses its traceback, and may not even be picklable
def train(entry: str, task: Clusters, form: Form, seed: int, how: Ladder) -> Outcome:
    """Train a router and its experts on the task and return what they reached."""
    torch.set_num_threads(1)
    router = _router(entry, task, seed)
    width = max(WIDTH, task.experts)
    experts_EWW = torch.empty(task.experts, width, width)
    for expert in range(task.experts):
        seeding.init_normal(experts_EWW[expert], width**-0.5, seed, "clusters.experts", expert)
    layer = _Layer(router, experts_EWW.requires_grad_(), form)
    groups = [{"params": [experts_EWW], "lr": how.lr}]
    groups += [{"params": list(router.parameters()), "lr": how.lr * how.router_lr_scale}]
    optimizer = torch.optim.Adam(groups)
    held_out, limit = _Tokens(task, VALIDATION, seed, "validation"), NEAR * task.ladder()["bayes"]
    arrived = None
    for step in range(how.steps):
        _step(layer, optimizer, _Tokens(task, how.tokens, seed, step), seed, step, step / how.steps)
        if arrived is None and (step + 1) % EVERY == 0 and _evaluate(layer, held_out, seed, False)[0] <= limit:
            arrived = step + 1
    loss, greedy = _evaluate(layer, held_out, seed, False)
    sampled_loss = overlap = None
    if router.stochastic:
        drawn_loss, drawn = _evaluate(layer, held_out, seed, True)
        sampled_loss = defined(drawn_loss)
        overlap = defined(metrics.overlap(drawn, greedy))
    found = agreement(held_out.label_T, greedy)
    return Outcome(loss=defined(loss), sampled_loss=sampled_loss, overlap=overlap, arrived=arrived, **found)


def _router(entry: str, task: Clusters, seed: int) -> Router:
    model = ModelConfig(num_experts=task.experts, k=1)
    config = build_entry(entry, DataConfig(), model, TrainConfig()).router
    if config is None:
        raise ConfigError(f"entry {entry!r}: the clusters have no dense model, legal are routers")
    return make_router(config, router_shape(task, seed))


def router_shape(task: Clusters, seed: int) -> RouterShape:
    """Return what a task's router is built for."""
    vocabulary = VOCAB_PER_EXPERT * task.experts
    return RouterShape(
        d_model=task.features,
        num_experts=task.experts,
        k=1,
        site=0,
        vocab_size=vocabulary,
        seed=seed,
        token_counts_V=torch.ones(vocabulary, dtype=torch.long),
        grants=frozenset(),
    )


def _step(
    layer: _Layer, optimizer: torch.optim.Optimizer, tokens: _Tokens, seed: int, step: int, progress: float
) -> None:
    router, count = layer.router, len(tokens.id_T)
    context = tokens.context(seed, step, True, progress, router.num_samples)
    loss_T, decision = layer.losses(tokens, context)
    feedback = Feedback(context=context, loss_MT=loss_T.detach().view(router.num_samples, count), num_valid=count)
    optimizer.zero_grad()
    learned = learn([router], [decision], feedback, loss_T.mean())
    optimizer.step()
    adapt([router], learned.sums_L, progress)


@torch.no_grad()
def _evaluate(layer: _Layer, tokens: _Tokens, seed: int, explore: bool) -> tuple[float, RoutingDecision]:
    """Return the mean loss and the decision, where schedules have ended."""
    loss_T, decision = layer.losses(tokens, tokens.context(seed, -1, explore, progress=1.0))
    return float(loss_T.mean()), decision


def compare(
    entries: Sequence[str], seeds: Sequence[int], how: Ladder, workers: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train every entry on both tasks and with both gate forms, and return one row per entry, task and form with its
    outcomes.

    Args:
        entries: routers, or ``router:field=value,...``.
        seeds: of initial weights, data and draws.
        how: the training.
        workers: processes, one thread each.
        say: told of progress.

    Raises:
        ConfigError: an illegal entry, before any work.
    """
    routers = {entry: _router(entry, task, 0) for task in TASKS.values() for entry in entries}
    cells = list(product(TASKS, FORMS, entries))

    def trained_as(name: str, form: Form, entry: str) -> tuple[str, Form, str]:
        """Return the cell whose runs serve this one: a gate that does not learn is 1/k in either form."""
        return (name, form if "gate" in routers[entry].learns_from else FORMS[0], entry)

    spawn = multiprocessing.get_context("spawn")  # a forked torch may hang
    rows = []
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool, ExitStack() as stopped:
        stopped.callback(pool.shutdown, wait=False, cancel_futures=True)  # what has not begun need not, after Ctrl-C
        futures = {
            (name, form, entry): [pool.submit(train, entry, TASKS[name], form, seed, how) for seed in seeds]
            for name, form, entry in cells
            if (name, form, entry) == trained_as(name, form, entry)
        }
        for name, form, entry in cells:
            runs = [run.result() for run in futures[trained_as(name, form, entry)]]
            outcomes = [asdict(run) for run in runs]
            rows.append({"task": name, "gate": form, "entry": entry, "seeds": list(seeds), "outcomes": outcomes})
            say(f"{len(rows)} of {len(cells)}: {entry}, {name}, gate {form}: loss {_shown(runs, 'loss', '.4f')}")
    return rows


def _defined(runs: Sequence[Outcome], name: str) -> list[float]:
    return [value for run in runs if (value := getattr(run, name)) is not None]


def _mean(runs: Sequence[Outcome], name: str) -> float:
    values = _defined(runs, name)
    return math.fsum(values) / len(values)


def _shown(runs: Sequence[Outcome], name: str, spec: str) -> str:
    """Return the mean over the runs in which it is defined."""
    return f"{_mean(runs, name):{spec}}" if _defined(runs, name) else NOTHING


COLUMNS = (
    *("router", "loss", "worst seed", "sampled loss", "overlap", "merged", "seeds with none merged"),
    *("NMI", "MaxVio", "steps to 1.5 Bayes"),
)


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return one table per task and gate form, best first, with the task's ladder underneath.

    Routers that did not run one expert for each token are named below it with what they ran.
    """
    parts = []
    for task, form in dict.fromkeys((row["task"], row["gate"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["gate"]) == (task, form)]
        runs_of = [(row["entry"], [Outcome(**run) for run in row["outcomes"]]) for row in mine]
        runs_of.sort(key=lambda item: math.fsum(_losses(item[1])) / len(item[1]))
        table = markdown(COLUMNS, [_line(entry, runs) for entry, runs in runs_of], tight=True)
        ladder = ", ".join(f"{name} {loss:.4f}" for name, loss in TASKS[task].ladder().items())
        title, other = f"**{task} clusters, gate {form}**", _what_ran(runs_of)
        parts.append(f"{title}\n\n{table}\n\nIn closed form, with experts that fit: {ladder}.\n{other}")
    return "\n".join(parts)


def _line(entry: str, runs: Sequence[Outcome]) -> tuple[str, ...]:
    none_merged = sum(run.merged == 0 for run in runs)
    arrived = [run.arrived for run in runs if run.arrived is not None]
    when = f"{sorted(arrived)[len(arrived) // 2]} ({len(arrived)} of {len(runs)})" if arrived else "never"
    return (
        entry,
        _shown(runs, "loss", ".4f"),
        _worst(runs),
        _shown(runs, "sampled_loss", ".4f"),
        _shown(runs, "overlap", ".2f"),
        _shown(runs, "merged", ".1f"),
        f"{none_merged} of {len(runs)} {between(*wilson(none_merged, len(runs)))}",
        _shown(runs, "nmi", ".3f"),
        _shown(runs, "max_vio", ".2f"),
        when,
    )


def _losses(runs: Sequence[Outcome]) -> list[float]:
    """Return the runs' losses, infinite where training diverged."""
    return [math.inf if run.loss is None else run.loss for run in runs]


def _worst(runs: Sequence[Outcome]) -> str:
    diverged = sum(run.loss is None for run in runs)
    return f"{diverged} of {len(runs)} diverged" if diverged else f"{max(_losses(runs)):.4f}"


def _what_ran(runs_of: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    """Return a line on the routers that ran another number of pairs than one for each token, if there are any."""
    said = [
        f"{entry} ran {_mean(runs, 'pairs'):.2f} pairs per token, and none for {_mean(runs, 'without'):.1%} of tokens"
        for entry, runs in runs_of
        if any(run.pairs != 1 or run.without for run in runs)
    ]
    return f"\nNot one expert for each token: {'; '.join(said)}.\n" if said else ""
