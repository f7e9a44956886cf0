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
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlroute import metrics, seeding
from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.envs.clusters import NOISE, VOCAB_PER_EXPERT, WIDTH, Clusters
from rlroute.errors import ConfigError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.statistics import wilson
from rlroute.experiments.text import NOTHING, between, markdown
from rlroute.kernels import gather_linear, make_plan
from rlroute.model.moe import apply_gate_form
from rlroute.registry import router_class
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext, RoutingDecision
from rlroute.training.step import weighted

FORMS = ("own", "unit")
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
        loss, sampled_loss: mean squared error per coordinate.
        overlap: share of tokens whose greedy and drawn experts agree.
        merged: clusters less the experts that are some cluster's main one.
        nmi: normalised mutual information of cluster and expert.
        max_vio: highest load over the fair share, minus 1.
        arrived: the first step at which the loss was at most ``NEAR`` times the Bayes loss.
    """

    loss: float
    merged: int
    nmi: float
    max_vio: float
    arrived: int | None
    sampled_loss: float | None = None
    overlap: float | None = None


class _Tokens:
    """Tokens of the task, drawn from a key."""

    def __init__(self, task: Clusters, count: int, *key: int | str) -> None:
        generator, width = seeding.numpy_generator("clusters", *key), max(WIDTH, task.experts)
        self.label_T = generator.choice(task.experts, size=count, p=task.prior_E)
        x_TD = task.centres()[self.label_T] + task.sigma * generator.standard_normal((count, task.features))
        z_TW = generator.standard_normal((count, width))
        shift_TW = (np.arange(width) - self.label_T[:, None]) % width
        y_TW = np.take_along_axis(z_TW, shift_TW, 1) + NOISE * generator.standard_normal((count, width))
        self.x_TD, self.z_TW, self.y_TW = (torch.from_numpy(a.astype(np.float32)) for a in (x_TD, z_TW, y_TW))
        self.id_T = torch.from_numpy(generator.integers(VOCAB_PER_EXPERT * task.experts, size=count))

    def context(self, seed: int, step: int, explore: bool, samples: int = 1) -> RoutingContext:
        rows_T = torch.arange(len(self.id_T)).repeat(samples)
        return RoutingContext(
            seed=seed,
            layer=0,
            step=step,
            token_ids_T=self.id_T.repeat(samples),
            position_T=torch.zeros_like(rows_T),
            sequence_T=rows_T,
            mask_T=torch.ones_like(rows_T, dtype=torch.bool),
            explore=explore,
            num_samples=samples,
        )


class _Layer:
    """A router and linear experts, as the MoE layer has them."""

    def __init__(self, router: Router, experts_EWW: Tensor, form: str) -> None:
        self.router, self.experts_EWW, self.form = router, experts_EWW, form

    def losses(self, tokens: _Tokens, context: RoutingContext) -> tuple[Tensor, RoutingDecision]:
        """Return each row's loss, shape (M * T,), and the decision."""
        samples = context.num_samples
        decision = self.router(tokens.x_TD.repeat(samples, 1), context)
        decision = apply_gate_form(decision, self.form, 1)
        plan = make_plan(decision)
        y_RW = gather_linear(tokens.z_TW.repeat(samples, 1), plan, self.experts_EWW)
        gated_RW = decision.gates_R[plan.pairs_R, None] * y_RW
        out_TW = torch.zeros_like(tokens.y_TW.repeat(samples, 1)).index_add(0, plan.tokens_R, gated_RW)
        return (out_TW - tokens.y_TW.repeat(samples, 1)).square().mean(1), decision


def train(entry: str, task: Clusters, form: str, seed: int, how: Ladder) -> Outcome:
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
        _step(layer, optimizer, _Tokens(task, how.tokens, seed, step), seed, step)
        if arrived is None and (step + 1) % EVERY == 0 and _evaluate(layer, held_out, seed, False)[0] <= limit:
            arrived = step + 1
    loss, ids_T = _evaluate(layer, held_out, seed, False)
    sampled_loss = overlap = None
    if router.stochastic:
        sampled_loss, drawn_T = _evaluate(layer, held_out, seed, True)
        overlap = float((drawn_T == ids_T).double().mean())
    agreement = _agreement(held_out.label_T, ids_T.numpy(), task.experts)
    return Outcome(loss=loss, sampled_loss=sampled_loss, overlap=overlap, arrived=arrived, **agreement)


def _router(entry: str, task: Clusters, seed: int) -> Router:
    model = ModelConfig(num_experts=task.experts, k=1)
    config = build_entry(entry, DataConfig(), model, TrainConfig()).router
    if config is None:
        raise ConfigError(f"entry {entry!r}: the clusters have no dense model, legal are routers")
    vocabulary = VOCAB_PER_EXPERT * task.experts
    shape = RouterShape(
        d_model=task.features,
        num_experts=task.experts,
        k=1,
        layer=0,
        vocab_size=vocabulary,
        seed=seed,
        token_counts_V=torch.ones(vocabulary, dtype=torch.long),
    )
    return router_class(config.name)(config, shape)


def _step(layer: _Layer, optimizer: torch.optim.Optimizer, tokens: _Tokens, seed: int, step: int) -> None:
    router, count = layer.router, len(tokens.id_T)
    context = tokens.context(seed, step, True, router.num_samples)
    loss_T, decision = layer.losses(tokens, context)
    if decision.gates_R.requires_grad:
        decision.gates_R.retain_grad()
    feedback = Feedback(context=context, loss_MT=loss_T.detach().view(router.num_samples, count), num_valid=count)
    total = loss_T.mean() + weighted([router.objective(decision, feedback)])
    optimizer.zero_grad()
    torch.autograd.backward(total)
    sums = router.observe(decision, feedback)
    optimizer.step()
    with torch.no_grad():
        router.adapt(sums)


@torch.no_grad()
def _evaluate(layer: _Layer, tokens: _Tokens, seed: int, explore: bool) -> tuple[float, Tensor]:
    """Return the mean loss and the expert of each token (its first pair)."""
    loss_T, decision = layer.losses(tokens, tokens.context(seed, -1, explore))
    return float(loss_T.mean()), decision.expert_ids_R


def _agreement(label_T: Any, expert_T: Any, experts: int) -> dict[str, Any]:
    """Return how clusters and experts belong together."""
    joint_EE = np.zeros((experts, experts))
    np.add.at(joint_EE, (label_T, expert_T), 1.0)
    load_E = torch.from_numpy(joint_EE.sum(0))
    return {
        "merged": experts - len(np.unique(joint_EE.argmax(1))),
        "nmi": mutual_information(joint_EE),
        "max_vio": float(metrics.max_vio(load_E)),
    }


def mutual_information(counts: Any) -> float:
    """Return the mutual information of rows and columns over the mean of their entropies; 0 where both are constant."""
    joint = counts / counts.sum()
    rows, columns = joint.sum(1), joint.sum(0)

    def entropy(p: Any) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    total = entropy(rows) + entropy(columns)
    return 2 * (total - entropy(joint.ravel())) / total if total else 0.0


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

    def trained_as(name: str, form: str, entry: str) -> tuple[str, str, str]:
        """Return the cell whose runs serve this one: a gate that does not learn is 1/k in either form."""
        return (name, form if "gate" in routers[entry].learns_from else FORMS[0], entry)

    spawn = multiprocessing.get_context("spawn")  # a forked torch may hang
    rows = []
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures = {
            (name, form, entry): [pool.submit(train, entry, TASKS[name], form, seed, how) for seed in seeds]
            for name, form, entry in cells
            if (name, form, entry) == trained_as(name, form, entry)
        }
        for name, form, entry in cells:
            outcomes = [asdict(run.result()) for run in futures[trained_as(name, form, entry)]]
            rows.append({"task": name, "gate": form, "entry": entry, "seeds": list(seeds), "outcomes": outcomes})
            say(f"{len(rows)} of {len(cells)}: {entry}, {name}, gate {form}: loss {_mean(outcomes, 'loss'):.4f}")
    return rows


def _mean(outcomes: Sequence[dict[str, Any]], name: str) -> float:
    values = [one[name] for one in outcomes if one[name] is not None]
    return math.fsum(values) / len(values) if values else math.nan


COLUMNS = (
    *("router", "loss", "worst seed", "sampled loss", "overlap", "merged", "seeds with none merged"),
    *("NMI", "MaxVio", "steps to 1.5 Bayes"),
)


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return one table per task and gate form, best first, with the task's ladder underneath."""
    parts = []
    for task, form in dict.fromkeys((row["task"], row["gate"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["gate"]) == (task, form)]
        mine.sort(key=lambda row: _mean(row["outcomes"], "loss"))
        table = markdown(COLUMNS, map(_line, mine), tight=True)
        ladder = ", ".join(f"{name} {loss:.4f}" for name, loss in TASKS[task].ladder().items())
        title = f"**{task} clusters, gate {form}**"
        parts.append(f"{title}\n\n{table}\n\nIn closed form, with experts that fit: {ladder}.\n")
    return "\n".join(parts)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    runs = row["outcomes"]
    none_merged = sum(run["merged"] == 0 for run in runs)
    arrived = [run["arrived"] for run in runs if run["arrived"] is not None]
    when = f"{sorted(arrived)[len(arrived) // 2]} ({len(arrived)} of {len(runs)})" if arrived else "never"
    drawn = [f"{_mean(runs, name):{spec}}" for name, spec in (("sampled_loss", ".4f"), ("overlap", ".2f"))]
    drawn = drawn if runs[0]["overlap"] is not None else [NOTHING, NOTHING]
    return (
        row["entry"],
        f"{_mean(runs, 'loss'):.4f}",
        f"{max(run['loss'] for run in runs):.4f}",
        *drawn,
        f"{_mean(runs, 'merged'):.1f}",
        f"{none_merged} of {len(runs)} {between(*wilson(none_merged, len(runs)))}",
        f"{_mean(runs, 'nmi'):.3f}",
        f"{_mean(runs, 'max_vio'):.2f}",
        when,
    )
