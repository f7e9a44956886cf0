"""The mixture of a trained model as one safetensors file, under names that say what each tensor is: docs/export.md.

Shape suffixes: D model width, E experts, H hidden rows of an expert (2F where gated), F expert width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from safetensors.torch import save
from torch import Tensor

from rlroute.experiments.checkpoints.trained import TrainedRun
from rlroute.kernels.activations import hidden_rows
from rlroute.model.attention import AttentionExperts
from rlroute.model.moe import DenseMLP, Experts
from rlroute.model.switchhead import HeadProjection, SwitchHead
from rlroute.model.transformer import RoutedSite

LAYOUT = "rlroute-moe-1"
"""Stands in the header of every such file."""


def moe_file(run: TrainedRun) -> bytes:
    """Return the file of a run's final weights.

    Raises:
        StoreError, CheckpointError: they cannot be read.
    """
    header = {
        "layout": LAYOUT,
        "run": run.id,
        "step": str(run.last_step),
        "config": json.dumps(run.config.to_dict(), sort_keys=True),
    }
    return save(moe_tensors(run), header)


def moe_tensors(run: TrainedRun) -> dict[str, Tensor]:
    """Return the tensors of the file by their names."""
    found: dict[str, Tensor] = {}
    for layer, block in enumerate(run.model.blocks):
        if isinstance(block.attention, SwitchHead):
            found[f"layers.{layer}.attention.qk"] = block.attention.qk.weight
        for site in (site for part in block.routed_parts for site in part.sites):
            found |= {f"layers.{site.router.shape.site}.{name}": tensor for name, tensor in named(site)}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


def named(site: RoutedSite) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a routed site by their names in the file, but for what comes before them."""
    for name, tensor in site.router.state_dict().items():
        yield f"router.{name}", tensor
    if isinstance(site, HeadProjection):
        yield "experts", site.weights_EOI
        return
    if isinstance(site, AttentionExperts):
        yield from (("kv", site.kv.weight), ("experts.query", site.query_EPD), ("experts.out", site.out_EDP))
        return
    yield from _experts("experts", site.experts, site.config.activation)
    if site.shared is not None:
        yield from _shared(site.shared)
    if site.shared_gate is not None:
        yield "shared_gate", site.shared_gate.weight
    if site.down is not None and site.up is not None:
        yield from (("latent.down", site.down.weight), ("latent.up", site.up.weight))
    if site.free is not None and site.free.constants:
        yield from (("constants.vector", site.free.vector_JD), ("constants.mix", site.free.mix_J2D))


def _experts(name: str, experts: Experts, activation: str) -> Iterator[tuple[str, Tensor]]:
    inner = experts.out_EDF.shape[2]
    gated = hidden_rows(activation, inner) == 2 * inner
    parts = ("gate", "up") if gated else ("up",)
    for part, tensor in zip(parts, torch.split(experts.in_EHD, inner, dim=1), strict=True):
        yield f"{name}.{part}", tensor
    yield f"{name}.down", experts.out_EDF
    if experts.in_bias_EH is not None and experts.out_bias_ED is not None:
        for part, tensor in zip(parts, torch.split(experts.in_bias_EH, inner, dim=1), strict=True):
            yield f"{name}.{part}_bias", tensor
        yield f"{name}.down_bias", experts.out_bias_ED


def _shared(shared: DenseMLP) -> Iterator[tuple[str, Tensor]]:
    """Yield what every token runs: one MLP, without the leading dimension of experts."""
    for name, tensor in _experts("shared", shared.experts, shared.activation):
        yield name, tensor.squeeze(0)
