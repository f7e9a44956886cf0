"""Inspecting trained runs: what their folders hold is read back, domains that a router separates are found."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlroute.errors import DataError
from rlroute.experiments.checkpoints.trained import open_routed
from rlroute.experiments.inspection.domains import MOST, OTHERS, find_domains
from rlroute.experiments.inspection.history import agreed, look_back, table_of
from rlroute.experiments.inspection.inspection import inspect_run
from rlroute.experiments.inspection.probe import run_probe
from rlroute.experiments.recipes.entries import build_entry
from rlroute.reading import read_runs
from rlroute.routing import RoutingDecision
from rlroute.training.data import load_corpus
from rlroute.training.loop import train
from rlroute.training.manifest import own_checkpoints
from tests import inspection_figure
from tests.commands import ran, refused, rlroute
from tests.tiny import DATA, MODEL, STEPS, TRAIN

KEYS = {"seed": 0, "step": STEPS}
KEEPING = replace(TRAIN, record_choices=True, micro_batches=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(build_entry("switch", DATA, MODEL, KEEPING), 0, folder, keep="all")
    return folder


@pytest.fixture
def run(store):
    (record,) = read_runs(store)
    return open_routed(record, store)


# --- checkpoints


def test_a_run_keeps_the_weights_of_every_checkpoint_if_it_is_asked_to(run, tmp_path):
    assert run.steps == [4, 8, 12] == list(own_checkpoints(run.folder))
    assert not list(run.folder.glob("checkpoint-*/trainer*"))  # nobody resumes from these
    train(build_entry("switch", DATA, MODEL, KEEPING), 0, tmp_path)
    (record,) = read_runs(tmp_path)
    plain = open_routed(record, tmp_path)
    assert plain.steps == [12]
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name])
        assert torch.equal(value, run.at(12).state_dict()[name])
    assert not torch.equal(run.at(4).embed.weight, run.at(8).embed.weight)
    assert look_back(plain, plain.batches(64)).steps == [0, 12]


# --- history


def test_routes_settle_towards_those_of_the_end(run):
    history = look_back(run, run.batches(64))
    assert history.steps == [0, 4, 8, 12] and history.recorded[0] == 0 and history.recorded[-1] == STEPS - 1
    settled = history.sites[0]
    assert settled.saturation[-1] == 1 and settled.unsettled[-1] == 0 and settled.saturation[0] < 1
    assert len(history.agreed[0]) == len(history.recorded)


@pytest.mark.parametrize("step", [4, 8])
def test_recorded_choices_are_those_of_the_checkpoint_that_made_them(step, run):
    assert agreed(run, run.at(step), step) == {0: 1.0}
    assert agreed(run, run.initial(), 0) == {0: 1.0}
    assert agreed(run, run.at(12), 0)[0] < 1


def test_recorded_choices_are_read_whoever_chose():
    by_token = table_of(torch.tensor([[0, 2], [2, 3], [1, 0], [1, 1]]), tokens=2, experts=3)  # 2 samples; 3: unused
    assert by_token.tolist() == [[True, False, True], [False, False, True]]
    by_expert = table_of(torch.tensor([[0, 4], [3, 1], [4, 4]]), tokens=4, experts=3)
    assert by_expert.t().tolist() == [[True, False, False, False], [False, True, False, True], [False] * 4]


# --- domains


def test_domains_that_a_router_separates_are_found(run, monkeypatch):
    """One that sends every token to the expert of its domain, whatever it says; and one that asks nobody."""
    run = replace(run, corpus=load_corpus("synth:documents=64,length=64,domains=4", None))
    domain_of = {}
    for batch in run.batches(128):
        domain_of |= {
            (int(s), p): int(d)
            for s, row in zip(batch.sequence_B, batch.domains_BS, strict=True)
            for p, d in enumerate(row)
        }

    def by_domain(x_TD, context):
        keys = zip(context.sequence_T.tolist(), context.position_T.tolist(), strict=True)
        return RoutingDecision.token_choice(
            torch.tensor([[domain_of[key]] for key in keys]), torch.ones(len(x_TD), 1), 4
        )

    def by_turns(x_TD, context):
        return RoutingDecision.token_choice(torch.arange(len(x_TD))[:, None] % 4, torch.ones(len(x_TD), 1), 4)

    plain = inspect_run(run, 128, 0)
    assert plain.worth is None and plain.sites[0].domains.nmi < 0.5
    (router,) = run.model.routers
    monkeypatch.setattr("rlroute.experiments.inspection.inspection.look_back", lambda run, batches: None)
    monkeypatch.setattr(router, "forward", by_domain)
    found = inspect_run(run, 128, 0).sites[0]
    assert found.domains.nmi > 0.9 > found.domains.chance and found.domains.explained > 0.9
    np.testing.assert_allclose(found.by_domain_LE, np.eye(4)[: len(found.by_domain_LE)])
    monkeypatch.setattr(router, "forward", by_turns)
    assert inspect_run(run, 128, 0).sites[0].domains.nmi < 0.1


@pytest.fixture
def files(tmp_path):
    def lay(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode() * 4)
        return f"file:{tmp_path}/**"

    return lay


def domains_of(spec):
    found = find_domains(load_corpus(spec))
    if found is None:
        return None
    tokens = found.corpus.valid
    starts = np.flatnonzero(tokens == 256)
    return {
        bytes(tokens[start + 1 : end].astype(np.uint8)).decode(): found.names[found.corpus.valid_domains[start]]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)
    }


def test_domains_of_files_are_the_first_folders_that_tell_them_apart(files):
    spec = files(*(f"all/valid/{folder}/deep/{name}.txt" for folder in "ab" for name in "xy"), "all/train/c/x.txt")
    assert set(domains_of(spec).values()) == {"valid/a", "valid/b"}
    assert all(text.startswith(f"all/{domain}/") for text, domain in domains_of(spec).items())


def test_domains_of_files_in_one_folder_are_the_files(files):
    found = domains_of(files("valid.a.txt", "valid.b.txt", "train.txt"))
    assert all(text.startswith(domain) for text, domain in found.items()) and len(found) == 2


def test_one_document_has_no_domains(files):
    assert domains_of(files("valid.txt", "train.txt")) is None


def test_the_smallest_of_many_domains_are_one(files):
    spec = files("train/x.txt", *(f"valid/{number:02}/x.txt" for number in range(40)))
    names = find_domains(load_corpus(spec)).names
    assert len(names) == MOST and names[-1] == OTHERS


def test_more_tokens_than_there_are_are_refused(run):
    with pytest.raises(DataError, match="is too short"):
        inspect_run(run, 10**6, 0)


# --- commands

FEW = ("--tokens", "64", "--worth-tokens", "32")


def test_inspect_shows_tables_figures_and_a_page(store, run, tmp_path):
    out = (tmp_path / "in.html", tmp_path / "in.json")
    said = ran("inspect", "switch", "--store", store, *FEW, "--out", *out)
    for part in (
        "saturation",
        "favourite tokens",
        "loss without it",
        "lift",
        "recorded",
        "domain NMI",
        "regret (nats)",
        run.id,
    ):
        assert part in said
    figures = json.loads(out[1].read_text())
    assert figures == json.loads(ran("inspect", "switch", "--store", store, *FEW, "--json")) | {
        "command": figures["command"]
    }
    (site,) = figures["sites"]
    assert sum(site["load_E"]) == 64 * MODEL.k and len(site["together_EE"]) == 4
    assert len(figures["worth"]["experts"]["0"]) == 4 and figures["worth_tokens"] == 32
    assert figures["loss"] == pytest.approx(
        float(run_probe(run.model, run.batches(64), run.device, **KEYS).loss_T.mean()), rel=1e-5
    )
    page = out[0].read_text()
    assert figures["regret"]["nats_C"] == pytest.approx(run.record.summary["measured"]["regret"]["nats_C"], rel=1e-5)
    for name in ("loads", "history", "worth", "best", "regret", "domains0", "together0"):
        assert f'id="{name}"' in page and f'"{name}":' in page


def test_a_run_that_kept_its_end_alone_says_which_option_keeps_more(tmp_path):
    train(build_entry("switch", DATA, MODEL, TRAIN), 0, tmp_path)
    assert "--keep all" in ran("inspect", "switch", "--store", tmp_path, *FEW[:2], "--worth-tokens", "0")


def test_inspect_drops_shows_what_the_batch_changes(store, tmp_path):
    out = (tmp_path / "drops.html", tmp_path / "drops.json")
    said = ran(
        "inspect", "drops", "switch", "--store", store, "--tokens", "128", "--capacity", "0.5", "1", "--out", *out
    )
    assert "dropless: nothing changes" in said and "capacity 0.5: " in said and "next " in said
    tight, even, dropless = json.loads(out[1].read_text())["drops"]
    assert (tight["factor"], even["factor"], dropless["factor"]) == (0.5, 1, None)
    assert tight["dropped"] > even["dropped"] > 0 == dropless["dropped"] == dropless["changed"]
    assert all(f'id="{name}"' in out[0].read_text() for name in ("changes", "by_position", "by_row"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a", "b", "switch"), "inspect a b switch: want [drops] RUN"),
        (("other", "switch"), "inspect other switch: want [drops] RUN"),
        (("switch", "--capacity", "1"), "--capacity does not apply to inspect RUN, which takes --tokens"),
        (("switch", "--orders", "9"), "--orders 9 does not apply to inspect RUN"),
        (("drops", "switch", "--worth-tokens", "9"), "--worth-tokens 9 does not apply to inspect drops"),
        (("switch", "--out", "x.png"), "legal are names that end in .html, .json"),
        (("nothing",), "holds no ended run whose id starts with 'nothing'"),
        (("drops", "switch", "--capacity", "0"), "--capacity = 0.0: legal are numbers above 0"),
        (("drops", "switch", "--orders", "1"), "--orders = 1"),
        (("drops", "switch", "--tokens", "16"), "want two batches or more"),
        (("switch", "--tokens", "1000000"), "is too short"),
    ],
)
def test_what_cannot_be_inspected_is_refused(words, said, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(rlroute("inspect", *words, "--store", store))
    assert not list(tmp_path.iterdir())


def test_the_figure_of_the_page_is_what_the_commands_wrote():
    assert inspection_figure.figure() == inspection_figure.FIGURE.read_text(), "python -m tests.inspection_figure"
    (record,) = read_runs(inspection_figure.RESULTS / "run.jsonl")
    assert record.id == inspection_figure.found("inside.json")["run"]
