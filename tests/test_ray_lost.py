"""Whatever happens to Ray, or to the command that uses it, ends the command in one line, and the same one goes on."""

import os
import signal
import time

import pytest

from rlroute.experiments.bench import victims
from rlroute.records import state
from tests import ROOT
from tests.commands import start, table
from tests.conftest import HANG, until
from tests.distributions import install
from tests.mishaps import MISHAP, ended, spec_of, undisturbed

pytestmark = pytest.mark.processes
GOES_ON = "what ended is kept, and the same command goes on"
NAMES = {"raylet": "its raylet here", "GCS": "its control store (GCS)"}
RAYLET, GCS = (f"{name} at 127.0.0.2:" for name in NAMES.values())
DEAF_SECONDS = 5
"""How long a control store is deaf before it is killed; Ray's own call, made every two seconds, waits for a minute."""
BLOWS = {
    ("raylet", signal.SIGKILL): RAYLET,
    ("raylet", signal.SIGTERM): RAYLET,
    ("GCS", signal.SIGKILL): GCS,
    ("GCS", signal.SIGTERM): GCS,
    ("GCS", signal.SIGSTOP): GCS,
    ("Ray driver", signal.SIGKILL): "the process that drives it has ended, by signal SIGKILL",
    ("driver", signal.SIGTERM): "stopped",
    ("driver", signal.SIGHUP): "stopped",
}
FIRST = [("raylet", signal.SIGKILL), ("driver", signal.SIGTERM)]


@pytest.mark.slow
@pytest.mark.parametrize("blows", [FIRST, [b for b in BLOWS if b not in FIRST]])
def test_whatever_is_lost_ends_the_command_and_the_same_one_goes_on(blows, tmp_path, marked, site):
    """Two of its runs have ended each time, and the others wait in their seventh step."""
    path = f"{ROOT}:{install(site, 'mishap', 'acme.mishap:MishapRouter', MISHAP)}"
    command = ("sweep", spec_of(tmp_path, ("hash", "mishap:fault=wait"), 12, 4), "--concurrency", "2")
    (tmp_path / "harm-wait").touch()
    for victim, blow in blows:
        process = start(tmp_path, *command, path=path)
        until(lambda process=process: in_the_middle(tmp_path / "runs") or ended(process))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/summary.json")}
        strike(victim, blow, process, marked())
        line = last_line(process)
        if victim == "driver":
            assert process.returncode == 128 + blow and line == f"stopped; {GOES_ON}"
        else:
            assert process.returncode == 2 and line.startswith("error: Ray was lost: ") and line.endswith(GOES_ON)
            assert BLOWS[victim, blow] in line
        until(lambda: not marked() and not waiting(tmp_path / "runs"))  # who ends holds its run a little longer
        assert len(before) == 2 and not list(tmp_path.glob("runs/*/failed.json"))
    (tmp_path / "harm-wait").unlink()
    process = start(tmp_path, *command, path=path)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert "4 of 4 runs ended, 0 set aside" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before  # no run twice
    assert table(tmp_path / "runs").encode() == table(undisturbed(tmp_path)).encode()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["GCS", "raylet"])
def test_what_is_lost_while_ray_starts_ends_the_command_too(victim, tmp_path, marked):
    """Nobody knows yet where it listens, and Ray waits for it for a minute."""
    process = start(tmp_path, "sweep", spec_of(tmp_path, ("hash",), 12, 4))
    until(lambda: any(map(victims.VICTIMS[victim], marked())) or ended(process))
    strike(victim, signal.SIGKILL, process, marked())
    line = last_line(process)
    assert (
        process.returncode == 2 and line.startswith(f"error: Ray was lost: {NAMES[victim]}") and line.endswith(GOES_ON)
    )


def in_the_middle(store):
    return len(list(store.glob("hash-*/summary.json"))) == 2 and len(waiting(store)) == 2


def waiting(store):
    return [path for path in store.glob("mishap-*/checkpoint-*") if state(path.parent) == "running"]


def strike(victim, blow, process, family):
    if victim == "driver":
        process.send_signal(blow)
    else:
        (pid,) = filter(victims.VICTIMS[victim], family)
        os.kill(pid, blow)
        if blow == signal.SIGSTOP:
            time.sleep(DEAF_SECONDS)
            os.kill(pid, signal.SIGKILL)


def last_line(process):
    """Return the one line of ours in which a command has ended."""
    _, err = process.communicate(timeout=HANG)
    assert "Traceback" not in err and "***" not in err, err  # C++ marks its traces by asterisks
    *begun, line = err.splitlines()
    assert [other for other in begun if " into " not in other and "runs ended" not in other] == [], err
    return line
