"""Claims from the command line to their page: registered, trained once, measured, decided; what is changed on the way
is caught and named.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlroute.errors import ComparisonError, ConfigError, StoreError
from rlroute.experiments.claims import claim as claims
from rlroute.experiments.claims import ledger, page
from rlroute.experiments.claims import outcomes as outcomes_
from rlroute.experiments.claims.claim import Base, Claim, Part, alike, arm, less, more
from rlroute.experiments.claims.evidence import collect, outcome
from rlroute.experiments.claims.measures import MEASURES
from rlroute.experiments.claims.outcomes import faults, read_outcomes
from rlroute.experiments.claims.probes import Sample
from rlroute.experiments.claims.readings import together
from rlroute.experiments.claims.registration import Registration, registration_file
from rlroute.experiments.claims.run import run_claims
from rlroute.experiments.comparison.registration import read_registration
from rlroute.experiments.launch.jobs import Launch
from rlroute.experiments.statistics import t_interval
from rlroute.reading import read_run, read_runs
from rlroute.seal import of_part, seal
from rlroute.training import loop
from tests.commands import ran, refused, rlroute, stamps
from tests.tiny import DATA, MODEL, TRAIN

SWITCH = arm("switch:balance_weight=0.01")
KEPT = arm("switch:balance_weight=0.1", checkpoint_every=4, num_shared_experts=1)
MADE_UP: dict[str, Any] = {"source": "nobody", "anchor": "no figures", "tier": "quick", "seeds": (0, 1, 2)}
FIRST = Claim(
    id="1",
    statement="Hashing and switch are one.",
    arms={"hash": arm("hash"), "switch": SWITCH},
    parts=(
        alike("hash", "switch", "they are the same within 9 bits", margin=9),
        less("max_vio", "switch", "hash", "switch is more even"),
        Part("it costs about the same", "cost_ratio", {"hash": 1.0, "switch": -1.0}, above=0.5, below=2),
        Part("it is no worse by 9 bits at equal time", "bits_at_equal_time", {"hash": 1.0, "switch": -1.0}, below=9),
    ),
    **MADE_UP,
)
SECOND = Claim(
    id="2",
    statement="Switch is worse than a wider one.",
    arms={"switch": SWITCH, "wide": arm("switch:balance_weight=0.01", d_expert=16)},
    parts=(more("bits", "switch", "wide", "by 9 bits at least", by=9),),
    **MADE_UP,
)
LACKING = Claim(id="3", statement="Cannot be said.", lacks="a feature", **(MADE_UP | {"tier": "long"}))
CLAIMS = {"1": FIRST, "2": SECOND, "3": LACKING}
RUN = ("claims", "run", "1", "2", "--launcher", "local", "--out", "out")


@pytest.fixture(autouse=True, scope="module")
def made_up() -> Generator[None]:
    """A ledger of three claims whose runs take a second."""
    patch = pytest.MonkeyPatch()
    patch.setitem(claims.BASES, "quick", Base(DATA, MODEL, TRAIN))
    patch.setattr(ledger, "CLAIMS", CLAIMS)
    patch.setattr(page, "CLAIMS", CLAIMS)
    patch.setattr(page, "THEMES", {"Made up": tuple(CLAIMS.values())})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two claims were run; nobody may change it."""
    folder = tmp_path_factory.mktemp("claims")
    with contextlib.chdir(folder):
        (folder / "printed").write_text(ran(*RUN))
    return folder


@pytest.fixture
def copy(stored: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stored, tmp_path / "copy"))


def run_again(folder: Path, *chosen: Claim) -> list[Any]:
    """Run claims in a folder's store; what has no verdict raises."""
    found: list[Any] = []
    lacking = run_claims(
        chosen, Launch(store=folder / "runs", launcher="local"), found=found.append, say=lambda line: None
    )
    if lacking:
        raise ComparisonError("; ".join(lacking.values()))
    return found


def test_each_run_is_trained_once_and_says_for_which_claims(stored: Path) -> None:
    runs = {run.id: run for run in read_runs(stored / "runs")}
    assert len(runs) == 9  # three arms of three seeds: switch is in both claims
    for claim in (FIRST, SECOND):
        registered = read_registration(registration_file(stored / "runs", claim), Registration)
        assert registered["plan"]["claim"] == claim.to_dict() and registered["plan"]["there_before"] == []
        assert registered["sha256"] == of_part(registered["plan"])
        for config in claim.configs().values():
            for seed in claim.seeds:
                run = runs[config.run_id(seed)]
                assert run.config["asked"]["claims"][claim.id] == registered["sha256"]
                assert run.environment["begun"] >= registered["registered"]
    assert ran("verify", stored / "runs") == ""


def test_outcomes_are_what_the_records_give(stored: Path) -> None:
    outcomes = read_outcomes(stored / "out" / "claims.jsonl")
    assert list(outcomes) == ["1", "2"] and list(faults(outcomes, CLAIMS)) == []
    configs = FIRST.configs()
    finals: dict[Any, Any] = {
        (name, seed): read_run(stored / "runs" / config.run_id(seed)).summary
        for name, config in configs.items()
        for seed in FIRST.seeds
    }
    diffs = [
        finals["hash", s]["final"]["bits_per_byte"] - finals["switch", s]["final"]["bits_per_byte"] for s in range(3)
    ]
    first, found = outcomes["1"]["parts"][0], t_interval(diffs)
    assert list(first["values"].values()) == diffs
    assert first["effect"] == found.mean and first["interval"] == [found.low, found.high] and first["n"] == 3
    assert first["verdict"] == "holds" == outcomes["1"]["parts"][2]["verdict"]
    assert outcomes["2"]["verdict"] == "refuted"
    assert outcomes["1"]["cost"]["runs"] == 6 and outcomes["1"]["cost"]["tokens"] == 6 * 12 * 4 * 16
    printed = (stored / "printed").read_text()
    assert "2. Switch is worse than a wider one. refuted" in printed and "outcomes in out/claims.jsonl" in printed


def test_running_again_trains_nothing_and_says_the_same(copy: Path) -> None:
    before, outcomes = stamps(copy / "runs"), (copy / "out" / "claims.jsonl").read_text()
    with contextlib.chdir(copy):
        assert ran(*RUN) == (copy / "printed").read_text()
    assert stamps(copy / "runs") == before and (copy / "out" / "claims.jsonl").read_text() == outcomes


def test_what_is_stopped_says_what_it_can_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, begun = loop.train, list[Any]()

    def stopped_in_the_eighth(*arguments: Any, **options: Any) -> Any:
        begun.append(arguments)
        if len(begun) == 8:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train", stopped_in_the_eighth)
    assert rlroute(*RUN).code == 130
    assert list(read_outcomes(Path("out/claims.jsonl"))) == ["1"]
    monkeypatch.setattr(loop, "train", train)
    ran(*RUN)
    assert list(read_outcomes(Path("out/claims.jsonl"))) == ["1", "2"] and len(read_runs(Path("runs"))) == 9


def test_the_page_is_checked_against_outcomes_and_outcomes_against_values(copy: Path) -> None:
    results, text = copy / "out" / "claims.jsonl", copy / "page.md"
    table = ("claims", "table", "--results", results)
    assert ran(*table, "--page", text) and ran(*table, "--page", text, "--check") == ""
    assert ran(*table) == text.read_text() and "| 3 | Cannot be said. | long | cannot be run yet |" in text.read_text()
    text.write_text(text.read_text().replace("refuted", "holds", 1))
    done = rlroute(*table, "--page", text, "--check")
    assert done.code == 1 and "page.md, line" in done.out
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for change, said in (
        ({"verdict": "holds"}, "verdict is 'holds', its parts give 'refuted'"),
        ({"sha256": 64 * "0"}, "claim 2 was changed after its runs"),
        ({"claim": "9"}, "claim 9: the ledger has no such claim"),
        ({"seeds": [0, 1]}, "its parts or seeds are not the claim's"),
        ({"parts": [lines[1]["parts"][0] | {"effect": 7.0}]}, "effect is 7.0, its values give"),
        ({"parts": [lines[1]["parts"][0] | {"above": 1.0}]}, "above is 1.0, the claim says 9"),
        ({"parts": [lines[1]["parts"][0] | {"values": {"0": 1.0}}]}, "it has values of seeds 0, want all of"),
    ):
        results.write_text("".join(json.dumps(line) + "\n" for line in (lines[0], lines[1] | change)))
        assert said in rlroute(*table, "--check", "--page", text).out
        assert refused(rlroute(*table))
    results.write_text(json.dumps(lines[0] | {"verdict": "nice"}) + "\n")
    assert "verdict" in refused(rlroute(*table))
    results.write_text(2 * (json.dumps(lines[0]) + "\n"))
    assert "claim 1 is there twice" in refused(rlroute(*table))


def test_the_list_shows_verdicts_and_options_that_do_not_apply_are_refused(stored: Path) -> None:
    listed = ran("claims", "list", "--results", stored / "out" / "claims.jsonl")
    assert "| refuted |" in listed and "| cannot be run yet |" in listed
    assert "Cannot" not in ran("claims", "list", "--tier", "quick")
    for words, said in (
        (("list", "--check"), "--check True does not apply to claims list"),
        (("list", "1"), "--ids does not apply"),
        (("run", "1", "--page", "x"), "--page x does not apply to claims run"),
        (("table", "--store", "x"), "--store x does not apply to claims table"),
        (("table", "--tier", "gpu"), "--tier gpu does not apply"),
        (("table", "--results", "nowhere"), "nowhere"),
        (("run", "3", "--launcher", "local"), "claim 3 cannot be run: rlroute lacks a feature"),
        (("run", "4"), "claim '4': legal are 1 to 3"),
        (("run",), "wants ids of claims"),
    ):
        assert said in refused(rlroute("claims", *words))


# Held against what is published


Change = Callable[[Any], None]


def published(folder: Path, patch: pytest.MonkeyPatch, *changes: Change) -> Path:
    """Publish a folder's outcomes, the first of which is changed."""
    lines = [json.loads(line) for line in (folder / "out" / "claims.jsonl").read_text().splitlines()]
    for change in changes:
        change(lines[0])
    path = folder / "published.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    patch.setattr(outcomes_, "PUBLISHED", path)
    return path


def ends_of(values: list[float]) -> list[float | None]:
    found = t_interval(values)
    return [found.low, found.high]


def of_the_try(said: Any) -> None:
    """Change what is of the try, and what a clock moves: its part decides otherwise."""
    said |= {"commit": "another", "dirty": True, "registration": 64 * "2", "there_before": 3}
    said["cost"]["seconds"] += 7.5
    values = {"0": 9.5, "1": 10.0, "2": 10.5}
    interval = ends_of(list(values.values()))
    said["parts"][3] |= {"effect": 10.0, "interval": interval, "n": 3, "values": values, "undefined": []}
    said["parts"][3]["verdict"] = "inconclusive"
    said["verdict"] = together(part["verdict"] for part in said["parts"])


def part(number: int, **values: Any) -> Change:
    """Return what changes a part, counted from 1 on."""
    return lambda said: said["parts"][number - 1].update(values)


def test_what_a_clock_and_the_commit_move_is_no_difference(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(copy, monkeypatch, of_the_try)
    with contextlib.chdir(copy):
        said = ran(*RUN, "--check").splitlines()
    held = "    held against the published outcome bit for bit"
    assert held in said and f"{held}; a clock is in part 4: not held, nor what is decided by it" in said


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (part(1, effect=0.5), "claim 1: part 1: effect is "),
        (part(2, verdict="refuted"), "claim 1: part 2: verdict is "),
        (part(2, values={"0": 1.0, "1": 2.0, "2": 3.0}), "claim 1: part 2: values/0 is "),
        (part(3, n=2), "claim 1: part 3: n is 3, published is 2"),
        (lambda said: said["cost"].update(tokens=1), "claim 1: cost/tokens is 4608, published is 1"),
        (lambda said: said.update(sha256=64 * "3"), "claim 1: it was changed since it was published"),
        (lambda said: said.update(claim="7"), "claim 1: nothing of it is published"),
    ],
    ids=["effect", "verdict", "values", "n", "cost", "changed", "none"],
)
def test_what_is_not_what_is_published_is_named(
    change: Change, line: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(copy, monkeypatch, of_the_try, change)
    with contextlib.chdir(copy):
        done = rlroute(*RUN, "--check")
        assert done.code == 1 and any(said.startswith(line) for said in done.out.splitlines()), done
        assert rlroute(*RUN).code == 0, "nothing is held where nobody asks"


def test_on_another_kind_of_cpu_effects_are_held_to_the_published_intervals(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_outcomes(copy / "out" / "claims.jsonl")["1"]["parts"][0]
    effect, ends = first["effect"], first["interval"]
    assert effect is not None and ends is not None
    half = (ends[1] - ends[0]) / 2

    def elsewhere(said: Any) -> None:
        said["cpu_capability"] = "OTHER"

    for shift, findings in ((0.9 * half, 0), (-0.9 * half, 0), (1.1 * half, 1), (-1.1 * half, 1)):
        moved = part(1, effect=effect + shift, interval=[end + shift for end in ends])
        published(copy, monkeypatch, of_the_try, elsewhere, moved)
        with contextlib.chdir(copy):
            done = rlroute(*RUN, "--check")
        assert "by the published intervals (cpu_capability OTHER, here " in done.out and done.code == findings
        assert sum("part 1: effect is" in line and "OTHER" in line for line in done.out.splitlines()) == findings
    published(copy, monkeypatch, of_the_try, lambda said: said.pop("device_name"))  # what is not said is not known
    with contextlib.chdir(copy):
        assert "by the published intervals (device_name unknown, here " in ran(*RUN, "--check")
    published(copy, monkeypatch, of_the_try, lambda said: said.update(core=64 * "1"))
    with contextlib.chdir(copy):
        assert f"by the published intervals (core {24 * '1'}, here " in ran(*RUN, "--check")
    published(copy, monkeypatch, elsewhere, part(2, verdict="holds", n=2))
    with contextlib.chdir(copy):
        lines = [line.split() for line in rlroute(*RUN, "--check").out.splitlines()]
    assert [line[4] for line in lines if line[:4] == ["claim", "1:", "part", "2:"]] == ["n", "verdict"]


def test_a_page_of_what_is_published_is_one_s_own_but_for_clock_and_commit(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(copy, monkeypatch, of_the_try)
    text = copy / "page.md"
    mine = ("claims", "table", "--check", "--page", text, "--results", copy / "out" / "claims.jsonl")
    ran("claims", "table", "--page", text)
    assert "another (changed)" in text.read_text() and "+10.0000" in text.read_text()
    assert ran(*mine) == ran("claims", "table", "--check", "--page", text) == ""
    values = {"0": 1.1, "1": 1.2, "2": 1.3}
    other = part(3, values=values, effect=1.2, interval=ends_of(list(values.values())))
    published(copy, monkeypatch, of_the_try, other)
    ran("claims", "table", "--page", text)
    done = rlroute(*mine)
    assert done.code == 1 and "it costs about the sa" in done.out


# What was changed is caught


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def folder_of(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / FIRST.configs()[name].run_id(seed)


def test_a_claim_that_was_changed_after_its_registration_is_refused(copy: Path) -> None:
    easier = replace(FIRST, parts=(replace(FIRST.parts[0], above=-99.0), *FIRST.parts[1:]))
    with pytest.raises(ConfigError, match=r"claim-1\.json was registered with -9, now it is -99"):
        run_again(copy, easier)
    path = registration_file(copy / "runs", FIRST)
    edit(path, lambda said: said["plan"]["claim"].update(statement="Other."))
    with pytest.raises(StoreError, match="was changed after it was registered"):
        run_again(copy, FIRST)
    edit(path, lambda said: said.update(sha256=of_part(said["plan"])))
    with pytest.raises(ConfigError, match=r"was registered with 'Other\.'"):
        run_again(copy, FIRST)
    path.unlink()  # and made anew
    with pytest.raises(
        StoreError, match=r"claim-1\.json is gone, and was there before the first run: run \S+ was trained"
    ):
        run_again(copy, easier)
    assert not path.exists()


def test_a_missing_seed_is_named(copy: Path) -> None:
    shutil.rmtree(folder_of(copy, "hash", 1))
    with pytest.raises(ComparisonError, match=r"claim 1: seed 1 of hash is missing: \S+hash-\S+-s1 holds no ended run"):
        collect(FIRST, copy / "runs")


def reseal(folder: Path) -> None:
    """Let an edited record's seal fit again."""
    run = read_run(folder)
    parts = {name: getattr(run, name) for name in ("config", "environment", "evals", "train", "loads", "summary")}
    (folder / "seal.json").write_text(json.dumps(seal(parts)))


def test_an_edited_record_is_named_and_so_are_other_initial_weights(copy: Path) -> None:
    folder = folder_of(copy, "hash", 1)
    kept = (folder / "summary.json").read_text()
    edit(folder / "summary.json", lambda said: said["model"].update(training_flops=1))
    with pytest.raises(ComparisonError, match=rf"claim 1: {folder.name}: summary.json: .*edited after the run ended"):
        collect(FIRST, copy / "runs")
    (folder / "summary.json").write_text(kept)
    edit(folder / "summary.json", lambda said: said["fingerprint"].update(shared=64 * "a"))
    reseal(folder)
    with pytest.raises(ComparisonError, match=r"fingerprint\.shared differs: .* has 'aaaa"):
        collect(FIRST, copy / "runs")


def test_a_field_that_no_arm_gives_must_be_the_same(copy: Path) -> None:
    silent = replace(SECOND, id="5", arms={**SECOND.arms})
    assert silent.deliberate(("switch", "wide")) == {"model.d_expert"}
    collect(silent, copy / "runs")
    unsaid = type("Unsaid", (Claim,), {"deliberate": lambda self, arms: frozenset()})
    with pytest.raises(ComparisonError, match=r"config\.model\.d_expert differs"):
        collect(unsaid(**{f: getattr(silent, f) for f in silent.__dataclass_fields__}), copy / "runs")


def test_a_run_that_fails_leaves_its_claims_without_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = loop.train

    def failing(config: Any, *arguments: Any, **options: Any) -> Any:
        if config.model.d_expert == 16:
            raise ConfigError("no room")
        return train(config, *arguments, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "train", failing)
    done = rlroute(*RUN)
    assert done.code == 1 and "no verdict: claim 2: seed 0 of wide is missing" in done.err and "no room" in done.err
    assert list(read_outcomes(Path("out/claims.jsonl"))) == ["1"]


def test_where_a_value_is_not_defined_nothing_is_decided(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def undefined(sample: Sample) -> float | None:
        seed = sample.record.config["seed"]
        return None if seed == 2 else 1.0 + seed

    monkeypatch.setitem(MEASURES, "bits", replace(MEASURES["bits"], of=undefined))
    registered: Any = read_registration(registration_file(copy / "runs", FIRST), Registration)
    found = outcome(FIRST, registered, copy / "runs")
    (first, *_) = found["parts"]
    assert first["verdict"] == found["verdict"] == "inconclusive" and first["undefined"] == ["hash, seed 2"]
    assert first["values"] == {"0": 0, "1": 0} and list(faults({"1": found}, CLAIMS)) == []


# By weights


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A run that kept its checkpoints, with a shared expert."""
    store, config = tmp_path_factory.mktemp("kept"), KEPT.on(claims.BASES["quick"])
    loop.train(config, 0, store, keep="all")
    return Sample(read_run(store / config.run_id(0)), store)


def measured(sample: Sample, name: str) -> float:
    value = MEASURES[name].of(sample)
    assert value is not None
    return value


def test_logits_are_those_of_validation(kept: Sample) -> None:
    seen: list[torch.Tensor] = []
    router: Any = kept.trained.model.routers[0]
    hook = router.scores.register_forward_hook(lambda module, inputs, logits: seen.append(logits.detach().double()))
    size = measured(kept, "logit_size")
    hook.remove()
    assert size == pytest.approx(float(torch.cat(seen).exp().sum(1).log().square().mean().sqrt()), rel=1e-6)


def test_prefixes_end_where_the_whole_is_read_by_a_causal_router(kept: Sample) -> None:
    final = kept.record.summary["final"]
    assert final is not None
    whole, nats, text = list[torch.Tensor](), 0.0, 0.0
    run = kept.trained
    hook = run.model.unembed.register_forward_hook(lambda module, inputs, logits: whole.append(logits.detach()))
    assert measured(kept, "logit_size") and whole
    hook.remove()
    for batch, logits in zip(kept.batches, whole, strict=True):
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), torch.from_numpy(batch.targets_BS).flatten(), reduction="none"
        ).view(batch.targets_BS.shape)
        nats += float(losses[:, 7::8].double().sum())
        text += float(run.corpus.token_bytes_V[batch.targets_BS[:, 7::8]].sum())
    assert measured(kept, "prefix_bits") == pytest.approx(nats / text / 0.6931471805599453, rel=1e-5)


def test_what_experts_are_worth_and_when_routes_settle(kept: Sample) -> None:
    assert measured(kept, "without_shared") != 0 and measured(kept, "without_best") != 0
    assert -1 <= measured(kept, "noise_gini") <= 1
    assert MEASURES["settled_early"].of(kept) is None  # a tenth of 12 steps is no checkpoint
    from rlroute.experiments.claims.probes import settled, unsettled

    assert settled(1.0)(kept) == 1 and unsettled(1.0)(kept) == 0
    early, late = settled(1 / 3)(kept), unsettled(1 / 3)(kept)
    assert early is not None and late is not None and 0 < early <= 1 and 0 <= late <= 1
    assert 1 - early <= late  # a choice that is another is a set that is another
