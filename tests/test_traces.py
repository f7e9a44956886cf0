"""Traces: each form gives the choices that were put into it, figures are those of slow loops over Python's numbers,
what does not fit is refused by file and line, and the command shows and writes it all.

Shape suffixes: T tokens, L layers, K experts per token, E experts, C tokens of an expert.
"""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlroute import arrays
from rlroute.errors import ConfigError, RlrouteError, StoreError
from rlroute.experiments.traces import flips as flipping
from rlroute.experiments.traces import reading
from rlroute.experiments.traces.flips import flips
from rlroute.experiments.traces.measure import PERCENTS, measure
from rlroute.experiments.traces.reading import Trace, open_trace
from rlroute.experiments.traces.text import SHADES, heatmap
from rlroute.experiments.traces.write import write
from tests.commands import TINY, ran, refused, rlroute


def draw(tokens: int = 30, layers: int = 3, k: int = 2, experts: int = 5, seed: int = 0) -> np.ndarray:
    """Return choices of shape (T, L, K), no expert twice for a token."""
    order_TLE = np.random.default_rng(seed).random((tokens, layers, experts)).argsort(-1)
    return order_TLE[..., :k].astype(np.int16)


def saved(path: Path, *steps: np.ndarray) -> Trace:
    """Write arrays in the form that the name's end says, and open them."""
    if path.suffix == ".npy":
        np.save(path, np.concatenate(steps))
    elif path.suffix == ".npz":
        np.savez_compressed(path, *steps)
    elif path.suffix == ".safetensors":
        save_file({f"step-{number}": np.ascontiguousarray(ids) for number, ids in enumerate(steps)}, path)
    else:
        lines(
            path, *(line(step, layer, ids[:, layer]) for step, ids in enumerate(steps) for layer in range(ids.shape[1]))
        )
    return open_trace(str(path), path.parent)


def line(step: int, layer: int, ids_TK: Any, **others: Any) -> dict[str, Any]:
    """Return a record as Megatron-LM's tracer writes it."""
    ids = np.asarray(ids_TK)
    plain = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
    return plain | {"num_tokens": len(ids), "topk": ids.shape[1], "top_indices": ids.tolist()} | others


def lines(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def choices_of(trace: Trace) -> list[list[Any]]:
    """Return all choices by layer, as lists."""
    found: dict[reading.Layer, list[Any]] = {}
    for part in trace.parts():
        for layer, ids_TK in part.ids.items():
            found.setdefault(layer, []).extend(ids_TK.tolist())
    return [found[layer] for layer in sorted(found)]


# Reading


@pytest.mark.parametrize("end", [*arrays.ENDS, ".jsonl"])
@pytest.mark.parametrize("dtype", ["int16", "uint8", "int64"])
def test_every_form_gives_the_choices_that_were_written(
    end: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "AT_ONCE", 50)  # several parts an array
    steps = [draw(seed=seed) for seed in range(11)]  # the eleventh name comes after the tenth, not after the first
    trace = saved(tmp_path / f"trace{end}", *(ids.astype(dtype) for ids in steps))
    assert choices_of(trace) == np.concatenate(steps).transpose(1, 0, 2).tolist()
    assert measure(trace).steps == (1 if end == ".npy" else 11)


def test_an_array_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one that is packed, whose file is small."""
    monkeypatch.setattr(arrays, "AT_ONCE", 1 << 14)
    trace = saved(tmp_path / "trace.npz", np.zeros((1 << 20, 2, 1), np.int64))
    tracemalloc.start()
    assert sum(len(next(iter(part.ids.values()))) for part in trace.parts()) == 1 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < 16 << 20


def test_a_megatron_trace_has_micro_batches_heads_ranks_and_sidecars(tmp_path: Path) -> None:
    zero = [line(0, 3, [[0, 1]]), line(0, 3, [[2, 1], [1, 0]]), line(0, 0, [[0, 1]], block="mtp", mtp_idx=1)]
    lines(tmp_path / "router_trace_rank0.jsonl", *zero, line(1, 3, [[1, 2]], logit_shape=[1, 7], logit_offset=0))
    lines(tmp_path / "router_trace_rank10.jsonl", line(1, 3, [[3, 3], [-1, -1]], rank=10))
    lines(tmp_path / "router_trace_rank2.jsonl", line(0, 3, [[0, 2]], rank=2))
    loads = measure(open_trace(str(tmp_path), tmp_path))
    assert [of.layer for of in loads.layers] == ["3", "mtp 1.0"] and loads.steps == 2
    decoder, head = loads.layers
    assert decoder.load_E == [3, 4, 3, 0, 0, 0, 0] and head.load_E == [1, 1]
    assert (decoder.tokens, decoder.silent, decoder.repeated) == (7, 2, 1)  # an expert twice: nothing was noted
    assert "3 ranks" in loads.kind and not loads.stated


def test_experts_are_those_that_are_said_or_up_to_the_highest_id(tmp_path: Path) -> None:
    trace = saved(tmp_path / "a.npy", np.array([[[0], [3]]]))
    assert [of.experts for of in measure(trace).layers] == [4, 4]
    assert measure(trace, 16).layers[0].load_E == [1] + [0] * 15
    with pytest.raises(ConfigError, match="layer 1 has expert 3, and is said to have 3 experts"):
        measure(trace, 3)


@pytest.mark.parametrize("experts", [4, 5])
def test_choices_of_experts_become_those_of_tokens(experts: int) -> None:
    rng = np.random.default_rng(experts)
    ids_EC = rng.random((experts, 6)).argsort(1)[:, :3]
    ids_EC[0, 0] = 6  # an unused slot
    ids_TK = reading._by_token(ids_EC, experts, 6)
    want = [{e for e in range(experts) if token in ids_EC[e]} for token in range(6)]
    assert [set(row) - {-1} for row in ids_TK.tolist()] == want


def test_choices_of_tokens_stay_but_for_unused_slots() -> None:
    ids_TK = np.array([[0, 4], [3, 1], [4, 4], [2, 0]])
    assert reading._by_token(ids_TK, 4, 2).tolist() == [[0, -1], [3, 1], [-1, -1], [2, 0]]


# Measuring


def test_figures_of_a_layer_are_those_of_slow_loops(tmp_path: Path) -> None:
    steps = [draw(seed=seed, experts=6) for seed in range(5)]
    loads = measure(saved(tmp_path / "a.npz", *steps), 8)
    vios = []
    for layer, found in enumerate(loads.layers):
        counts = [[sum(e in row for row in ids[:, layer].tolist()) for e in range(8)] for ids in steps]
        total = [sum(step[e] for step in counts) for e in range(8)]
        assert found.load_E == total and found.tokens == 150 and found.dead == 2 and not found.silent
        assert found.max_vio == pytest.approx(max(total) / (sum(total) / 8) - 1)
        apart = sum(abs(one - other) for one in total for other in total)
        assert found.gini == pytest.approx(apart / (2 * 8 * sum(total))) and found.min_over_max == 0
        mine = [max(step) / (sum(step) / 8) - 1 for step in counts]
        assert found.step_max_vio == pytest.approx(np.percentile(mine, (*PERCENTS, 100)).tolist())
        vios += mine
    assert loads.spread["MaxVio of a layer and step"] == pytest.approx(np.percentile(vios, (*PERCENTS, 100)).tolist())


def test_a_layer_that_noted_nothing_is_shown_as_such(tmp_path: Path) -> None:
    """An engine leaves zeros for layers without experts: no load is made of them."""
    ids_TLK = draw()
    ids_TLK[:, 1] = 0
    loads = measure(saved(tmp_path / "a.npy", ids_TLK))
    assert (
        loads.layers[1].silent == 30 == loads.layers[1].repeated and loads.layers[1].max_vio != loads.layers[1].max_vio
    )
    assert not loads.layers[0].silent and np.isfinite(loads.spread["MaxVio of a layer"]).all()
    assert heatmap(loads).splitlines()[1] == "1 –"


def test_letters_of_the_heatmap_stand_for_shares_of_the_fair_load(tmp_path: Path) -> None:
    loads = measure(saved(tmp_path / "a.npy", np.array([0] * 14 + [1] * 5 + [2]).reshape(-1, 1, 1)), 4)
    assert heatmap(loads) == "0 " + "▓▒░·"
    wide = measure(saved(tmp_path / "b.npy", np.arange(200, dtype=np.int16).reshape(-1, 1, 1)))
    assert heatmap(wide) == "0 " + SHADES[2][1] * 67  # three experts a letter


# Flips


@pytest.mark.parametrize("forms", [("a.npz", "b.npy"), ("a.jsonl", "b.npz"), ("a.safetensors", "b.jsonl")])
def test_flips_are_those_of_slow_loops_however_the_tokens_are_cut(
    forms: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flipping, "AT_ONCE", 7)
    one, other = draw(), draw()[..., ::-1].copy()  # the same sets in another order
    other[3:9, 1] = draw(seed=1)[3:9, 1]
    other[7:12, 2] = draw(seed=2)[7:12, 2]
    one[8, 2] = -1
    found = flips(saved(tmp_path / forms[0], one[:11], one[11:]), saved(tmp_path / forms[1], other[:4], other[4:]))
    sets = [[({*one[t, layer].tolist()} - {-1}, {*other[t, layer].tolist()}) for layer in range(3)] for t in range(30)]
    for layer in range(3):
        compared = [(a, b) for a, b in (row[layer] for row in sets) if a]
        assert found.compared[layer] == len(compared) and found.chosen[layer] == 2 * len(compared)
        assert found.changed[layer] == sum(a != b for a, b in compared)
        assert found.lost[layer] == sum(len(a - b) for a, b in compared)
    differ = [sum(a != b for a, b in row if a) for row in sets]
    assert found.tokens == 30 and found.anywhere == sum(map(bool, differ))
    assert found.changed_layers == pytest.approx(sum(differ) / 30) and found.changed[0] == 0 < found.changed[1]


def test_traces_that_are_not_of_the_same_tokens_and_layers_have_no_flips(tmp_path: Path) -> None:
    ids_TLK = draw()
    one = saved(tmp_path / "a.npy", ids_TLK)
    with pytest.raises(StoreError, match="not the same number of tokens"):
        flips(one, saved(tmp_path / "b.npy", ids_TLK[:-1]))
    with pytest.raises(StoreError, match="have 3 and 2 layers"):
        flips(one, saved(tmp_path / "b.npy", ids_TLK[:, 1:]))
    lines(tmp_path / "c.jsonl", line(0, 0, ids_TLK[:, 0]), line(0, 1, ids_TLK[:, 1]), line(0, 2, ids_TLK[1:, 2]))
    with pytest.raises(StoreError, match="step 0 has from 29 to 30 tokens"):
        flips(one, open_trace(str(tmp_path / "c.jsonl"), tmp_path))


# Writing


@pytest.mark.parametrize("end", [".npz", ".jsonl"])
def test_what_is_written_is_read_again(end: str, tmp_path: Path) -> None:
    steps = [draw(seed=seed) for seed in range(3)]
    steps[1][2:5, 1, 1] = -1
    trace = saved(tmp_path / "a.safetensors", *steps)
    write(trace, tmp_path / f"again{end}")
    again = open_trace(str(tmp_path / f"again{end}"), tmp_path)
    assert choices_of(again) == choices_of(trace) and measure(again).layers == measure(trace).layers
    write(trace, tmp_path / f"twice{end}")
    assert (tmp_path / f"twice{end}").read_bytes() == (tmp_path / f"again{end}").read_bytes()


def test_a_failed_writing_leaves_what_was_there(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", line(0, 0, [[1]]), line(0, 1, [[1], [0]]))
    (tmp_path / "b.npz").write_text("kept")
    with pytest.raises(StoreError, match="from 1 to 2 tokens"):
        write(open_trace(str(tmp_path / "a.jsonl"), tmp_path), tmp_path / "b.npz")
    assert (tmp_path / "b.npz").read_text() == "kept" and len(list(tmp_path.iterdir())) == 2


# What is refused

GOOD = line(0, 0, [[0, 1]])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"loss": 1.0}, "line 2: step: this field is missing"),
        (GOOD | {"top_indices": [[0, 99999]]}, "line 2: top_indices/0/1 = 99999"),
        (GOOD | {"top_indices": [[0, 1.5]]}, "line 2: top_indices/0/1 = 1.5"),
        (GOOD | {"top_indices": [[0]]}, "line 2: top_indices/0 has 1 experts, topk says 2"),
        (GOOD | {"num_tokens": 2}, "line 2: top_indices has 1 rows, num_tokens says 2"),
        (GOOD | {"layer": -1}, "line 2: layer = -1"),
        (GOOD | {"block": "a b\x1b"}, "line 2: block = "),
        (GOOD | {"logit_shape": [1, 99999]}, "line 2: logit_shape = "),
    ],
)
def test_a_record_that_does_not_fit_is_named_by_file_and_line(
    record: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    lines(tmp_path / "a.jsonl", GOOD, record)
    with pytest.raises(StoreError, match=re.escape(f"a.jsonl, {reason}")):
        measure(open_trace(str(tmp_path / "a.jsonl"), tmp_path))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3), np.int16), "array arr_0 is int16 of shape (2, 3): want whole numbers"),
        (np.zeros((2, 3, 2)), "array arr_0 is float64"),
        (np.zeros((2, 0, 2), np.int16), "want at least one layer"),
        (np.array([[[0, -2]]]), "array arr_0, token 0, layer 0: expert -2"),
        (np.array([[[0]], [[70000]]]), "array arr_0, token 1, layer 0: expert 70000"),
        (np.asfortranarray(np.zeros((2, 3, 2), np.int16)), "lies by columns"),
        (np.zeros((0, 3, 2), np.int16), "holds no token"),
    ],
)
def test_an_array_that_does_not_fit_is_named(array: np.ndarray, reason: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(StoreError, match=re.escape(reason)):
        measure(open_trace(str(tmp_path / "a.npz"), tmp_path))


def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.npy").write_bytes(np.lib.format.magic(1, 0) + b"\xff")
    np.save(tmp_path / "short.npy", draw())
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-2])
    for seed in (0, 1):
        (tmp_path / f"run-0123456789ab-s{seed}").mkdir()
        (tmp_path / f"run-0123456789ab-s{seed}" / "config.json").write_text("{}")
    for name, reason in (
        ("a.txt", "is no trace: want a name that ends in .jsonl, .npy"),
        ("empty", "is the folder of no run, and holds no router_trace_rank"),
        ("nonesuch", "there is no file 'nonesuch', and 0 runs"),
        ("run-", "and 2 runs of " + str(tmp_path) + " are called so: run-0123456789ab-s0, run-0123456789ab-s1"),
        ("cut.npy", "cut.npy: EOF"),
        ("short.npy", "array short ends before token 30 of 30"),
    ):
        path = tmp_path / name
        with pytest.raises(RlrouteError, match=re.escape(reason)):
            measure(open_trace(name if name in ("nonesuch", "run-") else str(path), tmp_path))


# The command


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a run that recorded its choices, and of one that did not."""
    path = tmp_path_factory.mktemp("traces") / "runs"
    ran("train", "switch", *TINY, "--train.record-choices", "--train.micro-batches", "2", "--store", path)
    ran("train", "hash", *TINY, "--train.steps", "4", "--store", path)
    return path


def test_the_command_shows_a_run_and_writes_all_forms(store: Path, tmp_path: Path) -> None:
    files = [tmp_path / "new" / f"a{end}" for end in (".html", ".json", ".npz", ".jsonl")]
    said = ran("trace", "switch", "--store", store, "--out", *files)
    assert "12 steps, 768 tokens" in said and "| MaxVio of a layer and step |" in said and "```\n0 " in said
    stored = json.loads(files[1].read_text())
    ((layer,),) = [trace["layers"] for trace in stored["traces"]]
    assert sum(layer["load_E"]) == 2 * 768 and stored["flips"] is None
    page = files[0].read_text()
    drawn = json.loads(re.findall(r'id="figures">(.*?)</script>', page, re.S)[0])
    assert set(drawn) == {"loads0", "balance"} and all(f'id="{name}"' in page for name in drawn)
    assert set(drawn["loads0"]["layout"]["meta"]["scales"]) == {"light", "dark"}
    said = ran("trace", files[2], files[3], "--out", tmp_path / "b.html")
    assert "0.00 % of choices differ; 0.00 % of 768 tokens flip" in said
    drawn = json.loads(re.findall(r'id="figures">(.*?)</script>', (tmp_path / "b.html").read_text(), re.S)[0])
    assert set(drawn) == {"loads0", "loads1", "balance", "flips"}
    assert "of choices differ" in ran("trace", next(store.glob("switch*")), files[2])


def test_a_page_holds_no_markup_of_a_file_name(tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>.npy"
    np.save(path, draw())
    ran("trace", path, path, "--out", tmp_path / "a.html")
    assert "<img" not in (tmp_path / "a.html").read_text().replace("\\u003cimg", "")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("hash",), "records no choices: train a router with --train.record-choices"),
        (("switch", "--experts", "4"), "--experts 4 does not apply: switch says itself how many there are"),
        (("switch", "--out", "a.csv"), "--out a.csv: legal are names that end in .html, .json, .npz, .jsonl"),
        (("switch", "switch", "--out", "a.npz"), "--out a.npz does not apply to two traces"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    words: tuple[str, ...], reason: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in refused(rlroute("trace", *words, "--store", store))
    assert not list(tmp_path.iterdir())
