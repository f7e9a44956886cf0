"""What a run is made from belongs to what it is: whatever of it changes, no run is handed out, continued or pooled.

Each change is made to a run that has ended and to one that has not, by hand in the places where it would be made.

Longer than most: everything a run is made from has its own change.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rlroute import baselines, registry, sources
from rlroute.commit import commit_of, core_sha256_at
from rlroute.config import RunConfig, content_hash, run_id
from rlroute.errors import ComparisonError, ConfigError
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.recipes.entries import build_entry
from rlroute.provenance import made_from
from rlroute.reading import read_runs
from rlroute.sources import core_files, core_sha256, router_files
from rlroute.training import loop, prepare
from rlroute.training.data import load_corpus
from rlroute.training.documents import Document
from rlroute.training.train_tokenizer import train_tokenizer
from tests import ROOT
from tests.commands import TINY, contents, ran, refused, rlroute, start
from tests.conftest import HANG, forget
from tests.distributions import ROUTER, install
from tests.policies import weights_of, write_policy
from tests.runs import interrupted
from tests.test_table import changed, make_run, make_runs
from tests.tiny import DATA, MODEL, TRAIN

SMALL = TINY[2:]  # without the corpus


def words(number: int) -> bytes:
    """Return a text of a document's own."""
    return (f"the {number} quick brown foxes jump over {number * number} lazy dogs, " * 8).encode()


def write_corpus(folder: Path, documents: int = 40) -> Path:
    folder.mkdir(parents=True)
    for number in range(documents):
        (folder / f"{number:02d}.txt").write_bytes(words(number))
    return folder


def validation(folder: Path) -> set[str]:
    """Return the names of the documents that are held out."""
    from rlroute.training.documents import file_documents, split_documents

    return {document.name for document in split_documents("c", file_documents(f"{folder}/*.txt"))[1]}


def unfinish(folder: Path) -> None:
    """Make an ended run one that was stopped after its last checkpoint."""
    (folder / "summary.json").unlink()


def end_it(folder: Path) -> None:
    """Leave an ended run as it is."""


ENDINGS = pytest.mark.parametrize("left", [end_it, unfinish], ids=["ended", "unfinished"])


def left_in_turn(changes):
    """Return each change with both ends of a run; one of them, the other each time, is slow."""
    return [
        pytest.param(change, left, id=f"{change}-{left.__name__}", marks=[pytest.mark.slow] * ((at + place) % 2))
        for at, change in enumerate(changes)
        for place, left in enumerate((end_it, unfinish))
    ]


def refused_everywhere(store: Path, entry: str, *options: object) -> list[str]:
    """Assert that a store's one run is refused by every command that trains, untouched; return what they say."""
    (folder,) = store.iterdir()
    before = contents(store)
    spec = store.parent / "spec.toml"
    base: dict[str, object] = {
        str(name).removeprefix("--").replace("-", "_"): value
        for name, value in zip(options[::2], options[1::2], strict=True)
    }
    spec.write_text(
        f'entries = ["{entry}"]\n[base]\n'
        + "".join(f"{n} = {v if str(v).isdigit() else json.dumps(v)}\n" for n, v in base.items())
    )
    said = [
        refused(rlroute("train", entry, *options, "--store", store)),
        refused(rlroute("compare", entry, *options, "--seeds", 1, "--store", store, "--launcher", "local")),
        refused(rlroute("sweep", spec, "--store", store, "--launcher", "local")),
    ]
    assert contents(store) == before
    assert all(str(folder) in line and "was made" in line for line in said), said
    return said


# --- data


CHANGES = {
    "a training document": lambda c, held: (c / min(set(os.listdir(c)) - held)).write_bytes(words(77)),
    "a validation document": lambda c, held: (c / min(held)).write_bytes(words(78)),
    "one byte": lambda c, held: (c / min(set(os.listdir(c)) - held)).write_bytes(words(0)[:-1] + b"!"),
    "one more": lambda c, held: (c / "99.txt").write_bytes(words(99)),
    "one fewer": lambda c, held: (c / min(set(os.listdir(c)) - held)).unlink(),
    "a name": lambda c, held: (c / max(held)).rename(c / (max(held).removesuffix(".txt") + "x.txt")),
}


@pytest.mark.parametrize(("change", "left"), left_in_turn(CHANGES))
def test_a_run_of_another_corpus_is_refused(change, left, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    options = ("--data.spec", f"file:{corpus}/*.txt", *SMALL)
    ran("train", "hash", *options, "--store", tmp_path / "runs")
    left(next((tmp_path / "runs").iterdir()))
    CHANGES[change](corpus, validation(corpus))
    for line in refused_everywhere(tmp_path / "runs", "hash", *options):
        assert "made from another corpus: its " in line


def test_two_folders_of_one_relative_spelling_are_two_corpora(tmp_path, monkeypatch):
    for name, first in (("a", 0), ("b", 100)):
        for number in range(40):
            file = tmp_path / name / "corpus" / f"{number:02d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(words(first + number))
    command = ("train", "hash", "--data.spec", "file:corpus/*.txt", *SMALL, "--store", tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "a")
    ran(*command)
    monkeypatch.chdir(tmp_path / "b")
    assert "made from another corpus" in refused(rlroute(*command))
    monkeypatch.chdir(tmp_path / "a")
    assert "already finished" in ran(*command)


@ENDINGS
def test_a_tokenizer_of_the_same_name_is_another(left, tmp_path):
    corpus, path = write_corpus(tmp_path / "corpus"), tmp_path / "t.json"
    path.write_text(train_tokenizer([Document("t.txt", b"the theory of the thing " * 9)], entries=280))
    options = ("--data.spec", f"file:{corpus}/*.txt", "--data.tokenizer", path, *SMALL)
    ran("train", "hash", *options, "--store", tmp_path / "runs")
    left(next((tmp_path / "runs").iterdir()))
    path.write_text(path.read_text() + "\n")  # the same tokens, and not the same file
    said = refused(rlroute("train", "hash", *options, "--store", tmp_path / "runs"))
    assert "made with another tokenizer: its tokenizer was" in said


def test_both_streams_their_split_and_their_domains_are_hashed(tmp_path):
    def hashes(spec):
        return {name: v for name, v in load_corpus(spec).provenance.items() if name.endswith("_sha256")}

    one = hashes(f"file:{write_corpus(tmp_path / 'a')}/*.txt")
    (tmp_path / "a" / min(validation(tmp_path / "a"))).write_bytes(words(555))
    two = hashes(f"file:{tmp_path / 'a'}/*.txt")
    assert one["train_sha256"] == two["train_sha256"] and one["valid_sha256"] != two["valid_sha256"]
    synth = load_corpus("synth:documents=64,length=64")
    domains = synth.train_domains
    from rlroute.training.data import _stream_sha256

    assert _stream_sha256(synth.train, domains) == synth.provenance["train_sha256"]
    assert _stream_sha256(synth.train, (domains + 1) % 8) != synth.provenance["train_sha256"]
    assert _stream_sha256(synth.train, None) != synth.provenance["train_sha256"]


def test_a_stream_is_hashed_alike_in_parts_and_on_disk(tmp_path, monkeypatch):
    from rlroute.training import data, shards

    tokens = np.arange(1000, dtype=np.uint16)
    whole = data._stream_sha256(tokens, None)
    tokens.tofile(tmp_path / "t.bin")
    monkeypatch.setattr(shards, "BLOCK_TOKENS", 7)
    assert data._stream_sha256(np.memmap(tmp_path / "t.bin", dtype="<u2"), None) == whole
    assert data._stream_sha256(tokens.astype(">u2"), None) == whole
    assert data._stream_sha256(tokens[::-1], None) != whole


# --- routers


@pytest.mark.parametrize(
    ("what", "left"), left_in_turn(["its file", "its helper", "a module nobody imports", "its version"])
)
def test_a_run_of_another_router_is_refused(what, left, site, tmp_path):
    source = ROUTER.replace("import torch\n", "import torch\n\nfrom acme.helper import SCALE\n", 1)
    install(site, source=source)
    (site / "acme" / "helper.py").write_text("SCALE = 1.0\n")
    (site / "acme" / "other.py").write_text("")
    ran("train", "fragile", *TINY, "--store", tmp_path / "runs")
    left(next((tmp_path / "runs").iterdir()))
    files = {"its file": "fragile.py", "its helper": "helper.py", "a module nobody imports": "other.py"}
    if what in files:
        with (site / "acme" / files[what]).open("a") as file:
            file.write("# changed\n")
        forget(site)
    else:
        (metadata,) = site.glob("*.dist-info/METADATA")
        metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 2.0"))
        registry._sources.cache_clear()
    part = {"its file": "sha256", "its version": "version"}.get(what, "others_sha256")
    for line in refused_everywhere(tmp_path / "runs", "fragile", *TINY):
        assert f"made by another router fragile: its {part} was" in line


def test_a_router_that_is_mended_before_its_first_checkpoint_begins_anew(site, tmp_path):
    """Nothing old is in it then."""
    install(site)
    entry = "fragile:fault=raise,step=2"
    options = (*TINY, "--store", tmp_path / "runs")
    refused(rlroute("train", entry, *options))
    module = site / "acme" / "fragile.py"
    module.write_text(module.read_text() + "# mended\n")
    forget(site)
    said = refused(rlroute("train", entry, *options))
    assert "was made" not in said and "of trouble" in said


def test_the_code_of_a_router_is_its_package_and_what_it_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write = {
        "zed/__init__.py": "",
        "zed/router.py": "from . import near\nimport zhelp, torch\nfrom rlroute.baselines.switch import SwitchRouter\n",
        "zed/near.py": "",
        "zed/far.py": "",
        "zed/data.csv": "1",
        "zhelp.py": "import zdeep.inner",
        "zdeep/__init__.py": "",
        "zdeep/inner.py": "",
        "zother.py": "",
    }
    for name, text in write.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    module = importlib.import_module("zed.router")
    found = {
        path.name if path.name != "__init__.py" else f"{path.parent.name}/"
        for path in router_files(module, {}).values()
    }
    assert found == {"router.py", "near.py", "far.py", "zed/", "zhelp.py", "zdeep/", "inner.py"} | {
        "switch.py",
        "baselines/",
    }
    for name in ("zed", "zed.router", "zed.near", "zhelp", "zdeep", "zdeep.inner"):
        sys.modules.pop(name, None)


def test_a_helper_is_of_the_code_unless_it_lies_where_distributions_are_installed(tmp_path, monkeypatch):
    write = {
        "src/zed.py": "import z_editable, z_installed, z_space.inner, z_broken.inner\n",
        "src/z_space/inner.py": "",
        "src/z_broken/__init__.py": "1 / 0",
        "work/z_editable.py": "",
        "work/z_editable.egg-info/PKG-INFO": "Name: z_editable\n",  # which setuptools leaves there
        "site/z_editable-1.0.dist-info/METADATA": "Name: z_editable\nVersion: 1.0\n",
        "site/z_editable-1.0.dist-info/top_level.txt": "z_editable\n",
        "site/z_installed.py": "",
        "site/z_installed-1.0.dist-info/METADATA": "Name: z_installed\nVersion: 1.0\n",
    }
    for name, text in write.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path / name.partition("/")[0])
    module = ModuleType("zed")
    module.__file__ = str(tmp_path / "src" / "zed.py")
    assert router_files(module, {}).keys() == {"zed", "z_editable", "z_space.inner", "z_broken"}


def test_a_new_router_beside_ours_changes_none_of_them():
    for name in registry.router_names():
        module = sys.modules[registry.router_class(name).__module__]
        if module.__name__.startswith("rlroute."):
            files = {path.stem for path in router_files(module, {}).values()}
            assert files == ({"hash", "__init__"} if name == "hash_gated" else set()) | {name}  # it has hash's tables


@ENDINGS
def test_a_policy_that_changed_under_its_hash_is_refused(left, tmp_path):
    """Its hash is in the configuration; one that is written out is held against the file."""
    path = tmp_path / "policy.zip"
    write_policy(path, weights_of(16, 4))
    made = build_entry(f"sb3:policy={path}", *parts())
    loop.train(made, 0, tmp_path / "runs")
    left(tmp_path / "runs" / made.run_id(0))
    write_policy(path, weights_of(16, 4, seed=1))
    with pytest.raises(ConfigError, match="another policy needs another run"):
        loop.train(made, 0, tmp_path / "runs")
    anew = build_entry(f"sb3:policy={path}", *parts())
    assert anew.run_id(0) != made.run_id(0)


def parts(**train):
    return DATA, MODEL, replace(TRAIN, steps=4, eval_every=2, checkpoint_every=2, **train)


@ENDINGS
@pytest.mark.parametrize("what", ["settings", "choices", "code"])
def test_a_replay_whose_source_changed_is_refused(what, left, site, tmp_path):
    install(site)
    source = build_entry("fragile", *parts(record_choices=True))
    loop.train(source, 0, tmp_path / "runs")
    folder = tmp_path / "runs" / source.run_id(0)
    replay = build_entry(f"replay:run={folder}", *parts())
    loop.train(replay, 0, tmp_path / "runs")
    left(tmp_path / "runs" / replay.run_id(0))
    if what == "settings":
        described = json.loads((folder / "config.json").read_text())
        described["config"]["router"]["step"] = 7
        (folder / "config.json").write_text(json.dumps(described))
    elif what == "choices":
        file = next((folder / "choices").glob("*.int32"))
        kept = file.read_bytes()
        file.write_bytes(kept[:-4] + bytes([kept[-4] ^ 1]) + kept[-3:])
    else:
        with (site / "acme" / "fragile.py").open("a") as module:
            module.write("# changed\n")
        forget(site)
    with pytest.raises(ConfigError, match="made from another file that its router reads"):
        loop.train(replay, 0, tmp_path / "runs")


# --- code that changes while a process runs


def of_a_file(tmp_path, site, monkeypatch):
    file = tmp_path / "fragile.py"
    file.write_text(ROUTER)
    registry.include(file)
    return file


def of_an_entry_point(tmp_path, site, monkeypatch):
    install(site)
    return site / "acme" / "fragile.py"


def of_a_wing(tmp_path, site, monkeypatch):
    file = tmp_path / "fragile.py"
    file.write_text(ROUTER)
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    return file


def helping(place):
    """A module that such a router imports."""

    def of_a_helper(tmp_path, site, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path / "lib")
        helper = tmp_path / "lib" / "z_helper.py"
        helper.parent.mkdir()
        helper.write_text("SCALE = 1.0\n")
        file = place(tmp_path, site, monkeypatch)
        file.write_text(ROUTER.replace("import torch\n", "import torch\nfrom z_helper import SCALE\n", 1))
        return helper

    return of_a_helper


PARTS = {
    **{place.__name__: place for place in (of_a_file, of_an_entry_point, of_a_wing)},
    **{f"helping_{place.__name__}": helping(place) for place in (of_a_file, of_an_entry_point, of_a_wing)},
}


@pytest.fixture(params=PARTS)
def part(request, routers, site, tmp_path, monkeypatch):
    """A file of the code of the router fragile, wherever that comes from."""
    return PARTS[request.param](tmp_path, site, monkeypatch)


def edit(file: Path) -> None:
    file.write_text(file.read_text() + "# changed\n")


def test_code_that_changed_under_a_process_makes_no_run(part, tmp_path):
    """It would be trained by the old code, and say that it is of the new."""
    store = tmp_path / "runs"
    config = build_entry("fragile", *parts())
    interrupted(config, store, 3)
    before, kept = contents(store), part.read_text()
    edit(part)
    said = f"{part} was changed since this process loaded it: want a new process"
    for seed in (0, 1):  # one goes on, one is new
        with pytest.raises(ConfigError, match=re.escape(said)):
            loop.train(config, seed, store)
    where = ("--store", store, "--out", tmp_path / "out", "--launcher", "local")
    for command in (("compare", "fragile", "hash"), ("judge", "fragile")):
        assert said in refused(rlroute(*command, *TINY, *where))
    assert contents(store) == before
    part.write_text(kept)
    assert loop.train(config, 0, store)["status"] == "finished"


def test_code_that_changed_before_the_first_run_is_known_as_well(part):
    registry.router_class("fragile")
    edit(part)
    with pytest.raises(ConfigError, match="was changed since"):
        registry.router_code("fragile")


def test_a_helper_that_changed_is_known_to_a_router_that_is_loaded_later(routers, site, tmp_path, monkeypatch):
    helper = helping(of_an_entry_point)(tmp_path, site, monkeypatch)
    registry.router_class("fragile")
    edit(helper)
    later = tmp_path / "later.py"
    later.write_text((site / "acme" / "fragile.py").read_text())
    registry.include(later)
    with pytest.raises(ConfigError, match=re.escape(f"{helper} was changed since")):
        registry.router_code("later")


@pytest.mark.processes
def test_a_core_that_changed_under_a_process_is_refused(tmp_path):
    """Also where the part that changed is loaded later."""
    code = checkout(tmp_path / "code")
    script = (
        "from rlroute.sources import PACKAGE, core_sha256\n"
        "core_sha256()\n"
        "(PACKAGE / 'metrics.py').write_text('')\n"
        "core_sha256()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=code, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 1 and f"{code / 'rlroute' / 'metrics.py'} was changed since this process" in done.stderr


# --- the core


def lying(package: Path) -> str:
    """Return the SHA-256 of the core as it lies in a copy of the package."""
    return sources.digest({name: path.read_bytes() for name, path in core_files(package).items()})


def test_the_core_is_all_python_outside_the_wings_and_the_tile_table(tmp_path):
    package = tmp_path / "rlroute"
    shutil.copytree(sources.PACKAGE, package, ignore=lambda folder, names: {*sources.WINGS, "__pycache__"} & set(names))
    names = set(core_files(package))
    assert {"training/loop.py", "routing.py", "kernels/tiles.json"} <= names
    assert lying(package) == core_sha256()
    (package / "py.typed").write_text("x")
    (package / "agents").mkdir()
    (package / "agents" / "new.py").write_text("")
    assert lying(package) == core_sha256()
    for name in ("kernels/tiles.json", "model/moe.py", "new.py", "kernels/new.py"):
        known = (package / name).read_text() if (package / name).exists() else None
        (package / name).write_text((known or "") + "\n")
        assert lying(package) != core_sha256(), name
        (package / name).write_text(known) if known is not None else (package / name).unlink()
    (package / "errors.py").rename(package / "faults.py")
    assert lying(package) != core_sha256()


def checkout(folder: Path) -> Path:
    """Copy the checkout's code, as a clone has it."""
    ignored = shutil.ignore_patterns("__pycache__", "results", ".*")
    for part in ("rlroute", *sources.WINGS):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignored)
    return folder


@pytest.mark.processes
@pytest.mark.slow
@ENDINGS
def test_a_run_of_other_sources_is_refused_and_a_comment_elsewhere_is_none(left, tmp_path):
    code = checkout(tmp_path / "code")

    def command(*arguments: object) -> tuple[int, str]:
        process = start(tmp_path, *arguments, path=str(code))
        out, err = process.communicate(timeout=HANG)
        return process.returncode, out + err

    assert command("train", "hash", *TINY)[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    left(folder)
    before = contents(folder)
    for name in (
        "baselines/switch.py",
        "experiments/text.py",
        "envs/world.py",
    ):  # of another router, and of no training
        with (code / name).open("a") as file:
            file.write("# no difference\n")
    with (code / "rlroute" / "metrics.py").open("a") as file:
        file.write("# a difference\n")
    for said in (
        command("train", "hash", *TINY),
        command("compare", "hash", *TINY, "--seeds", "1", "--launcher", "local"),
    ):
        assert said[0] == 2 and "made by other sources of rlroute: its core was" in said[1]
    assert contents(folder) == before
    (code / "rlroute" / "metrics.py").write_text((ROOT / "rlroute" / "metrics.py").read_text())
    again = command("train", "hash", *TINY)[1]
    assert "was made" not in again and ("already finished" in again) == (left is end_it)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("options", [(), ("--workers", "2", "--train.micro-batches", "2")], ids=["alone", "in twos"])
def test_under_ray_a_changed_corpus_is_refused_and_nothing_is_touched(options, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    entries = ("hash", "dense", "--seeds", "1", "--no-tuned", "--launcher", "ray", *options)

    def command() -> tuple[int, str]:
        process = start(tmp_path, "compare", *entries, "--data.spec", "file:corpus/*.txt", *SMALL)
        _, err = process.communicate(timeout=HANG)
        return process.returncode, err

    code, err = command()
    assert code == 0, err
    (corpus / "00.txt").write_bytes(words(50))
    before = contents(tmp_path / "runs")
    code, err = command()
    assert code == 2 and "made from another corpus" in err
    assert contents(tmp_path / "runs") == before
    (corpus / "00.txt").write_bytes(words(0))
    code, err = command()
    assert code == 0, err


def test_workers_with_other_code_or_data_are_refused():
    class Other:
        rank = 1

        def agree(self, value):
            return value + 1

    config = build_entry("hash", *parts())
    made = made_from(config, load_corpus(config.data.spec).provenance)
    prepare.refuse_other_ranks(prepare.ALONE, made)
    with pytest.raises(ConfigError, match="worker 1 of a run has other code or data than worker 0"):
        prepare.refuse_other_ranks(Other(), made)


# --- what does not say


@pytest.mark.parametrize("left", [end_it, unfinish], ids=["ended", "unfinished"])
@pytest.mark.parametrize("silent", ["made_from", "config.json"])
def test_a_run_that_does_not_say_is_refused(left, silent, tmp_path):
    ran("train", "hash", *TINY, "--store", tmp_path)
    (folder,) = tmp_path.iterdir()
    left(folder)
    described = json.loads((folder / "config.json").read_text())
    del described["made_from"]
    if silent == "made_from":
        (folder / "config.json").write_text(json.dumps(described))
    else:
        (folder / "config.json").unlink()
    said = refused(rlroute("train", "hash", *TINY, "--store", tmp_path))
    assert "does not say from which code and data it was made" in said and str(folder) in said


def test_a_difference_in_the_commit_alone_is_none(tmp_path):
    config = build_entry("hash", *parts())
    file = interrupted(config, tmp_path, 3) / "environment.json"
    for _ in ("goes on", "is handed out"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "0" * 40, "dirty": False}))
        assert loop.train(config, 0, tmp_path)["status"] == "finished"


# --- tables


@pytest.mark.parametrize(
    "path",
    ["core", "tokenizer", "data.train_sha256", "data.sha256", "routers.switch.sha256", "reads.router.policy"],
)
def test_no_entry_pools_what_was_made_from_something_else(path):
    def other(run):
        made = json.loads(json.dumps(run.config["made_from"]))
        part, _, name = path.partition(".")
        if part == "reads":
            made["reads"][name] = "other"
        elif part == "routers":
            made["routers"]["switch"]["sha256"] = "other"
        elif name:
            made[part][name] = "other"
        else:
            made[part] = "other"
        return changed(run, "config.made_from", made)

    runs = [make_run("switch", seed) for seed in range(3)]
    with pytest.raises(
        ComparisonError, match=r"config\.made_from\..* differs: switch-.*-s0 has .*, switch-.*-s2 has 'other'"
    ):
        build_table([*runs[:2], other(runs[2])])


def test_two_entries_of_one_router_are_one_code():
    one, two = make_run("switch"), make_run("switch", fields={"balance_weight": 0.5})
    build_table([one, two])
    with pytest.raises(ComparisonError, match=r"config\.made_from\.routers\.switch\.sha256 differs"):
        build_table([one, changed(two, "config.made_from.routers.switch.sha256", "other")])


def test_a_table_says_from_what_it_was_made():
    notes = dict(build_table(make_runs()).notes)
    core = make_run("switch").config["made_from"]["core"]
    assert notes["Made from"] == f"rlroute's core sha256 {core}, equal over all runs"


def test_records_of_schema_1_are_read_say_so_and_are_never_mixed():
    old = read_runs(ROOT / "experiments" / "results" / "reward-flops.jsonl")
    assert "recorded before schema 2" in dict(build_table(old).notes)["Made from"]
    new = [changed(run, "config.schema", 2) for run in old[:8]]
    with pytest.raises(ComparisonError, match=r"config\.schema differs"):
        build_table([*new, *old[8:]])
    with pytest.raises(ComparisonError, match=r"config\.made_from\.routers"):
        first = {"routers": {"switch": {"sha256": "0"}}}
        runs = [run for run in old if run.config["router"] == "switch"]
        build_table([replace(runs[0], environment={**runs[0].environment, **first}), *runs[1:]])


# --- the id and the hash


@pytest.mark.parametrize(("name", "schema"), [("reward-flops", 1), ("comparison", 2)])
def test_the_hash_of_a_record_of_any_schema_is_that_of_its_configuration(name, schema):
    for run in read_runs(ROOT / "experiments" / "results" / f"{name}.jsonl"):
        assert run.config["schema"] == schema
        described = run.config
        assert content_hash(described["config"], described["schema"]) == described["config_hash"]
        assert run_id(described["router"], described["config_hash"], described["seed"]) == run.id
    config = RunConfig()
    assert config.run_id(3) == run_id("dense", content_hash(config.to_dict()), 3)
    assert content_hash(config.to_dict(), 1) != config.content_hash()


# --- the commit


def git(folder: Path, *arguments: str) -> str:
    told = ("git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@e", *arguments)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(told, check=True, capture_output=True, text=True, env=environment).stdout.strip()


@pytest.fixture
def clone(tmp_path):
    """A repository with the code, all of it committed."""
    root = checkout(tmp_path / "clone")
    git(root, "init", "-q")
    (root / ".gitignore").write_text("__pycache__\nmine_*.py\n")
    git(root, "add", ".")
    git(root, "commit", "-qm", "all")
    return root


def head(root: Path) -> str:
    return git(root, "rev-parse", "HEAD")


def test_a_clean_checkout_is_its_commit(clone):
    assert commit_of(clone / "rlroute") == (head(clone), False)
    assert core_sha256_at(head(clone), clone / "rlroute") == lying(clone / "rlroute")
    for name in ("runs/x/config.json", "results/table.md", "experiments/results/new.json", "notes.txt", "tests/new.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("x")
    assert commit_of(clone / "rlroute") == (head(clone), False)


@pytest.mark.parametrize(
    "name",
    ["agents/new.py", "baselines/mine_ignored.py", "rlroute/extra.py", "rlroute/kernels/tiles.json", "envs/world.py"],
)
@pytest.mark.parametrize("how", ["written", "added", "assumed unchanged"])
def test_a_file_that_the_commit_lacks_is_seen(name, how, clone):
    with (clone / name).open("a") as file:
        file.write("\n")
    if how == "added":
        git(clone, "add", "-f", name)
    elif how == "assumed unchanged" and git(clone, "ls-files", name):
        git(clone, "update-index", "--assume-unchanged", name)
    assert commit_of(clone / "rlroute") == (head(clone), True)


def test_a_file_that_is_gone_is_seen(clone):
    (clone / "baselines" / "hash.py").unlink()
    assert commit_of(clone / "rlroute") == (head(clone), True)


def test_a_wheel_in_somebody_elses_repository_has_no_commit(tmp_path):
    root = tmp_path / "theirs"
    installed = root / ".venv" / "site-packages" / "rlroute"
    shutil.copytree(ROOT / "rlroute", installed, ignore=shutil.ignore_patterns("__pycache__", "results"))
    git(root, "init", "-q")
    (root / "a.txt").write_text("a")
    git(root, "add", "a.txt")
    git(root, "commit", "-qm", "theirs")
    assert commit_of(installed) == (None, None)
    assert core_sha256_at(head(root), installed) != lying(installed)


def test_no_repository_and_no_commit_yet_have_no_commit(tmp_path):
    package = checkout(tmp_path / "plain") / "rlroute"
    assert commit_of(package) == (None, None)
    git(package.parent, "init", "-q")
    assert commit_of(package) == (None, None)


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"])
def test_what_the_environment_says_of_git_is_ignored(variable, clone, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-qm", "other", "--allow-empty")
    wanted = head(clone)
    place = {
        "GIT_DIR": ".git",
        "GIT_WORK_TREE": ".",
        "GIT_INDEX_FILE": ".git/index",
        "GIT_OBJECT_DIRECTORY": ".git/objects",
    }
    monkeypatch.setenv(variable, str(other / place[variable]))
    assert commit_of(clone / "rlroute") == (wanted, False)
    assert core_sha256_at(wanted, clone / "rlroute") == lying(clone / "rlroute")


@pytest.mark.parametrize("commit", ["--output=/tmp/x", "HEAD", "0" * 40, "", "zz"])
def test_what_is_no_commit_here_has_no_sources(commit, clone):
    assert core_sha256_at(commit, clone / "rlroute") is None
