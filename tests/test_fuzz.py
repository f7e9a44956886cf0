"""A short search of each reader's faults (``make fuzz`` takes ten minutes), and that the search would see one."""

import signal

import pytest

from rlroute.errors import ConfigError
from tests import fuzz
from tests.fuzz import READERS, Fault, run_case, search

QUICK = {"record": 12, "compact": 12, "sweep": 40, "entry": 60, "values": 60, "bench": 20, "sb3": 25, "tokens": 25}
QUICK |= {"registration": 30, "outcomes": 30, "choices": 25, "trace": 40, "command": 3, "checkpoint": 4}
QUICK |= {"corpus": 4, "tokenizer": 3, "ladder": 40, "imported": 100}


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_answers_or_refuses(reader):
    assert not search([reader], 0, lambda case: case == QUICK[reader], print)


def faulty(error):
    def case(folder, random):
        raise error

    return case


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecursionError(), SystemExit(1), MemoryError(), OSError("full"), ConfigError("")]
)
def test_what_is_no_refusal_is_a_fault(error, monkeypatch):
    monkeypatch.setitem(READERS, "faulty", faulty(error))
    fault = run_case("faulty", 3, 7)
    assert isinstance(fault, Fault) and "--seed 3 --case 7 faulty" in str(fault)
    monkeypatch.setitem(READERS, "faulty", faulty(ConfigError("want another")))
    assert run_case("faulty", 3, 7) is None


def test_a_hang_is_a_fault(monkeypatch):
    def case(folder, random):
        signal.pause()

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(READERS, "faulty", case)
    assert "no answer in 1 s" in str(run_case("faulty", 0, 0))


def test_a_case_is_the_same_when_it_is_run_again(monkeypatch):
    drawn = []
    monkeypatch.setitem(READERS, "faulty", lambda folder, random: drawn.append(random.random()))
    for seed, case in ((0, 1), (0, 1), (0, 2), (1, 1)):
        run_case("faulty", seed, case)
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
