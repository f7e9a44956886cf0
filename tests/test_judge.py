"""A judgement says the verdict of a change, goes on after a kill, and stands by what was registered before its first
run.
"""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlroute.errors import ComparisonError, ConfigError, RlrouteError, StoreError
from rlroute.experiments.comparison.compare import compare
from rlroute.experiments.comparison.judge import judge
from rlroute.experiments.comparison.judgement import EXACT, KNOWN, SAME, Judgement
from rlroute.experiments.comparison.table import build_table
from rlroute.experiments.launch.jobs import Launch
from rlroute.experiments.recipes.presets import build_pair
from rlroute.experiments.recipes.tuned import tuned_settings
from rlroute.experiments.verdicts import intervals, looks, shares, verdict
from rlroute.reading import read_runs
from rlroute.registry import default_names, router_class
from rlroute.seal import of_part
from rlroute.training import loop
from tests import ROOT
from tests.commands import TINY, contents, ran, refused, rlroute, stamps, start
from tests.conftest import HANG, forget, make_shape
from tests.runs import figures
from tests.test_include import SOURCE
from tests.tiny import DATA, MODEL, TRAIN

LOCAL = ("--launcher", "local")
HASH = ("judge", "hash", *TINY, *LOCAL, "--max-seeds", "4")
SIGN = "(gates_TK if context.explore else -3 * gates_TK)"
CRIPPLED = SOURCE.replace("token_choice(ids_TK, gates_TK,", f"token_choice(ids_TK, {SIGN},")
"""In evaluation its experts subtract what they learned to add."""


def judged(store: Path, candidate: object = "hash", **options: Any) -> Judgement:
    """Judge tiny runs against switch, silently."""
    shared: dict[str, Any] = {"data": DATA, "model": MODEL, "train": TRAIN, "max_seeds": 4, "say": lambda line: None}
    return judge(str(candidate), how=Launch(store=store, launcher="local"), **(shared | options))


def registrations(store: Path) -> list[Path]:
    return sorted(store.glob("judgement-*.json"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which hash was judged against switch, within four seeds; nobody may change it."""
    folder = tmp_path_factory.mktemp("judged")
    with contextlib.chdir(folder):
        done = rlroute(*HASH)
    (folder / "printed").write_text(done.out)
    (folder / "said").write_text(done.err)
    (folder / "code").write_text(str(done.code))
    return folder


@pytest.fixture
def store(stored: Path, tmp_path: Path) -> Path:
    """A copy of the runs and the registration of :func:`stored`."""
    return Path(shutil.copytree(stored / "runs", tmp_path / "runs"))


def test_without_a_verdict_the_code_is_3_and_all_is_said(stored: Path) -> None:
    assert (stored / "code").read_text() == "3"
    printed, said = ((stored / name).read_text() for name in ("printed", "said"))
    found = json.loads((stored / "results" / "judgement.json").read_text())
    assert printed.startswith("hash against switch: unresolved\n") and found["verdict"] == "unresolved"
    assert said.startswith("registered ") and said.index("registered") < said.index(" into runs/")
    (file,) = registrations(stored / "runs")
    registered = json.loads(file.read_text())
    assert registered == found["registration"] and registered["sha256"] == of_part(registered["plan"])
    assert registered["sha256"] in printed and registered["sha256"] in said
    records = read_runs(stored / "runs")
    assert {run.config["asked"]["registration"] for run in records} == {registered["sha256"]}
    assert all(run.environment["begun"] >= registered["registered"] for run in records)
    assert found["runs"] == sorted(found["runs"], key=lambda run: not run.startswith("switch"))
    assert sorted(found["runs"]) == [run.id for run in records] and found["cost"]["runs"] == 8
    assert found["cost"]["tokens"] == sum(run.summary["tokens"] for run in records)
    assert found["cost"]["training_flops"] == sum(run.summary["model"]["training_flops"] for run in records)
    assert found["cost"]["runs_there_before"] == 0 and registered["plan"]["there_before"] == []


def test_looks_are_what_the_rule_says_of_the_runs(stored: Path) -> None:
    found = json.loads((stored / "results" / "judgement.json").read_text())
    bits = {
        (run.config["router"], run.config["seed"]): run.evals[-1]["bits_per_byte"] for run in read_runs(stored / "runs")
    }
    diffs = [bits["hash", seed] - bits["switch", seed] for seed in range(4)]
    assert list(found["differences"].values()) == diffs and found["n"] == 4
    assert [look["n"] for look in found["looks"]] == looks(4) == [3, 4]
    for look, level in zip(found["looks"], shares(looks(4)), strict=True):
        against_0, within = intervals(diffs[: look["n"]], level)
        assert look["interval"] == [against_0.low, against_0.high] and look["effect"] == against_0.mean
        assert look["equivalence_interval"] == [within.low, within.high]
        assert look["verdict"] == str(verdict(diffs[: look["n"]], 0.02, level))
    (row,) = [row for row in build_table(read_runs(stored / "runs")).rows if row.label == "hash"]
    assert row.difference and row.difference.mean == found["effect"]


def test_judging_again_trains_nothing_and_says_the_same_and_so_does_python(store: Path) -> None:
    before, first = stamps(store), json.loads((registrations(store)[0]).read_text())
    with contextlib.chdir(store.parent):
        assert rlroute(*HASH).code == 3
        again = json.loads(Path("results/judgement.json").read_text())
        in_python = judged(Path("runs")).to_dict()
    assert stamps(store) == before and again["registration"] == first
    assert json.loads(json.dumps(in_python)) | {"command": None} == again | {"command": None}


def test_nothing_is_amiss_in_the_store(stored: Path) -> None:
    assert ran("verify", stored / "runs") == ""
    assert "8" in ran("runs", stored / "runs") and ran("table", stored / "runs")


@pytest.mark.parametrize("name", default_names())
def test_what_a_router_is_lent_it_can_take(name: str) -> None:
    for reference in ("switch", "reinforce", "noisy_topk"):
        (mine, _), _ = build_pair(name, reference, DATA, MODEL, TRAIN, tuned=True)
        assert mine.router is not None
        why = router_class(name).refuses(mine.router, make_shape(MODEL.num_experts, MODEL.k))
        assert why is None or "weight" not in why


def test_a_copy_of_the_reference_from_a_file_is_equivalent(tmp_path: Path, routers: None, store: Path) -> None:
    twin = Path(shutil.copy(ROOT / "baselines" / "switch.py", tmp_path / "twin.py"))
    with contextlib.chdir(tmp_path):
        done = rlroute("judge", "./twin.py", *TINY, *LOCAL)
    assert done.code == 0, done.err
    assert (
        done.out.startswith("twin against switch: equivalent within 0.02 (3 of 6 runs were there before")
        and EXACT in done.out
    )
    found = json.loads((tmp_path / "results" / "judgement.json").read_text())
    assert found["equivalent"] and found["direction"] is None and found["n"] == 3 and found["effect"] == 0
    plan = found["registration"]["plan"]
    assert (
        plan["candidate"]["settings"] == "those of switch"
        and plan["reference"]["settings"] == "tuned at 500 steps of 8"
    )
    there = [run for run in found["runs"] if run.startswith("switch")]
    assert plan["there_before"] == sorted([*there, next(iter(there))[:-1] + "3"]) and len(there) == 3
    assert "(3 there before)" in done.out
    twin.write_text(twin.read_text() + "\n# changed\n")
    forget(tmp_path)
    with contextlib.chdir(tmp_path):
        assert "by another router twin" in refused(rlroute("judge", "./twin.py", *TINY, *LOCAL))


def test_the_reference_itself_is_equivalent(store: Path) -> None:
    before = stamps(store)
    found = judged(store, "switch")
    assert str(found.verdict) == "equivalent within 0.02" and SAME in found.notes and found.cost["runs"] == 3
    assert {name: stamp for name, stamp in stamps(store).items() if name in before} == before


def test_a_crippled_router_is_worse_before_the_seeds_are_spent(tmp_path: Path, routers: None, store: Path) -> None:
    (tmp_path / "crippled.py").write_text(CRIPPLED)
    found = judged(store, tmp_path / "crippled.py", max_seeds=8)
    assert found.verdict.direction == "worse" and not found.verdict.equivalent
    assert len(found.differences) == found.looks[-1].against_0.n < 8 and "worse" in str(found)
    assert [look.verdict.resolved for look in found.looks] == [False] * (len(found.looks) - 1) + [True]
    turned = judged(store, "switch", against=str(tmp_path / "crippled.py"), max_seeds=8)
    assert turned.verdict.direction == "better"


def test_what_is_killed_goes_on_to_the_same_judgement(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, begun = loop.train, list[Any]()

    def killed_in_the_third(*arguments: Any, **options: Any) -> Any:
        def stop(step: int) -> None:
            if len(begun) == 3 and step == 6:
                raise KeyboardInterrupt

        begun.append(arguments)
        return train(*arguments, **options | {"on_step": stop})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train", killed_in_the_third)
    assert rlroute(*HASH).code == 130
    ended, (file,) = read_runs(Path("runs")), registrations(Path("runs"))
    assert len(ended) == 2 and file.exists()
    kept, written = stamps(Path("runs") / ended[0].id), file.read_bytes()
    monkeypatch.setattr(loop, "train", train)
    assert rlroute(*HASH).code == 3
    assert stamps(Path("runs") / ended[0].id) == kept and file.read_bytes() == written
    for run in read_runs(Path("runs")):
        assert figures(Path("runs") / run.id) == figures(stored / "runs" / run.id)
    one, other = (json.loads((place / "results/judgement.json").read_text()) for place in (tmp_path, stored))
    assert one["looks"] == other["looks"] and one["registration"]["sha256"] == other["registration"]["sha256"]


# What was registered stands


def better_by_a_bit(folder: Path) -> None:
    """Edit the last loss of a run that has ended, wherever it stands."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    summary, last = json.loads((folder / "summary.json").read_text()), json.loads(lines[-1])
    for final in (summary["final"], last):
        final["bits_per_byte"] -= 1
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")


def changed(file: Path, rehash: bool, **values: Any) -> None:
    """Change fields of a registered plan, with its hash or without."""
    registered = json.loads(file.read_text())
    registered["plan"] |= values
    file.write_text(json.dumps(registered | ({"sha256": of_part(registered["plan"])} if rehash else {})))


def test_another_margin_or_other_seeds_are_refused(store: Path) -> None:
    before = contents(store)
    with pytest.raises(ConfigError, match=r"another margin: .* was registered with 0\.02, now it is 0\.5"):
        judged(store, margin=0.5)
    with pytest.raises(ConfigError, match=r"--max-seeds.*registered with \[3, 4\], now it is \[3, 4, 6\]"):
        judged(store, max_seeds=6)
    assert contents(store) == before


def test_a_registration_that_was_changed_is_refused(store: Path) -> None:
    (file,) = registrations(store)
    changed(file, rehash=False, margin=0.5)
    for margin in (0.02, 0.5):
        with pytest.raises(StoreError, match="was changed after it was registered"):
            judged(store, margin=margin)


def test_so_is_one_that_was_hashed_anew_or_made_anew_after_the_first_run(store: Path) -> None:
    (file,) = registrations(store)
    changed(file, rehash=True, margin=0.5)
    with pytest.raises(StoreError, match=r"was changed after the first run: run (hash|switch)-\S+ was trained under"):
        judged(store, margin=0.5)
    changed(file, rehash=True, margin=0.02, there_before=["switch-000000000000-s0"])
    with pytest.raises(StoreError, match="was changed after the first run"):
        judged(store)
    file.unlink()
    before = contents(store)
    with pytest.raises(
        StoreError, match=r"\.json is gone, and was there before the first run: run \S+ was trained under"
    ):
        judged(store, margin=0.5)
    assert contents(store) == before


@pytest.mark.parametrize("pair", [("hash", "switch"), ("switch", "hash")])
def test_the_same_pair_the_other_way_round_is_refused_before_anything_is_written(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    """The differences are the same with the other sign: nothing is left to ask, and another margin may not be."""
    one, other = pair
    found = judged(tmp_path, one, against=other, max_seeds=3)
    before = contents(tmp_path)
    for options in ({}, {"margin": 0.5}):
        with pytest.raises(ConfigError, match=rf"^{one} against {other} is registered in this store \(\S+json\)"):
            judged(tmp_path, other, against=one, max_seeds=3, **options)
    assert contents(tmp_path) == before
    assert judged(tmp_path, one, against=other, max_seeds=3).to_dict() == found.to_dict()


def test_a_verdict_on_runs_that_were_there_before_says_so(tmp_path: Path) -> None:
    """A registration that trained nothing can be made anew with a margin that suits: what was known stays said."""
    store = tmp_path / "runs"
    compare(["hash", "switch"], seeds=3, how=Launch(store=store, launcher="local"), data=DATA, model=MODEL, train=TRAIN)
    for margin, verdict_ in ((1e-9, "unresolved"), (9.0, "equivalent within 9")):
        found = judged(store, margin=margin, max_seeds=3)
        said = f"{found.verdict} (6 of 6 runs were there before it was registered)"
        assert verdict_ in str(found.verdict) and str(found).splitlines()[0] == f"hash against switch: {said}"
        plain = found.to_dict()
        assert (plain["verdict"], plain["said"], plain["there_before"]) == (str(found.verdict), said, 6)
        assert KNOWN in plain["notes"] and KNOWN in str(found)
        registrations(store)[0].unlink()


def test_a_verdict_on_its_own_runs_says_nothing_of_the_kind(stored: Path) -> None:
    found = json.loads((stored / "results" / "judgement.json").read_text())
    assert found["said"] == found["verdict"] and found["there_before"] == 0 and KNOWN not in found["notes"]


def test_an_edited_record_decides_nothing_and_is_named(store: Path) -> None:
    """Final losses that were edited would turn the verdict."""
    for folder in store.glob("hash-*"):
        better_by_a_bit(folder)
    with pytest.raises(ComparisonError, match=r"^hash-\w+-s0: metrics\.jsonl: .*edited after the run ended"):
        judged(store)
    with contextlib.chdir(store.parent):
        done = rlroute(*HASH)
        assert done.code == 2 and "edited after the run ended" in done.err
        assert not Path("results/judgement.json").exists()


def test_a_table_and_a_report_of_it_say_so(store: Path) -> None:
    whole = rlroute("table", store)
    assert whole.err == ""
    edited = sorted(store.glob("hash-*"))[:2]
    for folder in edited:
        better_by_a_bit(folder)
    for words in (("table", store), ("report", store, "--out", store.parent / "page.html")):
        done = rlroute(*words)
        assert done.code == 0 and done.out != whole.out
        named = [line.split(": ") for line in done.err.splitlines() if "edited after the run ended" in line]
        assert [words[:3] for words in named] == [["rlroute", folder.name, "metrics.jsonl"] for folder in edited]


def test_a_registration_that_is_changed_between_looks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tamper(line: str) -> None:
        if line.startswith("3 seeds"):
            changed(registrations(tmp_path)[0], rehash=True, margin=0.5)

    with pytest.raises(ConfigError, match=r"another margin.*with 0\.5, now it is 0\.02"):
        judged(tmp_path, say=tamper)


def test_a_candidate_whose_code_changed_before_its_first_run_ended_is_refused(tmp_path: Path, routers: None) -> None:
    """Where no run says so yet, the registration does."""
    path = tmp_path / "plain.py"
    path.write_text(SOURCE)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path / "runs", path, say=stop)
    assert len(registrations(tmp_path / "runs")) == 1 and not read_runs(tmp_path / "runs")
    path.write_text(SOURCE + "\n# changed\n")
    forget(tmp_path)
    with pytest.raises(ConfigError, match=r"the candidate's code has changed \(routers/plain/sha256\)"):
        judged(tmp_path / "runs", path, say=stop)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": {}, "sha256": "0", "registered": "now"}', "\xff"])
def test_what_is_no_registration_is_refused_by_name(text: str, store: Path) -> None:
    (file,) = registrations(store)
    file.write_text(text, encoding="latin-1")
    with pytest.raises(RlrouteError, match=file.name):
        judged(store)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-seeds", "2"), "--max-seeds"),
        (("--margin", "0"), "--margin"),
        (("--margin", "nan"), "--margin"),
        (("--against", "nonesuch"), "nonesuch"),
        (("--budget", "time"), "--seconds"),
        (("--train.lr", "1e-3"), "train.lr"),
        (("--launcher", "local", "--workers", "2"), "--workers"),
        (("--data.spec", "synth:nonesuch=1"), "nonesuch"),
    ],
)
def test_bad_input_is_refused_before_anything_is_registered(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(rlroute("judge", "hash", *TINY, *words))
    assert contents(tmp_path) == {}


# Runs that end otherwise, and settings


def test_a_run_that_diverges_ends_it_unresolved(tmp_path: Path) -> None:
    found = judged(tmp_path, train=replace(TRAIN, lr=1e30, warmup_steps=0), tuned=False)
    assert not found.verdict.resolved and found.looks == () and found.to_dict()["effect"] is None
    assert any(note.startswith("diverged: hash: seed 0 at step") for note in found.notes) and "diverged" in str(found)


def test_a_run_that_fails_is_no_verdict(tmp_path: Path, routers: None) -> None:
    (tmp_path / "broken.py").write_text(
        SOURCE.replace("return RoutingDecision", "raise KeyError\n        return RoutingDecision")
    )
    with pytest.raises(ComparisonError, match=r"runs failed.*KeyError"):
        judged(tmp_path / "runs", tmp_path / "broken.py", max_seeds=3)


def test_an_untuned_candidate_gets_the_settings_of_the_reference(tmp_path: Path, routers: None) -> None:
    shutil.copy(ROOT / "baselines" / "switch.py", tmp_path / "twin.py")
    from rlroute.registry import include

    include(tmp_path / "twin.py")
    rest, at = (DATA, MODEL, TRAIN), "tuned at 500 steps of 8"
    (twin, switch), _ = build_pair("twin", "switch", *rest, tuned=True)
    plain, theirs = twin.to_dict(), switch.to_dict()
    assert plain["router"] | {"name": "switch"} == theirs["router"] and plain["train"] == theirs["train"]
    own = {"balance_weight": 0.5}
    (varied, _), settings = build_pair("twin:balance_weight=0.5", "switch", *rest, tuned=True)
    assert varied.to_dict()["router"] == plain["router"] | own and settings == ["those of switch", at]
    (tuned, _), settings = build_pair("hash", "switch", *rest, tuned=True)
    assert tuned.train.lr == tuned_settings("hash", TRAIN)["train"]["lr"] and settings == [at, at]
    (untuned, other), settings = build_pair("twin", "switch", *rest, tuned=False)
    assert untuned.train == other.train == TRAIN and settings == ["default", "default"]
    with pytest.raises(ConfigError, match="lr"):
        build_pair("twin", "switch", DATA, MODEL, replace(TRAIN, lr=0.5), tuned=True)


def test_under_a_budget_of_flops_both_get_those_of_the_reference(tmp_path: Path) -> None:
    found = judged(tmp_path, "noisy_topk", budget="flops", max_seeds=3)
    plan = found.registration["plan"]
    trains = [plan[name]["config"]["train"] for name in ("candidate", "reference")]
    assert [train["budget"] for train in trains] == ["flops", "flops"]
    assert trains[0]["budget_amount"] == trains[1]["budget_amount"] and len(found.looks) == 1


@pytest.mark.slow
@pytest.mark.processes
def test_ray_comes_to_the_same_judgement(stored: Path, tmp_path: Path) -> None:
    process = start(tmp_path, *HASH, "--launcher", "ray", "--concurrency", "2")
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 3, err
    one, other = (json.loads((place / "results/judgement.json").read_text()) for place in (tmp_path, stored))
    assert one["looks"] == other["looks"] and one["registration"]["plan"] == other["registration"]["plan"]
