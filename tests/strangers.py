"""Routers that are in no file of their own: what choices look like that none of ours makes.

Shape suffixes: T tokens, E experts, C tokens per expert.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from rlroute import registry
from rlroute.config import RouterConfig
from rlroute.routing import LinearScores, Router, RoutingDecision, Term


class ExpertChoice(Router):
    """Each expert takes a fair share of tokens."""

    causal = False
    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts"

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        pass

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 0.02)

    def forward(self, x_TD, context):
        logits_TE = self.scores(x_TD)
        probs_TE = logits_TE.softmax(1)
        capacity = max(1, len(x_TD) // self.shape.num_experts)
        ids_EC = context.choose(logits_TE.t(), capacity)
        return RoutingDecision.expert_choice(
            ids_EC, probs_TE.t().gather(1, ids_EC), len(x_TD), logits_TE=logits_TE, probs_TE=probs_TE
        )


class Threshold(Router):
    """Each token takes the experts whose probability reaches a threshold: many, one or none. It learns from all."""

    learns_from = frozenset({"gate", "reward", "load"})
    gate_meaning = "softmax over all experts"
    stochastic = True

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        threshold: float = 0.5
        noise: float = 0.3
        samples: int = 1

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.scores = LinearScores(shape, "scores", 1.0)
        self.seen = {"credit": [], "progress": [], "loss": []}

    @property
    def num_samples(self):
        return self.config.samples

    def forward(self, x_TD, context):
        logits_TE, experts = self.scores(x_TD), self.shape.num_experts
        if context.explore:
            logits_TE = logits_TE + self.config.noise * context.noise("threshold", (experts,)).to(x_TD.dtype)
        probs_TE = logits_TE.softmax(1)
        ids_TK = context.choose(probs_TE.masked_fill(probs_TE < self.config.threshold, float("-inf")), experts)
        gates_TK = torch.cat([probs_TE, torch.zeros_like(probs_TE[:, :1])], 1).gather(1, ids_TK)
        return RoutingDecision.token_choice(ids_TK, gates_TK, experts, logits_TE=logits_TE, probs_TE=probs_TE)

    def objective(self, decision, feedback):
        loss_T = feedback.loss_MT.reshape(-1)
        return {"liking": Term(feedback.mean(loss_T * decision.token_sum(decision.gates_R)), 0.1)}

    def observe(self, decision, feedback):
        self.seen["loss"].append(feedback.loss_MT)
        return {"credit": decision.gates_R.grad.abs().sum()}

    def adapt(self, sums, progress):
        self.seen["credit"].append(float(sums["credit"]))
        self.seen["progress"].append(progress)


class Picky(Threshold):
    """It takes no shape but one: five experts at a second site."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Threshold.Config):
        pass

    @classmethod
    def refuses(cls, config, shape):
        if shape.num_experts != 5 or shape.site_index == 0:
            return f"num_experts = {shape.num_experts} at site {shape.site_index + 1}: legal are 5 behind another site"
        return super().refuses(config, shape)


STRANGERS = {"expert_choice_like": ExpertChoice, "threshold_like": Threshold, "picky": Picky}


def install(monkeypatch: Any, *names: str) -> None:
    """Let the registry know strangers until the test ends."""
    known: dict[str, Any] = dict(registry._sources())
    for name in names:
        monkeypatch.setattr(STRANGERS[name].Config, "name", name)
        known[name] = SimpleNamespace(name=name, value=name, dist=None, load=lambda name=name: STRANGERS[name])
    monkeypatch.setattr(registry, "_sources", lambda: known)
