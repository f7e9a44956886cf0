"""Fewer training tokens are contained in more; and training tokens are evaluated as validation tokens are."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlroute.config import DataConfig, RunConfig
from rlroute.errors import ConfigError, DataError
from rlroute.experiments.recipes.entries import build_entry
from rlroute.experiments.verify.store import verify
from rlroute.reading import read_run
from rlroute.training.batches import eval_batches
from rlroute.training.checkpoint import load_weights
from rlroute.training.data import Corpus, corpus_of, load_corpus
from rlroute.training.documents import Document, cut
from rlroute.training.evaluate import evaluate
from rlroute.training.loop import train
from rlroute.training.prepare import build_model
from rlroute.training.shards import Joined, Stream, head
from rlroute.training.step import Device
from tests.runs import figures
from tests.tiny import DATA, MODEL, TRAIN

SPEC = "synth:documents=64,length=64"
BOS = 256


def documents_of(stream: Stream) -> list[bytes]:
    """Cut a byte stream before its BOS tokens."""
    stream = stream[:]
    return [part.tobytes() for part in np.split(stream, np.flatnonzero(stream == BOS)) if len(part)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.data())
def test_less_is_less_or_as_much_of_each_document_and_one_at_most_is_cut(sizes: list[int], data: Any) -> None:
    documents = [Document(f"{number}.py", b"") for number in range(len(sizes))]
    less, more = sorted(data.draw(st.integers(1, sum(sizes))) for _ in range(2))
    few, many = cut(documents, sizes, less), cut(documents, sizes, more)
    assert sum(few) == less and sum(many) == more
    assert all(one <= other <= size for one, other, size in zip(few, many, sizes, strict=True))
    assert sum(0 < one < size for one, size in zip(few, sizes, strict=True)) <= 1
    assert cut(documents, sizes, sum(sizes)) == sizes


def test_which_documents_are_taken_follows_from_their_names_alone() -> None:
    names = [f"{number}.py" for number in range(20)]
    taken = dict(zip(names, cut([Document(name, b"") for name in names], [10] * 20, 55), strict=True))
    back = dict(zip(names[::-1], cut([Document(name, b"x") for name in names[::-1]], [10] * 20, 55), strict=True))
    assert taken == back and sorted(taken.values()) == [0] * 14 + [5] + [10] * 5


def test_a_smaller_set_is_contained_in_a_larger_one_and_validation_stays() -> None:
    whole = load_corpus(SPEC)
    sets = [load_corpus(SPEC, None, tokens) for tokens in (100, 130, 1000, len(whole.train))]
    for few, many in pairwise(sets):
        there = documents_of(many.train)
        for one in documents_of(few.train):
            where = next(i for i, other in enumerate(there) if other.startswith(one))
            there.pop(where)
    for corpus in sets:
        assert np.array_equal(corpus.valid[:], whole.valid[:])
        assert corpus.provenance["sha256"] == whole.provenance["sha256"]
        assert corpus.provenance["valid_sha256"] == whole.provenance["valid_sha256"]
        assert corpus.train_domains is not None and len(corpus.train_domains) == len(corpus.train)
        assert corpus.provenance["train_tokens"] == len(corpus.train)
    assert len({corpus.provenance["train_sha256"] for corpus in sets}) == len(sets)
    assert sets[-1].provenance == whole.provenance and np.array_equal(sets[-1].train[:], whole.train[:])
    last, all_of_them = sets[-1].train_domains, whole.train_domains
    assert last is not None and all_of_them is not None and np.array_equal(last, all_of_them)


def test_domains_are_those_of_what_was_taken() -> None:
    """The synthetic domains have alphabets of their own."""
    whole, some = load_corpus("synth:domains=4,vocab=64"), load_corpus("synth:domains=4,vocab=64", None, 3000)
    assert whole.train_domains is not None and some.train_domains is not None

    def spoken(corpus: Corpus, domains: np.ndarray) -> set[tuple[int, int]]:
        return set(zip(corpus.train.tolist(), domains.tolist(), strict=True))  # type: ignore[union-attr]

    assert spoken(some, some.train_domains) <= spoken(whole, whole.train_domains)
    assert len(set(some.train_domains.tolist())) > 1


def test_of_shards_the_first_tokens_are_taken_and_stay_where_they_are(tmp_path: Path) -> None:
    for number in range(3):
        np.arange(10 * number, 10 * number + 10, dtype="<u2").tofile(tmp_path / f"{number}.bin")
    corpus = load_corpus(f"bin:{tmp_path}/*.bin,vocab=30,bytes_per_token=1", None, 14)
    assert isinstance(corpus.train, Joined) and all(isinstance(part, np.memmap) for part in corpus.train.parts)
    assert corpus.train[:].tolist() == list(range(14)) and corpus.valid[:].tolist() == list(range(20, 30))
    parts = Joined([np.arange(3), np.arange(3, 5)])
    assert [head(parts, tokens)[:].tolist() for tokens in range(1, 6)] == [list(range(n)) for n in range(1, 6)]


@pytest.mark.parametrize("tokens", [100_000_000, 4_000])
@pytest.mark.parametrize("form", ["synth", "bin"])
def test_more_than_there_is_is_refused_by_name(form: str, tokens: int, tmp_path: Path) -> None:
    np.zeros(100, "<u2").tofile(tmp_path / "a.bin")
    spec = SPEC if form == "synth" else f"bin:{tmp_path}/*.bin,vocab=30,bytes_per_token=1"
    there = len(load_corpus(spec).train)
    with pytest.raises(DataError, match=rf"data\.train_tokens = {tokens}: corpus .* legal are 1 to {there}"):
        load_corpus(spec, None, tokens)


@pytest.mark.parametrize("tokens", [0, -1, 1.5])
def test_no_token_is_refused_by_name(tokens: Any) -> None:
    with pytest.raises(ConfigError, match=rf"data\.train_tokens = {tokens}"):
        DataConfig(train_tokens=tokens).check()


# Training tokens that are evaluated


def run_of(**fields: Any) -> RunConfig:
    return build_entry("switch", replace(DATA, train_tokens=700), MODEL, replace(TRAIN, **fields))


def test_training_tokens_are_evaluated_as_validation_tokens_are() -> None:
    corpus = corpus_of(run_of().data)
    sizes: dict[str, Any] = {"num_tokens": 128, "batch_size": 4, "seq_len": 16}
    swapped = replace(corpus, valid=corpus.train, valid_domains=corpus.train_domains)
    one, other = eval_batches(corpus, part="train", **sizes), eval_batches(swapped, **sizes)
    assert [batch.digest() for batch in one] == [batch.digest() for batch in other] and len(one) == 2
    few = eval_batches(load_corpus(SPEC, None, 50), part="train", **sizes)
    assert sum(len(batch.tokens_BS) for batch in few) == 3, "as many windows as there are"


def test_a_run_says_what_it_reaches_on_training_tokens_and_trains_no_otherwise(tmp_path: Path) -> None:
    plain, seen = run_of(), run_of(eval_train=True)
    folders = {config: tmp_path / config.run_id(0) for config in (plain, seen)}
    for config in folders:
        train(config, 0, tmp_path)
    losses = [row.pop("training") for row in read_run(folders[seen]).evals]
    assert [row["step"] for row in read_run(folders[seen]).evals] == [4, 8, 12]
    model, corpus = build_model(seen, corpus_of(seen.data), 0), corpus_of(seen.data)
    load_weights(folders[seen], model, folders[seen].name)
    batches = eval_batches(corpus, num_tokens=128, batch_size=4, seq_len=16, part="train")
    device = Device("cpu", torch.float32)
    by_hand = evaluate(model, batches, corpus.token_bytes_V, device, seed=0, step=12, progress=1.0, final=False)
    assert losses[-1] == {name: by_hand[name] for name in ("loss", "bits_per_byte")}
    one, other = (figures(folder) for folder in folders.values())
    for figure in (one, other):
        for row in (figure["summary"]["final"], *figure["metrics"]):
            row.pop("training", None)
        for name in ("id", "config_hash"):
            figure["summary"].pop(name)
    assert one == other
    assert verify(tmp_path) == []
