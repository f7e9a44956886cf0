"""One router with many rules, and models of it: what the contract allows and no router of ours does.

Shape suffixes: T tokens, D model width, E experts, K slots per token, S shared experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from rlroute import registry
from rlroute.config import ModelConfig, RouterConfig
from rlroute.limits import NonNegative, Positive
from rlroute.model import ModelShape, Transformer
from rlroute.parallel.mesh import Mesh
from rlroute.routing import LinearScores, Router, RouterShape, RoutingContext, RoutingDecision, Sums
from rlroute.training.group import ALONE
from tests.tiny import V

Rule = Literal["top", "threshold", "experts", "soft", "nothing", "double", "devices", "carry"]


class ToyRouter(Router):
    """Softmax gates of pairs chosen by one rule or another; keyed noise lets equal tokens differ a little."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        rule: Rule = "top"
        """top: k slots. threshold: 3 slots, those well above the fair share used. experts: each takes a quarter of the
        tokens. soft: all. nothing: no pair. double: twice k in training. devices: the best device's alone. carry: adds
        the logits of the site before."""
        share: Positive | None = None
        """Pairs per token at most."""
        shared: bool = False
        """Whether shared experts, where there are any, have gates."""
        own: NonNegative = 0.0
        """Weight of the token's own input, times its largest probability."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax"
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 1.0)
        self.seen: list[tuple[float, int, int]] = []

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Decide by the rule."""
        experts, config = self.shape.num_experts, self.config
        logits_TE = self.scores(x_TD) + 0.1 * context.noise("toy", (experts,)).to(x_TD.dtype)
        if config.rule == "carry" and context.previous is not None:
            assert context.previous.logits_TE is not None
            logits_TE = logits_TE + context.previous.logits_TE
        probs_TE = logits_TE.softmax(1)
        if config.rule == "experts":
            ids_EC = context.choose(logits_TE.t(), max(1, len(x_TD) // 4))
            gates_EC = probs_TE.t().gather(1, ids_EC.clamp(max=len(x_TD) - 1))
            return RoutingDecision.expert_choice(ids_EC, gates_EC, len(x_TD), logits_TE=logits_TE, probs_TE=probs_TE)
        ids_TK = context.choose(*self._rule(logits_TE, context))
        shared = self.shape.num_shared_experts if config.shared else 0
        return RoutingDecision.token_choice(
            ids_TK,
            probs_TE.gather(1, ids_TK.clamp(max=experts - 1)),
            experts,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            self_T=config.own * probs_TE.amax(1) if config.own else None,
            shared_gates_TS=logits_TE[:, :shared].sigmoid() if shared else None,
            max_pairs=None if config.share is None else int(config.share * len(x_TD)),
        )

    def _rule(self, logits_TE: Tensor, context: RoutingContext) -> tuple[Tensor, int]:
        """Return scores and slots."""
        rule, k, experts = self.config.rule, self.shape.k, self.shape.num_experts
        if rule == "threshold":
            return logits_TE.masked_fill(logits_TE.softmax(1) < 1.5 / experts, -torch.inf), 3
        if rule == "nothing":
            return torch.full_like(logits_TE, -torch.inf), k
        if rule == "soft":
            return logits_TE, experts
        if rule == "double":
            return logits_TE, 2 * k if context.explore else k
        if rule == "devices" and context.expert_device_E is not None:
            best_T1 = context.expert_device_E[logits_TE.argmax(1, keepdim=True)]
            return logits_TE.masked_fill(context.expert_device_E != best_T1, -torch.inf), k
        return logits_TE, k

    def adapt(self, sums: Sums, progress: float) -> None:
        """Note what is handed in: progress, this site's pairs, and those of all sites of this router."""
        self.seen.append((progress, int(sums["load_E"].sum()), int(sums.over_sites("load_E").sum())))


def toy_model(
    config: ModelConfig, seq_len: int = 8, vocab_size: int = V, group: Any = ALONE, backend: str = "cpu", **fields: Any
) -> Any:  # a Transformer, into whose layers tests look
    """Return a model at its initial weights in float64 in which :class:`ToyRouter` decides everywhere."""
    shape = ModelShape(vocab_size=vocab_size, seq_len=seq_len, seed=0, backend=backend, placement=group.placement)
    return Transformer(config, shape, lambda site: ToyRouter(ToyRouter.Config(**fields), site)).double()


@contextmanager
def installed(router: type[Router] = ToyRouter) -> Iterator[None]:
    """Let the registry know the router, as that of a distribution of its own."""
    value = f"{router.__module__}:{router.__name__}"
    point = EntryPoint(name=router.Config.name, value=value, group=registry.GROUP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", lambda group: [point] if group == registry.GROUP else [])
        registry._sources.cache_clear()
        try:
            yield
        finally:
            registry._sources.cache_clear()


def mesh_of(shards: int) -> Mesh:
    """Return the group of this process's ranks, over which the experts are cut into so many shards."""
    return Mesh(shards)
