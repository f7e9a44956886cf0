"""Shards made from text: the same tokens, the same bytes every time, all of them or nothing."""

import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlroute.errors import DataError, MissingDependencyError, StoreError
from rlroute.training import write_shards as writing
from rlroute.training.batches import batch_chain
from rlroute.training.data import Corpus, load_corpus
from rlroute.training.write_shards import SAID, write_shards
from tests.commands import refused, rlroute

TEXTS = [f"document {i}: " + "über the lazy dog " * (i % 7) for i in range(40)]


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Return the spec of a folder of small files."""
    for number, words in enumerate(TEXTS):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.txt").write_text(words)
    return f"file:{tmp_path}/text/*.txt"


def same(one: Corpus, other: Corpus) -> None:
    for part in ("train", "valid"):
        np.testing.assert_array_equal(np.asarray(getattr(one, part)), np.asarray(getattr(other, part)))
    for name in ("train_sha256", "valid_sha256", "train_tokens", "valid_tokens", "vocab_size"):
        assert one.provenance[name] == other.provenance[name], name
    links = [list(islice(batch_chain(corpus, 0, 2, 8), 3)) for corpus in (one, other)]
    assert links[0] == links[1], "the same batches"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("shard_tokens", [10**8, 333])
def test_shards_are_read_as_the_text_is(text: str, tokenizer: str, shard_tokens: int, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    made = write_shards(out, text, tokenizer, shard_tokens)
    direct, again = load_corpus(text, tokenizer), load_corpus(made.spec, made.tokenizer)
    same(direct, again)
    files = sorted(path.name for path in out.glob("*.bin"))
    assert made.shards == len(files) and (shard_tokens > 333 or len(files) > 3)
    assert files[0] == "train-00000.bin" and "valid-00000.bin" in files
    assert json.loads((out / SAID).read_text())["made_from"] == direct.provenance
    text_bytes = direct.token_bytes_V[direct.valid].sum()
    assert again.token_bytes_V[np.asarray(again.valid)].sum() == pytest.approx(text_bytes, rel=1e-12)


def test_documents_stay_on_their_side(text: str, tmp_path: Path) -> None:
    """No validation document has a token in a training shard: each opens with BOS, and is whole on one side."""
    made = write_shards(tmp_path / "shards", text, "bytes")
    corpus = load_corpus(made.spec, made.tokenizer)
    sides = [
        set(bytes(np.asarray(s)[np.asarray(s) != 256].astype(np.uint8)).split(b"document ")) for s in streams(corpus)
    ]
    assert not (sides[0] & sides[1]) - {b""} and len(sides[0] | sides[1]) == len(TEXTS) + 1


def streams(corpus: Corpus) -> tuple[Any, Any]:
    return corpus.train, corpus.valid


def test_the_same_text_gives_the_same_bytes(text: str, tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "shards", tmp_path / "b" / "shards"]
    for folder in folders:
        write_shards(folder, text, "bytes", 500)
    one, other = ({p.name: p.read_bytes() for p in folder.glob("*.bin")} for folder in folders)
    assert one == other


def test_a_write_that_fails_leaves_nothing_and_the_next_one_is_whole(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, put, written = tmp_path / "shards", writing._put, []

    def failing(path: Path, pieces: Any) -> None:
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        put(path, pieces)

    monkeypatch.setattr(writing, "_put", failing)
    with pytest.raises(StoreError, match=r"cannot write .*shards: No space left on device"):
        write_shards(out, text, "bytes", 333)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    monkeypatch.undo()
    made = write_shards(out, text, "bytes", 333)
    same(load_corpus(text, "bytes"), load_corpus(made.spec, made.tokenizer))


@pytest.mark.processes
def test_a_killed_process_leaves_no_folder_and_what_it_left_goes(text: str, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    script = (
        "import sys, signal, os; from pathlib import Path\n"
        "from rlroute.training import write_shards as writing\n"
        "put = writing._put\n"
        "def last(path, pieces):\n"
        "    put(path, pieces)\n"
        "    if path.name.endswith('00002.bin'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "writing._put = last\n"
        "writing.write_shards(Path(sys.argv[1]), sys.argv[2], 'bytes', 333)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(out), text], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    left = [path.name for path in tmp_path.iterdir() if path.name != "text"]
    assert left == [".shards.tmp"]
    with pytest.raises(DataError, match="no file matches"):
        load_corpus(f"bin:{out}/*.bin,vocab=257,bytes_per_token=1")
    made = write_shards(out, text, "bytes", 333)
    same(load_corpus(text, "bytes"), load_corpus(made.spec, made.tokenizer))
    assert not (tmp_path / ".shards.tmp").exists()


def test_what_cannot_be_prepared_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in ("bin:x,vocab=9,bytes_per_token=1", "synth:"):
        with pytest.raises(DataError, match="is no text: legal are file:GLOB, parquet:GLOB"):
            write_shards(tmp_path / "out", spec, "bytes")
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreError, match="there is there already: legal is a folder that is not"):
        write_shards(tmp_path / "there", text, "bytes")
    monkeypatch.setattr(writing, "MOST_IDS", 256)
    with pytest.raises(DataError, match="has 257 ids with BOS: shards take up to 256"):
        write_shards(tmp_path / "out", text, "bytes")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_what_trains_on_them(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = rlroute("data", "prepare", "shards", "--data.spec", text, "--shard-tokens", "400")
    assert done.code == 0, done
    line = done.out.splitlines()[-1]
    assert line.startswith("--data.spec 'bin:shards/*.bin,vocab=257,bytes_per_token=") or "bin:shards" in line
    spec = line.split()[1].strip("'")
    same(load_corpus(text), load_corpus(spec))
    assert "is there already" in refused(rlroute("data", "prepare", "shards", "--data.spec", text))
    assert "no file matches" in refused(rlroute("data", "prepare", "deep/others", "--data.spec", "file:nothing/*"))
    assert not (tmp_path / "deep").exists()


# Parquet


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def test_rows_of_parquet_files_are_documents(tmp_path: Path) -> None:
    write_parquet(tmp_path / "wiki" / "train-00000-of-00001.parquet", text=TEXTS[:30], id=list(range(30)))
    write_parquet(tmp_path / "wiki" / "validation-00000-of-00001.parquet", text=[*TEXTS[30:], None, ""], id=[0] * 12)
    spec = f"parquet:{tmp_path}/wiki/*.parquet"
    corpus = load_corpus(spec)
    for stream, texts in zip(streams(corpus), (TEXTS[:30], TEXTS[30:]), strict=True):
        wanted = b"".join(b"|" + words.encode() for words in texts)
        assert bytes(np.where(stream == 256, ord("|"), stream).astype(np.uint8)) == wanted
    made = write_shards(tmp_path / "shards", spec, "bytes", 300)
    same(corpus, load_corpus(made.spec, made.tokenizer))
    same(corpus, load_corpus(f"{spec},column=text"))


def test_bad_parquet_files_are_named_in_one_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", words=TEXTS, number=list(range(len(TEXTS))))
    for options, message in {
        "": r"'x\.parquet' has no column 'text', legal are 'words', 'number'",
        ",column=number": "column 'number' of 'x.parquet' holds 0, legal are texts",
        ",col=words": "unknown option 'col', legal are column",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            load_corpus(f"parquet:{path}{options}")
        assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.parquet' cannot be read") as caught:
        load_corpus(f"parquet:{path},column=words")
    assert "\n" not in str(caught.value)


def test_every_error_of_pyarrow_s_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "x.parquet", text=TEXTS)
    pa = pytest.importorskip("pyarrow")
    for kind in pa.ArrowException.__subclasses__():

        def fail(path: Path, kind: type[Exception] = kind) -> None:
            raise kind("two\nlines")

        monkeypatch.setattr("pyarrow.parquet.ParquetFile", fail)
        with pytest.raises(DataError, match=r"x\.parquet' cannot be read: '?two"):
            load_corpus(f"parquet:{path}")


def test_without_pyarrow_a_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match="needs the package pyarrow: pip install"):
        load_corpus(f"parquet:{tmp_path}/x.parquet")
