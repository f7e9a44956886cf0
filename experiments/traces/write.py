"""A trace as a file for others: arrays as vLLM's are, one a step, or Megatron-LM's JSON lines; a step at a time.

The router ``replay`` takes the arrays of one of our runs in place of the choices that the run recorded.

Shape suffixes: T tokens, L layers, K experts per token.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from rlroute.errors import StoreError
from rlroute.experiments.traces.reading import Layer, Trace, joined, widened
from rlroute.records import replacing

Step = tuple[int, dict[Layer, np.ndarray]]


def write(trace: Trace, path: Path) -> None:
    """Write a trace into a file whose name ends in one of :data:`FORMS`.

    Raises:
        StoreError: it cannot be read, or the file not written; arrays want the same number of tokens in each layer.
    """
    with replacing(path) as file:
        FORMS[path.suffix](trace, file)


def _steps(trace: Trace) -> Iterator[Step]:
    """Yield the steps of a trace, what lies in several parts joined; those of different ranks each by itself."""
    step, held = -1, dict[Layer, list[np.ndarray]]()
    for part in trace.parts():
        if held and part.step != step:
            yield step, {layer: joined(ids) for layer, ids in held.items()}
            held = {}
        step = part.step
        for layer, ids_TK in part.ids.items():
            held.setdefault(layer, []).append(ids_TK)
    if held:
        yield step, {layer: joined(ids) for layer, ids in held.items()}


def _arrays(trace: Trace, file: IO[bytes]) -> None:
    """Write .npz: the array ``step-000000`` is int16 of shape (T, L, K), layers in their order, -1 for no expert."""
    with zipfile.ZipFile(file, "w") as archive:
        for number, (step, ids) in enumerate(_steps(trace)):
            found = [ids[layer] for layer in sorted(ids)]
            if len(tokens := {len(ids_TK) for ids_TK in found}) > 1:
                raise StoreError(
                    f"{trace.name}, step {step} has from {min(tokens)} to {max(tokens)} tokens, by layer: arrays want "
                    "the same in all"
                )
            width = max(ids_TK.shape[1] for ids_TK in found)
            ids_TLK = np.stack([widened(ids_TK, width) for ids_TK in found], axis=1)
            with archive.open(zipfile.ZipInfo(f"step-{number:06}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, ids_TLK, version=(1, 0), allow_pickle=False)


def _lines(trace: Trace, file: IO[bytes]) -> None:
    """Write Megatron-LM's records: one for each step and layer, as of rank 0."""
    for step, ids in _steps(trace):
        for layer in sorted(ids):
            ids_TK = ids[layer]
            record = {
                "step": step,
                "stage": "pre_dispatch",
                "block": layer.block,
                "layer": layer.number,
                "rank": 0,
                "num_tokens": len(ids_TK),
                "topk": ids_TK.shape[1],
                "top_indices": ids_TK.tolist(),
            }
            head = {} if layer.head < 0 else {"mtp_idx": layer.head}
            file.write(json.dumps(record | head).encode() + b"\n")


FORMS: dict[str, Callable[[Trace, IO[bytes]], None]] = {".npz": _arrays, ".jsonl": _lines}
"""By the end of the file's name."""
