"""Configurations: frozen dataclasses that turn into plain dictionaries and back, and name a run by their content.

Nothing heavy is imported here, so that the command line can answer ``--help`` at once.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar

from rlroute.errors import ConfigError

SCHEMA = 1
DENSE = "dense"

C = TypeVar("C")
Budget = Literal["tokens", "flops", "time"]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of every router's ``Config``. ``name`` is the router's, set when its class is made."""

    name: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut."""

    spec: str = "package:sympy"
    """Corpus: package:NAME, stdlib, synth:..., file:GLOB or bin:GLOB."""
    tokenizer: str | None = None
    """A Hugging Face tokenizers JSON file; bytes without one."""
    seq_len: int = 128
    """Tokens per sequence."""
    eval_tokens: int = 49_152
    """Fixed validation tokens, the same for every run."""

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal.
        """
        _require_positive(self, "seq_len", "eval_tokens")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder-only transformer that every router is put into."""

    num_layers: int = 2
    d_model: int = 96
    num_heads: int = 4
    num_dense_layers: int = 0
    """The first n layers keep a dense MLP of the same active width."""
    num_experts: int = 16
    k: int = 2
    """Experts per token."""
    d_expert: int = 96
    """Hidden width of one expert."""
    num_shared_experts: int = 0
    """Experts that every token runs besides its k, ungated (DeepSeekMoE, arXiv 2401.06066)."""
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    """Between an expert's projections; swiglu is gated and has a third weight matrix."""
    gate_form: Literal["own", "unit"] = "own"
    """own: the gate as published (1/k where it does not learn); unit: value 1/k, gradient of the router's gate."""
    capacity_factor: float | None = None
    """Capacity of an expert over its fair share of pairs; none: dropless."""
    rope_base: float = 10_000.0

    @property
    def active_width(self) -> int:
        """Hidden width that a token runs: that of the dense model of equal active compute."""
        return (self.k + self.num_shared_experts) * self.d_expert

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal.
        """
        _require_positive(self, "num_layers", "d_model", "num_heads", "num_experts", "k", "d_expert", "rope_base")
        if self.k > self.num_experts:
            raise ConfigError(f"model.k = {self.k}: legal are 1 to model.num_experts = {self.num_experts}")
        if self.d_model % (2 * self.num_heads):
            raise ConfigError(
                f"model.d_model = {self.d_model}: must be a multiple of 2 * num_heads = {2 * self.num_heads} (rotary positions)"
            )
        if self.num_shared_experts < 0:
            raise ConfigError(f"model.num_shared_experts = {self.num_shared_experts}: legal are numbers from 0")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ConfigError(f"model.num_dense_layers = {self.num_dense_layers}: legal are 0 to {self.num_layers}")
        _require_choices(self, "activation", "gate_form")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ConfigError(
                f"model.capacity_factor = {self.capacity_factor}: legal are numbers above 0, or none (dropless)"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one run is trained."""

    steps: int = 200
    """Optimizer steps under budget tokens; the most steps under the others."""
    batch_size: int = 16
    """Sequences per step."""
    micro_batches: int = 1
    """A step's batch is cut into this many: gradient accumulation, or shares of the workers that train together."""
    balance_scope: Literal["micro_batch", "batch"] = "micro_batch"
    """What balance losses look at: a micro-batch, or the whole batch (which needs as many workers as micro-batches)."""
    lr: float = 8e-3
    """Peak learning rate of AdamW."""
    router_lr_scale: float = 1.0
    """The router's learning rate over ``lr``."""
    warmup_steps: int = 50
    final_lr: float = 0.1
    """The learning rate at the end over its peak (cosine decay)."""
    weight_decay: float = 0.1
    """On matrices outside the router; the router has none."""
    clip: float = 1.0
    """Gradient-norm clip of all but the router."""
    router_clip: float = 1.0
    """Gradient-norm clip of the router, a group of its own."""
    budget: Budget = "tokens"
    """What is equal between runs."""
    budget_amount: float | None = None
    """Training FLOPs (budget flops) or seconds (budget time)."""
    eval_every: int = 100
    log_every: int = 10
    checkpoint_every: int = 100
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute precision; router and residual loss stay in float32 at least."""
    kernel: Literal["auto", "cpu", "triton", "reference"] = "auto"
    threads: int = 1
    """CPU threads of a run; bits depend on it, so it is part of the run's identity."""

    def check(self) -> None:
        """Refuse illegal values by name.

        Raises:
            ConfigError: a value is illegal.
        """
        names = ("steps", "batch_size", "micro_batches", "lr", "clip", "router_clip", "eval_every", "log_every")
        _require_positive(self, *names, "checkpoint_every", "threads", "router_lr_scale")
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"train.micro_batches = {self.micro_batches}: must divide train.batch_size = {self.batch_size}"
            )
        _require_choices(self, "budget", "balance_scope", "device", "dtype", "kernel")
        if (self.budget == "tokens") != (self.budget_amount is None):
            raise ConfigError(
                f"train.budget_amount = {self.budget_amount} with budget {self.budget!r}: flops and time need one, tokens takes none"
            )
        if self.budget_amount is not None and not self.budget_amount > 0:
            raise ConfigError(f"train.budget_amount = {self.budget_amount}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run but for its seed. ``router`` None is the dense model of equal active width, the yardstick.

    Raises:
        ConfigError: a part holds an illegal value. The parts themselves are plain values until they meet here, so that the command
            line can parse any and refuse it in our words.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for part in (self.data, self.model, self.train):
            part.check()

    @property
    def router_name(self) -> str:
        """The router's name, or ``dense``."""
        return DENSE if self.router is None else self.router.name

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries; :meth:`from_dict` is the inverse."""
        router = {} if self.router is None else asdict(self.router)
        parts = {"data": asdict(self.data), "model": asdict(self.model), "train": asdict(self.train)}
        return parts | {"router": {"name": self.router_name} | router}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build a configuration from plain dictionaries.

        Raises:
            ConfigError: an unknown router or field, or an illegal value.
        """
        from rlroute.registry import router_class  # the registry imports the routers, which import this module

        _refuse_unknown("run", values, ("data", "model", "router", "train"))
        router_values = dict(values.get("router", {"name": DENSE}))
        name = router_values.pop("name", None)
        if name is None:
            raise ConfigError("router has no 'name'")
        if name == DENSE:
            _refuse_unknown("router dense", router_values, ())
        return cls(
            data=from_dict(DataConfig, values.get("data", {}), "data"),
            model=from_dict(ModelConfig, values.get("model", {}), "model"),
            router=None if name == DENSE else from_dict(router_class(name).Config, router_values, f"router {name}"),
            train=from_dict(TrainConfig, values.get("train", {}), "train"),
        )

    def content_hash(self) -> str:
        """Return 12 hex digits of the SHA-256 of the configuration and the schema version."""
        text = json.dumps({"schema": SCHEMA} | self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def run_id(self, seed: int) -> str:
        """Return the name of the run with this seed: router, content hash, seed."""
        return f"{self.router_name}-{self.content_hash()}-s{seed}"


def from_dict(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build the dataclass ``cls`` from a plain dictionary; missing fields take their defaults.

    Raises:
        ConfigError: an unknown field, a value of another type than the field's, or none for a field that needs one; the message
            starts with ``where``.
    """
    if not is_dataclass(cls):
        raise TypeError(f"{cls} is not a dataclass")
    _refuse_unknown(where, values, [f.name for f in fields(cls)])
    missing = [name for name in needed_fields(cls) if name not in values]
    if missing:
        raise ConfigError(f"{where} needs {' and '.join(missing)}: say {missing[0]}=VALUE")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _checked(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def needed_fields(cls: type) -> list[str]:
    """Return the names of a dataclass's fields without a default."""
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def _refuse_unknown(where: str, values: Mapping[str, Any], legal: typing.Iterable[str]) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} = {values!r}: want a mapping of fields")
    unknown = sorted(set(values) - set(legal))
    if unknown:
        raise ConfigError(f"{where} has no field {unknown[0]!r}: legal are {', '.join(sorted(legal)) or 'none'}")


def _checked(value: Any, hint: Any, where: str) -> Any:
    """Return ``value`` as the annotated type, turning whole floats and lists that JSON made of ints and tuples back."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _checked(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: legal are {', '.join(map(repr, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_checked(item, arguments[0], where) for item in value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r}: want {getattr(hint, '__name__', hint)}")
    return value


def _section(config: Any) -> str:
    return type(config).__name__.removesuffix("Config").lower()


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{_section(config)}.{name} = {getattr(config, name)}: must be above 0")


def _require_choices(config: Any, *names: str) -> None:
    """Hold fields that are literals to them."""
    hints = typing.get_type_hints(type(config))
    for name in names:
        legal = typing.get_args(hints[name])
        if getattr(config, name) not in legal:
            raise ConfigError(
                f"{_section(config)}.{name} = {getattr(config, name)!r}: legal are {', '.join(map(repr, legal))}"
            )
