"""AdamW in three groups (matrices with weight decay, vectors, routers), two gradient clips, and the learning-rate schedule.

The routers have a clip of their own, so that policy noise does not throttle the language model, and no weight decay.
"""

import math

import torch
from torch import Tensor, nn

from rlroute.config import TrainConfig
from rlroute.model.accounting import is_router


class Optimizer:
    """AdamW with the schedule and the clips of a :class:`TrainConfig`."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        named = list(model.named_parameters())
        self.router = [p for name, p in named if is_router(name)]
        self.shared = [p for name, p in named if not is_router(name)]
        groups = [
            {"params": [p for p in self.shared if p.dim() > 1], "weight_decay": config.weight_decay, "scale": 1.0},
            {"params": [p for p in self.shared if p.dim() <= 1], "weight_decay": 0.0, "scale": 1.0},
            {"params": self.router, "weight_decay": 0.0, "scale": config.router_lr_scale},
        ]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, 0.95), fused=True)

    def step(self, step: int, progress: float) -> dict[str, float]:
        """Clip, update, clear the gradients; return the learning rate and both gradient norms as they were before clipping.

        Args:
            step: optimizer steps done before this one (warm-up counts them).
            progress: share of the budget used, 0 to 1 (the decay follows it).
        """
        rate = learning_rate(self.config, step, progress)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["scale"]
        norms = {
            "grad_norm": _clip(self.shared, self.config.clip),
            "router_grad_norm": _clip(self.router, self.config.router_clip),
        }
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return {"lr": rate} | norms


def _clip(parameters: list[nn.Parameter], limit: float) -> float:
    norm: Tensor = nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm)


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Return the learning rate: linear warm-up over ``warmup_steps``, cosine decay to ``final_lr`` of the peak over the budget."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * warm * decay
