"""What experts are worth: the loss without each of them, without each token's best ones, without the shared ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlroute.experiments.inspection.masking import Mask, masked
from rlroute.experiments.inspection.probe import loss_T
from rlroute.experiments.statistics import Interval, t_interval
from rlroute.model import Transformer
from rlroute.routing import Site
from rlroute.training.batches import Batch
from rlroute.training.step import Device


@dataclass(frozen=True)
class Worth:
    """What the loss is without some experts, in nats a token. Differences have 95 % intervals over sequences.

    Attributes:
        loss: with all.
        experts: by site and expert, how much is lost without this one.
        best: by their number, how much is lost without each token's so many best experts, at all sites at once
            (DeepSeekMoE, arXiv 2401.06066, section 4.5); none where a router ranks no experts.
        shared: likewise without the shared experts of all sites; None where there are none.
    """

    loss: float
    experts: dict[Site, list[Interval]]
    best: dict[int, Interval]
    shared: Interval | None


def masked_loss(
    model: Transformer, batches: Sequence[Batch], device: Device, masks: dict[Site, Mask], *, seed: int, step: int
) -> Tensor:
    """Return the greedy loss of each token in nats, float64 of shape (T,), of a model without experts.

    Raises:
        ConfigError: they cannot be masked.
    """
    with masked(model, masks):
        return loss_T(model, batches, device, seed=seed, step=step)


def measure_worth(model: Transformer, batches: Sequence[Batch], device: Device, *, seed: int, step: int) -> Worth:
    """Measure what the experts of a model are worth on batches: one pass for each expert, and few more."""
    keys = {"seed": seed, "step": step}
    base_T, length = loss_T(model, batches, device, **keys), batches[0].tokens_BS.shape[1]
    sites = {site.router.shape.site: site for site in model.routed}

    def lost(masks: dict[Site, Mask]) -> Interval:
        more_T = masked_loss(model, batches, device, masks, **keys) - base_T
        return t_interval(more_T.view(-1, length).mean(1).tolist())

    experts = {
        key: [lost({key: Mask(experts=(expert,))}) for expert in range(site.router.shape.num_experts)]
        for key, site in sites.items()
        if site.router.shape.num_experts > site.router.shape.k
    }
    ranked = all("logits" in router.publishes for router in model.routers)
    shared = [key for key, site in sites.items() if getattr(site, "shared", None) is not None]
    return Worth(
        loss=float(base_T.mean()),
        experts=experts,
        best={best: lost({key: Mask(best=best) for key in sites}) for best in _numbers(model)} if ranked else {},
        shared=lost({key: Mask(shared=True) for key in shared}) if shared else None,
    )


def _numbers(model: Transformer) -> list[int]:
    """Return how many of the best experts are masked: 1, 2, 4, ... up to half of those that there are."""
    shapes = [router.shape for router in model.routers]
    most = min(min(shape.num_experts // 2, shape.num_experts - shape.k) for shape in shapes)
    return [2**power for power in range(16) if 2**power <= most]
