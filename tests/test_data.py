"""Corpora are the same bytes everywhere and split by document; a batch is a pure function of (corpus, seed, step).

Longer than most: each kind of corpus is refused, split and read in the same ways.
"""

import dataclasses
import glob
import hashlib
import itertools
import os
import sys
import tracemalloc
import typing
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlroute.config import DataConfig, Order, RunConfig
from rlroute.errors import ConfigError, DataError
from rlroute.training import shards
from rlroute.training.batches import EVAL_SEQUENCES, eval_batches, sample_batch
from rlroute.training.data import Corpus, _cut_options, load_corpus
from rlroute.training.documents import Document, is_test, package_documents, split_documents
from rlroute.training.files import find_files, listed, part_of
from rlroute.training.prepare import Cut
from rlroute.training.synthetic import Mixture

SYMPY_SHA256 = "4d6b5fb36310e3b8a40efa0032d6f1e65bf60da172e6ad74122637af81ac7a6d"
SYNTH_SHA256 = "fafe781105df5f3f4d7e874c74e9837631873265f126c125b975b3181757f5ed"
BOS = 256
ORDERS: tuple[Order, ...] = typing.get_args(Order)


@pytest.fixture(scope="module")
def synth() -> Corpus:
    return load_corpus("synth:documents=400")


def corpus_of(train: np.ndarray, valid: np.ndarray | None = None) -> Corpus:
    valid = train if valid is None else valid
    return Corpus(train=train, valid=valid, vocab_size=257, token_bytes_V=np.ones(257), provenance={"spec": "file:x"})


def texts_of(stream: shards.Stream) -> set[bytes]:
    """Cut a byte stream at its BOS tokens."""
    stream = stream[:]
    return {
        part[1:].astype(np.uint8).tobytes() for part in np.split(stream, np.flatnonzero(stream == BOS)) if len(part)
    }


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    def write(files: dict[str, bytes]) -> Path:
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return write


# Batches


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_depends_on_seed_and_step_alone(synth: Corpus, order: Order) -> None:
    cut: Cut = {"batch_size": 4, "seq_len": 32, "order": order}
    first = sample_batch(synth, seed=3, step=7, **cut)
    sample_batch(synth, seed=3, step=8, **cut)
    assert sample_batch(synth, seed=3, step=7, **cut).digest() == first.digest()
    others = [sample_batch(synth, seed=seed, step=step, **cut).digest() for seed, step in [(3, 8), (4, 7)]]
    assert len({first.digest(), *others}) == 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_row_is_what_its_sequence_id_says(synth: Corpus, batch_size: int, order: Order) -> None:
    whole = sample_batch(synth, seed=0, step=5, batch_size=8, seq_len=16, order=order)
    steps = range(40 // batch_size, 48 // batch_size)
    parts = [sample_batch(synth, seed=0, step=step, batch_size=batch_size, seq_len=16, order=order) for step in steps]
    for name in ("tokens_BS", "targets_BS", "sequence_B", "domains_BS"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    assert whole.sequence_B.tolist() == list(range(40, 48))


def test_rows_are_windows_of_the_training_stream() -> None:
    batch = sample_batch(corpus_of(np.arange(200, dtype=np.uint16)), seed=1, step=0, batch_size=64, seq_len=10)
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == batch.sequence_B.dtype == np.int64
    np.testing.assert_array_equal(batch.targets_BS, batch.tokens_BS + 1)
    np.testing.assert_array_equal(np.diff(batch.tokens_BS), 1)


def test_windows_are_uniform_over_all_start_offsets() -> None:
    batch = sample_batch(corpus_of(np.arange(12)), seed=0, step=2, batch_size=9000, seq_len=3)
    counts = np.bincount(batch.tokens_BS[:, 0], minlength=9)
    assert len(counts) == 9
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(1000)


def test_epochs_show_every_window_once_before_any_again_in_another_order_and_cut() -> None:
    corpus, windows = corpus_of(np.arange(1003)), (1003 - 7) // 7
    rows = sample_batch(corpus, seed=2, step=0, batch_size=3 * windows, seq_len=7, order="epochs").tokens_BS
    np.testing.assert_array_equal(np.diff(rows), 1)
    epochs = rows.reshape(3, windows, 7)
    for epoch in epochs:
        assert len(np.unique(epoch)) == epoch.size, "no token twice"
        assert len({int(row[0]) % 7 for row in epoch}) == 1
        assert np.abs(np.diff(epoch[:, 0])).max() > 100, "not in the order of the text"
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    other = sample_batch(corpus, seed=3, step=0, batch_size=windows, seq_len=7, order="epochs").tokens_BS
    assert not np.array_equal(other, epochs[0])
    many = sample_batch(corpus, seed=0, step=0, batch_size=60 * windows, seq_len=7, order="epochs").tokens_BS
    assert many.min() == 0 and many[:, 0].max() > 1003 - 7 - 1 - 7, "from the first token to the last whole window"


def test_every_part_of_a_batch_is_in_its_digest(synth: Corpus) -> None:
    batch = sample_batch(synth, seed=0, step=0, batch_size=2, seq_len=8)
    changed = [
        dataclasses.replace(batch, **{name: getattr(batch, name) + 1})
        for name in ("tokens_BS", "targets_BS", "sequence_B")
    ]
    assert len({batch.digest(), *(other.digest() for other in changed)}) == 4


def test_the_shortest_training_stream_is_one_window() -> None:
    corpus = corpus_of(np.arange(9))
    assert sample_batch(corpus, seed=0, step=0, batch_size=1, seq_len=8).tokens_BS.tolist() == [list(range(8))]
    with pytest.raises(DataError, match=r"'file:x' is too short: 9 training tokens, seq_len = 9 needs 10"):
        sample_batch(corpus, seed=0, step=0, batch_size=1, seq_len=9)
    sample_batch(corpus_of(np.arange(16)), seed=0, step=0, batch_size=9, seq_len=8, order="epochs")
    with pytest.raises(DataError, match=r"'file:x' is too short: 9 training tokens, seq_len = 8 needs 16"):
        sample_batch(corpus, seed=0, step=0, batch_size=1, seq_len=8, order="epochs")


@pytest.mark.parametrize(("tokens", "length"), [(64, 65), (64, 200), (50, 97), (1, 9)])
def test_evaluation_windows_are_spread_and_do_not_overlap(tokens: int, length: int) -> None:
    corpus = corpus_of(np.arange(5), np.arange(length))
    batches = eval_batches(corpus, num_tokens=tokens, batch_size=3, seq_len=8)
    targets = np.concatenate([batch.targets_BS for batch in batches])
    ids = np.concatenate([batch.sequence_B for batch in batches])
    assert targets.size >= tokens and targets.size - tokens < 8
    assert len(np.unique(targets)) == targets.size
    gaps = np.diff(targets[:, 0])
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert ids.tolist() == [EVAL_SEQUENCES + i for i in range(len(targets))]


def test_a_validation_stream_that_is_too_short_is_refused() -> None:
    with pytest.raises(DataError, match=r"64 validation tokens, eval_tokens = 64 at seq_len = 8 needs 65"):
        eval_batches(corpus_of(np.arange(64)), num_tokens=64, batch_size=3, seq_len=8)


# Documents


def test_the_default_corpus_is_the_same_bytes_everywhere() -> None:
    corpus = load_corpus("package:sympy")
    known = {"spec": "package:sympy", "sha256": SYMPY_SHA256, "distribution": "sympy", "version": "1.14.0"}
    assert corpus.provenance.items() >= known.items()
    assert corpus.provenance["floor_bits_per_byte"] is None
    assert (len(corpus.train), len(corpus.valid)) == (
        corpus.provenance["train_tokens"],
        corpus.provenance["valid_tokens"],
    )
    assert corpus.vocab_size == len(corpus.token_bytes_V) == 257
    assert corpus.token_bytes_V[BOS] == 0 and (corpus.token_bytes_V[:256] == 1).all()
    assert 1 / 40 < len(corpus.valid) / len(corpus.train) < 1 / 8


def test_no_test_of_a_package_is_read() -> None:
    names = [document.name for document in package_documents("sympy")[0]]
    assert names == sorted(names) and len(names) > 500
    assert not [name for name in names if "/tests/" in name or "/test_" in name]


@pytest.mark.parametrize("path", ["a/tests/b.py", "test/b.py", "a/testing/b.py", "a/test_b.py", "conftest.py"])
def test_what_counts_as_a_test(path: str) -> None:
    assert is_test(path)
    assert not is_test("contest/latest.py")


def test_a_distribution_gives_its_sources_in_order(write_files, monkeypatch: pytest.MonkeyPatch) -> None:
    record = "demo/b.py,,\n../bin/run.py,,\ndemo/a.py,,\ndemo/tests/c.py,,\ndemo/data.txt,,\ndemo/__pycache__/a.pyc,,\n"
    info = {"METADATA": b"Metadata-Version: 2.1\nName: rlroute-demo\nVersion: 1.5\n", "RECORD": record.encode()}
    files = {f"rlroute_demo-1.5.dist-info/{name}": data for name, data in info.items()}
    root = write_files(files | {"demo/a.py": b"a = 1\r\n", "demo/b.py": b"\xff"})
    monkeypatch.syspath_prepend(root)
    documents, (found,) = package_documents("rlroute-demo")
    assert documents == [Document("demo/a.py", b"a = 1\r\n"), Document("demo/b.py", b"\xff")]
    assert found.version == "1.5"
    (root / "demo/b.py").unlink()
    with pytest.raises(DataError, match=r"b\.py' cannot be read"):
        package_documents("rlroute-demo")


def test_several_distributions_are_one_corpus_in_the_order_that_is_given() -> None:
    apart = {name: package_documents(name)[0] for name in ("rich", "tyro")}
    for names in ("rich,tyro", "tyro,rich"):
        documents, found = package_documents(names)
        assert [one.metadata["Name"] for one in found] == names.split(",")
        assert documents == [document for name in names.split(",") for document in apart[name]]
    made = load_corpus("package:rich,tyro").provenance
    assert made["distribution"] == "rich, tyro" and made["version"] == ", ".join(map(version, ("rich", "tyro")))


def test_the_standard_library_is_a_corpus() -> None:
    corpus = load_corpus("stdlib")
    assert corpus.provenance["version"] == ".".join(map(str, sys.version_info[:3]))
    assert len(corpus.train) > 2**21


def test_files_are_split_by_document(write_files) -> None:
    texts = {f"sub{i % 3}/{i:02d}.txt": bytes([i, 255 - i] * (i + 1)) for i in range(40)}
    corpus = load_corpus(f"file:{write_files(texts)}/**/*.txt")
    train, valid = texts_of(corpus.train), texts_of(corpus.valid)
    assert not train & valid and train | valid == set(texts.values())
    assert len(valid) == round(40 / 16)
    assert corpus.train[:1] == corpus.valid[:1] == BOS
    assert corpus.provenance["sha256"] == hashlib.sha256(b"".join(texts[name] for name in sorted(texts))).hexdigest()


def test_a_corpus_of_files_does_not_depend_on_where_they_lie(write_files, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_files({f"{place}/{i}.txt": bytes([i]) * 9 for place in ("here", "there/deep") for i in range(20)})
    monkeypatch.chdir(root)
    here, there = load_corpus("file:here/*.txt"), load_corpus(f"file:{root}/there/deep/*.txt")
    np.testing.assert_array_equal(here.train, there.train)
    np.testing.assert_array_equal(here.valid, there.valid)


def test_the_split_goes_by_name_and_both_parts_have_documents() -> None:
    documents = [Document(str(i), b"%d" % i) for i in range(32)]
    train, valid, notes = split_documents("file:x", documents)
    assert (len(train), len(valid), notes) == (30, 2, [])
    others = [d._replace(data=b"other" + d.data) for d in documents]
    assert split_documents("file:x", others).valid == [d for d in others if d.name in {v.name for v in valid}]
    assert [len(part) for part in split_documents("file:x", documents[:2])] == [1, 1, 0]
    with pytest.raises(DataError, match="'file:x' is too short: 1 non-empty documents"):
        split_documents("file:x", [Document("a", b"x"), Document("b", b"")])


def test_no_text_that_is_held_out_is_trained_on_under_another_name() -> None:
    documents = [Document(str(i), b"%d" % (i % 20)) for i in range(40)]
    train, valid, notes = split_documents("file:x", documents)
    assert not {d.data for d in train} & {d.data for d in valid}
    dropped = [d.name for d in documents if d not in train and d not in valid]
    assert dropped and len(train) + len(valid) + len(dropped) == 40
    assert notes == [
        f"corpus 'file:x': of its documents {len(dropped)} are held out too, and not trained on: {listed(dropped)}"
    ]
    with pytest.raises(DataError, match="every document is held out for validation"):
        split_documents("file:x", [Document(str(i), b"same") for i in range(9)])


# Files


def texts(root: Path, corpus: Corpus) -> tuple[set[bytes], set[bytes]]:
    """Return the texts of training and validation, each of which must be there once."""
    parts = [texts_of(part) for part in (corpus.train, corpus.valid)]
    assert not parts[0] & parts[1]
    assert [len(part) for part in parts] == [int((s[:] == BOS).sum()) for s in (corpus.train, corpus.valid)]
    return parts[0], parts[1]


def links_to_the_parent(root: Path) -> None:
    (root / "a/up").symlink_to("..")
    (root / "b/up").symlink_to(root)


def links_between_siblings(root: Path) -> None:
    for one, other in itertools.permutations("abcde", 2):
        (root / one / f"to_{other}").symlink_to(root / other)


def links_to_themselves(root: Path) -> None:
    (root / "a/me").symlink_to("me")
    (root / "a/me.txt").symlink_to("me.txt")
    (root / "gone.txt").symlink_to("/no/such")


def links_to_files(root: Path) -> None:
    for i, file in enumerate(sorted(root.rglob("*.txt"))):
        (root / f"{i}.txt").symlink_to(file)


def a_link_in_front(root: Path) -> None:
    (root / "0first").symlink_to(root / "d")


MESSES = [links_to_the_parent, links_between_siblings, links_to_themselves, links_to_files, a_link_in_front]


@pytest.fixture
def tree(write_files) -> Path:
    return write_files({f"t/{folder}/{i}.txt": f"{folder}{i}".encode() for folder in "abcde" for i in range(8)}) / "t"


@pytest.mark.parametrize("mess", [*MESSES, lambda root: [mess(root) for mess in MESSES]])
def test_each_file_is_one_document_whatever_links_the_tree_holds(tree: Path, mess) -> None:
    plain = load_corpus(f"file:{tree}/**/*.txt")
    mess(tree)
    for pattern in ("**/*.txt", "**/**/*.txt", "**"):
        messy = load_corpus(f"file:{tree}/{pattern}")
        texts(tree, messy)
        assert messy.provenance == plain.provenance | {"spec": f"file:{tree}/{pattern}"}
        np.testing.assert_array_equal(messy.train, plain.train)
        np.testing.assert_array_equal(messy.valid, plain.valid)


def test_a_file_of_several_names_is_one_document(tree: Path) -> None:
    for i, file in enumerate(sorted(tree.rglob("*.txt"))):
        (tree / f"hard{i}.txt").hardlink_to(file)
        (tree / f"{file.parent.name}/copy{i}.txt").hardlink_to(file)
    train, valid = texts(tree, load_corpus(f"file:{tree}/**/*.txt"))
    assert len(train | valid) == 40


def hard_links(files: Path, other: Path) -> None:
    other.mkdir(parents=True)
    for file in files.iterdir():
        (other / f"copy_{file.name}").hardlink_to(file)


def soft_links(files: Path, other: Path) -> None:
    other.mkdir(parents=True)
    for file in files.iterdir():
        (other / f"copy_{file.name}").symlink_to(file)


def linked_folder(files: Path, other: Path) -> None:
    other.parent.mkdir(parents=True, exist_ok=True)
    other.symlink_to(files)


@pytest.mark.parametrize("link", [hard_links, soft_links, linked_folder])
@pytest.mark.parametrize("held", ["valid", "test"])
@pytest.mark.parametrize(("lie", "others"), [("{}", ["train/x"]), ("train/x", ["{}"]), ("blobs", ["a/train", "{}"])])
def test_what_one_name_holds_out_is_held_out_under_all(
    write_files, link, held: str, lie: str, others: list[str]
) -> None:
    own = {f"train/{i}.txt": b"own%d" % i for i in range(40)}
    shared = {f"{lie.format(held)}/s{i}.txt": b"shared%d" % i for i in range(3)}
    root = write_files(own | shared)
    for other in others:
        link(root / lie.format(held), root / other.format(held))
    corpus = load_corpus(f"file:{root}/**/*.txt")
    train, valid = texts(root, corpus)
    if held == "valid":
        assert (train, valid) == (set(own.values()), set(shared.values())) and not corpus.notes
    else:
        assert train | valid == set(own.values()) and "3 named test are left out: 'test/" in corpus.notes[0]


def test_a_folder_is_reached_through_a_link(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link").symlink_to(tree)
    for pattern in ("link/*/*.txt", "*/a/../*/*.txt", "**/*.txt"):
        train, valid = texts(tree, load_corpus(f"file:{tmp_path}/elsewhere/{pattern}"))
        assert len(train | valid) == 40


def test_what_a_glob_is_matches_what_python_says(tree: Path) -> None:
    (tree / ".hidden").mkdir()
    (tree / ".hidden/x.txt").write_text("h")
    (tree / "a/.y.txt").write_text("y")
    for pattern in (
        "*/*.txt",
        "**/[0-3].txt",
        "[!a]/?.txt",
        "a/*",
        "**/a/*.txt",
        "*/.y*",
        ".h*/*",
        "a/0.txt",
        "b/**/7*",
    ):
        expected = {Path(p) for p in glob.glob(f"{tree}/{pattern}", recursive=True) if Path(p).is_file()}
        assert {found.path for found in find_files("file", f"{tree}/{pattern}")} == expected


def test_a_path_that_is_there_is_no_glob(tree: Path) -> None:
    for folder in ("c[13]", "c1", "x,y"):
        (tree / folder).mkdir()
        for i in range(2):
            (tree / folder / f"{i}.txt").write_text(folder + str(i))
    found = [f.path.parent.name for f in find_files("file", f"{tree}/c[13]/*.txt")]
    assert found == ["c[13]", "c[13]"]
    (tree / "odd*name?.txt").write_text("x")
    assert [f.path.name for f in find_files("file", f"{tree}/odd*name?.txt")] == ["odd*name?.txt"]
    train, valid = texts(tree, load_corpus(f"file:{tree}/x,y/*.txt"))
    assert train | valid == {b"x,y0", b"x,y1"}


@pytest.mark.parametrize("pattern", ["", "/", "*", "a/", "nothing", "a/*/", "a\0b", "\ud800", "[", "**/nothing"])
def test_a_glob_of_no_file_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.chdir(tree)
    with pytest.raises(DataError, match="no file matches"):
        load_corpus(f"file:{pattern}" if pattern != "/" else "file:/")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_refused(tree: Path, make) -> None:
    make(tree / "a/odd.txt")
    for pattern in ("file:{}/a/*.txt", "file:{}/a/odd.txt", "bin:{}/**/odd*,vocab=9,bytes_per_token=1"):
        with pytest.raises(DataError, match=r"a/odd\.txt', which is no regular file"):
            load_corpus(pattern.format(tree))


def test_names_that_are_not_utf8(tree: Path) -> None:
    folder = os.fsencode(tree) + b"/\xff\xfe"
    os.mkdir(folder)
    for i in range(3):
        Path(os.fsdecode(folder), f"{i}.txt").write_text(f"odd{i}")
    train, valid = texts(tree, load_corpus(f"file:{tree}/**/*.txt"))
    assert len(train | valid) == 43
    with pytest.raises(ConfigError, match=r"data.spec = 'file:.*udcff.*': legal is UTF-8") as caught:
        RunConfig(data=DataConfig(spec=f"file:{os.fsdecode(folder)}/*.txt"))
    str(caught.value).encode()
    with pytest.raises(ConfigError, match=r"data.tokenizer = "):
        RunConfig(data=DataConfig(tokenizer="\udcff"))


# Parts by name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("wiki.train.tokens", "train"),
        ("wiki.valid.tokens", "valid"),
        ("wiki.test.tokens", "test"),
        ("fineweb_val_000000.bin", "valid"),
        ("val1", "valid"),
        ("Validation/a.txt", "valid"),
        ("dev/train.txt", "valid"),
        ("x/TEST-00/a.txt", "test"),
        ("training/0.txt", "train"),
        ("train_test_split.txt", None),
        ("latest.txt", None),
        ("devices/trainer/values.txt", None),
        ("evaluation/0.txt", "valid"),
        ("development.txt", "valid"),
        ("wiki.heldout", "valid"),
        ("held_out/0.txt", "valid"),
        ("c4-held-out.txt", "valid"),
        ("holdout", "valid"),
        ("validate.jsonl", "valid"),
        ("wikiValid.txt", "valid"),
        ("WikiTEST.txt", "test"),
        ("valset", "valid"),
        ("DevSet/0.txt", "valid"),
        ("testset/0.txt", "test"),
        ("trainset/valid.txt", "train"),
        ("trainTestSplit.txt", None),
        ("dataset/out/helder.txt", None),
    ],
)
def test_a_part_is_a_word_of_a_folder_or_file(name: str, part: str | None) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize(
    "names",
    [
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("train/0", "valid/0", "test/0"),
        ("0", "dev/0", "tests/0"),
        ("a/training-00", "a/validation-00", "b/test_00"),
    ],
)
def test_names_of_parts_are_honoured_alike_by_files_and_shards(write_files, names) -> None:
    files = {f"c/{name}": shard(np.full(20, i), False) for i, name in enumerate(names)}
    root = write_files(files)
    corpus = load_corpus(f"file:{root}/c/**")
    assert texts(root, corpus) == ({files[f"c/{names[0]}"]}, {files[f"c/{names[1]}"]})
    assert corpus.notes == [f"corpus 'file:{root}/c/**': of its documents 1 named test are left out: {names[2]!r}"]
    corpus = load_corpus(f"bin:{root}/c/**,vocab=9,bytes_per_token=1")
    assert (set(corpus.train[:]), set(corpus.valid[:])) == ({0}, {1})
    assert corpus.notes == [f"corpus 'bin:{root}/c/**': 1 shards named test are left out: {names[2]!r}"]


def test_without_a_named_validation_part_some_training_is_held_out_and_tests_are_not(write_files) -> None:
    root = write_files({f"{part}/{i}.txt": f"{part}{i}".encode() for part in ("train", "test") for i in range(20)})
    train, valid = texts(root, load_corpus(f"file:{root}/**/*.txt"))
    assert len(valid) == 1 and len(train) == 19 and not any(text.startswith(b"test") for text in train | valid)
    write_files({"testing/0.txt": b"x"})
    with pytest.raises(DataError, match="is too short: 0 non-empty documents beside 21 named test"):
        load_corpus(f"file:{root}/test*/*.txt")
    train, valid = texts(root, load_corpus(f"file:{root}/test/*.txt"))  # the name is of all: it parts nothing
    assert len(train | valid) == 20


def test_names_of_packages_part_nothing(write_files, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["demo/train.py", "demo/valid.py", "demo/dev.py"]
    files = {"METADATA": b"Name: rlroute-parts\nVersion: 1\n", "RECORD": "".join(f"{n},,\n" for n in names).encode()}
    root = write_files(
        {f"rlroute_parts-1.dist-info/{n}": data for n, data in files.items()} | {n: n.encode() for n in names}
    )
    monkeypatch.syspath_prepend(root)
    assert texts_of(load_corpus("package:rlroute-parts").valid) != {b"demo/valid.py", b"demo/dev.py"}


# Synthetic mixtures


def test_synthetic_text_is_the_same_everywhere(synth: Corpus) -> None:
    assert synth.provenance["sha256"] == load_corpus("synth:documents=400").provenance["sha256"] == SYNTH_SHA256
    assert load_corpus("synth:documents=400,seed=1").provenance["sha256"] != SYNTH_SHA256


def transitions(mixture: Mixture) -> np.ndarray:
    """Return the true chains, (domain, context, next byte)."""
    chains = np.zeros((mixture.domains, mixture.vocab**mixture.order, mixture.vocab))
    weights = np.stack([mixture.weights(d) / mixture.weights(d).sum() for d in range(mixture.domains)])
    np.put_along_axis(chains, mixture.successors(), np.broadcast_to(weights[:, None], chains.shape), axis=-1)
    return chains


def test_the_entropy_rate_is_that_of_the_stationary_chain() -> None:
    mixture = Mixture(domains=3, vocab=16)
    for domain, chain in enumerate(transitions(mixture)):
        np.testing.assert_allclose(chain.sum(-1), 1.0, rtol=1e-12)
        stationary = np.linalg.matrix_power(chain, 1024)[0]
        assert (stationary * -(chain * np.log2(chain)).sum(-1)).sum() == pytest.approx(
            mixture.entropy(domain), rel=1e-12
        )


@pytest.mark.parametrize("order", [1, 2])
def test_the_true_chain_codes_the_text_at_the_floor(order: int) -> None:
    mixture = Mixture(domains=4, vocab=16, length=100, documents=400, order=order, seed=5)
    documents, chains = mixture.sample(), transitions(mixture)
    bits = []
    for document in documents:
        context = 0
        for byte in document.data:
            bits.append(-np.log2(chains[document.domain, context, byte]))
            context = (context * mixture.vocab + byte) % mixture.vocab**order
    error = np.std(bits) / np.sqrt(len(bits))
    assert abs(np.mean(bits) - mixture.floor(documents)) < 4 * error
    assert error < 0.02 < 4.0 - mixture.floor(documents)  # 4 bits: what knowing nothing costs


def test_domains_label_every_token(synth: Corpus) -> None:
    labels = {document.data: document.domain for document in Mixture(documents=400).sample()}
    for stream, domains in [(synth.train, synth.train_domains), (synth.valid, synth.valid_domains)]:
        assert domains is not None and len(domains) == len(stream)
        for start in np.flatnonzero(stream == BOS):
            text = stream[start + 1 : start + 257].astype(np.uint8).tobytes()
            assert (domains[start : start + 257] == labels[text]).all()
    batch = sample_batch(synth, seed=0, step=0, batch_size=4, seq_len=300)
    assert batch.domains_BS is not None and batch.domains_BS.shape == (4, 300)


def test_the_floor_is_that_of_the_validation_documents(synth: Corpus) -> None:
    assert synth.valid_domains is not None
    entropies = [Mixture().entropy(d) for d in synth.valid_domains]
    assert synth.provenance["floor_bits_per_byte"] == pytest.approx(np.mean(entropies), abs=1e-8)


# Shards


def shard(tokens: np.ndarray, header: bool) -> bytes:
    head = np.zeros(256, dtype="<i4")
    head[:3] = shards.MAGIC, 1, len(tokens)
    return (head.tobytes() if header else b"") + tokens.astype("<u2").tobytes()


@pytest.mark.parametrize("header", [False, True])
def test_one_shard_is_mapped_and_cut_near_its_end(write_files, header: bool) -> None:
    root = write_files({"a.bin": shard(np.arange(1600), header)})
    corpus = load_corpus(f"bin:{root}/*.bin,vocab=2000,bytes_per_token=4.5")
    assert isinstance(corpus.train, np.memmap)
    np.testing.assert_array_equal(corpus.train, np.arange(1500))
    np.testing.assert_array_equal(corpus.valid, np.arange(1500, 1600))
    assert corpus.vocab_size == 2000 and set(corpus.token_bytes_V) == {4.5}
    assert corpus.provenance["sha256"] == hashlib.sha256(np.arange(1600).astype("<u2").tobytes()).hexdigest()


@pytest.mark.parametrize(("names", "valid"), [(("a", "b_val_0", "c"), 1), (("a", "b", "c"), 2)])
def test_named_or_last_shard_is_validation(write_files, names: tuple[str, ...], valid: int) -> None:
    root = write_files({f"{name}.bin": shard(np.arange(10) + 10 * i, True) for i, name in enumerate(names)})
    corpus = load_corpus(f"bin:{root}/*.bin,vocab=30,bytes_per_token=1")
    assert corpus.valid[:].tolist() == list(range(10 * valid, 10 * valid + 10))
    assert corpus.train[:].tolist() == [token for token in range(30) if token // 10 != valid]
    assert sample_batch(corpus, seed=0, step=0, batch_size=2, seq_len=4).tokens_BS.dtype == np.int64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (shard(np.arange(10), True)[:-2], r"damaged: header version 1 and 10 tokens in 1042 bytes"),
        (shard(np.arange(10), True).replace(b"\x01\x00\x00\x00", b"\x02\x00\x00\x00", 1), r"damaged: header version 2"),
        (b"abc", r"3 bytes; legal is an even number"),
        (b"", r"0 bytes"),
        (shard(np.arange(31), False), r"holds token 30; .* are 0 to 29"),
    ],
)
def test_a_damaged_shard_is_refused(write_files, data: bytes, message: str) -> None:
    root = write_files({"a.bin": data})
    with pytest.raises(DataError, match=message):
        load_corpus(f"bin:{root}/a.bin,vocab=30,bytes_per_token=1")


def test_shards_that_do_not_make_a_corpus_are_refused(write_files) -> None:
    root = write_files({name: shard(np.arange(i, 10), False) for i, name in enumerate(("val1", "val2", "c/test"))})
    with pytest.raises(DataError, match="0 shards are named test and 2 are for validation; legal is at least one"):
        load_corpus(f"bin:{root}/val*,vocab=30,bytes_per_token=1")


def test_a_shard_that_is_held_out_is_not_trained_on_under_another_name(write_files) -> None:
    root = write_files({f"{n}.bin": shard(np.arange(10) + 10 * (i % 2), i > 1) for i, n in enumerate("abcd")})
    (root / "e.bin").symlink_to(root / "a.bin")
    corpus = load_corpus(f"bin:{root}/*.bin,vocab=30,bytes_per_token=1")
    assert corpus.valid[:].tolist() == list(range(10, 20)) and corpus.train[:].tolist() == [*range(10), *range(10)]
    assert corpus.notes == [f"corpus 'bin:{root}/*.bin': 1 shards are held out too, and not trained on: 'b.bin'"]


def test_a_shard_with_a_hole_is_named(write_files) -> None:
    root = write_files({"a.bin": shard(np.arange(1, 30_000), False)})
    with (root / "a.bin").open("r+b") as file:
        file.truncate(2**22)
    with pytest.raises(DataError, match=r"a\.bin' was never written from byte \d+ on \(of 4194304\)"):
        load_corpus(f"bin:{root}/a.bin,vocab=65536,bytes_per_token=1")


@pytest.mark.parametrize(
    ("rest", "pattern", "pairs"),
    [
        ("a,b/*.bin,vocab=9,bytes_per_token=1.5", "a,b/*.bin", ["vocab=9", "bytes_per_token=1.5"]),
        ("a,b.bin", "a,b.bin", []),
        ("x=1,y.bin,vocab=9", "x=1,y.bin", ["vocab=9"]),
        ("v=1,w=2/a.bin", "v=1,w=2/a.bin", []),
        ("a[,]v=1", "a[,]v=1", []),
        ("", "", []),
    ],
)
def test_paths_may_hold_commas(rest: str, pattern: str, pairs: list[str]) -> None:
    assert _cut_options(rest) == (pattern, pairs)


def test_a_path_that_is_there_has_no_options(write_files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_files({"a,v=1": b"", "a": b""}))
    assert _cut_options("a,v=1") == ("a,v=1", []) and _cut_options("a,v=1,w=2") == ("a,v=1", ["w=2"])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_joined_shards_are_cut_like_one_array(lengths: list[int], data) -> None:
    parts = np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])
    joined, whole = shards.Joined(parts), np.arange(sum(lengths), dtype=np.uint16)
    start, stop = (data.draw(st.none() | st.integers(-60, 60)) for _ in range(2))
    cut = slice(start, stop, data.draw(st.sampled_from([None, 1, 2])))
    np.testing.assert_array_equal(joined[cut], whole[cut])
    assert joined[cut].dtype == np.uint16 and len(joined) == len(whole)


def test_shards_stay_on_disk(write_files) -> None:
    """Reading, counting and cutting 48 MB of shards takes a fraction of them."""
    rng = np.random.default_rng(0)
    root = write_files({f"{i}.bin": shard(rng.integers(0, 999, 2**23, dtype=np.uint16), False) for i in range(3)})
    tracemalloc.start()
    try:
        corpus = load_corpus(f"bin:{root}/*.bin,vocab=999,bytes_per_token=1")
        counts = corpus.token_counts_V
        sample_batch(corpus, seed=0, step=0, batch_size=8, seq_len=64)
        eval_batches(corpus, num_tokens=4096, batch_size=8, seq_len=64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 9 * shards.BLOCK_TOKENS  # one block as int64, and little else
    np.testing.assert_array_equal(counts, np.bincount(corpus.train[:], minlength=999))


# Bad specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "",
            "'': unknown, legal are package:NAME, stdlib, synth:OPTIONS, file:GLOB, parquet:GLOB and bin:GLOB,OPTIONS",
        ),
        ("hf:fineweb", r"'hf:fineweb': unknown, legal are"),
        ("stdlib:os", r"'stdlib:os': unknown"),
        ("synth", r"'synth': unknown"),
        ("package:", r"no distribution '' is installed"),
        ("package:rich,no-such-thing", r"'package:rich,no-such-thing': no distribution 'no-such-thing' is installed"),
        ("package:rich,tyro,Rich", "'Rich' is named twice; legal is once"),
        ("package:no-such-thing", r"no distribution 'no-such-thing' is installed"),
        ("file:/no/such/*.txt", r"no file matches '/no/such/\*\.txt'"),
        ("bin:/no/such/*.bin,vocab=9,bytes_per_token=1", r"no file matches '/no/such/\*\.bin'"),
        ("bin:x.bin", r"needs vocab=\.\.\. and bytes_per_token=\.\.\."),
        ("bin:x.bin,vocab=70000,bytes_per_token=1", r"legal are a vocab of 1 to 65536 and bytes_per_token above 0"),
        ("bin:x.bin,vocab=7,bytes_per_token=nan", r"bytes_per_token above 0"),
        ("bin:x.bin,size=7", r"unknown option 'size', legal are vocab, bytes_per_token"),
        ("synth:domain=3", r"unknown option 'domain', legal are domains, vocab, length, documents, order, seed"),
        ("synth:domains=three", r"domains = 'three', legal is int"),
        ("synth:vocab=257", r"vocab = 257, legal is 2 to 256"),
        ("synth:documents=1", r"documents = 1, legal is 2 to"),
        ("synth:documents=1048576,length=1048576", "documents x length = 1099511627776, legal is at most 134217728"),
        ("synth:order=4", r"domains x vocab\^\(order \+ 1\) = 8589934592, legal is at most 4194304"),
    ],
)
def test_a_bad_spec_is_one_clear_line(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(spec)
    assert "\n" not in str(caught.value)
