"""Traces, each read in one pass and a step at a time: Megatron-LM's (``--moe-routing-trace-path``: a file of JSON lines
for each rank), vLLM's arrays (:mod:`rlroute.arrays`), and the choices of our own runs (:mod:`rlroute.choices`).

Shape suffixes: T tokens, E experts, C tokens of an expert, K experts per token, L layers, N rows of a record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, NotRequired

import numpy as np
from typing_extensions import TypedDict

from rlroute.arrays import ENDS, EXPERTS, arrays, naming
from rlroute.choices import ChoiceLog
from rlroute.errors import StoreError
from rlroute.experiments.report.runs import find
from rlroute.foreign import Unfit, clipped, hold, shown
from rlroute.limits import Between, Count, Matches, Whole
from rlroute.reading import read_described, read_lines
from rlroute.registry import run_config
from rlroute.routing import Site
from rlroute.sites import HEAD_PARTS, sites

NONE = -1
"""Stands where no expert is noted."""
RANKS = "router_trace_rank*.jsonl"
"""Megatron-LM's files, in the folder that it is given."""
AT_ONCE = 1 << 28
"""Ids that a step may have: they are held together."""


_PARTS = ("attention", *HEAD_PARTS)


class Layer(NamedTuple):
    """A layer's place among the others.

    Attributes:
        head: which head of multi-token prediction it belongs to; -1 for the model itself.
        number: its own.
        order: where it stands among those of its number: parts of attention, and their heads, come first.
        block: what part of the model it is.
    """

    head: int
    number: int
    order: tuple[int, int]
    block: str

    @classmethod
    def of(cls, number: int, block: str = "decoder", head: int = -1) -> Layer:
        """Return the layer of a block."""
        part, _, routed = block.partition(".")
        rank = _PARTS.index(part) if part in _PARTS else len(_PARTS)
        return cls(head, number, (rank, int(routed) if routed.isdecimal() else 0), block)

    @property
    def name(self) -> str:
        """What tables call it."""
        head = "" if self.head < 0 else f"{self.head}."
        return f"{head}{self.number}" if self.block == "decoder" else f"{self.block} {head}{self.number}"

    @property
    def family(self) -> str:
        """What those are called that are shown as one."""
        part = self.block.partition(".")[0]
        return self._replace(block=part).name if part in HEAD_PARTS else self.name


@dataclass(frozen=True)
class Part:
    """What some tokens of a step chose.

    Attributes:
        step: the step's number, or the array's.
        ids: by layer, int16 of shape (T, K); -1 where there is no expert.
        experts: by layer, how many there are; only where the trace says it.
        repeated: by layer, rows that named an expert twice. Engines leave zeros where they noted nothing: such rows are
            no choices, and hold -1 alone.
    """

    step: int
    ids: dict[Layer, np.ndarray]
    experts: Mapping[Layer, int]
    repeated: dict[Layer, int]


@dataclass(frozen=True)
class Trace:
    """A trace.

    Attributes:
        name: what the user calls it.
        kind: what it is.
        parts: reads it, once for each call.
    """

    name: str
    kind: str
    parts: Callable[[], Iterator[Part]]


def open_trace(word: str, store: Path) -> Trace:
    """Return the trace that a word stands for: a file, Megatron-LM's folder, a run's folder, or the id of a run of a
    store, or the start of it.

    Raises:
        StoreError: it stands for none.
    """
    path = Path(word)
    if os.path.isfile(word):
        if path.suffix == ".jsonl":
            return Trace(word, "Megatron-LM's router trace", partial(_megatron, [path]))
        if path.suffix not in ENDS:
            raise StoreError(f"{word} is no trace: want a name that ends in .jsonl, {', '.join(ENDS)}")
        return Trace(word, "routed experts in arrays", partial(_arrays, path))
    if os.path.isfile(path / "config.json"):
        return Trace(word, "choices of a run", partial(_run, path))
    if os.path.isdir(word):
        if not (paths := sorted(path.glob(RANKS), key=lambda file: (len(file.name), file.name))):
            raise StoreError(f"{word} is the folder of no run, and holds no {RANKS}")
        return Trace(word, f"Megatron-LM's router trace of {len(paths)} ranks", partial(_megatron, paths))
    folder = _run_of(word, store)
    return Trace(folder.name, "choices of a run", partial(_run, folder))


def _run_of(word: str, store: Path) -> Path:
    runs = sorted(path.parent.name for path in store.glob("*/config.json")) if store.is_dir() else []
    if len(found := find(runs, word)) != 1:
        so = f": {', '.join(found[:8])}" if found else ""
        raise StoreError(f"there is no file {shown(word)}, and {len(found)} runs of {store} are called so{so}")
    return store / found[0]


def part_of(step: int, ids: Mapping[Layer, np.ndarray], experts: Mapping[Layer, int]) -> Part:
    """Return what was chosen, without the rows that name an expert twice."""
    cleaned, repeated = {}, {}
    for layer, ids_TK in ids.items():
        ordered_TK = np.sort(ids_TK, axis=1)
        twice_T = ((ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] != NONE)).any(1)
        cleaned[layer] = np.where(twice_T[:, None], np.int16(NONE), ids_TK) if twice_T.any() else ids_TK
        repeated[layer] = int(twice_T.sum())
    return Part(step, cleaned, experts, repeated)


# Megatron-LM


class Record(TypedDict):
    """A line of a router trace; what else stands in it is not read."""

    step: Whole
    """The iteration, or the step of decoding."""
    layer: Whole
    """The layer's number."""
    num_tokens: Whole
    """Rows of ``top_indices``."""
    topk: Annotated[int, Between(1, 1024)]
    """Experts of a token."""
    top_indices: list[list[Annotated[int, Between(NONE, EXPERTS - 1)]]]
    """The experts of each token."""
    block: NotRequired[Annotated[str, Matches(r"[\w.-]+", longest=40)]]
    """``decoder`` or ``mtp``."""
    mtp_idx: NotRequired[Whole]
    """The head of multi-token prediction."""
    logit_shape: NotRequired[list[Count]]
    """Tokens and experts, where the logits were written too."""


def _megatron(paths: Sequence[Path]) -> Iterator[Part]:
    """Yield the steps of each rank, rank after rank."""
    for path in paths:
        step, held, experts, size = -1, dict[Layer, list[np.ndarray]](), dict[Layer, int](), 0
        for where, line in read_lines(path, follow=True):
            with naming(where):
                record, layer, ids_TK = _record(line)
            if record["step"] != step:
                yield from _joined(step, held, experts)
                step, held, experts, size = record["step"], {}, {}, 0
            held.setdefault(layer, []).append(ids_TK)
            if "logit_shape" in record:
                experts[layer] = record["logit_shape"][1]
            size += ids_TK.size
            if size > AT_ONCE:
                raise StoreError(f"{where}: step {step} has more than {AT_ONCE:,} ids, which are held together")
        yield from _joined(step, held, experts)


def _record(line: dict[str, object]) -> tuple[Record, Layer, np.ndarray]:
    hold(line, Record)
    record: Record = line  # type: ignore[assignment]  # as it is now known to be
    rows, tokens, k = record["top_indices"], record["num_tokens"], record["topk"]
    if len(rows) != tokens:
        raise Unfit(f" has {len(rows)} rows, num_tokens says {tokens}", "top_indices")
    for index, row in enumerate(rows):
        if len(row) != k:
            raise Unfit(f" has {len(row)} experts, topk says {k}", "top_indices", index)
    shape = record.get("logit_shape", [tokens, EXPERTS])
    if len(shape) != 2 or shape[1] > EXPERTS:
        raise Unfit(f" = {clipped(str(shape))}: want tokens, and at most {EXPERTS} experts", "logit_shape")
    layer = Layer.of(record["layer"], record.get("block", "decoder"), record.get("mtp_idx", -1))
    return record, layer, np.array(rows, dtype=np.int16).reshape(tokens, k)


def _joined(step: int, held: Mapping[Layer, list[np.ndarray]], experts: Mapping[Layer, int]) -> Iterator[Part]:
    """Yield a step whose layers ran several times, once for each micro-batch."""
    if held:
        yield part_of(step, {layer: joined(ids) for layer, ids in held.items()}, experts)


def joined(found: Sequence[np.ndarray]) -> np.ndarray:
    """Return choices one after the other, those of a smaller K filled up with -1."""
    width = max(ids_TK.shape[1] for ids_TK in found)
    return np.concatenate([widened(ids_TK, width) for ids_TK in found])


def widened(ids_TK: np.ndarray, width: int) -> np.ndarray:
    """Return choices with -1 in further columns."""
    return np.pad(ids_TK, ((0, 0), (0, width - ids_TK.shape[1])), constant_values=NONE)


# Arrays


def _arrays(path: Path) -> Iterator[Part]:
    """Yield each array, which counts as a step, some tokens at a time."""
    for step, array in enumerate(arrays(path)):
        for ids_TLK in array.rows():
            layers = range(ids_TLK.shape[1])
            yield part_of(step, {Layer.of(layer): ids_TLK[:, layer] for layer in layers}, {})


# Our own runs


def _run(folder: Path) -> Iterator[Part]:
    """Yield each step of a run that recorded its choices, its micro-batches one after the other."""
    described = read_described(folder)
    config = run_config(described["config"])
    log, parts = ChoiceLog(folder), config.train.micro_batches
    if config.router is None or not config.train.record_choices:
        raise StoreError(f"{folder} records no choices: train a router with --train.record-choices")
    rows = config.train.batch_size * config.data.seq_len // parts
    found = sites(config.model)
    experts = {_layer(site): count for site, count in found.items()}
    steps = min(log.steps(number, site) for site in found for number in range(parts))
    for step in range(steps):
        read = {site: [log.read(step, number, site).numpy() for number in range(parts)] for site in found}
        with naming(folder):
            ids = {
                _layer(site): joined([_by_token(ids_NK, found[site], rows) for ids_NK in read[site]]) for site in read
            }
            yield part_of(step, ids, experts)


def _layer(site: Site) -> Layer:
    index, _, block = str(site).partition(".")
    return Layer.of(int(index), block or "decoder")


def _by_token(ids_NK: np.ndarray, experts: int, rows: int) -> np.ndarray:
    """Return recorded choices as experts of tokens, int16 of shape (T, K), whoever chose.

    Args:
        ids_NK: experts of tokens (T, K), or tokens of experts (E, C); E and T mark unused slots.
        experts: E.
        rows: tokens of a micro-batch; T is a multiple of it, where there are several routing samples.
    """
    if len(ids_NK) % rows == 0:
        if ids_NK.size and not 0 <= ids_NK.min() <= ids_NK.max() <= experts:
            raise Unfit(f"a choice holds expert {ids_NK.max()}: the model has {experts}")
        return np.where(ids_NK == experts, NONE, ids_NK).astype(np.int16)
    if len(ids_NK) != experts or (ids_NK.size and not 0 <= ids_NK.min() <= ids_NK.max() <= rows):
        raise Unfit(f"a choice of shape {ids_NK.shape} is neither of {rows} tokens nor of {experts} experts")
    return _inverted(ids_NK, rows)


def _inverted(ids_EC: np.ndarray, tokens: int) -> np.ndarray:
    """Return the experts of tokens, from the tokens of experts: as wide as the token that most experts took."""
    pairs_R = np.flatnonzero(ids_EC != tokens)
    token_R, expert_R = ids_EC.reshape(-1)[pairs_R], pairs_R // ids_EC.shape[1]
    order_R = np.argsort(token_R, kind="stable")
    token_R, expert_R = token_R[order_R], expert_R[order_R]
    first_T = np.concatenate([[0], np.bincount(token_R, minlength=tokens).cumsum()[:-1]])
    slot_R = np.arange(len(token_R)) - first_T[token_R]
    ids_TK = np.full((tokens, int(slot_R.max(initial=0)) + 1), NONE, dtype=np.int16)
    ids_TK[token_R, slot_R] = expert_R
    return ids_TK
