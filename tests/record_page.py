"""docs/records.md out of :mod:`rlroute.schema`, of the configurations and of what judgements, claims and ladders store:
``python -m tests.record_page`` writes it.
"""

import ast
import inspect
import re
from dataclasses import is_dataclass
from itertools import zip_longest
from textwrap import dedent
from typing import Any

from rlroute import limits as of_fields
from rlroute import schema
from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.experiments.claims import claim, outcomes
from rlroute.experiments.claims import registration as of_claims
from rlroute.experiments.comparison import judgement, ladder_file
from rlroute.experiments.comparison import registration as of_judgements
from rlroute.router_config import RouterConfig
from rlroute.start import StartConfig
from tests import ROOT

PAGE = ROOT / "docs" / "records.md"
CONFIGURATIONS = (DataConfig, ModelConfig, TrainConfig, StartConfig, RouterConfig)
IN_STORE = (
    (
        "config.json",
        (
            schema.Described,
            schema.Asked,
            schema.MadeFrom,
            schema.Configuration,
            schema.DataFields,
            schema.ModelFields,
            schema.TrainFields,
            schema.NamedRouter,
            schema.SitedRouter,
            schema.StartFields,
            *CONFIGURATIONS,
        ),
    ),
    ("environment.json", (schema.Environment,)),
    ("metrics.jsonl", (schema.EvalRow, schema.Sampled, schema.Losses, schema.TrainRow)),
    ("loads.jsonl", (schema.LoadRow,)),
    (
        "summary.json",
        (
            schema.Summary,
            schema.Divergence,
            schema.Data,
            schema.ModelCosts,
            schema.Gate,
            schema.Fingerprint,
            schema.Batches,
            schema.BudgetSpent,
            schema.Measured,
            schema.MeasuredMode,
            schema.Dependence,
            schema.MeasuredFlops,
            schema.RouterFlops,
            schema.Regret,
        ),
    ),
    ("seal.json", (schema.Seal,)),
    ("failed.json", (schema.Failure,)),
    ("A compact file", (schema.Stored,)),
)
"""The files of a run, and the types to which they are held."""
BESIDE = (
    (
        "judgement-HASH-against-HASH.json",
        (of_judgements.Registration, of_judgements.Plan, of_judgements.Party, of_judgements.Trained),
    ),
    ("judgement.json", (judgement.Judged, judgement.Seen, judgement.Spent)),
    ("claim-ID.json", (of_claims.Registration, of_claims.Plan, claim.Claim, claim.Arm, claim.Part)),
    ("claims.jsonl", (outcomes.Outcome, outcomes.PartOutcome, outcomes.Cost)),
    (
        "ladder.json",
        (
            ladder_file.LadderOf,
            ladder_file.ClimbOf,
            ladder_file.IntervalOf,
            ladder_file.LawOf,
            ladder_file.MultiplierOf,
        ),
    ),
)
"""Files of a store beside its runs, and those of results that hold what was judged."""
FILES = IN_STORE + BESIDE
MORE: dict[type, str] = {
    DataConfig: " All fields of `data`; `order` is left out at its default.",
    ModelConfig: " All fields of `model`; those that came later are left out at their defaults.",
    TrainConfig: " All fields of `train`.",
    StartConfig: " All fields of `start`.",
    RouterConfig: " What each router has besides: [routers](routers.md).",
    claim.Claim: " As it is registered it also has `base`, the fields of data, model and train that all arms share and "
    "that are not at their defaults, and `rule`, how a part is decided, in words.",
}
"""What is said of a type besides its docstring."""
OF_SCHEMA = "Whole|Amount|Number|Signed|Part|Vio"
OF_FIELDS = "Size|Count|Layers|Experts|Positive|NonNegative|Share|BelowOne|Seed|Ratio"
NUMBERS = re.compile(rf"\b({OF_SCHEMA}|{OF_FIELDS}|int|float)\b")
SHARES = re.compile(r"\b(Part|Share|BelowOne)\b")
WEIGHTS = [name for name in RouterConfig.__annotations__ if name.endswith("_weight")]
UNTOLD = {
    "num_layers": "Blocks.",
    "d_model": "Width of the hidden states.",
    "num_heads": "Heads of queries.",
    "num_experts": "Experts of a routed site.",
    "rope_base": "Of the rotary positions' frequencies.",
    "device": "Where it is computed.",
    "kernel": "The engine that runs the experts: see kernels.md.",
    "warmup_steps": "In which the learning rate rises.",
    "eval_every": "From evaluation to evaluation.",
    "log_every": "From logged row to logged row.",
    "checkpoint_every": "From checkpoint to checkpoint.",
}
"""Fields of configurations whose names say it all where they stand."""
UNITS = {
    "optimizer steps": (*("step", "steps", "steps_M", "warmup_steps", "eval_every", "log_every", "checkpoint_every"),),
    "tokens": ("tokens", "train_tokens", "valid_tokens", "eval_tokens", "seq_len", "vocab_size", "loss_chunk"),
    "s": ("seconds",),
    "tokens/s": ("tokens_per_second",),
    "nats/token": ("loss", "nats", "nats_C"),
    "nats": ("nats_W",),
    "bits/byte": (
        *("bits_per_byte", "floor_bits_per_byte", "bits_per_byte_EJWS", "margin", "differences", "floor", "scale"),
        *("mean", "low", "high", "effect", "interval", "equivalence_interval"),
    ),
    "as the measure has it": ("above", "below", "values"),
    "nats/token per unit of weight": ("grad_norm", "router_grad_norm", "clip", "router_clip"),
    "experts": (
        *("dead_L", "num_experts", "num_shared_experts", "zero_experts", "copy_experts", "constant_experts"),
        "attention_experts",
    ),
    "heads": ("num_heads", "num_kv_heads", "state_heads", "state_key_heads"),
    "channels": (
        *("d_model", "d_expert", "d_dense", "d_latent", "head_width", "kv_rank", "q_rank", "rope_width", "value_width"),
        *("state_key_width", "state_value_width", "widths"),
    ),
    "groups": ("capacity_groups",),
    "devices": ("devices",),
    "pairs": ("round_to",),
    "micro-batches": ("micro_batches",),
    "batches": ("prefetch",),
    "runs": ("runs", "there_before", "runs_there_before"),
    "FLOPs/s": ("flops_per_second_EJWS",),
    "as `budget` says: FLOPs or s": ("budget_amount",),
    "experts/token": ("k",),
    "pairs/token": ("pairs_L",),
    "FLOPs": ("training_flops", "compute", "unit"),
    "FLOPs/token": ("flops_per_token", "training_only_flops_per_token"),
    "FLOPs/row": ("greedy", "training", "declared_L"),
    "parameters": ("active_parameters", "total_parameters", "router_parameters"),
    "bytes": ("peak_memory",),
    "sequences": ("batch_size",),
    "blocks": ("num_layers", "num_dense_layers", "moe_every"),
    "processes": ("workers",),
    "shards": ("expert_parallel",),
    "threads": ("threads",),
    "as `kind` says: tokens, FLOPs or s": ("amount",),
    "the term's own": ("terms",),
    "1/(the term's own)": ("weights", *WEIGHTS),
    "1": (
        *("lr", "router_lr_scale", "final_lr", "weight_decay", "max_vio_L", "target_max_vio", "cv_L", "logits_L"),
        *("load_std", "erc_alpha", "balance_rate", "capacity_factor", "rope_base", "init_scale", "upcycle_noise"),
        *("value", "reach", "exponent", "of"),
    ),
    "sets": ("sets",),
    "seeds": ("n", "looks"),
    "none": ("schema", "version", "seed", "seeds", "layer"),
}
"""The unit of each field that is a number, by the field's name; a share of a whole (``Part``) is of itself."""
UNITS_OF: dict[tuple[type, str], str] = {
    **{(ladder_file.MultiplierOf, name): "1" for name in ("low", "high")},
    **{(outcomes.PartOutcome, name): "as `unit` says" for name in ("effect", "interval", "values", "above", "below")},
    (claim.Claim, "parts"): "",
}
"""Where the same name is something else."""
HEAD = """# What a record holds

Written by `python -m tests.record_page` out of `rlroute/schema/`, to which every record is held when it is read
(`rlroute/reading.py`): types, limits, and what the parts say of each other. A value that does not fit is refused in one
line that names file and field.

A run's folder in a store is named by the run's id and holds the files below, all of them regular files, and
`checkpoint-<step>/`. `.lock` is held by the process that trains the run; an empty `stopped` says that a search stopped
it. A run has ended when it has a `summary.json`. Lists by site (`_L`, and `_LE` with one list of experts each) are in
the order of the model's routed sites. `null` stands for what is not defined; no number is NaN or infinite, none has
more than 64 bits, nothing is nested deeper than 32 levels. Fields that are not named here belong to a later version and
are left alone. *May be missing*: old records lack the field.

Beside its runs a store holds what was registered in it and the ladder that was climbed in it; `judgement.json`,
`claims.jsonl` and a copy of the ladder are written into `--out`. Each is described below like the files of a run. A
`checkpoint-<step>/` has a `manifest.json`: `schema`, `run` and `step`, and for each of its `files` the `size` in bytes
and the `sha256`. An empty `SEARCH` in a store says that it holds trials.

Texts are shown with what would control a terminal as its escape, and a cell of a CSV that would be a formula begins
with an apostrophe.
"""


def fields(cls: type) -> list[tuple[str, str, str]]:
    """Return the fields of a TypedDict or a configuration, those of its base classes first: name, type as it is written
    with its default, and what its docstring says.
    """
    found: dict[str, tuple[str, str]] = {}
    for part in reversed(cls.__mro__):
        if part.__module__ in ("builtins", "typing") or (part is not cls and not is_dataclass(part)):
            continue
        (node,) = ast.parse(dedent(inspect.getsource(part))).body
        assert isinstance(node, ast.ClassDef)
        told = attributes(part)
        for line, following in zip_longest(node.body, node.body[1:]):
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            name, kind = line.target.id, ast.unparse(line.annotation)
            if kind.startswith("ClassVar"):
                continue
            text = told.get(name, "")
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            default = (
                "" if line.value is None or "field(" in ast.unparse(line.value) else f" = {ast.unparse(line.value)}"
            )
            found[name] = (kind + default, text or (UNTOLD.get(name, "") if is_dataclass(cls) else ""))
    return [(name, *said) for name, said in found.items()]


def attributes(cls: type) -> dict[str, str]:
    """Return what a docstring says of attributes, where it has such a part."""
    _, _, part = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    said = re.findall(r"^    (\S[^:\n]*): ((?:.|\n {8})*)", part, re.M)
    return {
        name.strip(): text[:1].upper() + " ".join(text[1:].split()) for names, text in said for name in names.split(",")
    }


def page() -> str:
    """Return the page."""
    legal = [f"| `{name}` | {_limit(kind)} |" for name, kind in limits().items()]
    parts = [HEAD, "| type | legal values |\n|---|---|\n" + "\n".join(legal) + "\n"]
    for title, types in FILES:
        parts.append(f"## {title}\n")
        for cls in types:
            told = " ".join((cls.__doc__ or "").partition("Attributes:")[0].partition("Raises:")[0].split())
            parts.append(f"**{cls.__name__}**: {_plain(told)}{MORE.get(cls, '')}\n")
            parts.append("| field | type | unit | meaning |\n|---|---|---|---|")
            for field, kind, text in fields(cls):
                parts.append(f"| `{field}` | {_typed(kind)} | {unit(field, kind, cls)} | {_plain(text)} |")
            parts.append("")
    return "\n".join(parts)


def unit(field: str, kind: str, cls: type) -> str:
    """Return the unit of a field of a type; nothing of one that holds no number.

    Raises:
        LookupError: nobody has said it.
    """
    if (cls, field) in UNITS_OF:
        return UNITS_OF[cls, field]
    if not NUMBERS.search(kind):
        return ""
    said = [unit for unit, names in UNITS.items() if field in names]
    if not said and not SHARES.search(kind):
        raise LookupError(f"the field {field} is a number: say its unit in tests/record_page.py")
    return said[0] if said else "1 (a share)"


def _typed(kind: str) -> str:
    missing = kind.startswith("NotRequired[")
    inner = kind.removeprefix("NotRequired[").removesuffix("]") if missing else kind
    return f"`{inner}`".replace("|", "\\|") + (", may be missing" if missing else "")


def _plain(text: str) -> str:
    """Return a docstring's text as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


def _limit(kind: Any) -> str:
    (limit,) = kind.__metadata__
    base = {int: "whole numbers", float: "numbers", str: "texts"}[kind.__origin__]
    if base == "texts":
        longest = f", at most {limit.longest} characters" if limit.longest < 1000 else ""
        return f"texts like `{limit.pattern}`".replace("|", "\\|") + longest
    if isinstance(limit, of_fields.Between) and not limit.below:
        return f"{base} from {limit.low:.8g} to {limit.high:.8g}"
    return str(limit).replace("numbers", base)


def limits() -> dict[str, Any]:
    """Return the names of the types with limits: the schema's, and those of configurations and of ladders."""
    mine = {name: value for name, value in vars(schema).items() if hasattr(value, "__metadata__")}
    others = vars(of_fields) | {"Ratio": ladder_file.Ratio}
    return mine | {name: others[name] for name in OF_FIELDS.split("|")}


if __name__ == "__main__":
    PAGE.write_text(page())
