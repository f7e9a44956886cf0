"""The recorded choices of another run: its router again, told at every training step which experts to take.

A control of this project's own. It answers whether a difference between two models comes from which expert saw which
token: change the model and leave the choices. With nothing changed it gives the losses of the recorded run bit for bit,
which puts the whole seam to the test; `train` and `compare` give it that run's learning rates, unless --no-tuned says
otherwise. Replaying routes between two policies is known from R3, Ma et al. 2025 (arXiv 2510.11370).

Scores, gates and terms are those of the recorded run's router, which learns as it did there; evaluation asks it freely.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch import Tensor

from rlroute.choices import ChoiceArrays, ChoiceLog
from rlroute.config import RouterConfig, RunConfig
from rlroute.errors import ConfigError, StoreError
from rlroute.reading import read_described
from rlroute.registry import make_router, router_class, router_code, run_config
from rlroute.routing import Feedback, Router, RouterShape, RoutingContext, RoutingDecision, Sums, Term
from rlroute.transfer import put


class ReplayRouter(Router):
    """A run's router whose choices in training are those that were recorded."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Fields of a replay. The weights of terms are those of the recorded run."""

        run: str
        """Folder of a run that was trained with ``--train.record-choices``, on the same seed, data and batch."""
        trace: str = ""
        """A file that ``rlroute trace RUN --out FILE.npz`` wrote, or one like it: its choices are taken in place of the
        run's own.
        """
        sha256: str = ""
        """Of the choices, and so a part of this run's identity: filled in where it is empty, else they must have it."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if any(getattr(self, f.name) != f.default for f in fields(RouterConfig)):
                raise ConfigError(f"router replay:run={self.run}: the weights of terms are those of the recorded run")
            if not self.sha256:
                object.__setattr__(self, "sha256", self.choices_sha256())

        def choices_sha256(self) -> str:
            """Return the SHA-256 of the choices as they lie there.

            Raises:
                StoreError: there are none.
            """
            return (ChoiceArrays(Path(self.trace)) if self.trace else ChoiceLog(Path(self.run))).sha256()

        def recorded(self) -> tuple[RunConfig, int]:
            """Return the recorded run's configuration, and its seed.

            Raises:
                StoreError: it is no run with routers.
            """
            try:
                described = read_described(Path(self.run))
                config = run_config(described["config"])
            except (StoreError, ConfigError) as error:
                raise StoreError(f"router replay.run = {self.run!r} is no run: {error}") from error
            if config.router is None:
                raise StoreError(f"router replay.run = {self.run!r} is a run of the dense model: want one of a router")
            return config, described["seed"]

        def reads(self) -> dict[str, str]:
            """Return the SHA-256 of the choices, and of the recorded routers: their configurations, code and files."""
            config, seed = self.recorded()
            routers = {at: asdict(router) for at, router in config.by_place.items()}
            code = {name: router_code(name) for name in config.router_names}
            files = {
                f"{at}.{name}": sha for at, router in config.by_place.items() for name, sha in router.reads().items()
            }
            told = json.dumps([seed, routers, code], sort_keys=True)
            choices = {"choices": self.choices_sha256()}
            return choices | {"routers": hashlib.sha256(told.encode()).hexdigest()} | files

    gate_meaning = "the recorded router's"
    config: Config

    def __init__(self, config: Config, shape: RouterShape) -> None:
        super().__init__(config, shape)
        run, _ = config.recorded()
        self.micro_batches = run.train.micro_batches
        self.source = source = make_router(run.router_at(shape.site), shape)
        self.learns_from, self.gate_meaning, self.causal = source.learns_from, source.gate_meaning, source.causal
        self.stochastic, self.two_rules, self.publishes = source.stochastic, source.two_rules, source.publishes
        self.batch_dependent, self.wishes = source.batch_dependent, source.wishes
        self.common = tuple(f"source.{name}" for name in source.common)

    @classmethod
    def refuses(cls, config: RouterConfig, shape: RouterShape) -> str | None:
        """Refuse another seed than the recorded run's, choices that are not those that are named, and what its router
        refuses.
        """
        assert isinstance(config, cls.Config)
        run, seed = config.recorded()
        recorded = run.router_at(shape.site)
        if seed != shape.seed:
            return f"run = {config.run!r} has seed {seed}: legal is that, not {shape.seed}"
        if (found := config.choices_sha256()) != config.sha256:
            return f"run = {config.run!r} has choices of SHA-256 {found}, want {config.sha256}"
        if config.trace and (sites := ChoiceArrays(Path(config.trace)).sites) != shape.num_sites:
            return f"trace = {config.trace!r} has {sites} layers: legal are the model's {shape.num_sites} sites"
        return super().refuses(config, shape) or router_class(recorded.name).refuses(recorded, shape)

    @property
    def original(self) -> Router:
        """The recorded router."""
        return self.source

    @property
    def num_samples(self) -> int:
        """As the recorded router's."""
        return self.source.num_samples

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Let the recorded router decide, with its recorded choices in training."""
        if context.micro_batch is not None:
            ids_NK = self._recorded(context.step, context.micro_batch, len(x_TD))
            context = replace(context, choices={context.site: put(ids_NK, x_TD.device)})
        decision: RoutingDecision = self.source(x_TD, context)
        return decision

    def _recorded(self, step: int, micro_batch: int, tokens: int) -> Tensor:
        shape, config = self.shape, self.config
        if not config.trace:
            return ChoiceLog(Path(config.run)).read(step, micro_batch, shape.site)
        rows = slice(micro_batch * tokens, (micro_batch + 1) * tokens)
        whole = self.micro_batches * tokens
        return ChoiceArrays(Path(config.trace)).read(step, rows, whole, shape.site_index, shape.num_experts)

    def objective(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Term]:
        """Return the recorded router's own terms."""
        return self.source.objective(decision, feedback)

    def observe(self, decision: RoutingDecision, feedback: Feedback) -> dict[str, Tensor]:
        """Return what the recorded router observes."""
        return self.source.observe(decision, feedback)

    def adapt(self, sums: Sums, progress: float) -> None:
        """Let the recorded router adapt."""
        self.source.adapt(sums, progress)
