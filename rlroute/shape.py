"""What a router is built for: a site of the model, its sizes, and what the site hands out.

Shape suffixes: D model width, E experts, S shared experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlroute import seeding
from rlroute.sites import Site

WISHES = frozenset({"outputs", "weights"})
"""What routers may wish for: see :attr:`Router.wishes`."""


@dataclass(frozen=True, kw_only=True)
class RouterShape:
    """What a router is built for.

    Attributes:
        d_model, num_experts, k: D, E and experts per token.
        num_free_experts: the last so many of the E are free: they run nothing (``model.zero_experts`` and its like).
        site: the key of the site, from which names of draws derive.
        vocab_size: V.
        seed: initial weights and tables derive from it.
        token_counts_V: how often each token occurs in the training corpus, int64 (V,); None where unknown.
        site_index, num_sites: which of how many routed sites this is.
        devices: over so many are the experts spread evenly.
        num_shared_experts: S, experts that every token runs besides.
        weighs_shared: whether the layer weighs these itself (``model.shared_gate``).
        grants: what the site hands to routers that wish for it.
        d_expert: F, where it hands out weights.
        d_value: width of what an expert gives, where that is a head's values and no D.
    """

    d_model: int
    num_experts: int
    k: int
    site: Site
    vocab_size: int
    seed: int
    token_counts_V: Tensor | None = None
    site_index: int = 0
    num_sites: int = 1
    devices: int = 1
    num_shared_experts: int = 0
    weighs_shared: bool = False
    grants: frozenset[str] = WISHES
    d_expert: int = 1
    num_free_experts: int = 0
    d_value: int | None = None

    @property
    def d_output(self) -> int:
        """Width of what an expert gives, and of what a decision may add to it."""
        return self.d_value or self.d_model

    @property
    def num_real_experts(self) -> int:
        """The first so many experts run something."""
        return self.num_experts - self.num_free_experts

    def key(self, name: str) -> tuple[int, str]:
        """Return the key from which the draws for a weight or table called ``name`` derive."""
        return self.seed, f"layers.{self.site}.router.{name}"

    def init(self, tensor: Tensor, name: str, std: float) -> None:
        """Fill ``tensor`` with N(0, std^2) drawn from the key of ``name`` at this site."""
        seeding.init_normal(tensor, std, *self.key(name))
