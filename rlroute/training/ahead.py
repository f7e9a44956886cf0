"""The host runs ahead of the device: steps are taken without waiting for it, and looked at when a row is written.

A run that has diverged is ended then, and stands where it stood before the step at which it did.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlroute.model.accounting import Costs
from rlroute.training.progress import Progress
from rlroute.training.step import StepResult
from rlroute.transfer import numbers


class Diverged(Exception):
    """A non-finite number turned up; ``what`` says where."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@dataclass(eq=False)
class Ahead:
    """The steps that were taken and not looked at yet.

    Args:
        costs: of the model.
        tokens: of a step.
    """

    costs: Costs
    tokens: int
    taken: list[tuple[int, str, Any]] = field(default_factory=list)
    """Of each the step and the chain before it, and what came of it: the loss, both gradient norms, the pairs that ran
    by site.
    """

    def take(self, progress: Progress, chain: str, result: StepResult, norms: dict[str, Any]) -> None:
        """Let a run go on to the next step, whose batches have this chain."""
        figures = [result.loss, norms["grad_norm"], norms["router_grad_norm"], result.pairs_L]
        self.taken.append((progress.step, progress.chain, figures))
        progress.step, progress.chain = progress.step + 1, chain

    def look(self, progress: Progress, row: Any = None) -> Any:
        """Wait for the device, book the FLOPs of the steps that were taken, and return the numbers of a row.

        Args:
            progress: of the run.
            row: dicts and lists with tensors.

        Raises:
            Diverged: the figures of a step are not finite.
        """
        taken, self.taken = self.taken, []
        figures, row = numbers(([each for *_, each in taken], row))
        for (step, chain, _), (loss, *norms, pairs_L) in zip(taken, figures, strict=True):
            if None in (loss, *norms):
                progress.step, progress.chain = step, chain
                raise Diverged(f"the {'language-model loss' if loss is None else 'gradient'} is not finite")
            progress.flops += self.costs.of_training(self.tokens, pairs_L)
            progress.forward += self.costs.forward_in_training(self.tokens, pairs_L)
        return row
