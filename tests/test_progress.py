"""The live display: what it says of each entry, and that no line of it wraps, however narrow the terminal."""

import fcntl
import io
import json
import shutil
from contextlib import contextmanager

import pytest
from rich.console import Console

from rlroute.config import DataConfig, ModelConfig, TrainConfig
from rlroute.experiments.launch.jobs import Job
from rlroute.experiments.launch.progress import Monitor
from rlroute.experiments.recipes.entries import build_entry
from rlroute.records import RunFolder, write_atomically

TRAIN = TrainConfig(steps=100)
LONG = "reinforce:baseline=leave_one_out,samples=4,balance_weight=0.01"


def job(entry, seed, **train):
    config = build_entry(entry, DataConfig(), ModelConfig(), TrainConfig(**{"steps": 100} | train))
    return Job(config, seed, label=entry)


def train_row(step, seconds):
    return {"kind": "train", "step": step, "tokens": 1000 * step, "seconds": seconds, "loss": 2.0}


def eval_row(step, bits, vio):
    return {
        "kind": "eval",
        "step": step,
        "tokens": 1000 * step,
        "seconds": 1.0,
        "bits_per_byte": bits,
        "max_vio_L": vio,
    }


def write(store, job, *rows):
    folder = RunFolder(store, job.config, job.seed)
    folder.create()
    (folder.path / "config.json").write_text("{}")
    for row in rows:
        folder.append("metrics", row)
    return folder


@contextmanager
def running(folder):
    with (folder.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def drawn(monitor, width):
    console = Console(file=io.StringIO(), width=width, height=30, force_terminal=True, color_system=None)
    console.print(monitor.draw(console))
    return console.file.getvalue().splitlines()


@pytest.fixture
def clock():
    """A clock that a test sets."""
    now = [0.0]

    def read():
        return now[0]

    read.set = lambda value: now.__setitem__(0, value)
    return read


@pytest.fixture
def watched(tmp_path, clock):
    """Twelve runs of four entries: of the first one has ended, one runs and one waits; the second was set aside; the
    others wait.
    """
    jobs = [job(entry, seed) for entry in ("switch", LONG, "hash", "dense") for seed in range(3)]
    monitor = Monitor(jobs, tmp_path, clock)
    first = write(tmp_path, jobs[0], train_row(100, 50.0), eval_row(100, 2.0, [0.1, 0.5]))
    (first.path / "summary.json").write_text('{"status": "finished"}')
    second = write(tmp_path, jobs[1], train_row(20, 10.0), eval_row(20, 3.0, [None, 0.1]))
    write(tmp_path, jobs[3]).set_aside("a defect")
    with running(second):
        monitor.look()
        clock.set(60.0)
        second.append("metrics", train_row(50, 25.0))
        yield monitor


def test_an_entry_has_its_figures_in_one_line(watched):
    """Means over seeds; left: 1.5 runs of which it does half a percent a second."""
    head, *lines = drawn(watched, 140)
    assert head.split() == ["entry", "done", "running", "set", "aside", "bits/byte", "tokens/s", "MaxVio", "left"]
    (switch,) = (line.split() for line in lines if line.startswith("switch"))
    assert switch == ["switch", "1/3", "1", "2.5000", "2", "k", "0.30", "5", "min"]
    (second,) = (line.split() for line in lines if line.startswith("reinforce"))
    assert second == [LONG, "0/3", "1", "–", "–", "–", "–"]
    (everything,) = (line.split() for line in lines if line.startswith("all"))
    assert everything[1:4] == ["1/12", "1", "1"] and everything[-1] == "min"
    assert [line.split()[0] for line in lines][:5] == ["switch", LONG, "hash", "dense", "all"]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_no_line_wraps_and_what_matters_is_shown(watched, width):
    lines = drawn(watched, width)
    assert all(len(line) <= width for line in lines)
    shown = [line.split()[0][:5] for line in lines[1:6]]
    assert shown == ["switc", "reinf", "hash", "dense", "all"]
    line = next(line for line in lines if line.startswith("switch"))
    assert all(part in line for part in ("2.5000", "2 k", "0.30", "5 min"))
    assert all(title in lines[0] for title in ("byte", "tok", "MaxVio", "left"))


def test_at_any_width_there_is_one_line_for_each_entry(watched):
    for width in range(20, 200, 7):
        lines = drawn(watched, width)
        assert all(len(line) <= width for line in lines) and len(lines) in (6, 7), width


def test_more_entries_than_lines_are_counted(tmp_path):
    monitor = Monitor([job("switch", 0, lr=1e-3 * n) for n in range(1, 20)], tmp_path)
    monitor.look()
    grid = monitor.grid(8)
    assert len(grid.lines) == 8
    assert grid.lines[-2][0] == "13 entries more" and grid.lines[-1][:2] == ["all", "0/19"]
    assert len(monitor.grid(20).lines) == 20


def test_without_a_terminal_a_line_says_the_same(watched):
    assert watched.line() == (
        "1 of 12 runs ended, 1 running, 1 set aside; 1.0 min so far, left 32 min; "
        "switch 1/3: 2.5000 bits/byte, 2 k tokens/s, MaxVio 0.30, left 5 min"
    )


def test_new_alarms_are_said_once_and_counted_while_they_stand(tmp_path, clock):
    one = job("switch", 0)
    monitor = Monitor([one], tmp_path, clock)
    load = [[1 / 16] * 16]
    rows = [eval_row(step, 2.5, [0.1]) | {"dead_L": [5], "load_LE": load} for step in (10, 20, 30)]
    folder = write(tmp_path, one, train_row(10, 10.0), *rows)
    with running(folder):
        assert "1 running, 1 alarm; " in monitor.line()
        (said,) = monitor.take_alarms()
        assert said.startswith(f"alarm: {one.id}, site 0: 5 of 16 experts are dead")
        folder.append("metrics", rows[-1] | {"step": 40})
        monitor.look()
        assert monitor.take_alarms() == []
        clock.set(200.0)
        monitor.look()
        (said,) = monitor.take_alarms()
        assert said == f"alarm: {one.id}: no row for 200 s (alarm from 180 on, since step 40)"
        folder.append("metrics", eval_row(50, 2.5, [0.1]) | {"dead_L": [0], "load_LE": load})
        assert "alarm" not in monitor.line()


def test_what_is_over_before_the_first_line_has_its_alarms_said(tmp_path, capsys):
    """Without a terminal, where a line comes every half minute; and once."""
    one = job("switch", 0)
    dead = {"dead_L": [5], "load_LE": [[1 / 16] * 16]}
    rows = [eval_row(step, 2.5, [0.1]) | dead for step in (10, 20, 30)]
    with Monitor([one], tmp_path):
        folder = write(tmp_path, one, train_row(10, 10.0), *rows)
        (folder.path / "summary.json").write_text('{"status": "finished"}')
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"alarm: {one.id}, site 0: 5 of 16 experts are dead")
    with Monitor([one], tmp_path):
        pass
    assert capsys.readouterr().err == "", "it had ended before"


def test_a_run_taken_up_again_is_read_anew(tmp_path, clock):
    one = job("switch", 0)
    monitor = Monitor([one], tmp_path, clock)
    folder = write(tmp_path, one, train_row(50, 25.0), eval_row(50, 2.5, [0.1]), train_row(60, 30.0))
    (run,) = monitor.runs
    monitor.look()
    assert run.share == 0.6
    file = folder.path / "metrics.jsonl"
    write_atomically(file, "".join(file.read_text().splitlines(keepends=True)[:2]))  # the rest will be written again
    monitor.look()
    assert run.share == 0.5 and run.evaluation["bits_per_byte"] == 2.5
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_row(70, 35.0))[:-4])  # torn, as a reader may find it
    monitor.look()
    assert run.share == 0.5
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_row(70, 35.0))[-4:] + "\n\0\0 no row\n")
    monitor.look()
    assert run.share == 0.7


def test_a_run_that_has_ended_is_read_to_its_end_and_never_again(tmp_path, clock):
    one = job("switch", 0)
    monitor = Monitor([one], tmp_path, clock)
    folder = write(tmp_path, one, train_row(50, 25.0))
    monitor.look()
    folder.append("metrics", eval_row(100, 2.5, [0.1]))
    (folder.path / "summary.json").write_text('{"status": "finished"}')
    monitor.look()
    (run,) = monitor.runs
    assert (run.state, run.evaluation["bits_per_byte"]) == ("finished", 2.5)
    shutil.rmtree(folder.path)
    monitor.look()
    assert (run.state, run.evaluation["bits_per_byte"]) == ("finished", 2.5)


def test_under_a_budget_of_time_what_is_left_is_time(tmp_path):
    one = job("switch", 0, budget="time", budget_amount=40.0, steps=10**6)
    write(tmp_path, one, train_row(50, 30.0))
    monitor = Monitor([one], tmp_path)
    monitor.look()
    assert monitor.runs[0].share == 0.75
