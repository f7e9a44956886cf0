"""What every router's configuration has: the weights of shared terms, and a balance that is held.

Nothing heavy is imported here either (:mod:`rlroute.config`).
"""

from dataclasses import dataclass, fields
from typing import ClassVar

from rlroute.limits import NonNegative, Positive, check_fields, refuse_idle

_NEEDED = {"load_std": "load_weight", "erc_alpha": "erc_weight", "balance_rate": "target_max_vio"}
"""Fields that say how, and the field that says whether at all."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of every router's ``Config``. ``name`` is the router's, set when its class is made.

    Each field says in its annotation what it may hold (:mod:`rlroute.limits`). A rule between fields is checked in a
    ``__post_init__`` of the router's own, which calls this one first.

    Raises:
        ConfigError: a field's annotation does not allow its value.
    """

    name: ClassVar[str] = ""

    entropy_weight: NonNegative = 0.0
    """Weight of minus the entropy of the routing distribution: a bonus."""
    balance_weight: NonNegative = 0.0
    """Weight of the f.P balance loss (Switch, arXiv 2101.03961) over the balance scope."""
    z_weight: NonNegative = 0.0
    """Weight of the router z-loss; ST-MoE (arXiv 2202.08906) uses 1e-3."""
    device_balance_weight: NonNegative = 0.0
    """Weight of the f.P loss over the devices that hold the experts (DeepSeek-V2, arXiv 2405.04434); no gradient where
    one holds all.
    """
    sequence_balance_weight: NonNegative = 0.0
    """Weight of the f.P loss within each sequence; DeepSeek-V3 (arXiv 2412.19437) uses 1e-4."""
    communication_balance_weight: NonNegative = 0.0
    """Weight of the f.P loss over devices as receivers of tokens (DeepSeek-V2, arXiv 2405.04434: 0.02); no gradient
    where one device holds all.
    """
    importance_weight: NonNegative = 0.0
    """Weight of CV^2 of the experts' summed gates over the balance scope (Shazeer et al. 2017, arXiv 1701.06538)."""
    load_weight: NonNegative = 0.0
    """Weight of CV^2 of the experts' smooth load over the balance scope (Shazeer et al. 2017): of the probability that
    each is among the k best by its logit with noise.
    """
    load_std: Positive | None = None
    """Standard deviation of that noise, which no choice need see; none: 1 / E (V-MoE, arXiv 2106.05974)."""
    simbal_weight: NonNegative = 0.0
    """Weight of the distance of the score weights' Gram matrix from the identity (SimBal, arXiv 2506.14038)."""
    erc_weight: NonNegative = 0.0
    """Weight of expert-router coupling (ERC, arXiv 2512.23447), which reads the experts' weights: all of them in this
    process.
    """
    erc_alpha: Positive = 1.0
    """What share of an expert's answer to its own row of score weights the others may reach, in that term."""
    orthogonal: bool = False
    """Score weights start with orthonormal rows, as SimBal has it."""
    target_max_vio: NonNegative | None = None
    """The weight of the f.P loss starts at `balance_weight` and moves after each step, up where the step's MaxVio is
    above this, else down; none: it stays.
    """
    balance_rate: Positive = 0.001
    """How far that weight moves in a step."""

    def __post_init__(self) -> None:
        check_fields(self, f"router {self.name}")
        refuse_idle(self, RouterConfig, self.name, _NEEDED)

    def reads(self) -> dict[str, str]:
        """Return the SHA-256 of what the router reads besides its own code, by a name for each; nothing by default.

        It belongs to what a run is: a run is neither handed out nor continued where it has changed.

        Raises:
            ConfigError, StoreError: it cannot be read.
        """
        return {}

    @property
    def term_weights(self) -> dict[str, float]:
        """The weights of the terms that every router with scores can have, by field: see
        :func:`rlroute.balance.regularisers`.
        """
        return {f.name: getattr(self, f.name) for f in fields(RouterConfig) if f.name.endswith("_weight")}

    @property
    def wishes(self) -> frozenset[str]:
        """What these terms ask of the layer: see :attr:`rlroute.routing.Router.wishes`."""
        return frozenset({"weights"} if self.erc_weight else ())

    @property
    def balances(self) -> bool:
        """Whether there is an f.P loss, be its weight 0 at the start."""
        return self.balance_weight > 0 or self.target_max_vio is not None

    @property
    def mixes_tokens(self) -> bool:
        """Whether one of these terms mixes the tokens of a micro-batch."""
        mixing = ("device_balance_weight", "communication_balance_weight", "importance_weight", "load_weight")
        return self.balances or any(getattr(self, name) for name in mixing)
