"""A step of training as a router sees it, small enough for the laws: shapes, keys, batches, and what comes of them.

Shape suffixes: T tokens (rows of all routing samples), D model width, V vocabulary, E experts, R routed pairs, M
routing samples.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlroute import learning
from rlroute.balance import regularisers
from rlroute.coupling import terms_of_weights
from rlroute.learning import learn
from rlroute.model.wishes import stand_in
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext, RoutingDecision, Sums, Term

D, V = 6, 11


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return fixed standard normal draws in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_shape(experts: int = 8, k: int = 2, **fields: Any) -> RouterShape:
    """Return a layer of 6 features and 11 tokens whose counts are known and skewed."""
    counts_V = torch.arange(1, V + 1) ** 2
    defaults: dict[str, Any] = {"d_model": D, "site": 1, "vocab_size": V, "seed": 0, "token_counts_V": counts_V}
    return RouterShape(num_experts=experts, k=k, **(defaults | fields))


def make_context(tokens: int = 12, length: int = 4, samples: int = 1, **fields: Any) -> RoutingContext:
    """Return the context of ``tokens`` tokens in sequences of ``length``, in training, repeated for each routing
    sample.
    """
    rows_T = torch.arange(tokens).repeat(samples)
    defaults: dict[str, Any] = {
        "seed": 0,
        "site": 1,
        "step": 0,
        "token_ids_T": 7 * rows_T % V,
        "position_T": rows_T % length,
        "sequence_T": 100 + rows_T // length,
        "mask_T": torch.ones_like(rows_T, dtype=torch.bool),
        "explore": True,
        "num_samples": samples,
    }
    return RoutingContext(**(defaults | fields))


def make_feedback(context: RoutingContext, loss_T: Tensor | None = None, num_valid: int | None = None) -> Feedback:
    """Return feedback on all rows of a context; losses are 2 nats and the step is this micro-batch unless said
    otherwise.
    """
    rows, samples = len(context.mask_T), context.num_samples
    loss_T = torch.full((rows,), 2.0, dtype=torch.float64) if loss_T is None else loss_T
    valid = int(context.mask_T.sum()) // samples if num_valid is None else num_valid
    return Feedback(context=context, loss_MT=loss_T.view(samples, -1), num_valid=valid)


def terms_of(router: Router, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
    """Return the terms of a router's configuration, and its own."""
    shared = regularisers(router, decision, feedback) | terms_of_weights(router, decision, feedback)
    return shared | router.objective(decision, feedback)


def sums_of(router: Router, decision: RoutingDecision, feedback: Feedback) -> Sums:
    """Return a micro-batch's sums, as a step of one micro-batch and one site hands them to ``adapt``."""
    sums = learning.count(decision, feedback) | router.observe(decision, feedback)
    return Sums(sums, [sums])


@dataclass(frozen=True, eq=False)
class Batch:
    """What a step hands to a router: inputs, keys, each token's loss, and what each expert's output would be worth to a
    token.
    """

    x_TD: Tensor
    credit_TE: Tensor
    loss_T: Tensor
    context: RoutingContext
    num_valid: int

    def rows(self, keep: Tensor) -> "Batch":
        """Return the micro-batch of these rows (or the same rows in another order)."""
        keys = ("token_ids_T", "position_T", "sequence_T", "mask_T")
        context = replace(self.context, **{name: getattr(self.context, name)[keep] for name in keys})
        return Batch(self.x_TD[keep], self.credit_TE[keep], self.loss_T[keep], context, self.num_valid)

    @property
    def feedback(self) -> Feedback:
        return make_feedback(self.context, self.loss_T, self.num_valid)


def make_batch(router: Router, tokens: int = 12, loss_seed: int = 3, **context: Any) -> Batch:
    made = make_context(tokens, samples=router.num_samples, **context)
    rows, dtype = tokens * router.num_samples, next((p.dtype for p in router.parameters()), torch.float64)
    x_TD = draw(rows, router.shape.d_model, seed=1).to(dtype)
    credit_TE = draw(rows, router.shape.num_experts, seed=2).to(dtype)
    valid = int(made.mask_T.sum()) // router.num_samples
    return Batch(x_TD, credit_TE, draw(rows, seed=loss_seed).abs().to(dtype), made, valid)


def decide(router: Router, tokens: int = 12, **context: Any) -> RoutingDecision:
    batch = make_batch(router, tokens, **context)
    decision: RoutingDecision = router(batch.x_TD, batch.context)
    return decision


def run(router: Router, batch: Batch) -> RoutingDecision:
    """Return a router's decision on a batch, as a layer would hand it back."""
    return stand_in(router, router(batch.x_TD, batch.context), batch.x_TD)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Weighted terms, gradients by parameter, and sums for ``adapt``."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    sums: dict[str, Tensor]

    def __add__(self, other: "Outcome") -> "Outcome":
        parts = ("values", "gradients", "sums")
        pairs = [(getattr(self, part), getattr(other, part)) for part in parts]
        return Outcome(*({name: mine[name] + theirs[name] for name in mine} for mine, theirs in pairs))

    def close_to(self, other: "Outcome", tolerance: float = 1e-12) -> bool:
        mine, theirs = (outcome.values | outcome.gradients | outcome.sums for outcome in (self, other))
        assert mine.keys() == theirs.keys()
        return all(torch.allclose(mine[n].double(), theirs[n].double(), rtol=0, atol=tolerance) for n in mine)


def backward(router: Router, batch: Batch, *, terms: bool = True, interrupted: bool = False) -> Outcome:
    """Run one micro-batch as the loop does; the language-model loss is the gates times what each expert is worth to the
    token.
    """
    router.zero_grad()
    decision = run(router, batch)
    if interrupted:
        evaluate(router)
    used_R = decision.used_R & batch.context.mask_T[decision.token_ids_R]
    credit_R = batch.credit_TE[decision.token_ids_R, decision.expert_ids_R.clamp(max=decision.num_experts - 1)]
    loss = torch.where(used_R, decision.gates_R * credit_R, 0.0).sum() / batch.num_valid
    for added in (decision.self_T, decision.shared_gates_TS, decision.fill_TD):
        if added is not None:
            worth_T = batch.credit_TE[:, 0] * batch.context.mask_T
            loss = loss + (worth_T * added.view(len(worth_T), -1).sum(1)).sum() / batch.num_valid
    if terms:
        learned = learn([router], [decision], batch.feedback, loss)
        found, sums = learned.terms_L[0], learned.sums_L[0]
    else:
        found, sums = {}, {}
        if loss.requires_grad:
            torch.autograd.backward(loss)
    return Outcome(
        {name: term.weight * term.value.detach() for name, term in found.items()},
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in router.named_parameters()},
        sums,
    )


def evaluate(router: Router) -> RoutingDecision:
    with torch.no_grad():
        return decide(router, tokens=8, explore=False)


def adapt(router: Router, sums: dict[str, Tensor]) -> None:
    learning.adapt([router], [sums], progress=0.0)


def with_a_past(router: Router) -> Router:
    """Let the router see one step: running means start there."""
    adapt(router, backward(router, make_batch(router, loss_seed=9)).sums)
    return router


def state(router: Router) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in router.state_dict().items()}


def same(a: Any, b: Any) -> bool:
    """Whether two decisions (or parts of decisions, or states) agree bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, RoutingDecision):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return bool(a == b)


def gates_TE(decision: RoutingDecision) -> Tensor:
    """The gate of each expert for each token, 0 where it was not chosen: a decision whatever the order of its pairs."""
    table_TE = decision.gates_R.new_zeros(decision.num_tokens, decision.num_experts + 1)
    places = (decision.token_ids_R, decision.expert_ids_R)
    return table_TE.index_put(places, decision.gates_R, accumulate=True)[:, :-1].detach()


def spread(router: Router) -> Router:
    """Move a router's parameters so far that its scores differ, and what it drew or dropped shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return router
