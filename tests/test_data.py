"""Corpora are the same bytes everywhere and split by document; a batch is a pure function of (corpus, seed, step)."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rlroute.errors import DataError, MissingDependencyError
from rlroute.training import shards
from rlroute.training.data import EVAL_SEQUENCES, Corpus, eval_batches, load_corpus, sample_batch
from rlroute.training.documents import Document, is_test, package_documents, split_documents
from rlroute.training.synthetic import Mixture

SYMPY_SHA256 = "4d6b5fb36310e3b8a40efa0032d6f1e65bf60da172e6ad74122637af81ac7a6d"
SYNTH_SHA256 = "fafe781105df5f3f4d7e874c74e9837631873265f126c125b975b3181757f5ed"
BOS = 256


@pytest.fixture(scope="module")
def synth() -> Corpus:
    return load_corpus("synth:documents=400")


def corpus_of(train: np.ndarray, valid: np.ndarray | None = None) -> Corpus:
    valid = train if valid is None else valid
    return Corpus(train=train, valid=valid, vocab_size=257, token_bytes_V=np.ones(257), provenance={"spec": "file:x"})


def texts_of(stream: np.ndarray) -> set[bytes]:
    """Cut a byte stream at its BOS tokens."""
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


def test_a_batch_depends_on_seed_and_step_alone(synth: Corpus) -> None:
    cut = {"batch_size": 4, "seq_len": 32}
    first = sample_batch(synth, seed=3, step=7, **cut)
    sample_batch(synth, seed=3, step=8, **cut)
    assert sample_batch(synth, seed=3, step=7, **cut).digest() == first.digest()
    others = [sample_batch(synth, seed=seed, step=step, **cut).digest() for seed, step in [(3, 8), (4, 7)]]
    assert len({first.digest(), *others}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_row_is_what_its_sequence_id_says(synth: Corpus, batch_size: int) -> None:
    whole = sample_batch(synth, seed=0, step=5, batch_size=8, seq_len=16)
    steps = range(40 // batch_size, 48 // batch_size)
    parts = [sample_batch(synth, seed=0, step=step, batch_size=batch_size, seq_len=16) for step in steps]
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
    documents, found = package_documents("rlroute-demo")
    assert documents == [Document("demo/a.py", b"a = 1\r\n"), Document("demo/b.py", b"\xff")]
    assert found.version == "1.5"
    (root / "demo/b.py").unlink()
    with pytest.raises(DataError, match=r"b\.py' cannot be read"):
        package_documents("rlroute-demo")


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
    assert corpus.train[0] == corpus.valid[0] == BOS
    assert corpus.provenance["sha256"] == hashlib.sha256(b"".join(texts[name] for name in sorted(texts))).hexdigest()


def test_a_corpus_of_files_does_not_depend_on_where_they_lie(write_files, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_files({f"{place}/{i}.txt": bytes([i]) * 9 for place in ("here", "there/deep") for i in range(20)})
    monkeypatch.chdir(root)
    here, there = load_corpus("file:here/*.txt"), load_corpus(f"file:{root}/there/deep/*.txt")
    np.testing.assert_array_equal(here.train, there.train)
    np.testing.assert_array_equal(here.valid, there.valid)


def test_the_split_goes_by_name_and_both_parts_have_documents() -> None:
    documents = [Document(str(i), b"x") for i in range(32)]
    train, valid = split_documents("file:x", documents)
    assert (len(train), len(valid)) == (30, 2)
    assert split_documents("file:x", [d._replace(data=b"other") for d in documents])[1] == [
        d._replace(data=b"other") for d in valid
    ]
    assert [len(part) for part in split_documents("file:x", documents[:2])] == [1, 1]
    with pytest.raises(DataError, match="'file:x' is too short: 1 non-empty documents"):
        split_documents("file:x", [Document("a", b"x"), Document("b", b"")])


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
    assert corpus.valid.tolist() == list(range(10 * valid, 10 * valid + 10))
    assert corpus.train.tolist() == [token for token in range(30) if token // 10 != valid]
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


def test_shards_that_do_not_make_a_corpus_are_refused(write_files, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_files({name: shard(np.arange(10), False) for name in ("a.bin", "b.bin", "c.bin", "val1", "val2")})
    with pytest.raises(DataError, match="every shard is named"):
        load_corpus(f"bin:{root}/val*,vocab=30,bytes_per_token=1")
    monkeypatch.setattr(shards, "MAX_COPIED_TOKENS", 19)
    with pytest.raises(DataError, match="20 tokens in 2 shards; legal are 19"):
        load_corpus(f"bin:{root}/*.bin,vocab=30,bytes_per_token=1")


# Tokenizer files


def test_a_missing_tokenizer_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"rlroute\[tokenizers\]"):
        load_corpus("synth:documents=2", tokenizer="x.json")


def train_tokenizer(path: Path, normalizer: object = None, byte_level: bool = True) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    if byte_level:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the theory of the thing, naïve"] * 5, trainer)
    tokenizer.save(str(path))
    return str(path)


def test_a_tokenizer_keeps_count_of_the_bytes(write_files, tmp_path: Path) -> None:
    texts = {f"{i}.txt": f"the naïve theory <|end|> 数 {i}".encode() for i in range(4)}
    path = train_tokenizer(tmp_path / "t.json")
    corpus = load_corpus(f"file:{write_files(texts)}/*.txt", path)
    stream = np.concatenate([corpus.train, corpus.valid])
    bos = corpus.vocab_size - 1
    assert corpus.train[0] == corpus.valid[0] == bos and (stream == bos).sum() == 4
    assert corpus.token_bytes_V[bos] == corpus.token_bytes_V[0] == 0  # 0: <|end|>
    assert corpus.token_bytes_V[stream].sum() == sum(map(len, texts.values())) > len(stream)
    assert corpus.provenance["tokenizer_sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_tokenizer_sizes_shards(write_files, tmp_path: Path) -> None:
    path = train_tokenizer(tmp_path / "t.json")
    spec = f"bin:{write_files({'a.bin': shard(np.arange(32), False)})}/*.bin"
    assert load_corpus(spec, path).vocab_size == load_corpus("synth:documents=2", path).vocab_size
    with pytest.raises(DataError, match="unknown option 'vocab', legal are none"):
        load_corpus(spec + ",vocab=300", path)


def test_a_tokenizer_that_would_falsify_bits_per_byte_is_refused(write_files, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    spec = f"file:{write_files({f'{i}.txt': 'naïve'.encode() for i in range(4)})}/*.txt"
    with pytest.raises(DataError, match="turns the 6 bytes of document"):
        load_corpus(spec, train_tokenizer(tmp_path / "strip.json", tokenizers.normalizers.NFD()))
    with pytest.raises(DataError, match="byte-level"):
        load_corpus(spec, train_tokenizer(tmp_path / "chars.json", byte_level=False))
    with pytest.raises(DataError, match="cannot be read"):
        load_corpus(spec, str(tmp_path / "none.json"))
    (tmp_path / "0.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"'0\.txt' is not UTF-8"):
        load_corpus(spec, train_tokenizer(tmp_path / "t.json"))


# Bad specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", r"'': unknown, legal are package:NAME, stdlib, synth:OPTIONS, file:GLOB and bin:GLOB,OPTIONS"),
        ("hf:fineweb", r"'hf:fineweb': unknown, legal are"),
        ("stdlib:os", r"'stdlib:os': unknown"),
        ("synth", r"'synth': unknown"),
        ("package:", r"no distribution '' is installed"),
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
        ("synth:order=4", r"domains x vocab\^\(order \+ 1\) = 8589934592, legal is at most 4194304"),
    ],
)
def test_a_bad_spec_is_one_clear_line(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(spec)
    assert "\n" not in str(caught.value)
