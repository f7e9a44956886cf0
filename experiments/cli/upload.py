"""The command ``wandb``."""

from __future__ import annotations

from typing import Literal

import tyro

from rlroute.errors import StoreError
from rlroute.experiments.cli.common import RUNS, Store, select
from rlroute.faults import explain


def wandb(
    what: tyro.conf.Positional[Literal["push"]],
    store: Store = RUNS,
    only: tuple[str, ...] = (),
    mode: Literal["online", "offline"] = "online",
) -> None:
    """Upload stored runs to Weights & Biases, as they would have been while they were trained (docs/wandb.md).

    Args:
        what: push.
        store: a run store or a compact file.
        only: ids (or their starts) of the runs to take; all that have ended if none are given.
        mode: online; or offline, for `wandb sync`: in `wandb/` of each run's folder, or beside a compact file.
    """
    from rlroute.reading import read_runs
    from rlroute.sink import require
    from rlroute.upload import push

    require("rlroute wandb")
    records = select(store, only)[0] if only else read_runs(store)
    if not records:
        raise StoreError(f"{store} holds no ended run")
    for record in records:
        try:
            push(record, mode, store / record.id if store.is_dir() else store.parent)
        except Exception as error:  # wandb's own are of many classes without a common one
            raise StoreError(f"{record.id} was not uploaded: {explain(error)}") from error
        print(f"{record.id} {'uploaded' if mode == 'online' else 'written for wandb sync'}")
