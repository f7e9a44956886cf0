"""A tokenizer loses, adds and draws nothing: what it makes of a document is the document, or it is refused."""

import copy
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlroute.config import DataConfig, RunConfig
from rlroute.errors import DataError, MissingDependencyError
from rlroute.training import encoded, tokenizer_file
from rlroute.training.data import load_corpus, read_documents
from rlroute.training.documents import Document, split_documents
from rlroute.training.tokenizer import BPE_FILE, ByteEncoder, TokenizerFile, open_encoder
from rlroute.training.tokenizer_file import read_tokenizer
from rlroute.training.train_tokenizer import ENTRIES, train_tokenizer

TEXTS = [
    "the theory of the thing, naïve\n",
    "  indented:\n\tand 数 <|end|>\r\n\n",
    "\ufeffﬁne ① \x00 \U0001f600 ",
    "Ünïcode",
]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}


def documents(*texts: str) -> list[Document]:
    return [Document(f"{i}.txt", text.encode()) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def small() -> dict:
    """A tokenizer of few merges, as JSON."""
    return json.loads(train_tokenizer(documents(*TEXTS * 3), entries=300))


@pytest.fixture
def write(tmp_path: Path):
    def write(said: object, name: str = "t.json") -> str:
        path = tmp_path / name
        path.write_bytes(said if isinstance(said, bytes) else json.dumps(said).encode())
        return str(path)

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlroute"


def with_added(said: dict, content: str, **fields: object) -> dict:
    index = max(said["model"]["vocab"].values()) + 1
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return said | {"added_tokens": [plain | {"id": index, "content": content} | fields]}


# Ours


def test_ours_has_every_byte_and_no_more_than_it_says():
    encoder = open_encoder("bpe")
    assert encoder.vocab_size == len(encoder.token_bytes_V) == ENTRIES <= 4096
    assert encoder.exact and encoder.token_bytes_V[-1] == 0 and (encoder.token_bytes_V[:-1] >= 1).all()
    assert sorted(read_tokenizer(BPE_FILE)[0].bytes_V[:256]) == sorted(bytes([b]) for b in range(256))
    assert BPE_FILE.stat().st_size < 60_000


@functools.cache
def ours():
    return open_encoder("bpe")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_ours_keeps_every_text(text: str):
    encoder = ours()
    (ids,) = encoder.encode(documents(text))
    assert encoder.token_bytes_V[ids].sum() == len(text.encode())


def test_ours_shortens_python():
    source = Path(__file__).read_bytes()
    (ids,) = open_encoder("bpe").encode([Document("x", source)])
    assert len(source) / len(ids) > 2


def test_training_again_gives_the_same_bytes_whatever_the_order_of_hashes():
    one, other = (train_tokenizer(documents(*TEXTS * 3), entries=280) for _ in range(2))
    assert one == other


@pytest.mark.slow
def test_ours_is_what_the_training_documents_give():
    spec = DataConfig().spec
    split = split_documents(spec, read_documents(spec))
    assert split.valid and train_tokenizer(split.train) == BPE_FILE.read_text()


# Which tokenizer a run has


@pytest.mark.parametrize(
    ("spec", "said", "has"),
    [
        ("package:sympy", "auto", "bpe"),
        ("package:numpy", "auto", "bytes"),
        ("synth:", "auto", "bytes"),
        ("package:sympy", "bytes", "bytes"),
        ("synth:", "bpe", "bpe"),
        ("package:sympy", None, None),  # of records that are older than the words
        ("package:sympy", "a/b.json", "a/b.json"),
    ],
)
def test_a_record_says_which_tokenizer_it_was(spec, said, has):
    config = RunConfig(data=DataConfig(spec=spec, tokenizer=said))
    assert config.to_dict()["data"]["tokenizer"] == has
    assert config.data == RunConfig(data=config.data).data


def test_words_are_one_flag_away(write_text):
    spec = write_text(*TEXTS)
    plain, ours = load_corpus(spec, "bytes"), load_corpus(spec, "bpe")
    assert plain.vocab_size == 257 == load_corpus(spec).vocab_size
    assert ours.provenance["tokenizer_sha256"] == open_encoder("bpe").sha256 != plain.provenance["tokenizer_sha256"]
    assert ours.provenance["sha256"] == plain.provenance["sha256"]
    for part in ("train", "valid"):
        counts = [c.token_bytes_V[getattr(c, part)].sum() for c in (plain, ours)]
        assert counts[0] == counts[1]


@pytest.fixture
def write_text(tmp_path: Path):
    def write(*texts: str) -> str:
        for document in documents(*texts):
            (tmp_path / document.name).write_bytes(document.data)
        return f"file:{tmp_path}/*.txt"

    return write


def test_the_default_corpus_is_read_through_ours(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME")  # seconds to make: the user's own
    data = RunConfig().data
    ours, plain = load_corpus(data.spec, data.tokenizer), load_corpus(data.spec, "bytes")
    for part in ("train", "valid"):
        a, b = getattr(ours, part), getattr(plain, part)
        assert ours.token_bytes_V[a].sum() == plain.token_bytes_V[b].sum()
        assert len(b) / len(a) > 2.5
    assert a.dtype == np.uint16


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, write_text):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        MissingDependencyError,
        match=r"pip install .*tokenizers.*; --data\.tokenizer bytes needs none",
    ):
        load_corpus(write_text(*TEXTS), "bpe")


# Files


def test_special_tokens_stand_for_no_text_and_are_never_read_out_of_one(small, write, write_text):
    path = write(with_added(small, "<|end|>", special=True))
    corpus = load_corpus(write_text(*TEXTS), path)
    stream = np.concatenate([corpus.train, corpus.valid])
    assert corpus.vocab_size == 301 and (stream == 300).sum() == len(TEXTS) and not (stream == 299).any()
    assert corpus.token_bytes_V[stream].sum() == sum(len(text.encode()) for text in TEXTS) > len(stream)


def test_added_tokens_that_are_text_count_as_text(small, write):
    encoder = TokenizerFile(write(with_added(small, "naïve")))
    (ids,) = encoder.encode(documents(TEXTS[0]))
    assert 299 in ids and encoder.token_bytes_V[299] == 6


def test_padding_and_truncation_do_not_apply(small, write):
    padding = {"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 9}
    said = small | {"padding": padding | {"pad_type_id": 0, "pad_token": "!"}, "truncation": cut}
    post = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "!", "type_id": 0}}]}
    (ids,), (plain,) = (
        TokenizerFile(write(s, n)).encode(documents(TEXTS[0]))
        for s, n in ((said | {"post_processor": post}, "a"), (small, "b"))
    )
    np.testing.assert_array_equal(ids, plain)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "NFD"}},
        {"normalizer": {"type": "StripAccents"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "o"}},
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
        {"normalizer": {"type": "BertNormalizer", "lowercase": True}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": "x"},
    ],
)
def test_what_may_change_text_is_refused_by_name(small, write, change):
    kind = change["normalizer"]["type"] if isinstance(change["normalizer"], dict) else "x"
    with pytest.raises(DataError, match=f"changes text: normalizer '{kind}'"):
        open_encoder(write(small | change))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"normalizer": {"type": "NFC"}}, "e\u0301"),  # as many bytes, other ones: compared, not counted
        ({"normalizer": {"type": "NFC"}}, "\u212b"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "word"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}}, "a b"),
    ],
)
def test_text_is_compared_with_every_document(small, write, write_text, change, text):
    path = write(small | change)
    assert not open_encoder(path).exact
    plain = " nothing" if change.get("normalizer") or "Sequence" not in str(change) else "nothing"
    open_encoder(path).encode(documents(plain, plain))
    with pytest.raises(DataError, match=r"changes the text of document '1\.txt': b"):
        open_encoder(path).encode(documents(plain, text))
    with pytest.raises(DataError, match="may change text, and shards hold none to compare"):
        load_corpus("bin:x.bin", path)


def test_added_tokens_that_swallow_spaces_are_refused(small, write):
    encoder = TokenizerFile(write(with_added(small, "thing", lstrip=True)))
    with pytest.raises(DataError, match="changes the text"):
        encoder.encode(documents("the thing"))


@pytest.mark.parametrize("field", [{"dropout": 0.1}, {"dropout": 1}, {"alpha": 0.2}, {"nbest_size": -1}])
def test_what_draws_at_random_is_refused_by_name(small, write, field):
    (name, value) = next(iter(field.items()))
    with pytest.raises(DataError, match=f"draws at random: {name} = {value}"):
        open_encoder(write(small | {"model": small["model"] | field}))


def without(said: dict, *path: str) -> dict:
    said = copy.deepcopy(said)
    part = said
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"model": ' * 5_000 + b"1" + b"}" * 5_000, "cannot be read|has model.type"),
        (b"1" * 10_000, "cannot be read"),
        (b'"\\ud800"', "cannot be read"),
        (b"[]", "has the file = "),
        (b"null", "has the file = None"),
        (b"{}", "has model = None"),
        (b'{"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}', "has a model of type 'Unigram'"),
        (b'{"model": {"type": ["BPE"]}}', r"has a model of type \['BPE'\]"),
        (b'{"model": {"vocab": []}}', r"has model.vocab = \[\]"),
        (b'{"model": {"vocab": {"a": -1}}}', "gives token 'a' the id -1"),
        (b'{"model": {"vocab": {"a": 1.5}}}', "gives token 'a' the id 1.5"),
        (b'{"model": {"vocab": {"a": true}}}', "gives token 'a' the id True"),
        (b'{"model": {"vocab": {"a": 4294967295}}}', "gives token 'a' the id 4294967295"),
        (b'{"model": {"vocab": {"a": 1, "b": 1}}}', "two tokens of its vocabulary one id"),
        (b'{"model": {"vocab": {"a": 1}}}', "not byte-level: byte 0 has no token"),
    ],
)
def test_a_damaged_file_is_one_line(write, said, message):
    with pytest.raises(DataError, match=message) as caught:
        open_encoder(write(said))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("model.merges", [["a", "no such token"]], "has the merge"),
        ("model.merges", ["abc"], "has the merge 'abc'"),
        ("model.merges", [["a"]], "has the merge"),
        ("model.merges", [1], "has the merge 1"),
        ("model.merges", None, "has model.merges = None"),
        ("model.byte_fallback", True, "not byte-level: byte_fallback"),
        ("model.continuing_subword_prefix", "##", "not byte-level: continuing_subword_prefix"),
        ("model.end_of_word_suffix", "</w>", "not byte-level: end_of_word_suffix"),
        ("model.ignore_merges", 3, "has model.ignore_merges = 3"),
        ("pre_tokenizer", None, "has pre_tokenizer = None"),
        ("pre_tokenizer", {"type": "Whitespace"}, "has pre_tokenizer 'Whitespace'"),
        ("pre_tokenizer", {"type": {}}, "has pre_tokenizer {}"),
        ("pre_tokenizer", {"type": "Digits", "individual_digits": True}, "not byte-level: pre_tokenizer 'Digits'"),
        ("pre_tokenizer", {"type": "ByteLevel", "use_regex": 1}, "has ByteLevel.use_regex = 1"),
        ("pre_tokenizer", {"type": "ByteLevel", "cache": 1}, "has ByteLevel.cache"),
        ("pre_tokenizer", SPLIT | {"behavior": "Odd"}, "has Split.behavior = 'Odd'"),
        ("pre_tokenizer", SPLIT | {"pattern": {"Regex": "("}}, "not byte-level"),
        ("pre_tokenizer", SPLIT | {"pattern": {"Regex": "a" * 5000}}, "has the pattern"),
        ("pre_tokenizer", SPLIT | {"pattern": {}}, "has the pattern"),
        ("added_tokens", {}, "has added_tokens|cannot be read"),
        ("added_tokens", [{"id": 1}], "has added_tokens.content = None"),
        ("added_tokens", 7, "has added_tokens = 7"),
    ],
)
def test_what_is_not_byte_level_bpe_is_refused_before_native_code_sees_it(
    small, write, monkeypatch, part, value, message
):
    said = copy.deepcopy(small)
    *inside, name = part.split(".")
    (said[inside[0]] if inside else said)[name] = value
    if value == {}:
        said[name] = {"x": 1}
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=message):
        open_encoder(write(said))


def nested(depth: int) -> dict:
    said = BYTE_LEVEL
    for _ in range(depth):
        said = {"type": "Sequence", "pretokenizers": [said]}
    return said


def test_sequences_may_be_nested_but_not_deeply(small, write):
    open_encoder(write(small | {"pre_tokenizer": nested(4)})).encode(documents("a b"))
    with pytest.raises(DataError, match="at depth 5"):
        open_encoder(write(small | {"pre_tokenizer": nested(100)}))


def test_what_the_library_refuses_is_one_line(small, write):
    regex = {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": "(("}}, BYTE_LEVEL]}
    for said in (small | {"pre_tokenizer": regex}, with_added(small, "xyz", id=5000)):
        with pytest.raises(DataError) as caught:
            open_encoder(write(said)).encode(documents("a b"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/", "/no/such", "a\0b"])
def test_what_is_no_file_is_refused(path):
    with pytest.raises(DataError, match="cannot be read"):
        open_encoder(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    with (tmp_path / "t").open("wb") as file:
        file.truncate(tokenizer_file.MAX_BYTES + 1)
    with pytest.raises(DataError, match="it has 67,108,865 bytes: legal are 67,108,864; "):
        open_encoder(str(tmp_path / "t"))


def test_a_document_that_is_not_text_needs_bytes(small, write):
    with pytest.raises(DataError, match=r"'0\.txt' is not UTF-8, .* --data.tokenizer bytes takes any"):
        TokenizerFile(write(small)).encode([Document("0.txt", b"\xff")])
    assert ByteEncoder().encode([Document("0.txt", b"\xff")])[0].tolist() == [255]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mutated_file_is_refused_or_keeps_every_text(small, tmp_path_factory, data):
    """Any value of the file, replaced by any other: one line, or the text as it is."""
    said = copy.deepcopy(small) | {"added_tokens": with_added(small, "naïve")["added_tokens"]}
    places = [(said, name) for name in said] + [(said[p], n) for p in ("model", "pre_tokenizer") for n in said[p]]
    places += [(said["added_tokens"][0], name) for name in said["added_tokens"][0]]
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
        max_leaves=5,
    )
    part, name = data.draw(st.sampled_from(range(len(places))).map(places.__getitem__))
    part[name] = data.draw(values)
    path = tmp_path_factory.mktemp("m") / "t.json"
    path.write_text(json.dumps(said))
    try:
        encoder = open_encoder(str(path))
        (ids,) = encoder.encode(documents(TEXTS[0]))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert encoder.token_bytes_V[ids].sum() == len(TEXTS[0].encode())


# Remembering


def test_what_was_encoded_is_remembered(cache, monkeypatch):
    monkeypatch.setattr(encoded, "SMALLEST", 1)
    first = open_encoder("bpe").encode(documents(*TEXTS))
    (file,) = cache.iterdir()
    monkeypatch.setattr(TokenizerFile, "_encode", lambda *args: pytest.fail("encoded again"))
    again = open_encoder("bpe").encode(documents(*TEXTS))
    for a, b in zip(first, again, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    monkeypatch.undo()
    assert file.stat().st_size < 500


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data + b"\0",
    ],
)
def test_a_damaged_memory_is_made_anew(cache, monkeypatch, damage):
    monkeypatch.setattr(encoded, "SMALLEST", 1)
    first = open_encoder("bpe").encode(documents(*TEXTS))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = open_encoder("bpe").encode(documents(*TEXTS))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert [f.read_bytes() for f in cache.iterdir()] == [whole]


def test_other_text_and_other_tokenizers_have_their_own_memory(cache, monkeypatch, small, write):
    monkeypatch.setattr(encoded, "SMALLEST", 1)
    path = write(small)
    for encoder, texts in [("bpe", ["ab", "c"]), ("bpe", ["a", "bc"]), ("bpe", ["abc"]), (path, ["ab", "c"])]:
        ids = open_encoder(encoder).encode(documents(*texts))
        assert [int(open_encoder(encoder).token_bytes_V[each].sum()) for each in ids] == [len(t) for t in texts]
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("where", ["/proc/no/such", "relative", ""])
def test_without_a_folder_that_can_be_written_nothing_is_remembered(monkeypatch, tmp_path, where):
    monkeypatch.setattr(encoded, "SMALLEST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", where)
    monkeypatch.setenv("HOME", "/proc/no/home")
    monkeypatch.chdir(tmp_path)
    assert len(open_encoder("bpe").encode(documents(*TEXTS))) == len(TEXTS)
    assert not [p for p in tmp_path.iterdir() if p.name != "cache"]


def test_little_text_is_not_remembered(cache):
    open_encoder("bpe").encode(documents(*TEXTS))
    assert not cache.exists()
