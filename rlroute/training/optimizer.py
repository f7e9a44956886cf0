"""AdamW in three groups (matrices with weight decay, vectors, routers), two gradient clips, and the learning-rate
schedule.

The routers have a clip of their own, so that policy noise does not throttle the language model, and no weight decay.

A parameter in bfloat16 has a master in float32: that is what is clipped, moved and kept with the moments, and the
parameter is the master rounded.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlroute.config import TrainConfig
from rlroute.model.accounting import is_expert, is_matrix, is_router
from rlroute.training.group import ALONE, Group

MASTER = "master"
MOST_UPDATES = 2**24
"""Of a parameter, as AdamW counts them in float32: there it stands still."""


class Optimizer:
    """AdamW with the schedule and the clips of a :class:`TrainConfig`, over the parameters that this process of a group
    holds, those that are frozen left out.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, group: Group = ALONE) -> None:
        self.config, self.group = config, group
        self.before: dict[str, int] = {}  # updates that a parameter has had before the run: see carry()
        free = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {p: nn.Parameter(p.detach().float()) for p in free.values() if p.dtype == torch.bfloat16}
        self.nothing = torch.zeros((), device=next(model.parameters()).device)
        named = [(name, self.masters.get(p, p)) for name, p in free.items()]
        self.names = {parameter: name for name, parameter in named}
        self.router = [p for name, p in named if is_router(name)]
        self.shared = [p for name, p in named if not is_router(name)]
        matrices = {p for name, p in named if is_matrix(name, p)}
        groups = [
            {"params": [p for p in self.shared if p in matrices], "weight_decay": config.weight_decay, "scale": 1.0},
            {"params": [p for p in self.shared if p not in matrices], "weight_decay": 0.0, "scale": 1.0},
            {"params": self.router, "weight_decay": 0.0, "scale": config.router_lr_scale},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)

    def step(self, step: int, progress: float) -> dict[str, float | Tensor]:
        """Clip, update, clear the gradients; return the learning rate and both gradient norms as they were before
        clipping, which stay on the device.

        Args:
            step: optimizer steps done before this one (warm-up counts them).
            progress: share of the budget used, 0 to 1 (the decay follows it).
        """
        rate = learning_rate(self.config, step, progress)
        for parameter, master in self.masters.items():
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["scale"]
        norms = {
            "grad_norm": self._clip(self.shared, self.config.clip),
            "router_grad_norm": self._clip(self.router, self.config.router_clip),
        }
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._round()
        return {"lr": rate} | norms

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in self.masters.items():
            parameter.copy_(master)

    def _clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        gradients = [(self.names[p], p.grad) for p in parameters if p.grad is not None]
        if not gradients:
            return self.nothing  # of the device, unlike the norm of nothing
        norm = get_total_norm([g for name, g in gradients if not is_expert(name)])
        if experts := [g for name, g in gradients if is_expert(name)]:
            norm = (norm.square() + self.group.sum_over_shards(get_total_norm(experts).square())).sqrt()
        clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of each parameter by its name: its updates (a scalar), two moments of its shape, and its
        master where it has one.

        A router's parameter that has had no gradient yet has had none.
        """
        held = {name: dict(self.adamw.state.get(p) or _unmoved(p)) for p, name in self.names.items()}
        for master in self.masters.values():
            held[self.names[master]][MASTER] = master.detach()
        return held

    def check_state(self, state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Find out whether a state can be taken over. The fused update looks at nothing: it would write beyond a moment
        that is too small.

        Args:
            state: as :meth:`state` returns it.
            steps: optimizer steps done.

        Raises:
            ValueError: it is not that of this model after so many steps.
        """
        names = set(self.names.values())
        if state.keys() != names:
            raise ValueError(f"the optimizer's state is not of the model's parameters: {min(state.keys() ^ names)}")
        masters = set(self.masters.values())
        for parameter, name in self.names.items():
            updates = min(steps + self.before.get(name, 0), MOST_UPDATES)
            unmoved = _unmoved(parameter, "meta")
            unmoved |= {MASTER: torch.empty_like(parameter, device="meta")} if parameter in masters else {}
            if state[name].keys() != unmoved.keys():
                raise ValueError(f"the optimizer's state of {name} is {', '.join(state[name])}")
            for key, wanted in unmoved.items():
                value = state[name][key]
                if (value.shape, value.dtype, value.layout) != (wanted.shape, wanted.dtype, wanted.layout):
                    raise ValueError(f"{key} of {name} is {value.dtype} of {tuple(value.shape)}")
                if not value.isfinite().all() or (key in ("step", "exp_avg_sq") and (value < 0).any()):
                    raise ValueError(f"{key} of {name} holds a value that no update leaves")
            done = state[name]["step"]
            if done > updates or done % 1 or (done != updates and not is_router(name)):
                raise ValueError(f"{name} has had {done:g} updates at step {steps}")

    def carry(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from another run's moments, and their count of updates.

        Args:
            moments: by the names of parameters, in their shapes; what is not among them starts anew.
        """
        own = self.state()
        self.load_state({name: {**values, **moments.get(name, {})} for name, values in own.items()})
        self.before = {name: int(values["step"]) for name, values in moments.items() if name in own}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over a state that :meth:`check_state` let pass: copies, each laid out as its parameter."""
        plain: dict[str, Any] = self.adamw.state_dict()
        ordered = [p for group in self.adamw.param_groups for p in group["params"]]
        plain["state"] = {
            index: {key: empty.copy_(state[self.names[p]][key]) for key, empty in _unmoved(p, p.device).items()}
            for index, p in enumerate(ordered)
        }
        self.adamw.load_state_dict(plain)
        for master in self.masters.values():
            master.data.copy_(state[self.names[master]][MASTER])
        self._round()


def _unmoved(parameter: Tensor, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the state of a parameter before its first update, on its own or another device."""
    step = torch.zeros((), device=device)
    like = torch.zeros_like
    return {"step": step, "exp_avg": like(parameter, device=device), "exp_avg_sq": like(parameter, device=device)}


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Return the learning rate: linear warm-up over ``warmup_steps``, cosine decay to ``final_lr`` of the peak over the
    budget.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * warm * decay
