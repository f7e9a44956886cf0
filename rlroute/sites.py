"""Routed sites, the places of a model that have a router: their keys, which there are, and which are shown as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlroute.config import ModelConfig

Site = int | str
"""The key of a site: n for the feed-forward layer of block n, "n.attention" for its attention of experts, or, where
each head has experts of its own, "n.value.h" and "n.output.h" for those two projections of head h.
"""

HEAD_PARTS = ("value", "output")
"""The projections of a head that are routed in SwitchHead."""


def attention_sites(config: ModelConfig, layer: int) -> list[Site]:
    """Return the routed sites of a block's attention, in the order in which they decide."""
    if not config.attention_experts:
        return []
    if config.attention_form == "moa":
        return [f"{layer}.attention"]
    return [f"{layer}.{part}.{head}" for part in HEAD_PARTS for head in range(config.num_heads)]


def sites(config: ModelConfig) -> dict[Site, int]:
    """Return the number of experts at each routed site, free ones included, first to last."""
    found: dict[Site, int] = {}
    for layer in config.moe_layers:
        found |= dict.fromkeys(attention_sites(config, layer), config.attention_experts)
        found[layer] = config.num_experts + config.num_free_experts
    return found


def place(site: Site) -> tuple[int, str]:
    """Return the block of a site and which part of it the site is: ``mlp``, ``attention``, ``value`` or ``output``."""
    layer, _, part = str(site).partition(".")
    return int(layer), part.partition(".")[0] or "mlp"


def families(keys: Iterable[Site]) -> dict[str, list[int]]:
    """Return what pages and tables show as one, by its name, as places in a list over sites: all heads' sites of a part
    of a block, as ``0.value``, and every other site by itself.
    """
    found: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        layer, part = place(key)
        found.setdefault(str(layer) if part == "mlp" else f"{layer}.{part}", []).append(number)
    return found
