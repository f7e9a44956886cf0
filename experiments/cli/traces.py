"""The command ``trace``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rlroute.errors import ConfigError
from rlroute.experiments.cli.common import RUNS, command_line
from rlroute.experiments.cli.folders import check_ending, make_way
from rlroute.experiments.cli.output import show_grid
from rlroute.foreign import printable
from rlroute.limits import Experts

if TYPE_CHECKING:
    from rlroute.experiments.traces.flips import Flips
    from rlroute.experiments.traces.measure import Loads

SHOWN = (".html", ".json")
WRITTEN = (".npz", ".jsonl")


def trace(
    trace: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TRACE")],
    other: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OTHER")] = "",
    store: Path = RUNS,
    experts: Experts | None = None,
    out: tuple[Path, ...] = (),
) -> None:
    """Show which experts a model chose: loads, their balance, a heatmap; and where two traces of the same tokens
    differ.

    Args:
        trace: Megatron-LM's router trace (a .jsonl file, or the folder of all ranks), vLLM's routed experts (.npy,
            .npz, .safetensors, of shape (tokens, layers, k)), or a run that recorded its choices: its folder, or its
            id or the start of it.
        other: a trace of the same tokens, as of training against a rollout.
        store: the run store that ids are looked for in.
        experts: how many experts a layer has, where a trace does not say it; by default the highest id decides.
        out: files to write, by the ends of their names: .html is a page, .json all figures; of one trace, .npz is the
            trace as vLLM's arrays are, which `replay` reads, and .jsonl as Megatron-LM's.
    """
    _check(out, bool(other))
    from rlroute.experiments.traces.flips import flips
    from rlroute.experiments.traces.measure import measure
    from rlroute.experiments.traces.reading import open_trace
    from rlroute.experiments.traces.write import write

    for path in out:
        make_way(path)
    traces = [open_trace(word, store) for word in (trace, other) if word]
    measured = [measure(one, experts) for one in traces]
    if experts is not None and all(loads.stated for loads in measured):
        raise ConfigError(f"--experts {experts} does not apply: {trace} says itself how many there are")
    found = flips(*traces) if other else None
    for path in out:
        if path.suffix in WRITTEN:
            write(traces[0], path)
        else:
            _publish(measured, found, path)
    _show(measured, found)
    if out:
        print(f"in {', '.join(map(str, out))}")


def _check(out: tuple[Path, ...], two: bool) -> None:
    """Refuse files that cannot be written, before the work.

    Raises:
        ConfigError: naming the first.
        MissingDependencyError: a page is wanted, and Plotly is not installed.
    """
    for path in out:
        check_ending(path, SHOWN + WRITTEN, "--out ")
        if two and path.suffix in WRITTEN:
            raise ConfigError(f"--out {path} does not apply to two traces: {path.suffix} holds one")


def _show(measured: list[Loads], found: Flips | None) -> None:
    from rlroute.experiments.traces import text

    for loads in measured:
        print(printable(text.headline(loads)), end="\n\n")
        show_grid(text.layers_grid(loads))
        print()
        show_grid(text.spread_grid(loads))
        print(f"\n```\n{printable(text.heatmap(loads))}\n{text.SHADING}\n```\n")
    print(text.LEGEND)
    if found is not None:
        print(f"\n{text.flips_text(found)}\n")
        show_grid(text.flips_grid(found))
        print(f"\n{text.FLIPS_LEGEND}")


def _publish(measured: list[Loads], found: Flips | None, path: Path) -> None:
    from rlroute.experiments.traces import page, text
    from rlroute.records import write_atomically

    render = page.render if path.suffix == ".html" else text.to_json
    write_atomically(path, render(measured, found, command_line()))
