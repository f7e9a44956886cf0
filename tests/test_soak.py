"""The soak does what its seed says, kills nobody but its own, and takes no unforeseen end for a good one."""

import contextlib
import json
import os
import random
import subprocess
import sys

import pytest

from rlroute.experiments.bench import soak
from rlroute.experiments.bench.victims import MARK, VICTIMS, marked
from tests.conftest import until


def asked(monkeypatch, *given):
    monkeypatch.setattr(sys, "argv", ["soak", *given])
    return soak.arguments()


def test_a_seed_says_who_is_killed_and_how(monkeypatch):
    wanted = asked(monkeypatch, "--kills", "200")
    blows = soak.drawn(random.Random(7), wanted)
    assert blows == soak.drawn(random.Random(7), wanted) != soak.drawn(random.Random(8), wanted)
    assert {who for who, _ in blows} == set(soak.SCENES) and {how for _, how in blows} == set(soak.SIGNALS)
    few = asked(monkeypatch, "--kills", "50", "--victims", "GCS,node", "--signals", "TERM")
    assert set(soak.drawn(random.Random(7), few)) == {("GCS", "TERM"), ("node", "TERM")}


@pytest.mark.parametrize("given", [("--victims", "raylet,init"), ("--signals", "KILL,HUP"), ("--kills", "many")])
def test_what_cannot_be_killed_is_refused_by_name(given, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        asked(monkeypatch, *given)
    assert given[1].split(",")[-1] in capsys.readouterr().err


def test_ends_that_a_kill_does_not_bring_about_are_none_of_the_soaks():
    assert soak.ending(0, "") == "ended"
    assert soak.ending(-9, "") == soak.ending(143, "stopped") == "killed"
    assert soak.ending(2, "error: Ray was lost: its raylet") == "Ray was lost"
    for code, said in (
        (1, "set aside"),
        (2, "error: a corpus"),
        (2, "Traceback: Ray was lost"),
        (130, ""),
        (-6, "C++"),
    ):
        with pytest.raises(soak.Failed, match="the sweep failed"):
            soak.ending(code, said)


@pytest.mark.processes
@pytest.mark.slow
def test_a_sweep_is_killed_and_ends_with_the_table_of_one_that_was_left_alone(monkeypatch, tmp_path, capsys):
    kills = ("--kills", "2", "--victims", "driver,trial", "--signals", "TERM", "--steps", "300")
    monkeypatch.setattr(sys, "argv", ["soak", *kills, "--out", str(tmp_path / "soak.json")])
    with pytest.raises(SystemExit, match="0"):
        soak.main()
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["passed"] and result["kills"] == 2 and json.loads(capsys.readouterr().out)["passed"]


@contextlib.contextmanager
def running(words, more):
    process = subprocess.Popen([sys.executable, *words], env=os.environ | more)
    yield process.pid
    process.kill()
    process.wait()


@pytest.mark.processes
def test_only_what_carries_the_mark_is_a_victim():
    titled = ["-c", "import time; time.sleep(900)", "ray::ImplicitFunc.train"]
    with running(titled, {MARK: "a-mark"}) as mine, running(titled, {}) as other:
        until(lambda: mine in marked("a-mark"))
        assert [pid for pid in marked("a-mark") if VICTIMS["trial"](pid)] == [mine]
        assert VICTIMS["trial"](other) and not VICTIMS["raylet"](mine) and not VICTIMS["trial"](os.getpid())
