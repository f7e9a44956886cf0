"""A model over training, in memory, and its routers warmed up for a measurement."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from rlroute.config import RunConfig
from rlroute.experiments.gradients.steering import weights
from rlroute.learning import adapt
from rlroute.model import Transformer
from rlroute.routing import Router
from rlroute.training.batches import sample_batch
from rlroute.training.data import Corpus
from rlroute.training.optimizer import Optimizer
from rlroute.training.prepare import Cut, build_model, cut
from rlroute.training.step import Device, backward_batch, make_context

CPU = Device("cpu", torch.float32)


class Training:
    """A model in training, as the loop trains it, looked at after growing numbers of steps."""

    def __init__(self, config: RunConfig, corpus: Corpus, seed: int) -> None:
        self.config, self.corpus, self.seed, self.done = config, corpus, seed, 0
        self.model = build_model(config, corpus, seed)
        self.optimizer = Optimizer(self.model, config.train)

    def after(self, steps: int) -> Transformer:
        """Return the model after so many steps, no fewer than before; it is trained on afterwards."""
        size = cut(self.config)
        while self.done < steps:
            step, progress = self.done, self.done / self.config.train.steps
            batch = sample_batch(self.corpus, seed=self.seed, step=step, **size)
            result = backward_batch(
                self.model, batch, CPU, seed=self.seed, step=step, micro_batches=1, progress=progress
            )
            self.optimizer.step(step, progress)
            adapt(self.model.routers, result.sums_L, progress)
            self.done += 1
        return self.model


def warmed_up(model: Transformer, config: RunConfig, corpus: Corpus, seed: int, step: int, steps: int) -> Transformer:
    """Return a copy whose routers have seen so many more steps: running means move and value heads learn, model and
    policy stay.
    """
    model = copy.deepcopy(model)
    size = cut(config)
    heads = _heads(model, corpus, seed, step, size)
    if not heads and all(type(router).adapt is Router.adapt for router in model.routers):
        return model
    optimizer = torch.optim.AdamW(heads, lr=config.train.lr, weight_decay=0.0) if heads else None
    progress = step / config.train.steps
    for further in range(step, step + steps):
        batch = sample_batch(corpus, seed=seed, step=further, **size)
        result = backward_batch(model, batch, CPU, seed=seed, step=further, micro_batches=1, progress=progress)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        adapt(model.routers, result.sums_L, progress)
    return model


def _heads(model: Transformer, corpus: Corpus, seed: int, step: int, size: Cut) -> list[Tensor]:
    """Return the routers' parameters that no decision depends on: value heads."""
    batch = sample_batch(corpus, seed=seed, step=step, **size)
    context = make_context(batch, CPU, seed=seed, step=step, explore=True)
    _, decisions = model(torch.from_numpy(batch.tokens_BS), context)
    scores = [part for d in decisions for part in (d.logits_TE, d.probs_TE, d.log_prob_R) if part is not None]
    parts = [*scores, *(part for d in decisions for part in weights(d).values())]
    total = sum((part.sum() for part in parts if part.requires_grad), start=torch.zeros((), requires_grad=True))
    own = [parameter for router in model.routers for parameter in router.parameters() if parameter.requires_grad]
    reached = torch.autograd.grad(total, own, allow_unused=True) if own else ()
    return [parameter for parameter, gradient in zip(own, reached, strict=True) if gradient is None]
