"""The way of a batch, once, in one direction: tokens, decisions, loss, feedback, objectives, one backward, observe.

Shape suffixes: B sequences, S sequence length, T = B * S tokens, M routing samples, V vocabulary, L MoE layers, E experts.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from rlroute import metrics
from rlroute.model import Transformer
from rlroute.routing import Feedback, RoutingContext, RoutingDecision, Term
from rlroute.training.data import Batch
from rlroute.training.group import ALONE, Group


@dataclass(frozen=True, eq=False)
class Device:
    """Where and in what precision a forward runs."""

    name: str
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Return autocast to bfloat16 where that is the compute precision."""
        return torch.autocast(self.name, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


@dataclass(frozen=True)
class StepResult:
    """What one batch yielded, before the optimizer step.

    Attributes:
        loss: the language-model loss alone, nats per token.
        terms: each objective term's value per MoE layer, unweighted.
        weights: each term's weight.
        sums_L: what the routers observed, by layer, for ``adapt``.
    """

    loss: float
    terms: dict[str, list[float]]
    weights: dict[str, float]
    sums_L: list[dict[str, Tensor]]

    @property
    def demand_LE(self) -> Tensor:
        """Pairs that chose each expert, by layer; empty for the dense model."""
        return torch.stack([sums["demand_E"] for sums in self.sums_L]).float() if self.sums_L else torch.zeros(0, 0)


def make_context(
    batch: Batch,
    device: Device,
    *,
    seed: int,
    step: int,
    explore: bool,
    samples: int = 1,
    **surroundings: Any,
) -> RoutingContext:
    """Return the context of a batch's tokens, repeated ``samples`` times, sample-major.

    Args:
        batch: a micro-batch.
        device: where the forward runs.
        seed, step: what draws are keyed by.
        explore: whether to sample.
        samples: M.
        surroundings: further fields of the context, from :func:`surroundings`.
    """

    def rows(values: Tensor) -> Tensor:
        return values.reshape(-1).repeat(samples).to(device.name)

    tokens_BS = torch.from_numpy(batch.tokens_BS)
    sequences, length = tokens_BS.shape
    return RoutingContext(
        seed=seed,
        layer=0,
        step=step,
        token_ids_T=rows(tokens_BS),
        position_T=rows(torch.arange(length).expand(sequences, -1)),
        sequence_T=rows(torch.from_numpy(batch.sequence_B)[:, None].expand(-1, length)),
        mask_T=torch.ones(sequences * length * samples, dtype=torch.bool, device=device.name),
        explore=explore,
        num_samples=samples,
        **surroundings,
    )


def surroundings(
    model: Transformer, group: Group, scope: Literal["micro_batch", "batch"] = "micro_batch"
) -> dict[str, Any]:
    """Return what a context says of the other processes: where the experts are, and the sum over the balance scope."""
    fields: dict[str, Any] = {"sum_over_scope": group.sum_over_scope} if scope == "batch" else {}
    if group.placement.shards > 1 and model.routers:
        device_E = group.placement.device_E(model.routers[0].shape.num_experts)
        fields["expert_device_E"] = device_E.to(model.embed.weight.device)
    return fields


def forward(
    model: Transformer, batch: Batch, context: RoutingContext, device: Device
) -> tuple[Tensor, list[RoutingDecision]]:
    """Return each row's own next-token loss in nats, shape (M, T), and the decision of each MoE layer."""
    tokens_BS = context.token_ids_T.view(-1, batch.tokens_BS.shape[1])
    with device.autocast():
        logits_BSV, decisions = model(tokens_BS, context)
    targets_T = torch.from_numpy(batch.targets_BS).reshape(-1).repeat(context.num_samples).to(device.name)
    logits_TV = logits_BSV.flatten(0, 1)
    loss_T = functional.cross_entropy(
        logits_TV.float() if logits_TV.dtype != torch.float64 else logits_TV, targets_T, reduction="none"
    )
    return loss_T.view(context.num_samples, -1), decisions


def split(batch: Batch, parts: int) -> list[Batch]:
    """Return the micro-batches of a batch."""
    size = len(batch.sequence_B) // parts
    micro_batches = []
    for start in range(0, len(batch.sequence_B), size):
        rows = slice(start, start + size)
        domains = None if batch.domains_BS is None else batch.domains_BS[rows]
        micro_batches.append(Batch(batch.tokens_BS[rows], batch.targets_BS[rows], batch.sequence_B[rows], domains))
    return micro_batches


def backward_batch(
    model: Transformer,
    batch: Batch,
    device: Device,
    *,
    seed: int,
    step: int,
    micro_batches: int,
    group: Group = ALONE,
    scope: Literal["micro_batch", "batch"] = "micro_batch",
) -> StepResult:
    """Run a batch forward and backward, leaving the whole group's gradients in the parameters; the result is that of the whole batch.

    Args:
        model: the transformer.
        batch: the step's batch; each rank of the group runs its share of it.
        device: where it runs.
        seed, step: what draws are keyed by.
        micro_batches: the batch is cut into so many.
        group: the processes that train together.
        scope: what balance losses look at: a micro-batch, or what all ranks run at a time.
    """
    around = surroundings(model, group, scope)
    samples = max((router.num_samples for router in model.routers), default=1)
    num_valid = batch.tokens_BS.size
    loss = 0.0
    values: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(model.routers))
    weights: dict[str, float] = {}
    sums_L: list[dict[str, Tensor]] = [{} for _ in model.routers]
    for micro in group.share(split(batch, micro_batches)):
        context = make_context(micro, device, seed=seed, step=step, explore=True, samples=samples, **around)
        loss_MT, decisions = forward(model, micro, context, device)
        feedback = Feedback(context=context, loss_MT=loss_MT.detach(), num_valid=num_valid)
        terms_L = [r.objective(d, feedback) for r, d in zip(model.routers, decisions, strict=True)]
        total = loss_MT.sum() / (num_valid * samples)
        loss += float(total.detach())
        for layer, terms in enumerate(terms_L):
            for name, term in terms.items():
                values[name][layer] += float(term.value.detach())
                weights[name] = term.weight
        torch.autograd.backward(total + weighted(terms_L))
        for sums, router, decision in zip(sums_L, model.routers, decisions, strict=True):
            for name, value in router.observe(decision, feedback).items():
                sums[name] = sums[name] + value if name in sums else value
    model_sums = torch.tensor([loss, *itertools.chain(*values.values())], dtype=torch.float64, device=device.name)
    group.add_up([model_sums, *(value for sums in sums_L for value in sums.values())])
    loss, *flat = model_sums.tolist()
    layers = len(model.routers)
    values = {name: flat[i * layers : (i + 1) * layers] for i, name in enumerate(values)}
    group.sum_gradients(model)
    return StepResult(loss, values, weights, sums_L)


def weighted(terms_L: list[dict[str, Term]]) -> Tensor | float:
    """Return the sum of the weighted terms over layers; a term of weight 0 is left out, so that it cannot touch a gradient."""
    return sum((term.weight * term.value for terms in terms_L for term in terms.values() if term.weight), start=0.0)


def adapt(model: Transformer, result: StepResult) -> None:
    """Hand the step's sums to the routers, once per optimizer step."""
    with torch.no_grad():
        for router, sums in zip(model.routers, result.sums_L, strict=True):
            router.adapt(sums)


def max_vio_L(demand_LE: Tensor) -> list[float]:
    """Return MaxVio of each layer."""
    return [float(metrics.max_vio(demand_E)) for demand_E in demand_LE]


def load_fractions(demand_LE: Tensor) -> list[list[float]]:
    """Return each layer's demand as fractions that sum to 1, to six digits."""
    return [[round(float(f), 6) for f in demand_E / demand_E.sum()] for demand_E in demand_LE]
