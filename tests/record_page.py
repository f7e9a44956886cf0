"""docs/records.md out of :mod:`rlroute.schema`: ``python -m tests.record_page`` writes it."""

import ast
import inspect
import re
from typing import Any

from rlroute import schema
from tests import ROOT

PAGE = ROOT / "docs" / "records.md"
FILES = (
    (
        "config.json",
        (
            "Described",
            "Asked",
            "MadeFrom",
            "Configuration",
            "DataFields",
            "ModelFields",
            "TrainFields",
            "NamedRouter",
            "SitedRouter",
            "StartFields",
        ),
    ),
    ("environment.json", ("Environment",)),
    ("metrics.jsonl", ("EvalRow", "Sampled", "Losses", "TrainRow")),
    ("loads.jsonl", ("LoadRow",)),
    (
        "summary.json",
        (
            "Summary",
            "Divergence",
            "Data",
            "ModelCosts",
            "Gate",
            "Fingerprint",
            "Batches",
            "BudgetSpent",
            "Measured",
            "MeasuredMode",
            "Dependence",
            "MeasuredFlops",
            "RouterFlops",
            "Regret",
        ),
    ),
    ("seal.json", ("Seal",)),
    ("failed.json", ("Failure",)),
    ("A compact file", ("Stored",)),
)
NUMBERS = re.compile(r"\b(Whole|Amount|Number|Signed|Part|Vio|int|float)\b")
UNITS = {
    "optimizer steps": ("step", "steps", "steps_M"),
    "tokens": ("tokens", "train_tokens", "valid_tokens", "seq_len", "vocab_size"),
    "s": ("seconds",),
    "tokens/s": ("tokens_per_second",),
    "nats/token": ("loss", "nats", "nats_C"),
    "nats": ("nats_W",),
    "bits/byte": ("bits_per_byte", "floor_bits_per_byte"),
    "nats/token per unit of weight": ("grad_norm", "router_grad_norm"),
    "experts": ("dead_L", "num_experts", "num_shared_experts"),
    "experts/token": ("k",),
    "pairs/token": ("pairs_L",),
    "FLOPs": ("training_flops",),
    "FLOPs/token": ("flops_per_token", "training_only_flops_per_token"),
    "FLOPs/row": ("greedy", "training", "declared_L"),
    "parameters": ("active_parameters", "total_parameters", "router_parameters"),
    "bytes": ("peak_memory",),
    "sequences": ("batch_size",),
    "blocks": ("num_layers", "num_dense_layers"),
    "processes": ("workers",),
    "shards": ("expert_parallel",),
    "threads": ("threads",),
    "as `kind` says: tokens, FLOPs or s": ("amount",),
    "the term's own": ("terms",),
    "1/(the term's own)": ("weights",),
    "1": ("lr", "max_vio_L", "cv_L", "logits_L"),
    "sets": ("sets",),
    "none": ("schema", "seed", "seeds", "layer"),
}
"""The unit of each field that is a number, by the field's name; a share of a whole (``Part``) is of itself."""
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

Texts are shown with what would control a terminal as its escape, and a cell of a CSV that would be a formula begins
with an apostrophe.
"""


def fields(name: str) -> list[tuple[str, str, str]]:
    """Return the fields of a TypedDict: name, type as it is written, and what its docstring says."""
    (cls,) = ast.parse(inspect.getsource(getattr(schema, name))).body
    found: list[tuple[str, str, str]] = []
    for node in cls.body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append((node.target.id, ast.unparse(node.annotation), ""))
        elif found and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[-1] = (*found[-1][:2], " ".join(str(node.value.value).split()))
    return found


def page() -> str:
    """Return the page."""
    legal = [f"| `{name}` | {_limit(kind)} |" for name, kind in limits().items()]
    parts = [HEAD, "| type | legal values |\n|---|---|\n" + "\n".join(legal) + "\n"]
    for title, names in FILES:
        parts.append(f"## {title}\n")
        for name in names:
            told = " ".join((getattr(schema, name).__doc__ or "").split())
            lines = [f"| `{f}` | {_typed(kind)} | {unit(f, kind)} | {_plain(text)} |" for f, kind, text in fields(name)]
            parts.append(f"**{name}**: {_plain(told)}\n\n| field | type | unit | meaning |\n|---|---|---|---|")
            parts += [*lines, ""]
    return "\n".join(parts)


def unit(field: str, kind: str) -> str:
    """Return the unit of a field; nothing of one that holds no number.

    Raises:
        LookupError: nobody has said it.
    """
    if not NUMBERS.search(kind):
        return ""
    said = [unit for unit, names in UNITS.items() if field in names]
    if not said and "Part" not in kind:
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
    return f"{base} from {limit.low:.8g} to {limit.high:.8g}"


def limits() -> dict[str, Any]:
    """Return the names of the schema's types with limits."""
    return {name: value for name, value in vars(schema).items() if hasattr(value, "__metadata__")}


if __name__ == "__main__":
    PAGE.write_text(page())
