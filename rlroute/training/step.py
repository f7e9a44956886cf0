"""The way of a batch, once, in one direction: tokens, decisions, loss, feedback, objectives, one backward, observe.

Shape suffixes: B sequences, S sequence length, T = B * S tokens, M routing samples, V vocabulary, L routed sites, E
experts.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlroute import metrics
from rlroute.learning import learn
from rlroute.model import Transformer
from rlroute.routing import Feedback, RoutingContext, RoutingDecision, Site
from rlroute.training.batches import Batch
from rlroute.training.group import ALONE, Group
from rlroute.transfer import put


@dataclass(frozen=True, eq=False)
class Device:
    """Where and in what precision a forward runs."""

    name: str
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Return autocast to bfloat16 where that is the compute precision."""
        return torch.autocast(self.name, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


@dataclass(frozen=True, eq=False)
class StepResult:
    """What one batch yielded, before the optimizer step. It stays on the device: nothing has waited for it.

    Attributes:
        loss: the language-model loss alone, nats per token; float64.
        terms: each term's value at each site, unweighted; 0 where a site has none of that name; float64 of shape (L,).
        weights: each term's weight at each site.
        sums_L: what ran and what the routers observed, by site, for ``adapt``.
        pairs_L: pairs that ran, those of free experts left out, by site, of all routing samples; int64.
        without_L: rows for which no real expert ran, by site; int64.
        squares_L: mean squares of a row's router logits, summed over rows, by site; NaN without logits; float64.
        rows: valid rows, of all routing samples.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, list[float | Tensor]]
    sums_L: list[dict[str, Tensor]]
    pairs_L: Tensor
    without_L: Tensor
    squares_L: Tensor
    rows: int

    @property
    def demand_L(self) -> list[Tensor]:
        """Pairs that chose each expert, by site."""
        return [sums["demand_E"] for sums in self.sums_L]

    def per_token(self) -> dict[str, Tensor]:
        """Return the pairs that ran per token, the share of tokens for which none did, and the root mean square of the
        router's logits, by site.
        """
        return {
            "pairs_L": self.pairs_L.double() / self.rows,
            "without_L": self.without_L.double() / self.rows,
            "logits_L": (self.squares_L / self.rows).sqrt(),
        }


def make_context(batch: Batch, device: Device, *, samples: int = 1, **keys: Any) -> RoutingContext:
    """Return the context of a batch's tokens, repeated ``samples`` times, sample-major.

    Args:
        batch: a micro-batch.
        device: where the forward runs.
        samples: M.
        keys: further fields of the context: seed, step, explore ...
    """

    def rows(values: Tensor) -> Tensor:
        return values.reshape(-1).repeat(samples)

    sequences, length = batch.tokens_BS.shape
    return RoutingContext(
        site=0,
        token_ids_T=rows(put(batch.tokens_BS, device.name)),
        position_T=rows(torch.arange(length, device=device.name).expand(sequences, -1)),
        sequence_T=rows(put(batch.sequence_B, device.name)[:, None].expand(-1, length)),
        mask_T=torch.ones(sequences * length * samples, dtype=torch.bool, device=device.name),
        num_samples=samples,
        num_sequences=sequences,
        **keys,
    )


def forward(
    model: Transformer, batch: Batch, context: RoutingContext, device: Device
) -> tuple[Tensor, list[RoutingDecision]]:
    """Return each row's own next-token loss in nats, shape (M, T), and the decision of each routed site."""
    tokens_BS = context.token_ids_T.view(-1, batch.tokens_BS.shape[1])
    targets_T = put(batch.targets_BS, device.name).reshape(-1).repeat(context.num_samples)
    with device.autocast():
        loss_T, decisions = model.losses(tokens_BS, targets_T, context)
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
    progress: float = 0.0,
    group: Group = ALONE,
    scope: Literal["micro_batch", "batch"] = "micro_batch",
    on_choices: Callable[[int, dict[Site, Tensor]], None] | None = None,
) -> StepResult:
    """Run a batch forward and backward, leaving the whole group's gradients in the parameters; the result is that of
    the whole batch. The host does not wait for the device.

    Args:
        model: the transformer.
        batch: the step's batch; each rank of the group runs its share of it.
        device: where it runs.
        seed, step: what draws are keyed by.
        micro_batches: the batch is cut into so many.
        progress: the share of the budget that is spent.
        group: the processes that train together.
        scope: what balance losses look at: a micro-batch, or what all ranks run at a time.
        on_choices: told what each micro-batch that this rank runs chose, by its number and by site.
    """
    keys: dict[str, Any] = {"seed": seed, "step": step, "progress": progress, "explore": True}
    if scope == "batch":
        keys["sum_over_scope"] = group.sum_over_scope
    samples = max((router.num_samples for router in model.routers), default=1)
    num_valid, sites = batch.tokens_BS.size, len(model.routers)
    loss = torch.zeros((), dtype=torch.float64, device=device.name)
    nothing = torch.zeros_like(loss)
    values: dict[str, list[Tensor]] = defaultdict(lambda: [nothing] * sites)
    weights: dict[str, list[float | Tensor]] = defaultdict(lambda: [0.0] * sites)
    sums_L: list[dict[str, Tensor]] = [{} for _ in model.routers]
    squares_L = loss.new_zeros(sites)
    for number, micro in group.share(list(enumerate(split(batch, micro_batches)))):
        chosen: dict[Site, Tensor] | None = None if on_choices is None else {}
        context = make_context(micro, device, samples=samples, micro_batch=number, chosen=chosen, **keys)
        loss_MT, decisions = forward(model, micro, context, device)
        if on_choices is not None and chosen is not None:
            on_choices(number, chosen)
        feedback = Feedback(context=context, loss_MT=loss_MT.detach(), num_valid=num_valid)
        total = loss_MT.sum() / (num_valid * samples)
        learned = learn(model.routers, decisions, feedback, total)
        loss += total.detach()
        for site, decision in enumerate(decisions):
            squares_L[site] += metrics.square_sum(decision.logits_TE)
        for site, terms in enumerate(learned.terms_L):
            for name, term in terms.items():
                values[name][site] = values[name][site] + term.value.detach().reshape(())
                weights[name][site] = term.weight
        for sums, new in zip(sums_L, learned.sums_L, strict=True):
            for name, value in new.items():
                sums[name] = sums[name] + value if name in sums else value
    terms_L = {name: torch.stack(value_L) for name, value_L in values.items()}
    group.add_up([loss, *terms_L.values(), *(value for sums in sums_L for value in sums.values()), squares_L])
    group.sum_gradients(model)
    real_L = [router.shape.num_real_experts for router in model.routers]
    ran_L2 = [torch.stack([s["load_E"][:real].sum(), s["without"]]) for s, real in zip(sums_L, real_L, strict=True)]
    pairs_L, without_L = torch.stack(ran_L2, dim=1) if sites else loss.new_zeros(2, 0)
    return StepResult(loss, terms_L, dict(weights), sums_L, pairs_L, without_L, squares_L, num_valid * samples)


def load_fractions(demand_L: Sequence[Tensor]) -> list[Tensor]:
    """Return each site's demand as fractions that sum to 1; zeros where nothing was chosen."""
    return [demand_E.float() / demand_E.sum().clamp(min=1) for demand_E in demand_L]


def rounded(fractions_LE: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return load fractions to six digits, as records have them."""
    return [[round(fraction, 6) for fraction in fractions_E] for fractions_E in fractions_LE]


def max_vio_L(demand_L: Sequence[Tensor]) -> list[Tensor]:
    """Return MaxVio of each site; NaN where nothing was chosen."""
    return [metrics.max_vio(demand_E.float()) for demand_E in demand_L]
