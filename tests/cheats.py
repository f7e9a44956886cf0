"""A router that does by its configuration what it may not, or what others may but must say; nothing of it is declared.

Shape suffixes: T tokens, D model width, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rlroute.config import RouterConfig
from rlroute.gates import softmax_top_k
from rlroute.routing import Feedback, LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums, Term


class CheatRouter(Router):
    """Softmax top-k, but for what ``how`` says."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        how: str = "honest"
        causal: bool = True
        """What it says of itself."""
        claims: int = -1
        """FLOPs per token that it says it has; -1: it says nothing."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax"
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 0.5)
        self.causal = config.causal
        self.calls = 0
        if config.claims >= 0:
            self.flops_per_token = lambda: config.claims

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Decide by the scores that ``how`` bends, then bend the decision."""
        self.calls += 1
        how = self.config.how
        scores = self.scores(x_TD)
        logits_TE = SCORES[how](scores, x_TD, context, self) if how in SCORES else scores
        now = {
            "eight": True,
            "eight_in_training": context.explore,
            "eight_at_first": context.training and early(context),
        }
        k = 8 if now.get(how) else self.shape.k
        decision = softmax_top_k(logits_TE, k, context, normalize=True)
        return DECISIONS[how](decision, context, self) if how in DECISIONS else decision

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        if self.config.how == "work_in_objective":
            labour(decision.num_tokens)
        return {}

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        if self.config.how == "work_in_observe":
            labour(decision.num_tokens)
        return {}

    def adapt(self, sums: Sums, progress: float) -> None:
        if self.config.how == "work_in_adapt":
            labour(2048)


LABOUR = 64


def labour(rows: int) -> Tensor:
    """Two times 64^2 FLOPs a row."""
    return torch.ones(rows, LABOUR) @ torch.ones(LABOUR, LABOUR)


def follow(scores_TE: Tensor, tokens_T: Tensor) -> Tensor:
    return scores_TE + 9 * one_hot(tokens_T % scores_TE.shape[1], scores_TE.shape[1]).to(scores_TE.dtype)


def count_up(scores_TE: Tensor) -> Tensor:
    return scores_TE.cumsum(0) / torch.arange(1, len(scores_TE) + 1)[:, None]


def last_of_sequence(scores_TE: Tensor, context: RoutingContext) -> Tensor:
    length = int(context.position_T.max()) + 1
    return follow(scores_TE, context.token_ids_T.view(-1, length)[:, -1:].expand(-1, length).flatten())


def early(context: RoutingContext) -> bool:
    return context.step < 3


def numbers(tensor: Tensor) -> list[float]:
    return [tensor[place, 0].item() for place in range(len(tensor))]


def left(scores_TE: Tensor, numbers_of: Callable[[Tensor], Any]) -> Tensor:
    """Multiply outside PyTorch."""
    product = np.ones((LABOUR, len(scores_TE))) @ np.asarray(numbers_of(scores_TE.detach()))
    return scores_TE + 0 * float(product.sum())


Bend = Callable[[Tensor, Tensor, RoutingContext, CheatRouter], Tensor]
SCORES: dict[str, Bend] = {
    "next_token": lambda s, x, c, r: follow(s, c.token_ids_T.roll(-1)),
    "last_token": lambda s, x, c, r: last_of_sequence(s, c),
    "next_in_training": lambda s, x, c, r: follow(s, c.token_ids_T.roll(-1)) if c.explore else s,
    "next_with_gradient": lambda s, x, c, r: follow(s, c.token_ids_T.roll(-1)) if torch.is_grad_enabled() else s,
    "next_in_evaluation": lambda s, x, c, r: s if c.explore else follow(s, c.token_ids_T.roll(-1)),
    "next_at_first": lambda s, x, c, r: follow(s, c.token_ids_T.roll(-1)) if early(c) else s,
    "next_at_first_in_training": lambda s, x, c, r: follow(s, c.token_ids_T.roll(-1)) if c.training and early(c) else s,
    "batch_mean_at_first": lambda s, x, c, r: s - 3 * s.mean(0) if early(c) else s,
    "memory_at_first": lambda s, x, c, r: SCORES["memory"](s, x, c, r) if early(c) else s,
    "numpy": lambda s, x, c, r: left(s, lambda t: t.numpy()),
    "numpy_at_first": lambda s, x, c, r: left(s, lambda t: t.numpy()) if early(c) else s,
    "array": lambda s, x, c, r: left(s, np.asarray),
    "dlpack": lambda s, x, c, r: left(s, np.from_dlpack),
    "list": lambda s, x, c, r: left(s, lambda t: t.tolist()),
    "items": lambda s, x, c, r: left(s, numbers),
    "few_items": lambda s, x, c, r: s + 0 * s[0, 0].item() + 0 * sum(s.mean(0).tolist()) if s.max() > -9 else s,
    "next_at_second_site": lambda s, x, c, r: follow(s, c.token_ids_T.roll(-1)) if r.shape.site_index else s,
    "next_hidden_state": lambda s, x, c, r: s + 3 * s.roll(-1, 0),
    "batch_mean": lambda s, x, c, r: s - 3 * s.mean(0),
    "running_mean": lambda s, x, c, r: s - 3 * count_up(s),
    "reversed_running_mean": lambda s, x, c, r: s - 3 * count_up(s.flip(0)).flip(0),
    "memory": lambda s, x, c, r: s + 9 * one_hot(torch.tensor(r.calls % s.shape[1]), s.shape[1]),
    "elementwise": lambda s, x, c, r: (x[:, None] * r.scores.weight).sum(2),
    "vectors": lambda s, x, c, r: torch.stack([x @ row for row in r.scores.weight], 1),
    "late": lambda s, x, c, r: (
        s + 0 * (x @ torch.ones(x.shape[1], LABOUR)).sum(1, keepdim=True) * (c.step > 2) if c.step > 2 else s
    ),
}


def bent_gates(decision: RoutingDecision, context: RoutingContext, router: CheatRouter) -> RoutingDecision:
    worth_T = 1 + 0.01 * (context.token_ids_T.roll(-1) % 2)
    return replace(decision, gates_R=decision.gates_R * worth_T[decision.token_ids_R])


def bent_own_input(decision: RoutingDecision, context: RoutingContext, router: CheatRouter) -> RoutingDecision:
    return replace(decision, self_T=0.1 * (context.token_ids_T.roll(-1) % 2).to(decision.gates_R.dtype))


def part(decision: RoutingDecision, pairs: int, **fields: Any) -> RoutingDecision:
    names = ("token_ids_R", "expert_ids_R", "kept_R", "gates_R")
    return replace(decision, **{name: getattr(decision, name)[:pairs] for name in names}, **fields)


def flipped(decision: RoutingDecision) -> RoutingDecision:
    names = ("token_ids_R", "expert_ids_R", "kept_R", "gates_R")
    return replace(decision, **{name: getattr(decision, name).flip(0) for name in names})


DECISIONS: dict[str, Callable[[RoutingDecision, RoutingContext, CheatRouter], Any]] = {
    "gate_of_next_token": bent_gates,
    "own_input_of_next_token": bent_own_input,
    # Malformed ones, and a piece of what must be said of each.
    "no_pair": lambda d, c, r: part(d, 0, k=None),
    "too_few_pairs": lambda d, c, r: part(d, len(d.kept_R) - 1),
    "another_order": lambda d, c, r: flipped(d),
    "narrow_probabilities": lambda d, c, r: replace(d, probs_TE=r.scores.weight.new_ones(d.num_tokens, 7)),
    "few_probabilities": lambda d, c, r: replace(d, probs_TE=r.scores.weight.new_ones(d.num_tokens - 1, 8)),
    "flat_logits": lambda d, c, r: replace(d, logits_TE=r.scores.weight.new_ones(d.num_tokens * 8)),
    "expert_out_of_range": lambda d, c, r: replace(d, expert_ids_R=d.expert_ids_R + d.num_experts),
    "negative_token": lambda d, c, r: replace(d, token_ids_R=d.token_ids_R - 1),
    "nan_gates": lambda d, c, r: replace(d, gates_R=d.gates_R * float("nan")),
    "float_ids": lambda d, c, r: replace(d, expert_ids_R=d.expert_ids_R.float()),
    "other_tokens": lambda d, c, r: replace(d, num_tokens=d.num_tokens - 1),
    "gates_of_two": lambda d, c, r: replace(d, gates_R=d.gates_R.view(-1, 2)),
    "not_a_decision": lambda d, c, r: (d.gates_R, d.expert_ids_R),
    "nan_in_evaluation": lambda d, c, r: d if c.explore else replace(d, gates_R=d.gates_R * float("nan")),
    "ragged": lambda d, c, r: RoutingDecision.token_choice(d.expert_ids_R.view(-1, 2), d.gates_R, d.num_experts),
}
MALFORMED = {
    "no_pair": "no pair for 256 tokens",
    "too_few_pairs": "511 pairs for 256 tokens with k = 2: want 512",
    "another_order": "token_ids_R is not token-major",
    "narrow_probabilities": r"probs_TE has shape \(256, 7\): want \(256, 8\)",
    "few_probabilities": r"probs_TE has shape \(255, 8\)",
    "flat_logits": r"logits_TE has shape \(2048,\)",
    "expert_out_of_range": "expert_ids_R holds .*: legal are 0 to 8",
    "negative_token": "token_ids_R holds -1",
    "nan_gates": "is nan: want finite gates",
    "float_ids": "expert_ids_R is torch.float32",
    "other_tokens": "a decision on 255 tokens and 8 experts: want 256 and 8",
    "gates_of_two": r"gates_R is .* of shape \(256, 2\)",
    "not_a_decision": "its forward returned tuple",
    "nan_in_evaluation": "is nan: want finite gates",
    "ragged": "ids_TK has shape",
}
