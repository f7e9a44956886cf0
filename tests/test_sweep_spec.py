"""The list of runs is a pure function of the file, and what means nothing is refused before any work."""

import json
import re

import pytest

from rlroute.errors import ConfigError
from rlroute.experiments.launch.jobs import Launch
from rlroute.experiments.launch.spec import SEARCH, apart, ranking, read_spec
from tests import ROOT
from tests.commands import refused, rlroute
from tests.test_table import eval_row, train_row


def spec(tmp_path, text, name="some.toml"):
    (tmp_path / name).write_text(text)
    return read_spec(tmp_path / name)


def configs(read):
    """Return each run's configuration as plain values, by its label and seed."""
    return {(job.label, job.seed): job.config.to_dict() for job in read.jobs("command")}


def test_documented_example_is_what_the_page_says(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.S)
    read = spec(tmp_path, text)
    jobs = read.jobs("command")
    # switch and reinforce: 2 rates, 2 weights, 2 draws; hash and dense have no such weight; 3 seeds each
    assert len(jobs) == (2 * 8 + 2 * 4) * 3 == len({job.id for job in jobs})
    assert {job.config.train.steps for job in jobs} == {400}
    assert read.launch(Launch()).cpus == 1 and read.search(jobs) is None


def test_a_ranking_leaves_out_what_was_lost_before_its_first_row(tmp_path):
    jobs = spec(tmp_path, "entries = ['hash', 'switch']\nseeds = 2\n").jobs("command")
    lines = [json.dumps(row) + "\n" for row in (train_row("switch", 0, 1), eval_row("switch", 0, 4, 0.0))]
    for job, rows in zip(jobs, (None, "", lines[0], "".join(lines)), strict=True):
        (tmp_path / job.id).mkdir()
        if rows is not None:
            (tmp_path / job.id / "metrics.jsonl").write_text(rows)
    (row,) = ranking(jobs, tmp_path).splitlines()[2:]
    bits = eval_row("switch", 0, 4, 0.0)["bits_per_byte"]
    assert row.split("|")[1:4] == [f" {bits:.4f} ", " 4 ", f" {jobs[3].label} "]


def test_a_grid_is_all_combinations_for_all_seeds(tmp_path):
    read = spec(tmp_path, "entries = ['hash']\nseeds = [3, 5]\n[grid]\ntrain.lr = [0.1, 0.2]\nmodel.k = [1, 2]\n")
    found = {(c["train"]["lr"], c["model"]["k"], seed) for (_, seed), c in configs(read).items()}
    assert found == {(lr, k, seed) for lr in (0.1, 0.2) for k in (1, 2) for seed in (3, 5)}
    assert "hash lr=0.1 k=2" in {job.label for job in read.jobs("command")}


def test_router_fields_go_where_they_belong_and_the_rest_is_trained_once(tmp_path):
    read = spec(tmp_path, "entries = ['hash', 'switch']\n[grid]\nrouter.balance_weight = [0.1, 0.2]\n")
    weights = [c["router"].get("balance_weight") for c in configs(read).values()]
    assert weights == [0.0, 0.1, 0.2]  # hash has no scores to balance


def test_tables_and_dotted_paths_are_the_same(tmp_path):
    one = spec(tmp_path, "entries = ['hash']\n[base]\ntrain.steps = 7\n")
    two = spec(tmp_path, "entries = ['hash']\n[base.train]\nsteps = 7\n")
    three = spec(tmp_path, "entries = ['hash']\n[base]\n'train.steps' = 7\n")
    assert one.jobs("c") == two.jobs("c") == three.jobs("c")


def test_draws_are_a_function_of_the_file_and_more_trials_move_none(tmp_path):
    text = """
entries = ["hash"]
[random]
trials = {trials}
[random.fields]
"train.lr" = {{ low = 1e-4, high = 1e-1, log = true }}
"model.num_experts" = {{ low = 4, high = 9 }}
"model.gate_form" = {{ choice = ["own", "unit"] }}
"""
    few, many = (list(configs(spec(tmp_path, text.format(trials=n))).values()) for n in (20, 60))
    assert many[: len(few)] == few and len(many) > 50
    rates = [c["train"]["lr"] for c in many]
    assert (
        all(1e-4 <= rate <= 1e-1 for rate in rates) and 15 < sum(rate < 1e-2 for rate in rates) * 60 / len(rates) < 55
    )
    experts = [c["model"]["num_experts"] for c in many]
    assert set(experts) == set(range(4, 10)) and all(isinstance(e, int) for e in experts)
    assert {c["model"]["gate_form"] for c in many} == {"own", "unit"}


def test_the_command_line_wins_over_the_file(tmp_path):
    read = spec(tmp_path, "entries = ['hash']\n[resources]\nworkers = 4\nexpert_parallel = 2\ngpus = 1\n")
    how = read.launch(Launch(expert_parallel=4, gpus=0), {"expert_parallel", "gpus"})
    assert (how.workers, how.expert_parallel, how.gpus) == (4, 4, 0)


def test_a_search_has_a_store_of_its_own_that_no_table_takes(tmp_path):
    read = spec(tmp_path, "entries = ['hash']\n[base]\ntrain.steps = 90\n[asha]\ngrace = 10\nreduction = 2\n")
    search = read.search(read.jobs("command"))
    assert search and (search.steps, search.grace, search.reduction) == (90, 10, 2.0)
    how = apart(Launch(store=tmp_path / "runs"), read.name)
    assert how.store == tmp_path / "runs" / "search-some" and (how.store / SEARCH).exists()
    for command in ("table", "report"):
        assert "trials of a search" in refused(rlroute(command, how.store))


GOOD = "entries = ['hash', 'switch']\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entries = [", "not TOML"),
        ("", "entries = None: want a list"),
        ("entries = []", r"entries = \[\]: want a list"),
        ("entries = ['nash']", "unknown router 'nash'"),
        (GOOD + "sedes = 3", "has 'sedes': legal are entries, seeds, base"),
        (GOOD + "seeds = 0", "seeds = 0: want a number of seeds"),
        (GOOD + "seeds = [-1]", r"seeds = \[-1\]: want"),
        (GOOD + "seeds = true", "seeds = True: want"),
        (GOOD + "base = 3", r"base = 3: want a table, \[base\]"),
        (GOOD + "[base]\ntrain.stpes = 3", "train has no field 'stpes'"),
        (GOOD + "[base]\ntrain.steps = 'many'", "train.steps = 'many': want int"),
        (GOOD + "[base]\nsteps = 3", "steps: legal are data.FIELD"),
        (GOOD + "[base]\ntrain.lr = -1.0", "train.lr = -1.0: legal are numbers above 0"),
        (
            GOOD + "[base]\nrouter.ema_decay = 0.9",
            "router.ema_decay: no entry's router has it, legal are .*balance_weight",
        ),
        (GOOD + "[grid]\ntrain.lr = 0.1", r"\[grid\] train.lr = 0.1: want a list"),
        (GOOD + "[grid]\ntrain.lr = []", r"\[grid\] train.lr = \[\]: want a list"),
        (GOOD + "[random]\ntrials = 0", r"\[random\] trials = 0: want a whole number from 1"),
        (GOOD + "[random]\ntrails = 2", r"\[random\] has 'trails': legal are trials, seed, fields"),
        (GOOD + "[random]\ntrials = 2\n[random.fields]\n'train.lr' = 3", "want { low, high }"),
        (GOOD + "[random]\ntrials = 2\n[random.fields]\n'train.lr' = { low = 2, high = 1 }", "want low below high"),
        (
            GOOD + "[random]\ntrials = 2\n[random.fields]\n'train.lr' = { low = 0, high = 1, log = true }",
            "above 0 where",
        ),
        (
            GOOD + "[random]\ntrials = 2\n[random.fields]\n'train.lr' = { low = 0, high = 'x' }",
            "high = 'x': want a number",
        ),
        (GOOD + "[random]\ntrials = 2\n[random.fields]\n'train.lr' = { choice = [] }", r"choice = \[\]: want a list"),
        (GOOD + "[resources]\ncores = 2", r"\[resources\] has 'cores': legal are cpus, gpus, workers"),
        (GOOD + "[resources]\nworkers = 0", "workers = 0: legal are numbers from 1"),
        (GOOD + "[resources]\ncpus = 'two'", "cpus = 'two': want float"),
        (GOOD + "seeds = 1000000000", r"1,000,000,000 seeds are 1,000,000,000 runs: legal are 10,000"),
        (GOOD + "seeds = 6000", "2 entries x 1 choices x 6,000 seeds are 12,000 runs"),
        (GOOD + "[random]\ntrials = 99999999999\n", "99,999,999,999 trials are"),
        (GOOD + f"[grid]\ntrain.lr = {[0.1] * 200}\ntrain.clip = {[1.0] * 200}", "are 40,000 runs"),
        (GOOD + "[grid]\ntrain.lr = [nan]", "grid/train/lr/0 = nan: want a finite number"),
        (GOOD + "[base]\ntrain.lr = -inf", "base/train/lr = -inf: want a finite number"),
        (GOOD + f"[base]\ntrain.lr = {'9' * 400}.5", "base/train/lr = inf: want a finite number"),
        (GOOD + f"seeds = {'9' * 5000}", "not TOML: Exceeds the limit"),
        (GOOD + f"seeds = [{2**70}]", "seeds/0 is a number of 71 bits: legal are 64"),
        (GOOD + f"seeds = {'[' * 3000}{']' * 3000}", "nested deeper than 32 levels"),
        (GOOD + f"[base]\n{'a.' * 3000}b = 1", "nested deeper than 32 levels"),
        (GOOD + "[base]\ntrain.steps = 1979-05-27", "base/train/steps = .*: want a number, a text, true or false"),
        (
            GOOD + f"[random]\ntrials = 2\n[random.fields]\n'train.steps' = {{ low = 1, high = {2**63} }}",
            "want a range that 64 bits hold",
        ),
        (
            GOOD + "[random]\ntrials = 2\n[random.fields]\n'train.lr' = { low = -1.7e308, high = 1.7e308 }",
            "want a range that 64 bits hold",
        ),
        (GOOD + "[asha]\nreduction = 2", r"\[asha\] grace = None: want a whole number"),
        (GOOD + "[asha]\ngrace = 2\nreduction = 1", r"\[asha\] reduction = 1: want a number above 1"),
    ],
)
def test_what_means_nothing_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        spec(tmp_path, text).jobs("command")
    assert [path.name for path in tmp_path.iterdir()] == ["some.toml"]


def test_none_and_a_mark_at_the_beginning_are_no_faults(tmp_path):
    text = "entries = ['reinforce']\n[grid]\nmodel.capacity_factor = ['none', 2.0]\nrouter.baseline = ['none']\n"
    (tmp_path / "some.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = [job.config.to_dict() for job in read_spec(tmp_path / "some.toml").jobs("command")]
    assert [c["model"]["capacity_factor"] for c in found] == [None, 2.0]
    assert {c["router"]["baseline"] for c in found} == {"none"}


def test_a_file_that_is_not_there_is_one_line_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "sweep nowhere.toml: cannot be read" in refused(rlroute("sweep", "nowhere.toml"))
    assert not list(tmp_path.iterdir())


def test_a_corpus_has_the_tokenizer_that_the_command_line_would_take(tmp_path):
    grid = '[grid]\n"data.spec" = ["package:sympy", "stdlib"]\n'
    for said, wanted in (("", ["bpe", "bytes"]), ('[base]\n"data.tokenizer" = "bytes"\n', ["bytes", "bytes"])):
        jobs = spec(tmp_path, f'entries = ["hash"]\n{said}{grid}').jobs("command")
        assert [job.config.data.tokenizer for job in jobs] == wanted


@pytest.mark.parametrize(("name", "value"), [("out", "x"), ("reference", "hash"), ("margin", 0.5)])
def test_a_search_takes_no_option_of_the_table_that_it_does_not_make(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.toml").write_text("entries = ['hash', 'switch']\n[asha]\ngrace = 10\nreduction = 2\n")
    said = refused(rlroute("sweep", "some.toml", f"--{name}", value))
    assert f"--{name} {value} does not apply to a search" in said and len(list(tmp_path.iterdir())) == 1
