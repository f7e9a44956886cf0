"""rlroute from Python, as a marimo notebook: `marimo edit docs/notebook.py`, or `python docs/notebook.py`."""

import marimo

app = marimo.App()


@app.cell(hide_code=True)
def _():
    import marimo as mo

    mo.md("""
    # Routers compared from Python

    `rlroute.compare`, `rlroute.judge` and `rlroute.load_runs` are the commands of these names. What is trained
    here is tiny, so that the whole notebook takes seconds on one core; with the defaults, and `Launch()`, it is
    `rlroute compare`.
    """)
    return (mo,)


@app.cell
def _():
    from pathlib import Path

    import rlroute

    published = Path(__file__).parents[1] / "experiments" / "results" / "comparison.jsonl"
    how = rlroute.Launch(store=Path("runs/notebook"), launcher="local")
    small = {
        "data": rlroute.DataConfig(spec="synth:documents=256,length=128", seq_len=32, eval_tokens=1024),
        "model": rlroute.ModelConfig(num_layers=1, d_model=16, num_heads=2, num_experts=4, d_expert=8),
        "train": rlroute.TrainConfig(steps=40, batch_size=8, warmup_steps=5, eval_every=20, log_every=5),
    }
    return how, published, rlroute, small


@app.cell
def _(how, rlroute, small):
    found = rlroute.compare(["switch", "hash", "dense"], seeds=3, tuned=False, how=how, **small)
    found
    return (found,)


@app.cell
def _(found):
    {label: str(verdict) for label, verdict in found.verdicts.items()}
    return


@app.cell
def _(found):
    table = found.frame(library="pandas").set_index("label")
    table[["bits_per_byte_mean", "bits_per_byte_low", "bits_per_byte_high", "difference_mean", "max_vio", "n"]]
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## One change, judged

    The plan is registered before the first run; seeds are added until there is a verdict, or are spent. The runs
    of `switch` above are used again.
    """)
    return


@app.cell
def _(how, rlroute, small):
    judged = rlroute.judge("unbalanced", against="switch", max_seeds=4, tuned=False, how=how, **small)
    str(judged.verdict), [str(look) for look in judged.looks]
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    ## Stored runs as DataFrames

    A row for each run, evaluation, logged training step, or expert. Of the published comparison in this repository
    (an evaluation every 40 of 500 steps, 8 seeds an entry): bits per byte, mean over seeds; and the share of the
    fullest expert at the end.
    """)
    return


@app.cell
def _(published, rlroute):
    evals = rlroute.load_runs(published, "evals", library="pandas")  # a store's folder does as well
    evals.pivot_table(index="step", columns="entry", values="bits_per_byte").iloc[[0, 2, 6, 12]].round(4)
    return


@app.cell
def _(published, rlroute):
    loads = rlroute.load_runs(published, "loads", library="pandas")
    last = loads[loads["step"] == loads["step"].max()]
    last.groupby(["entry", "seed"])["share"].max().groupby("entry").mean().round(3).to_frame("fullest expert")
    return


if __name__ == "__main__":
    app.run()
