"""config.json and environment.json: which run this is, what it is made from, and where it happened."""

from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic does not take typing's own before Python 3.12

from rlroute.schema.values import ConfigHash, Digest, Moment, Name, Noted, Whole


class NamedRouter(TypedDict):
    """The configuration of a router: besides its name, the fields of its ``Config``."""

    name: Name
    """Of the router's file."""


class SitedRouter(NamedRouter):
    """A router of some sites."""

    sites: str
    """``0-1``, ``attention`` and so on."""


class DataFields(TypedDict):
    """Fields of :class:`rlroute.config.DataConfig`; these are in every record."""

    spec: str
    """The corpus."""
    seq_len: Whole
    """Tokens per sequence."""


class ModelFields(TypedDict):
    """Fields of :class:`rlroute.config.ModelConfig`; these are in every record."""

    num_layers: Whole
    """Blocks."""
    num_dense_layers: Whole
    """The first so many have no experts."""
    num_experts: Whole
    """Experts of a routed site."""
    k: Whole
    """Experts per token."""


class TrainFields(TypedDict):
    """Fields of :class:`rlroute.config.TrainConfig`; these are in every record."""

    steps: Whole
    """Optimizer steps, or the most of them."""
    batch_size: Whole
    """Sequences per step."""


class StartFields(TypedDict):
    """Fields of :class:`rlroute.start.StartConfig`; these are in every record that has any."""

    run: Name
    """Id of the run whose weights this one starts from."""
    step: Whole
    """Steps after which they were written."""
    sha256: Digest
    """Of the weights."""


class Configuration(TypedDict):
    """A run's configuration: :meth:`rlroute.config.RunConfig.to_dict`."""

    data: DataFields
    """The corpus."""
    model: ModelFields
    """The transformer."""
    train: TrainFields
    """How it was trained."""
    router: NamedRouter
    """The router that decides wherever no other does; of name ``dense`` in the dense model."""
    others: NotRequired[list[SitedRouter]]
    """The routers of some sites."""
    start: NotRequired[StartFields]
    """The checkpoint whose weights the run starts from; without one they derive from the seed."""


class MadeFrom(TypedDict):
    """What a run is made from besides its configuration, by SHA-256: see :func:`rlroute.provenance.made_from`."""

    core: Digest
    """rlroute's own sources without its wings, and the tile table."""
    routers: dict[str, dict[str, str]]
    """Each router's code: its file, the others that belong to it, its distribution and that one's version."""
    reads: dict[str, str]
    """What routers read: a policy's file, the choices of a replayed run."""
    data: dict[str, str]
    """The documents, the training stream and the validation stream, domains included."""
    tokenizer: Digest | None
    """The tokenizer's file."""


class Asked(TypedDict):
    """What was to be trained together: each of these entries with each of these seeds."""

    entries: list[Name]
    """Ids of runs without their seeds; of a sweep or of tuning, the run's own alone."""
    seeds: list[Whole]
    """As a run has one."""
    registration: NotRequired[Digest]
    """SHA-256 of the plan of the judgement that asked: see docs/judge.md."""
    claims: NotRequired[dict[str, Digest]]
    """SHA-256 of the plans of the claims that asked, by their ids: see docs/claims.md."""


class Described(TypedDict):
    """config.json: which run this is."""

    schema: Whole
    """The version of this description."""
    id: Name
    """The run's id, and its folder's name: router, hash of the configuration, seed."""
    router: Name
    """The names of its routers, or ``dense``."""
    seed: Whole
    """Initial weights, order of the data and routing noise derive from it."""
    config_hash: ConfigHash
    """12 hex digits of the SHA-256 of schema and configuration."""
    command: str | None
    """The command line behind it."""
    asked: NotRequired[Asked]
    """With what it was to be trained; it is no part of what the run is. Older records, and those of single runs, do not
    say.
    """
    config: dict[str, Any]
    """Its configuration: a :class:`Configuration`."""
    made_from: NotRequired[MadeFrom]
    """What it is made from besides; records of schema 1 do not say."""


class Environment(TypedDict):
    """environment.json: where the run happened, as far as it can change the result."""

    rlroute: str
    """The package's version."""
    commit: str | None
    """Of the repository, where there is one."""
    dirty: bool | Noted | None
    """Whether files differed from the commit."""
    python: str
    """Python's version."""
    torch: str
    """PyTorch's version."""
    numpy: str
    """NumPy's version."""
    platform: str
    """Operating system and C library."""
    device: str
    """Where it was computed: ``cpu`` or ``cuda``."""
    device_name: str
    """The processor's or the card's name."""
    cpu_capability: str
    """The instruction set that PyTorch used."""
    threads: Whole | Noted
    """CPU threads of a process."""
    allocator: NotRequired[str]
    """How memory on the CPU was allocated; it changes speeds alone."""
    kernel_backend: str
    """The engine that ran the experts."""
    kernel_tiles: NotRequired[str | None]
    """Hash of the table of tiles, where the engine has one."""
    routers: NotRequired[dict[str, dict[str, str]] | Noted]
    """In late records of schema 1, the code of each router, which ``made_from`` says now."""
    workers: NotRequired[Whole | Noted]
    """Processes that trained the run together."""
    expert_parallel: NotRequired[Whole | Noted]
    """Shards into which they cut the experts."""
    begun: NotRequired[Moment]
    """When the run was begun; it changes nothing."""
    notes: NotRequired[list[str]]
    """What happened to the run, such as a damaged checkpoint that was passed over."""
