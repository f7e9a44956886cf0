"""The list of mutants cannot rot, and the hunt for them tells the killed from those that lived."""

import ast
from pathlib import Path

import pytest

from tests import ROOT
from tests.mutants import KILLED, LIVED, MUTANTS, Mutant, copy_tree, stale, verdict


def test_every_old_text_occurs_exactly_once() -> None:
    assert not stale()


def test_mutants_are_many_and_different_and_can_be_read_by_python() -> None:
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS) >= 40
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.planted(ROOT))) != ast.dump(ast.parse(text)), mutant.what


def test_the_tests_named_exist() -> None:
    files = {name.partition("::")[0] for mutant in MUTANTS for name in mutant.tests.split()}
    assert files and all((ROOT / file).is_file() for file in files)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("new", "tests", "want"),
    [
        ("return 2", "tests/test_it.py", KILLED),
        ("return 2", "tests/test_other.py", LIVED),
        pytest.param("return (", "tests/test_it.py", "BROKEN", marks=pytest.mark.slow),
        ("return __import__('os')._exit(1)", "tests/test_it.py", "BROKEN"),
    ],
)
def test_only_a_failed_test_kills(tmp_path: Path, new: str, tests: str, want: str) -> None:
    tree = tmp_path / "tree"
    for name, text in {
        "rlroute/__init__.py": "",
        "rlroute/it.py": "def one():\n    return 1  # for all\n",
        "tests/test_it.py": "from rlroute.it import one\n\n\ndef test_one():\n    assert one() == 1\n",
        "tests/test_other.py": "def test_nothing():\n    pass\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    copy = copy_tree(tree, tmp_path / "copy")
    mutant = Mutant("one is not one", "rlroute/it.py", "return 1", new, tests)
    assert verdict(mutant, copy).startswith(want)
    assert (copy / "rlroute/it.py").read_text() == (tree / "rlroute/it.py").read_text(), "it is taken out again"


@pytest.mark.parametrize("old", ["no such text", "import"])
def test_a_text_that_does_not_occur_once_is_refused(old: str) -> None:
    with pytest.raises(ValueError, match="want once"):
        Mutant("none", "tests/mutants.py", old, "", "").planted(ROOT)
