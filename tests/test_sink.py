"""wandb beside the records: what it is given, and that nothing it does or fails to do changes a record."""

import importlib.machinery
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlroute import alarms, sink, upload
from rlroute.experiments.recipes.entries import build_entry
from rlroute.parallel.local import run_ranks
from rlroute.parallel.mesh import Mesh
from rlroute.reading import read_described, read_part, read_rows, read_runs
from rlroute.records import RunFolder, write_compact
from rlroute.schema import untimed
from rlroute.training import loop
from rlroute.values import flatten
from tests import ROOT
from tests.commands import TINY, contents, ran, refused, rlroute
from tests.conftest import HANG, until
from tests.runs import figures, interrupted
from tests.tiny import DATA, MODEL, STEPS, TRAIN

FAKE = '''
"""Writes down what it is told; fails where FAULT says."""
import json, os, time

FAULT, LOG = os.environ.get("FAULT", ""), os.environ["FAKE_LOG"]


def said(what, **values):
    with open(LOG, "a") as file:
        file.write(json.dumps({"what": what} | values) + "\\n")
    if FAULT == f"{what} hangs":
        time.sleep(10**6)
    if FAULT == f"{what} exits":
        raise SystemExit(3)
    if FAULT == what:
        raise OSError(28, f"No space left\\non device, in {what}")


class Run:
    def __init__(self):
        self.step, self.summary = int(os.environ.get("FAKE_STEP", 0)), self

    def log(self, row, step):
        said("log", row=row, step=step)

    def alert(self, **how):
        said("alert", **how)

    def update(self, values):
        said("summary", values=values)

    def finish(self, exit_code):
        said("finish", exit_code=exit_code)


def Table(columns, data):
    return {"columns": columns, "data": data}


def Image(pixels, caption):
    return {"shape": pixels.shape, "caption": caption}


def Settings(**fields):
    return fields


def login(prompt):
    assert not prompt
    return "WANDB_API_KEY" in os.environ


def init(**how):
    said("init", **how)
    return Run()


def teardown(exit_code):
    said("teardown")


said("import")
'''
CONFIG = build_entry("switch", DATA, MODEL, TRAIN)
FAULTS = ("import", "init", "log", "summary", "finish", "log exits")
HANGS = ("init hangs", "log hangs", "finish hangs")


def whole_lines(log):
    """The lines that are written to their end: another thread may be at the last one."""
    return log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A wandb that writes down its calls; returns a function that reads them."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE)
    log = tmp_path / "calls.jsonl"
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("FAULT", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda *kinds: [call for call in map(json.loads, whole_lines(log)) if not kinds or call["what"] in kinds]
    sys.modules.pop("wandb", None)
    sink.take_warnings()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The store of a run without a sink."""
    store = tmp_path_factory.mktemp("plain")
    loop.train(CONFIG, 0, store)
    return store


def left(store):
    """Return all that a run left, but for its timings and what wandb wrote itself."""
    (folder,) = (path.parent for path in store.glob("*/summary.json"))
    (file,) = folder.glob("checkpoint-*/model.safetensors")
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    environment, config = untimed(read_part(folder, "environment")), read_described(folder)
    names = [name for name in contents(store) if "wandb" not in Path(name).parts]
    return figures(folder), weights, config, environment, names


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_wandb_run_is_the_run(mode, fake, plain, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    summary = loop.train(CONFIG, 0, tmp_path / "runs", wandb=mode)
    assert left(tmp_path / "runs") == left(plain)
    assert capfd.readouterr() == ("", "")
    (how,) = fake("init")
    run = CONFIG.run_id(0)
    assert (how["mode"], how["id"], how["name"], how["group"], how["resume"]) == (mode, run, run, "switch", "allow")
    assert how["job_type"] == run.removesuffix("-s0") and "switch" in how["tags"]
    assert (how["project"], how["dir"]) == ("rlroute", str(tmp_path / "runs" / run))
    assert how["config"] == CONFIG.to_dict() | {"seed": 0, "config_hash": CONFIG.content_hash()}
    assert {"silent": True, "console": "off", "disable_git": True, "x_disable_stats": True}.items() <= how[
        "settings"
    ].items()
    steps = [call["step"] for call in fake("log")]
    assert steps == sorted(steps)
    logged = logged_by_step(fake("log"))
    assert list(logged) == list(range(1, STEPS + 1))
    record = RunFolder(tmp_path / "runs", CONFIG, 0).read()
    for train, loads in zip(record.train, record.loads, strict=True):
        row = logged[train["step"]]
        assert row["train/loss"] == train["loss"]
        assert [row["train/terms/balance/0"]] == train["terms"]["balance"]
        assert [row["train/max_vio_L/0"]] == train["max_vio_L"]
        assert [row[f"loads/load_LE/0/{expert}"] for expert in range(4)] == loads["load_LE"][0]
    assert [logged[row["step"]]["eval/loss"] for row in record.evals] == [row["loss"] for row in record.evals]
    media = {name: logged[STEPS].pop(name) for name in ("tables/final", "heatmaps/load/0")}
    assert all(isinstance(value, int | float) for row in logged.values() for value in row.values())
    final = record.summary["final"]
    columns = dict(zip(media["tables/final"]["columns"], *media["tables/final"]["data"], strict=True))
    assert (columns["site"], columns["max_vio"], columns["dead"]) == ("0", *final["max_vio_L"], *final["dead_L"])
    assert media["heatmaps/load/0"]["shape"] == [4 * upload.PIXELS, STEPS * upload.PIXELS]
    (values,) = (call["values"] for call in fake("summary"))
    assert (values["status"], values["final/loss"]) == ("finished", summary["final"]["loss"])
    assert [call["exit_code"] for call in fake("finish")] == [0]


def logged_by_step(calls):
    logged = {}
    for call in calls:
        row = logged.setdefault(call["step"], {})
        assert not row.keys() & call["row"].keys()
        row.update(call["row"])
    return logged


@pytest.fixture
def waits(fake, monkeypatch):
    """The sink waits until wandb hangs or has ended, however long that takes; return for how long it meant to wait."""
    seconds, join = [], threading.Thread.join

    def hangs():
        what, _, how = os.environ["FAULT"].partition(" ")
        return how == "hangs" and fake(what)

    def joined(thread, timeout=None):
        if thread.name != "wandb":
            return join(thread, timeout)
        seconds.append(timeout)
        until(lambda: not thread.is_alive() or hangs())
        return None

    monkeypatch.setattr(threading.Thread, "join", joined)
    return seconds


@pytest.mark.parametrize("fault", [*FAULTS, *HANGS])
def test_whatever_wandb_does_the_records_are_the_same(fault, fake, waits, plain, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAULT", fault)
    loop.train(CONFIG, 0, tmp_path / "runs", wandb="offline")
    assert waits and set(waits) <= {0, sink.PATIENCE}
    assert fake(fault.split()[0])
    assert left(tmp_path / "runs") == left(plain)
    said = capfd.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"warning: run {CONFIG.run_id(0)} goes on without wandb: ")
    assert ("not done" if "hangs" in fault else "SystemExit" if "exits" in fault else "No space left on device") in line
    until(lambda: fault == "import" or fake("teardown"))
    assert bool(fake("teardown")) == (fault != "import")  # else the process would wait for it at its end
    assert sink.take_warnings() == [line]
    assert sink.take_warnings() == []


def test_a_wandb_that_is_not_there_is_a_warning_in_a_worker(fake, plain, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    loop.train(CONFIG, 0, tmp_path / "runs", wandb="offline")
    assert left(tmp_path / "runs") == left(plain)
    assert capfd.readouterr().err.count("\n") == 1


def test_online_without_a_key_is_a_warning(fake, plain, tmp_path, capfd):
    loop.train(CONFIG, 0, tmp_path / "runs", wandb="online")
    assert left(tmp_path / "runs") == left(plain)
    (line,) = capfd.readouterr().err.splitlines()
    assert "no API key" in line
    assert not fake("init")


def test_a_sink_that_falls_behind_is_given_up(fake, waits, plain, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FAULT", "init hangs")
    monkeypatch.setattr(sink, "BACKLOG", 5)
    loop.train(CONFIG, 0, tmp_path / "runs", wandb="offline")
    assert waits == [0]
    assert left(tmp_path / "runs") == left(plain)
    (line,) = capfd.readouterr().err.splitlines()
    assert "5 rows wait" in line


def test_off_never_imports_wandb(fake, tmp_path):
    loop.train(CONFIG, 0, tmp_path / "runs")
    ran("train", "hash", *TINY, "--store", tmp_path / "runs")
    assert "wandb" not in sys.modules
    assert not fake()


def test_a_resumed_run_goes_on_under_its_id_with_all_its_rows(fake, plain, tmp_path, capfd):
    """Offline every part holds the whole run up to then, so that the last one is all that has to be synced."""
    interrupted(CONFIG, tmp_path / "runs", 6, wandb="offline")
    assert [call["exit_code"] for call in fake("finish")] == [1]
    first = logged_by_step(fake("log"))
    assert list(first) == [1, 2, 3, 4, 5, 6]
    loop.train(CONFIG, 0, tmp_path / "runs", wandb="offline")
    assert left(tmp_path / "runs") == left(plain)
    before, after = (call["id"] for call in fake("init"))
    assert before == after
    calls = fake("log", "init")
    again = calls[max(i for i, call in enumerate(calls) if call["what"] == "init") + 1 :]
    steps = [call["step"] for call in again]
    assert steps == sorted(steps)
    assert list(logged_by_step(again)) == list(range(1, STEPS + 1))
    assert [call["exit_code"] for call in fake("finish")] == [1, 0]
    assert capfd.readouterr().err == ""


def test_online_a_resumed_run_logs_no_step_twice(fake, tmp_path, monkeypatch):
    """wandb drops steps below its own, with a warning each."""
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    monkeypatch.setenv("FAKE_STEP", "7")
    interrupted(CONFIG, tmp_path, 6)
    loop.train(CONFIG, 0, tmp_path, wandb="online")
    assert list(logged_by_step(fake("log"))) == list(range(7, STEPS + 1))


def test_an_ended_run_opens_no_sink(fake, plain):
    loop.train(CONFIG, 0, plain, wandb="offline")
    assert not fake()


def test_a_diverged_run_says_so(fake, tmp_path):
    config = build_entry("switch", DATA, MODEL, replace(TRAIN, lr=1e30, warmup_steps=0))
    loop.train(config, 0, tmp_path, wandb="offline")
    (values,) = (call["values"] for call in fake("summary"))
    assert values["status"] == "diverged"
    assert "not finite" in values["diverged/what"]


@pytest.fixture
def watched(fake, tmp_path, monkeypatch):
    """The sink of a run that has begun, told of an evaluation at which two of four experts are dead."""
    folder = RunFolder(tmp_path / "runs", CONFIG, 0)
    interrupted(CONFIG, tmp_path / "runs", 5)
    opened = sink.open_sink("offline", folder.path)
    row = next(row for row in read_rows(folder.path / "metrics.jsonl") if row["kind"] == "eval")
    for step in range(6, 10):
        opened.log("metrics", row | {"step": step, "dead_L": [2]})
    yield opened
    opened.close()


def test_an_alarm_is_an_alert_once(fake, watched):
    watched.close()
    (alert,) = fake("alert")
    assert (alert["title"], alert["level"], alert["wait_duration"]) == ("dead experts", "WARN", 0)
    assert alert["text"].startswith(f"{CONFIG.run_id(0)}, site 0: 2 of 4 experts are dead")


def test_a_run_that_stalls_is_an_alert(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(alarms, "THRESHOLDS", alarms.Thresholds(stall_seconds=0.05, stall=0.0))
    interrupted(CONFIG, tmp_path, 4)
    opened = sink.open_sink("offline", tmp_path / CONFIG.run_id(0))
    until(lambda: fake("alert"))
    opened.close()
    assert [alert["title"] for alert in fake("alert")] == ["stalled"]


def test_alarms_of_before_a_resume_are_not_sent_again(fake, watched, tmp_path):
    folder = tmp_path / "runs" / CONFIG.run_id(0)
    watched.close()
    row = next(row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval")
    rows = [row | {"step": step, "dead_L": [2]} for step in range(6, 10)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(each) + "\n" for each in rows))
    again = sink.open_sink("offline", folder)
    again.log("metrics", row | {"step": 10, "dead_L": [2]})
    again.close()
    assert len(fake("alert")) == 1 and len(fake("init")) == 2


# The end, and runs of before


def described(**fields):
    model, train = {"num_experts": 4, "k": 2, "gate_form": "unit"}, {"steps": 9, "budget": "flops", "device": "cpu"}
    config = {"data": {"spec": "s" * 100}, "model": model, "train": train}
    return {"id": "a-0-s0", "router": "switch+hash", "command": "rlroute sweep x.toml", "config": config} | fields


def test_runs_that_were_asked_for_together_are_a_group_and_tags_tell_what_they_are():
    several = [described(asked={"entries": ["a-0", "b-1"], "seeds": [*range(n)]}) for n in (1, 2)]
    assert len({upload.group_of(one) for one in several}) == 1  # seeds may be added
    assert upload.group_of(several[0]).startswith("comparison-")
    others = [
        described(asked={"entries": ["a-0", "c-1"], "seeds": [0]}),
        described(asked={"entries": ["a-0"], "seeds": [0, 1]}),
    ]
    assert len({upload.group_of(one) for one in (several[0], *others)}) == 3
    alone = described(asked={"entries": ["a-0"], "seeds": [0]})
    assert upload.group_of(alone).startswith("sweep-") and upload.group_of(described()) == "switch+hash"
    judged = described(asked={"entries": ["a-0"], "seeds": [0], "registration": "ab" * 32})
    assert upload.group_of(judged) == "judgement-abababab"
    assert upload.tags_of(described()) == [
        *("switch", "hash", "budget flops", "gate unit", "4 experts, k 2", "9 steps", "s" * 64, "cpu"),
    ]


def test_a_heatmap_has_experts_by_row_steps_by_column_and_grey_for_the_fair_share():
    loads = [{"step": step, "load_LE": [[0.5, 0.5], [1.0, 0.0]]} for step in range(1, 502)]
    found = upload.loads_by_site(loads, ["0.attention", 0])
    shares_NE, steps = found["0"]
    assert list(found) == ["0.attention", "0"] and len(steps) <= upload.MOST_STEPS and steps[-1] == 501
    pixels = upload.heatmap(shares_NE)
    assert pixels.shape == (2 * upload.PIXELS, len(steps) * upload.PIXELS)
    assert (
        set(pixels[0]) == {255} and set(pixels[-1]) == {0} and set(upload.heatmap(found["0.attention"][0])[0]) == {128}
    )
    assert upload.loads_by_site([], [0]) == upload.loads_by_site([{"step": 1, "load_LE": []}], [0]) == {}


def without(calls):
    """Calls of the fake, but for where the files lie and how long they may take."""
    return [{name: value for name, value in call.items() if name not in ("dir", "settings")} for call in calls]


def test_pushing_a_stored_run_is_as_if_it_had_been_logged(fake, plain, tmp_path, monkeypatch):
    loop.train(CONFIG, 0, tmp_path / "runs", wandb="offline")
    live = fake()
    at = len(live)
    for store in (plain, tmp_path / "all.jsonl"):
        if store.suffix:
            write_compact(read_runs(plain), store)
        said = ran("wandb", "push", store, "--mode", "offline")
        assert said == f"{CONFIG.run_id(0)} written for wandb sync\n"
        pushed = fake()[at:]
        at = len(fake())
        kinds = [[call["what"] for call in calls if call["what"] != "import"] for calls in (live, pushed)]
        assert sorted(kinds[0]) == sorted(kinds[1])
        rows = [logged_by_step([c for c in calls if c["what"] == "log"]) for calls in (live, pushed)]
        assert untimed_rows(rows[0]) == untimed_rows(rows[1])
        inits = [next(call for call in calls if call["what"] == "init") for calls in (live, pushed)]
        assert without(inits[:1]) == without(inits[1:])


def untimed_rows(rows):
    return {step: {n: v for n, v in row.items() if not n.endswith("seconds")} for step, row in rows.items()}


def test_pushing_takes_what_is_named_and_says_in_one_line_what_fails(fake, plain, tmp_path, monkeypatch):
    assert "no API key" in refused(rlroute("wandb", "push", plain))
    assert "holds no ended run" in refused(rlroute("wandb", "push", plain, "--only", "hash"))
    (tmp_path / "empty").mkdir()
    assert "holds no ended run" in refused(rlroute("wandb", "push", tmp_path / "empty"))
    monkeypatch.setenv("FAULT", "log")
    del sys.modules["wandb"]  # which reads it once, and which the fixture forgets
    assert "was not uploaded: OSError" in refused(rlroute("wandb", "push", plain, "--mode", "offline"))
    sys.modules["wandb"] = None
    assert "rlroute wandb needs the package wandb" in refused(rlroute("wandb", "push", plain))


def test_the_real_wandb_takes_a_pushed_run_offline(plain, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("PIL")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # nothing is sent anywhere
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    write_compact(read_runs(plain), tmp_path / "all.jsonl")
    ran("wandb", "push", tmp_path / "all.jsonl", "--mode", "offline")
    (part,) = (tmp_path / "wandb").glob(f"offline-run-*-{CONFIG.run_id(0)}")
    (file,) = part.glob("*.wandb")
    words = (b"loads/load_LE/0/3", b"tables/final", b"heatmaps/load/0")
    until(lambda: all(word in file.read_bytes() for word in words))  # a process of wandb's own writes it
    assert len([*part.glob("files/media/images/**/*.png")]) == 1
    assert len([*part.glob("files/media/table/**/*.json")]) == 1


def test_ids_are_legal_and_stay_apart():
    assert upload.legal_id("switch-4a2e45e8eca6-s0") == "switch-4a2e45e8eca6-s0"
    assert upload.legal_id("a:b/c#d?e%f\\g;h,i'j k") == "a-b-c-d-e-f-g-h-i-j-k"
    long = [upload.legal_id("r" * 200 + f"-4a2e45e8eca6-s{seed}") for seed in range(2)]
    assert len(set(long)) == 2
    assert max(map(len, long)) == 128


def test_flatten_names_leaves_by_their_paths():
    row = {"loss": 1.0, "terms": {"balance": 2, "z": {}}, "load_LE": [[0.5, 0.25], []], "sampled": None}
    flat = {"loss": 1.0, "terms/balance": 2, "load_LE/0/0": 0.5, "load_LE/0/1": 0.25, "sampled": None}
    assert dict(flatten(row)) == flat


def test_flatten_names_lists_over_sites_by_their_keys():
    sites = ["0.attention", 0, "1.attention", 1]
    row = {"terms": {"balance": [1, 2, 3, 4]}, "load_LE": [[0.5, 0.5], [1.0], [0.5, 0.5], [1.0]], "names": ["a"] * 4}
    row |= {"sampled": {"overlap_L": [1, 1, 1, 1]}, "traffic": {"device_max_vio_L": [5, 6]}}
    flat = dict(upload.leaves(row, "", sites))
    assert {"terms/balance/1.attention", "load_LE/0.attention/1", "load_LE/1/0", "sampled/overlap_L/0"} <= flat.keys()
    assert [flat[f"traffic/device_max_vio_L/{site}"] for site in (0, 1)] == [5, 6]
    assert {f"names/{index}" for index in range(4)} <= flat.keys()


def test_the_command_line_takes_it_to_every_run(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--wandb" in ran("tune", "--help")
    ran("compare", "hash", "switch", *TINY, "--seeds", "2", "--launcher", "local", "--wandb", "offline")
    assert {call["id"] for call in fake("init")} == {path.name for path in (tmp_path / "runs").iterdir()}
    assert {call["mode"] for call in fake("init")} == {"offline"}
    ran("train", "hash", *TINY, "--seed", "5", "--store", "one", "--wandb", "offline")
    assert len(fake("init")) == 5


def test_asking_for_a_wandb_that_is_not_installed_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--wandb needs the package wandb: pip install 'wandb<1,>=0.31'" in refused(
        rlroute("train", "hash", *TINY, "--wandb", "offline")
    )
    assert contents(tmp_path) == {}


def test_a_folder_of_wandb_s_is_not_wandb(tmp_path, monkeypatch):
    """Whether wandb is installed or not."""
    (tmp_path / "wandb").mkdir()

    class FolderAlone:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)]) if name == "wandb" else None

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [FolderAlone, *sys.meta_path])
    assert "--wandb needs" in refused(
        rlroute("train", "hash", *TINY, "--store", tmp_path / "runs", "--wandb", "online")
    )


def train_as_rank(store, log):
    """The process that ranks are forked from may be older than the test's environment."""
    os.environ["FAKE_LOG"] = str(log)
    sys.path.insert(0, str(log.parent / "site"))
    config = build_entry("switch", DATA, MODEL, replace(TRAIN, micro_batches=2))
    loop.train(config, 0, store, group=Mesh(2), wandb="offline")


@pytest.mark.slow
@pytest.mark.processes
def test_one_rank_of_a_group_writes(fake, tmp_path):
    run_ranks(train_as_rank, 2, tmp_path / "runs", tmp_path / "calls.jsonl")
    assert len(fake("init")) == 1
    assert list(logged_by_step(fake("log"))) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.processes
def test_ray_workers_log_and_their_warnings_are_shown(fake, tmp_path):
    command = (*("compare", "hash", "switch", *TINY), "--seeds", "1", "--concurrency", "2", "--wandb", "offline")
    path = os.pathsep.join((str(tmp_path / "site"), str(ROOT)))
    for fault, folder in (("", "calm"), ("log", "full")):
        (tmp_path / folder).mkdir()
        done = subprocess.run(
            [sys.executable, "-m", "rlroute", *command],
            cwd=tmp_path / folder,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAULT": fault},
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("goes on without wandb: OSError") == (2 if fault else 0)
        assert len(fake("init")) == (4 if fault else 2)


def test_the_real_wandb_offline(plain, tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # nothing is sent anywhere
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    interrupted(CONFIG, tmp_path, 6, wandb="offline")
    second = int(time.time())
    until(lambda: int(time.time()) > second)  # wandb names its folders by it
    loop.train(CONFIG, 0, tmp_path, wandb="offline")
    assert capfd.readouterr() == ("", "")
    folder = tmp_path / CONFIG.run_id(0)
    parts = sorted((folder / "wandb").glob(f"offline-run-*-{folder.name}"))
    assert len(parts) == 2
    for part in parts:
        (file,) = part.glob("*.wandb")
        until(lambda file=file: b"loads/load_LE/0/3" in file.read_bytes())  # a process of wandb's own writes it
    assert left(tmp_path)[:4] == left(plain)[:4]
