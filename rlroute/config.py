"""Configurations: frozen dataclasses that turn into plain dictionaries and back, and name a run by their content.

Nothing heavy is imported here, so that the command line can answer ``--help`` at once.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from rlroute.errors import ConfigError
from rlroute.execution import Execution
from rlroute.limits import (
    MOST_EXPERTS,
    MOST_SEQUENCES,
    MOST_SITES,
    MOST_TOKENS,
    Between,
    Count,
    Experts,
    NonNegative,
    Positive,
    Size,
    Whole,
    check_fields,
    checked_seed,
    refuse_idle,
    refuse_product,
)
from rlroute.mixing import MIXING, Mixing
from rlroute.router_config import RouterConfig as RouterConfig  # also for whoever wants configurations
from rlroute.sites import HEAD_PARTS, attention_sites, place
from rlroute.start import StartConfig as StartConfig
from rlroute.variants import LayerVariants

SCHEMA = 2
"""Of records. 1 did not say from which code and data a run was made; it can still be read."""
DENSE = "dense"
DEFAULT_CORPUS = "package:sympy"

NEWER = {"attention_form", "tie_embeddings", "init_scale", "order"} | MIXING
"""Fields of ``model`` and ``data`` that their dictionaries leave out at their defaults: ids from before they were there
stay.
"""

_SITES = re.compile(r"(mlp|attention|value|output)?(?:(\d+)(?:-(\d+))?)?")

Budget = Literal["tokens", "flops", "time"]
Order = Literal["random", "epochs"]
Parts = Literal["all", "non-moe", "moe", "attention", "router"]
"""Which parameters train. moe: those of routed sites, routers among them; non-moe: all others; attention: those of
attention and other mixers but for routers, if they have any; router: those of routers alone (ST-MoE, arXiv 2202.08906,
section 5)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut."""

    spec: str = DEFAULT_CORPUS
    """Corpus: package:NAME, stdlib, synth:..., file:GLOB, parquet:GLOB or bin:GLOB."""
    tokenizer: str | None = "auto"
    """bytes; bpe, our own; a byte-level tokenizers JSON file; auto: bpe for the default corpus, else bytes."""
    seq_len: Size = 128
    """Tokens per sequence."""
    eval_tokens: Count = 12_288
    """Fixed validation tokens, the same for every run."""
    train_tokens: Count | None = None
    """So many of the training tokens alone: whole documents, the last one cut; fewer are among more. None: all."""
    order: Order = "random"
    """Of training windows. random: uniform over all offsets, so that some tokens come again before others have come;
    epochs: windows that do not overlap, each once before any comes again, shuffled and cut anew each time.
    """
    packed: bool = False
    """Attention stays within a document, which the last id opens."""

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal.
        """
        check_fields(self, "data")
        for name in ("spec", "tokenizer"):
            value = getattr(self, name) or ""
            if not value.isascii() and value.encode(errors="ignore").decode() != value:
                raise ConfigError(f"data.{name} = {value!r}: legal is UTF-8; a ? in a glob stands for what is not")

    def settled(self) -> DataConfig:
        """Return the same with the tokenizer that ``auto`` stands for. (None, in older records, is bytes.)"""
        auto = "bpe" if self.spec == DEFAULT_CORPUS else "bytes"
        return replace(self, tokenizer=auto) if self.tokenizer == "auto" else self


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Mixing, LayerVariants):
    """The decoder-only transformer that every router is put into."""

    num_experts: Experts = 16
    k: Count = 2
    """Experts per token."""
    d_expert: Size = 64
    """Hidden width of one expert."""
    num_shared_experts: Annotated[int, Between(0, 1024)] = 0
    """Experts that every token runs besides its k, ungated (DeepSeekMoE, arXiv 2401.06066)."""
    zero_experts: Annotated[int, Between(0, 1024)] = 0
    """Experts of an MLP site that give 0 and cost nothing (MoE++, arXiv 2410.07348), beside the num_experts."""
    copy_experts: Annotated[int, Between(0, 1024)] = 0
    """Experts that give the token's own input and cost nothing; LongCat-Flash (arXiv 2509.01322) has these."""
    constant_experts: Annotated[int, Between(0, 1024)] = 0
    """Experts that mix the token's own input with a learned vector, and cost next to nothing."""
    activation: Literal["swiglu", "gelu", "relu", "swiglu_clamped", "geglu", "relu_squared"] = "swiglu"
    """Between an expert's projections; the three with glu are gated and have a third weight matrix."""
    gate_form: Literal["own", "unit"] = "own"
    """own: the gate as published (1/k where it does not learn); unit: value 1/k, gradient of the router's gate."""
    capacity_factor: Positive | None = None
    """Capacity of an expert over its fair share of pairs; none: dropless."""
    capacity_order: Literal["position", "gate"] = "position"
    """Who comes first under a capacity: first choices before second ones and then earlier tokens, or larger gates."""
    capacity_rows: Literal["sample", "sequence"] = "sample"
    """Which rows compete for a capacity: those of a micro-batch (of one routing sample), or those of a sequence."""
    capacity_groups: Count = 1
    """Groups of neighbours in a sample's rows, each with capacities of its own (GShard, arXiv 2006.16668)."""
    capacity_of: Literal["expert", "device"] = "expert"
    """What has a capacity: each expert, or all experts of a device together (DeepSeek-V2, arXiv 2405.04434)."""
    devices: Whole = 0
    """Devices over which experts are spread evenly, for routers, balance and capacities; 0: those that hold them."""
    rope_base: Positive = 10_000.0
    tie_embeddings: bool = False
    """One matrix for both embeddings, of tokens and of logits (Press and Wolf 2017, arXiv 1608.05859)."""
    init_scale: Positive = 1.0
    """Variance of the initial weights over the usual one, 1 / inputs (Switch, arXiv 2101.03961, section 2.4: a tenth is
    steadier). Embeddings and routers start as they do.
    """

    @property
    def num_free_experts(self) -> int:
        """Experts of an MLP site that run nothing: zero, copy and constant ones, behind the others in this order."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def active_width(self) -> int:
        """Hidden width that a token runs whose k experts are real: that of the dense model of equal active compute."""
        return (self.k + self.num_shared_experts) * self.d_expert

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal.
        """
        check_fields(self, "model")
        sizes = {"model.num_layers": self.num_layers, "model.num_experts": self.num_experts}
        refuse_product(sizes, MOST_EXPERTS, "experts in all")
        if self.k > self.num_experts + (free := self.num_free_experts):
            more = f" and {free} free ones" if free else ""
            raise ConfigError(f"model.k = {self.k}: legal are 1 to model.num_experts = {self.num_experts}{more}")
        self.check_heads(self.k)
        self._check_sites()
        self.check_mixing()
        self.check_variants(self.num_shared_experts)
        if self.devices and self.num_experts % self.devices:
            raise ConfigError(f"model.devices = {self.devices}: must divide model.num_experts = {self.num_experts}")
        if self.capacity_of == "device" and not self.devices:
            raise ConfigError("model.capacity_of = 'device' needs model.devices: 0 says nothing of them")
        if self.capacity_rows == "sequence" and self.capacity_groups > 1:
            groups = self.capacity_groups
            raise ConfigError(f"model.capacity_groups = {groups}: with capacity_rows 'sequence' legal is 1")
        of_capacity = ("capacity_order", "capacity_rows", "capacity_groups", "capacity_of")
        refuse_idle(self, ModelConfig, "model", dict.fromkeys(of_capacity, "capacity_factor"))

    def _check_sites(self) -> None:
        """Refuse more routed sites than a record may have, or more experts of heads than can be initialised."""
        count = len(self.moe_layers) * (1 + len(attention_sites(self, 0)))
        if self.attention_form == "switchhead":
            sizes = {f"model.{name}": getattr(self, name) for name in ("num_layers", "num_heads", "attention_experts")}
            refuse_product(sizes, MOST_EXPERTS // len(HEAD_PARTS), "experts of a projection in all")
        if count > MOST_SITES:
            raise ConfigError(f"model.num_heads = {self.num_heads}: {count} routed sites, legal are {MOST_SITES}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Execution):
    """How one run is trained."""

    steps: Count = 500
    """Optimizer steps under budget tokens; the most steps under budget time."""
    batch_size: Size = 8
    """Sequences per step."""
    micro_batches: Count = 1
    """A step's batch is cut into this many: gradient accumulation, or shares of the workers that train together."""
    balance_scope: Literal["micro_batch", "batch"] = "micro_batch"
    """What balance losses look at: a micro-batch, or the whole batch (which needs as many workers as micro-batches)."""
    lr: Positive = 1.2e-2
    """Peak learning rate of AdamW."""
    router_lr_scale: NonNegative = 1.0
    """The router's learning rate over ``lr``; 0: routers are frozen."""
    parts: Parts = "all"
    """What trains; all else is frozen, to the bit (:mod:`rlroute.model.parts`)."""
    warmup_steps: Whole = 40
    final_lr: NonNegative = 0.1
    """The learning rate at the end over its peak (cosine decay)."""
    weight_decay: NonNegative = 0.1
    """On matrices outside the router; the router has none."""
    clip: Positive = 1.0
    """Gradient-norm clip of all but the router."""
    router_clip: Positive = 1.0
    """Gradient-norm clip of the router, a group of its own."""
    budget: Budget = "tokens"
    """What is equal between runs."""
    budget_amount: Positive | None = None
    """Training FLOPs (budget flops) or seconds (budget time)."""
    eval_every: Count = 40
    eval_train: bool = False
    """Evaluate as many training tokens as validation tokens too, in the same way: over-fitting shows."""
    log_every: Count = 10
    checkpoint_every: Count = 100
    record_choices: bool = False
    """Keep which experts were chosen at every step, so that the router ``replay`` can take the same."""

    @property
    def routers_train(self) -> bool:
        """Whether routers learn anything, by gradients or otherwise."""
        return self.parts in ("all", "moe", "router") and self.router_lr_scale > 0

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal.
        """
        check_fields(self, "train")
        self.check_execution()
        if self.parts == "router" and not self.routers_train:
            raise ConfigError("train.router_lr_scale = 0 with train.parts = 'router': nothing trains, legal is above 0")
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"train.micro_batches = {self.micro_batches}: must divide train.batch_size = {self.batch_size}"
            )
        sizes = {"train.steps": self.steps, "train.batch_size": self.batch_size}
        refuse_product(sizes, MOST_SEQUENCES, "sequences in all")
        if (self.budget == "tokens") != (self.budget_amount is None):
            raise ConfigError(
                f"train.budget_amount = {self.budget_amount} with budget {self.budget!r}: "
                "flops and time need one, tokens takes none"
            )


@dataclass(frozen=True, kw_only=True)
class SitedRouter:
    """A router for some sites, in place of the run's.

    Raises:
        ConfigError: ``sites`` is not of that form.
    """

    sites: str
    """Which: ``0-2`` or ``3`` (layers), ``mlp``, ``attention`` (of which ``value`` and ``output`` are parts where each
    head is routed), or both as in ``attention0-2``.
    """
    router: RouterConfig

    def __post_init__(self) -> None:
        _want("router", self.router, RouterConfig)
        if not (isinstance(self.sites, str) and self.sites and _SITES.fullmatch(self.sites)):
            raise ConfigError(
                f"sites {self.sites!r}: want layers as in '3' or '0-2', 'mlp', 'attention' or 'attention0-2' "
                "(of heads that are routed, 'value' and 'output' too)"
            )

    def serves(self, site: int | str) -> bool:
        """Whether a site (:data:`rlroute.routing.Site`) is one of them."""
        layer, part = place(site)
        match = _SITES.fullmatch(self.sites)
        assert match is not None
        wanted, first, last = match.groups()
        named = wanted in (None, part) or (wanted == "attention" and part in HEAD_PARTS)
        return named and int(first or 0) <= layer <= int(last or first or sys.maxsize)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run but for its seed. ``router`` None is the dense model of equal active width, the yardstick.

    ``others`` are routers for some sites, the first that serves a site deciding there; ``router`` decides elsewhere.
    ``start`` is the checkpoint of another run whose weights this one starts from; None: they derive from the seed.

    Raises:
        ConfigError: a part holds an illegal value. The parts themselves are plain values until they meet here, so that
            the command line can parse any and refuse it in our words.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig | None = None
    others: tuple[SitedRouter, ...] = ()
    train: TrainConfig = field(default_factory=TrainConfig)
    start: StartConfig | None = None

    def __post_init__(self) -> None:
        for name, kind in {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}.items():
            _want(name, getattr(self, name), kind)
            getattr(self, name).check()
        object.__setattr__(self, "data", self.data.settled())  # what a record says does not hang on another default
        self.model.check_router_dtype(self.train.dtype)
        sizes = {"train.batch_size": self.train.batch_size, "data.seq_len": self.data.seq_len}
        refuse_product(sizes, MOST_TOKENS, "tokens a step")
        _want("router", self.router, RouterConfig | None)
        _want("others", self.others, list | tuple)
        object.__setattr__(self, "others", tuple(self.others))
        for other in self.others:
            _want("others", other, SitedRouter)
        if self.others and self.router is None:
            raise ConfigError(f"routers at sites {self.others[0].sites}: the dense model has none elsewhere")
        _want("start", self.start, StartConfig | None)
        if self.start is not None:
            self.start.check()

    def router_at(self, site: int | str) -> RouterConfig:
        """Return the configuration of a site's router; not for the dense model."""
        assert self.router is not None
        return next((other.router for other in self.others if other.serves(site)), self.router)

    @property
    def router_name(self) -> str:
        """The names of the run's routers, as in ``switch+hash``; or ``dense``."""
        return "+".join(self.router_names) or DENSE

    @property
    def router_names(self) -> list[str]:
        """The names of the run's routers, once each."""
        routers = [self.router, *(other.router for other in self.others)]
        return list(dict.fromkeys(router.name for router in routers if router is not None))

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries; :func:`rlroute.registry.run_config` is the inverse."""
        parts = {name: _part_dict(getattr(self, name)) for name in ("data", "model", "train")}
        router = {"name": DENSE} if self.router is None else _router_dict(self.router)
        others = {"others": [{"sites": other.sites} | _router_dict(other.router) for other in self.others]}
        start = {} if self.start is None else {"start": asdict(self.start)}
        return parts | {"router": router} | (others if self.others else {}) | start

    def content_hash(self) -> str:
        """Return 12 hex digits of the SHA-256 of the configuration and the schema version."""
        return content_hash(self.to_dict())

    def run_id(self, seed: int) -> str:
        """Return the name of the run with this seed.

        Raises:
            ConfigError: no seed is like that.
        """
        return run_id(self.router_name, self.content_hash(), checked_seed(seed))

    @property
    def by_place(self) -> dict[str, RouterConfig]:
        """The configurations of the run's routers: ``router``, and ``router@0-1`` of some sites."""
        first = {} if self.router is None else {"router": self.router}
        return first | {f"router@{other.sites}": other.router for other in self.others}


def content_hash(values: Mapping[str, Any], schema: int = SCHEMA) -> str:
    """Return 12 hex digits of the SHA-256 of a plain configuration and the schema of its record."""
    text = json.dumps({"schema": schema} | dict(values), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_id(router: str, config_hash: str, seed: int) -> str:
    """Return the name of a run: its routers' names, its configuration's hash, its seed."""
    return f"{router}-{config_hash}-s{seed}"


def _want(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name} = {value!r}: want {getattr(kind, '__name__', kind)}")


def _part_dict(part: DataConfig | ModelConfig | TrainConfig) -> dict[str, Any]:
    plain = {f.name: f.default for f in fields(part) if f.name in NEWER}
    return {name: value for name, value in asdict(part).items() if name not in plain or value != plain[name]}


def _router_dict(router: RouterConfig) -> dict[str, Any]:
    return {"name": router.name} | asdict(router)
