"""The command ``dashboard``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from rlroute.errors import StoreError
from rlroute.experiments.cli.common import RUNS, Store
from rlroute.experiments.verdicts import MARGIN
from rlroute.extras import missing
from rlroute.limits import Between, Positive

TOKEN = "RLROUTE_TOKEN"


def dashboard(
    store: Store = RUNS,
    host: str = "127.0.0.1",
    port: Annotated[int, Between(0, 65535)] = 8050,
    token: str | None = None,
    reference: str | None = None,
    margin: Positive = MARGIN,
    results: Path = Path("results"),
) -> None:
    """Serve a page over a run store that follows it while runs go on: progress, curves, loads, verdicts, one run's
    record. Ctrl-C ends it.

    Args:
        store: a run store, which may be on a shared folder and need not be there yet, or a compact file.
        host: where to listen; beyond loopback only with a token.
        port: 0 for any that is free.
        token: who has it may look, at /?token=...; at least 16 characters. Others of this machine see it in the list of
            processes: RLROUTE_TOKEN in the environment is not seen there.
        reference: the entry that differences are taken to.
        margin: a difference below it does not matter, in bits per byte.
        results: the folder of what other commands published; what is not there is taken from rlroute's own records.
    """
    from rlroute.experiments.dashboard.server import check_address, make_server, protect

    token = token or os.environ.get(TOKEN) or None
    check_address(host, token)
    if not store.exists() and not store.parent.is_dir():
        raise StoreError(f"no run store at {store}, and no folder in which one could be made")
    try:
        from rlroute.experiments.dashboard.app import make_app
    except ModuleNotFoundError as error:
        raise missing("the dashboard", (error.name or "dash").partition(".")[0]) from error
    from rlroute.experiments.dashboard.published import read_results

    app = make_app(store, read_results(results), reference, margin)
    protect(app, token)
    server = make_server(app, host, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"dashboard of {store} at http://{shown}:{server.port}/{'?token=...' if token else ''}", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
