"""Distributions that bring a router by their entry point."""

from pathlib import Path

from rlroute import registry

ROUTER = '''
"""Top-k of a softmax that goes wrong when it is told to.

Nobody et al. 2026 (no paper).
"""

from dataclasses import dataclass

import torch

from rlroute.config import RouterConfig
from rlroute.routing import LinearScores, Router, RoutingDecision


class FragileRouter(Router):
    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        fault: str = "none"
        """none; gates: infinite gates in training; greedy: in later evaluations; raise: an error of two lines."""
        step: int = 0
        """The training step of the fault."""
        seed: int = 0
        """The run's seed in which it happens."""

    learns_from = frozenset({"gate"})
    gate_meaning = "softmax over all experts"

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.config = config
        self.scores = LinearScores(shape, "scores", 0.02)

    def forward(self, x_TD, context):
        probs_TE = self.scores(x_TD).softmax(1)
        ids_TK = context.choose(probs_TE, self.shape.k)
        gates_TK = probs_TE.gather(1, ids_TK)
        if context.seed == self.config.seed and self.config.fault != "none":
            now = context.explore and context.step == self.config.step
            if self.config.fault == "raise" and now:
                raise RuntimeError("two lines\\nof trouble")
            later = not context.explore and context.step > 0
            if (self.config.fault == "gates" and now) or (self.config.fault == "greedy" and later):
                gates_TK = gates_TK * torch.inf
        return RoutingDecision.token_choice(ids_TK, gates_TK, self.shape.num_experts, probs_TE=probs_TE)
'''


def install(
    folder: Path, name: str = "fragile", value: str = "acme.fragile:FragileRouter", source: str = ROUTER
) -> str:
    """Write a distribution with one module and one entry point; return the folder that belongs on the path."""
    module = folder / Path(*value.partition(":")[0].split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True, exist_ok=True)
    if module.parent != folder:
        (module.parent / "__init__.py").touch()
    module.write_text(source)
    described = folder / f"{name}_by_{module.stem}-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-by-{module.stem}\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {value}\n")
    return str(folder)
