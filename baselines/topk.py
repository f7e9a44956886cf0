"""Token choice as published models have it: the score function, the order of scoring and choosing, normalisation,
scales and groups are fields.

The default is Mixtral (Jiang et al. 2024, arXiv 2401.04088), without a term that balances. What others set:

- Qwen2-MoE (arXiv 2407.10671) and OLMoE (arXiv 2409.02060): `normalize=false`.
- GPT-OSS (arXiv 2508.10925): `order=choose_first,linear_bias=true`; JetMoE (arXiv 2404.07413): `order=choose_first`.
- DeepSeek-V2 (arXiv 2405.04434): `normalize=false,route_scale=16,groups=8,groups_kept=3,group_score=max`; its
  device-limited routing has `groups=0`, one group for each of `--model.devices`.
- DeepSeek-V3 (arXiv 2412.19437): `score=sigmoid,route_scale=2.5,groups=8,groups_kept=4,bias_rate=0.001`.
- DeepSeek-V4, by its public code: `score=sqrt_softplus,route_scale=1.5,bias_rate=0.001`.

A single gate is never normalised: it would be a constant 1 and cut the router's gradient.

Shape suffixes: T tokens, D model width, E experts, K experts per token, G groups of X experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlroute.config import RouterConfig
from rlroute.errors import ConfigError
from rlroute.gates import normalize_rows, sqrt_softplus
from rlroute.limits import Count, NonNegative, Positive, Share, Whole
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums
from rlroute.sampling import top_k


class TopKRouter(Router):
    """The k best experts of a token, in its best groups; a bias, if there is one, moves the choice and never the
    gate.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of token choice."""

        score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
        """What makes scores of logits: softmax over all experts, or one expert at a time."""
        order: Literal["score_first", "choose_first"] = "score_first"
        """score_first: experts are chosen by their scores; choose_first: by their logits, and a softmax is over the
        chosen.
        """
        normalize: bool = True
        """Divide the gates by their sum over the chosen where k > 1."""
        route_scale: Positive = 1.0
        """Factor on all gates."""
        expert_scales: bool = False
        """A learned factor on the gates of each expert, at first 1 (Gemma 4, by its public code)."""
        norm_input: bool = False
        """Divide the router's input by its root mean square (Gemma 4, by its public code)."""
        linear_bias: bool = False
        """A learned bias in the logits, at first 0 (GPT-OSS)."""
        logit_scale: Positive = 1.0
        """Factor on the logits."""
        soft_cap: NonNegative = 0.0
        """Logits z become c tanh(z / c) (Gemma 2, arXiv 2408.00118); 0: they stay."""
        groups: Whole = 1
        """Neighbouring experts form this many equal groups; a token's experts come from its best ones. 0: those of a
        device form one, over as many devices as the model has (`--model.devices`).
        """
        groups_kept: Count = 1
        """How many groups a token may use, at most."""
        group_score: Literal["top2", "max"] = "top2"
        """What ranks a group: the sum of its two best experts (DeepSeek-V3), or its best (DeepSeek-V2)."""
        outside: Literal["forbidden", "zero"] = "forbidden"
        """What an expert outside the best groups has: no chance, or a score of 0, which beats a negative one (A.X K2,
        by its public code).
        """
        bias_rate: NonNegative = 0.0
        """How far a bias that only the choice sees moves per step towards less loaded experts (arXiv 2408.15664); 0:
        there is none. `bias_balanced` has other rules.
        """
        bias_until: Share = 1.0
        """The share of the budget after which the bias stays; DeepSeek-V3: 0.966."""
        init_std: NonNegative = 0.02
        """Standard deviation of the initial score weights."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.groups_kept > self.groups > 0:
                raise ConfigError(
                    f"router topk.groups_kept = {self.groups_kept}: legal are 1 to groups = {self.groups}"
                )
            for name, idle in (("group_score", "top2"), ("outside", "forbidden")):
                if self.groups == 1 and getattr(self, name) != idle:
                    raise ConfigError(f"router topk.{name} = {getattr(self, name)!r} needs groups: 1 ranks nothing")

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts, normalised over the chosen"
    config: Config
    bias_E: Tensor | None

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.gate_meaning = _meaning(config, shape.k)
        self.scores = Logits(config, shape)
        self.groups = config.groups or shape.devices
        if config.expert_scales:
            self.scale_E = nn.Parameter(torch.ones(shape.num_experts))
        self.register_buffer("bias_E", torch.zeros(shape.num_experts) if config.bias_rate else None)
        if config.bias_rate:
            self.learns_from = frozenset({"gate", "load"})

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Refuse groups that the experts cannot be cut into or that are too small, and a gate that is constant."""
        assert isinstance(config, cls.Config)
        if reason := super().refuses(config, shape):
            return reason
        experts, groups = shape.num_experts, config.groups or shape.devices
        least = -(-shape.k // min(config.groups_kept, groups))
        if groups > 1 and config.group_score == "top2":
            least = max(2, least)
        if groups > 1 and shape.num_free_experts:
            return f"groups = {groups}: legal is 1 where there are free experts, which are in no group"
        if experts % groups or experts // groups < least:
            return (
                f"groups = {groups}: legal are divisors of num_experts = {experts} that leave {least} or more to each"
            )
        if shape.k == 1 and config.score == "softmax" and config.order == "choose_first":
            return (
                "k = 1: a softmax over the chosen would be a constant 1, legal are 2 and more, or order 'score_first'"
            )
        return None

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Choose by biased scores (or logits) in the best groups, gate by unbiased ones."""
        config, logits_TE = self.config, self.scores(x_TD)
        scores_TE = _scores(config.score, logits_TE)
        ranked_TE = scores_TE if config.order == "score_first" else logits_TE
        ranked_TE = ranked_TE if self.bias_E is None else ranked_TE + self.bias_E
        ids_TK = context.choose(ranked_TE if self.groups == 1 else self._in_groups(ranked_TE), self.shape.k)
        gates_TK = scores_TE.gather(1, ids_TK)
        if config.score == "softmax" and config.order == "choose_first":
            gates_TK = logits_TE.gather(1, ids_TK).softmax(1)
        if config.normalize and self.shape.k > 1:
            gates_TK = normalize_rows(gates_TK)
        gates_TK = config.route_scale * gates_TK
        if config.expert_scales:
            gates_TK = gates_TK * self.scale_E[ids_TK]
        probs_TE = scores_TE if config.score == "softmax" else normalize_rows(scores_TE)
        return RoutingDecision.token_choice(
            ids_TK, gates_TK, self.shape.num_experts, logits_TE=logits_TE, probs_TE=probs_TE
        )

    def _in_groups(self, ranked_TE: Tensor) -> Tensor:
        """Return what experts are chosen by, those outside a token's best groups held back."""
        config = self.config
        ranked_TGX = ranked_TE.detach().view(-1, self.groups, self.shape.num_experts // self.groups)
        best_TGX = ranked_TGX.sort(dim=2, descending=True).values
        best_TG = best_TGX[..., : 1 if config.group_score == "max" else 2].sum(2)
        kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, top_k(best_TG, config.groups_kept), True)
        fill = 0.0 if config.outside == "zero" else float("-inf")
        return ranked_TGX.masked_fill(~kept_TG[..., None], fill).flatten(1)

    def adapt(self, sums: Sums, progress: float) -> None:
        """Raise the bias of experts that less than the mean chose, lower that of the others."""
        if self.bias_E is not None and progress < self.config.bias_until:
            demand_E = sums["demand_E"].to(self.bias_E.dtype)
            self.bias_E += self.config.bias_rate * torch.sign(demand_E.mean() - demand_E)


class Logits(LinearScores):
    """Logits of an input, normalised, with a bias, scaled and soft-capped as the configuration says."""

    def __init__(self, config: TopKRouter.Config, shape: RouterShape) -> None:
        super().__init__(shape, "scores", config.init_std)
        self.config = config
        if config.linear_bias:
            self.bias = nn.Parameter(torch.zeros(shape.num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits of shape (T, E)."""
        cap = self.config.soft_cap
        if self.config.norm_input:
            x_TD = functional.rms_norm(x_TD, x_TD.shape[1:])
        logits_TE = self.config.logit_scale * super().forward(x_TD)
        return cap * torch.tanh(logits_TE / cap) if cap else logits_TE


def _scores(score: str, logits_TE: Tensor) -> Tensor:
    if score == "softmax":
        return logits_TE.softmax(1)
    return logits_TE.sigmoid() if score == "sigmoid" else sqrt_softplus(logits_TE)


def _meaning(config: TopKRouter.Config, k: int) -> str:
    """Return what the gates are, for the table."""
    name = config.score.replace("_", "-")
    if config.score == "softmax":
        said = "softmax over the chosen" if config.order == "choose_first" else "softmax over all experts"
    else:
        said = f"{name}, unbiased" if config.bias_rate else name
    if config.normalize and k > 1 and "the chosen" not in said:
        said += ", normalised over the chosen"
    said += f", times {config.route_scale:g}" if config.route_scale != 1 else ""
    return said + (", times a learned scale of the expert" if config.expert_scales else "")
