"""What is taken from a checkpoint: bytes that rlroute wrote, in a folder that it named, or nothing at all."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlroute.config import SCHEMA, RunConfig
from rlroute.errors import CheckpointError, StoreError
from rlroute.experiments.play.token_table import token_table
from rlroute.experiments.recipes.entries import build_entry
from rlroute.model import Transformer
from rlroute.reading import read_runs
from rlroute.training import loop, prepare
from rlroute.training.checkpoint import load_checkpoint, load_weights
from rlroute.training.data import load_corpus
from rlroute.training.manifest import Manifest, own_checkpoints
from rlroute.training.optimizer import Optimizer
from tests.commands import contents
from tests.runs import figures, interrupted
from tests.tiny import DATA, MODEL, TRAIN

CONFIG = build_entry("switch", DATA, MODEL, TRAIN)
RUN = CONFIG.run_id(0)
NEWEST = "checkpoint-00000008"
ROUTER, BODY = "layers.0.moe.router.scores.weight", "embed.weight"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an interrupted run; nobody may change it."""
    return interrupted(CONFIG, tmp_path_factory.mktemp("begun"), 10).parent


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted; it holds the checkpoints of steps 4 and 8."""
    shutil.copytree(begun, tmp_path / "runs")
    return tmp_path / "runs" / RUN


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, which nothing disturbed."""
    store = tmp_path_factory.mktemp("undisturbed")
    loop.train(CONFIG, 0, store)
    return store / RUN


@cache
def unchanged() -> tuple[Transformer, Optimizer]:
    """A model and its optimizer, for those who change neither."""
    return built()


def built(config: RunConfig = CONFIG) -> tuple[Transformer, Optimizer]:
    model = prepare.build_model(config, load_corpus(DATA.spec), 0)
    return model, Optimizer(model, config.train)


def neither_taken(folder: Path, match: str = "checkpoint-") -> str:
    """Return why neither checkpoint is taken; neither the model nor a file has changed."""
    model, optimizer = unchanged()
    weights, before = {n: v.clone() for n, v in model.state_dict().items()}, contents(folder)
    with pytest.raises(CheckpointError, match=match) as raised:
        load_checkpoint(folder, model, optimizer, RUN)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert not optimizer.adamw.state
    assert contents(folder) == before
    return str(raised.value)


def forge(path: Path, edit: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Change what the trainer's state says and sign it, as somebody who knows the format can."""
    if edit is not None:
        state = torch.load(path / "trainer.pt", weights_only=True)
        edit(state)
        torch.save(state, path / "trainer.pt")
    files = {}
    for name in ("model.safetensors", "trainer.pt"):
        data = (path / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    step = json.loads((path / "manifest.json").read_text())["step"]
    (path / "manifest.json").write_text(Manifest(RUN, step, files).to_text())


# --- what is written
# --------------------------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_is_there_and_the_weights_whose_they_are(folder: Path) -> None:
    path = folder / NEWEST
    said = json.loads((path / "manifest.json").read_text())
    assert (said["schema"], said["run"], said["step"]) == (SCHEMA, RUN, 8)
    assert {file.name for file in path.iterdir()} == {*said["files"], "manifest.json"}
    for name, entry in said["files"].items():
        data = (path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert load_file(path / "model.safetensors").keys() == built()[0].state_dict().keys()


def test_the_newest_two_are_kept_and_of_an_ended_run_its_weights(folder: Path, undisturbed: Path) -> None:
    assert list(own_checkpoints(folder)) == [4, 8]
    kept = sorted(str(path.relative_to(undisturbed)) for path in undisturbed.glob("*checkpoint-*/*"))
    assert kept == ["checkpoint-00000012/manifest.json", "checkpoint-00000012/model.safetensors"]


def test_files_their_folder_and_its_name_outlast_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name appears after everything that stands under it, and is itself written out."""
    synced, sync = [], os.fsync

    def note(descriptor: int) -> None:
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note)
        path = interrupted(CONFIG, tmp_path, 5) / "checkpoint-00000004"
    files = [(path / name).stat().st_ino for name in ("model.safetensors", "trainer.pt", "manifest.json")]
    wanted = [*files, path.stat().st_ino, path.parent.stat().st_ino]
    those = [one for one in synced[synced.index(files[0]) :] if one in wanted]
    assert those[: len(wanted)] == wanted


# --- damage
# --------------------------------------------------------------------------------------------------------------------


def test_no_flipped_bit_is_accepted_wherever_it_is(folder: Path) -> None:
    """200 places: of the weights' header, of weights, of the trainer's state, of the manifest."""
    draw, path = random.Random(0), folder / NEWEST
    shutil.rmtree(folder / "checkpoint-00000004")
    whole = {file: file.read_bytes() for file in sorted(path.iterdir())}
    assert len(whole) == 3
    for turn in range(200):
        file = list(whole)[turn % 3]
        end = 2000 if turn % 2 else len(whole[file])  # headers and lists of names stand at the front
        place, bit = draw.randrange(min(end, len(whole[file]))), draw.randrange(8)
        damaged = bytearray(whole[file])
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=NEWEST):
            load_checkpoint(folder, *unchanged(), RUN)
            pytest.fail(f"bit {bit} of byte {place} of {file.name} is accepted")
        file.write_bytes(whole[file])
    found, said = load_checkpoint(folder, *built(), RUN)
    assert (found and found.step, said) == (8, [])


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    """The same bytes, but somewhere else."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def inside(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: damage(folder / name)


def of_another_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "checkpoint-00000004", path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    **{f"{damage.__name__} of {name}": inside(name, damage) for damage in (half, Path.unlink, pipe, link)
       for name in ("model.safetensors", "trainer.pt", "manifest.json")},
    "longer": lambda p: (p / "trainer.pt").write_bytes((p / "trainer.pt").read_bytes() + b"\0"),
    "an extra shard": lambda p: shutil.copy(p / "model.safetensors", p / "model-2-of-2.safetensors"),
    "an extra state": lambda p: shutil.copy(p / "trainer.pt", p / "trainer-1-of-2.pt"),
    "one of two shards": lambda p: (p / "model.safetensors").rename(p / "model-1-of-2.safetensors"),
    "of another step": of_another_step,
    "without a manifest": lambda p: (p / "manifest.json").unlink(),
    "deep manifest": lambda p: (p / "manifest.json").write_text("[" * 100_000),
    "another manifest": lambda p: (p / "manifest.json").write_text('{"schema": 1, "files": []}'),
    "long manifest": lambda p: (p / "manifest.json").write_text(" " * 2**25),
    "manifest with spaces": lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text() + " "),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    case: str, folder: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[case](folder / NEWEST)
    loop.train(CONFIG, 0, folder.parent)
    said = [line for line in capsys.readouterr().err.splitlines() if NEWEST in line]
    assert len(said) == 1 and RUN in said[0] and "from step 4" in said[0]
    (note,) = json.loads((folder / "environment.json").read_text())["notes"]
    assert NEWEST in note
    assert figures(folder) == figures(undisturbed)
    assert list(own_checkpoints(folder)) == [12]


@pytest.mark.parametrize("case", ["half of model.safetensors", "unlink of trainer.pt", "without a manifest"])
def test_where_none_is_sound_all_are_named_with_the_way_out(case: str, folder: Path, undisturbed: Path) -> None:
    for path in own_checkpoints(folder).values():
        DAMAGE[case](path)
    said = neither_taken(folder, "remove them to start it anew")
    assert all(str(path) in said for path in own_checkpoints(folder).values())
    before = contents(folder)
    with pytest.raises(CheckpointError, match=NEWEST):
        loop.train(CONFIG, 0, folder.parent)
    assert contents(folder) == before | {".lock": b""}
    for path in own_checkpoints(folder).values():
        shutil.rmtree(path)
    loop.train(CONFIG, 0, folder.parent)
    assert figures(folder) == figures(undisturbed)


def test_a_checkpoint_from_before_manifests_is_said_to_be_one(folder: Path) -> None:
    for path in own_checkpoints(folder).values():
        (path / "manifest.json").unlink()
    neither_taken(folder, "written before checkpoints had one")


def test_a_checkpoint_of_another_run_is_refused_by_its_name(folder: Path, tmp_path: Path) -> None:
    other = interrupted(replace(CONFIG, train=replace(TRAIN, lr=1e-3)), tmp_path / "other", 10)
    for path in own_checkpoints(folder).values():
        shutil.rmtree(path)
        shutil.copytree(other / path.name, path)
    assert RUN in neither_taken(folder, other.name)


def test_a_damaged_one_is_noted_once_however_often_the_run_goes_on(folder: Path) -> None:
    half(folder / NEWEST / "trainer.pt")
    for at in (5, 6):
        interrupted(CONFIG, folder.parent, at)
    assert len(json.loads((folder / "environment.json").read_text())["notes"]) == 1


# --- whose a folder is
# --------------------------------------------------------------------------------------------------------------------

FOREIGN = [
    "checkpoint-best",
    "checkpoint-00000020-keep",
    "checkpoint-20",
    "checkpoint-000000020",
    "checkpoint-",
    "checkpoint-00000008 copy",
    "checkpoint-0000000８",
    "checkpoint-00000020\n",
    "Checkpoint-00000020",
    ".checkpoint-best.tmp",
]


def test_folders_that_rlroute_did_not_name_are_never_loaded_counted_or_removed(folder: Path, undisturbed: Path) -> None:
    for name in FOREIGN:
        shutil.copytree(folder / "checkpoint-00000004", folder / name)
    (folder / "checkpoint-00000098").write_text("a file")
    (folder / "checkpoint-00000099").symlink_to(folder / "checkpoint-best", target_is_directory=True)
    (folder / "checkpoint-00000097").symlink_to(folder / "nowhere")
    foreign = [*FOREIGN, "checkpoint-00000098", "checkpoint-00000099", "checkpoint-00000097"]
    before = {name: contents(folder / name) for name in FOREIGN}
    loop.train(CONFIG, 0, folder.parent)
    assert figures(folder) == figures(undisturbed)
    assert list(own_checkpoints(folder)) == [12]
    assert {name: contents(folder / name) for name in FOREIGN} == before
    assert {path.name for path in folder.glob("*")} >= set(foreign)
    model, wanted = (built()[0] for _ in range(2))
    assert load_weights(folder, model, RUN) == load_weights(undisturbed, wanted, RUN) == 12
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["checkpoint-00000012", ".checkpoint-00000012.tmp"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_in_the_way_is_named_and_stays(kind: str, name: str, folder: Path, undisturbed: Path) -> None:
    precious = folder.parent.parent / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    path = folder / name
    path.symlink_to(precious) if kind == "link" else path.write_text("kept")
    with pytest.raises(StoreError, match="checkpoint-00000012"):
        loop.train(CONFIG, 0, folder.parent)
    assert path.is_symlink() if kind == "link" else path.read_text() == "kept"
    assert (precious / "file").read_text() == "kept"
    path.unlink()
    loop.train(CONFIG, 0, folder.parent)
    assert figures(folder) == figures(undisturbed)


# --- states that no run of this model can have
# --------------------------------------------------------------------------------------------------------------------


def moment(name: str, key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        state["optimizer"][name][key] = change(state["optimizer"][name][key])

    return edit


def constant(value: float) -> Callable[[Tensor], Tensor]:
    return lambda was: torch.tensor(value)


def without(name: str, key: str | None = None) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        del (state["optimizer"] if key is None else state["optimizer"][name])[key or name]

    return edit


def progress(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["progress"].update(values)


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{f"{what} in {key} of {name}": moment(name, key, change)
       for name in (BODY, ROUTER) for key in ("exp_avg", "exp_avg_sq") for what, change in {
           "one number": lambda v: v.flatten()[:1],
           "a row less": lambda v: v[1:],
           "a row more": lambda v: torch.cat([v, v[:1]]),
           "another shape": lambda v: v.t(),
           "float64": lambda v: v.double(),
           "integers": lambda v: v.to(torch.int32),
           "half": lambda v: v.half(),
           "NaN": lambda v: v.index_put((torch.tensor(1),), torch.tensor(float("nan"))),
           "infinity": lambda v: v.index_put((torch.tensor(1),), torch.tensor(float("inf"))),
           "sparse": lambda v: v.to_sparse(),
           "no tensor": lambda v: v.tolist(),
           "more than there is memory": lambda v: torch.zeros(()).expand(2**50),
       }.items()},
    "a negative square": moment(BODY, "exp_avg_sq", lambda v: v - 1),
    **{f"{count} updates of {name}": moment(name, "step", constant(count))
       for name in (BODY, ROUTER) for count in (9.0, 7.5, -1.0, float("nan"))},
    "fewer updates": moment(BODY, "step", lambda v: torch.tensor(7.0)),
    "updates as integers": moment(BODY, "step", lambda v: torch.tensor(8)),
    "updates by row": moment(BODY, "step", lambda v: torch.full((4,), 8.0)),
    **{f"no {key} of {name}": without(name, key)
       for name in (BODY, ROUTER) for key in ("step", "exp_avg", "exp_avg_sq")},
    **{f"nothing of {name}": without(name) for name in (BODY, ROUTER)},
    "a third moment": lambda s: s["optimizer"][BODY].update(third=torch.zeros(3)),
    "a foreign parameter": lambda s: s["optimizer"].update(foreign=s["optimizer"][BODY]),
    "no optimizer": lambda s: s.pop("optimizer"),
    "an optimizer that is a list": lambda s: s.update(optimizer=list(s["optimizer"].values())),
    "no progress": lambda s: s.pop("progress"),
    "a progress that is none": lambda s: s.update(progress=[8]),
    "no chain": lambda s: s["progress"].pop("chain"),
    "a field more": progress(momentum=1),
    **{f"{name} = {value!r}": progress(**{name: value}) for name, values in {
        "step": (4, 0, -8, 8.0, True, "8", None, float("nan"), torch.tensor(8)),
        "chain": ("", "0" * 63, "g" * 64, "A" * 64, "0" * 64 + "\n", 0, None),
        "flops": (-1, 1.0, float("nan"), True, None, "1"),
        "forward": (-1, 1.0, 2**62, True, None, "1"),
        "seconds": ({}, {"train": 1.0}, {"train": -1.0, "eval": 0.0}, {"train": float("nan"), "eval": 0.0},
                    {"train": float("inf"), "eval": 0.0}, {"train": 1, "eval": "0"},
                    {"train": 1.0, "eval": 0.0, "x": 1.0}, None),
    }.items() for value in values},
}  # fmt: skip


def test_a_state_that_no_run_can_have_is_refused_though_it_is_signed(folder: Path) -> None:
    """A moment that is too small has the fused update write beyond it: the heap, not only the figures."""
    shutil.rmtree(folder / "checkpoint-00000004")
    path = folder / NEWEST
    whole = {file: file.read_bytes() for file in path.iterdir()}
    for case, edit in FORGED.items():
        forge(path, edit)
        assert NEWEST in neither_taken(folder), case
        for file, data in whole.items():
            file.write_bytes(data)


def test_what_the_forger_above_does_not_change_is_taken(folder: Path) -> None:
    forge(folder / NEWEST, lambda state: None)
    found, damaged = load_checkpoint(folder, *built(), RUN)
    assert (found and found.step, damaged) == (8, [])


def test_moments_that_share_memory_are_taken_as_copies(folder: Path, undisturbed: Path) -> None:
    """Their values are those of the run; how they lie in memory is the model's."""

    def edit(state: dict[str, Any]) -> None:
        for one in state["optimizer"].values():
            one["exp_avg"] = torch.stack([one["exp_avg"]] * 2, dim=-1)[..., 0]

    forge(folder / NEWEST, edit)
    loop.train(CONFIG, 0, folder.parent)
    assert figures(folder) == figures(undisturbed)


@pytest.mark.parametrize("field", ["step", "run", "schema"])
def test_the_weights_header_agrees_with_the_rest(field: str, folder: Path) -> None:
    file = folder / NEWEST / "model.safetensors"
    header = {"schema": str(SCHEMA), "step": "8", "run": RUN}
    save_file(load_file(file), file, header | {field: "4"})
    forge(folder / NEWEST)
    shutil.rmtree(folder / "checkpoint-00000004")
    neither_taken(folder, "header")


@pytest.mark.parametrize("change", ["missing", "more", "shape", "dtype"])
def test_weights_of_another_model_are_refused_though_they_are_signed(change: str, folder: Path) -> None:
    file = folder / NEWEST / "model.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights[BODY]
    else:
        new = {"more": weights[BODY].clone(), "shape": weights[BODY][1:].clone(), "dtype": weights[BODY].double()}
        weights["more" if change == "more" else BODY] = new[change]
    save_file(weights, file, {"schema": str(SCHEMA), "step": "8", "run": RUN})
    forge(folder / NEWEST)
    shutil.rmtree(folder / "checkpoint-00000004")
    neither_taken(folder, "does not fit the model: (embed.weight|more)")


def test_a_router_that_has_had_no_gradient_yet_goes_on_bit_for_bit(tmp_path: Path) -> None:
    entry = "reinforce:policy_weight=0.0,entropy_weight=0.0,balance_weight=0.0,baseline=ema"
    config = build_entry(entry, DATA, MODEL, TRAIN)
    loop.train(config, 0, tmp_path / "whole")
    folder = interrupted(config, tmp_path, 10)
    state = torch.load(folder / NEWEST / "trainer.pt", weights_only=True)["optimizer"]
    assert state[ROUTER]["step"] == 0 and not state[ROUTER]["exp_avg"].any() and state[BODY]["step"] == 8
    loop.train(config, 0, tmp_path)
    assert figures(folder) == figures(tmp_path / "whole" / folder.name)


# --- readers of weights
# --------------------------------------------------------------------------------------------------------------------


def test_weights_of_an_ended_run_are_verified_and_no_older_ones_taken(undisturbed: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs"
    shutil.copytree(undisturbed, store / RUN)
    (record,) = read_runs(store)
    token_table(record, store, 64)
    file = store / RUN / "checkpoint-00000012" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256"):
        token_table(record, store, 64)
    shutil.rmtree(file.parent)
    shutil.copytree(interrupted(CONFIG, tmp_path / "begun", 10) / NEWEST, store / RUN / NEWEST)
    with pytest.raises(CheckpointError, match="weights of step 8: the run ended at step 12"):
        token_table(record, store, 64)
