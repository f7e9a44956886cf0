"""The pictures of the dashboard in the README: ``python -m tests.screenshots`` makes them anew.

It serves the published comparison, from the root of the repository, and needs playwright, and Chromium on the path.
"""

import shutil
import threading
from pathlib import Path

from rlroute.experiments.dashboard.app import make_app
from rlroute.experiments.dashboard.server import make_server

STORE, PICTURES = Path("experiments/results/comparison.jsonl"), Path("docs/images")
PAGE, DRAWN = "?page=verdicts", ".js-plotly-plot .scatterlayer .trace"


def main() -> None:
    """Make them."""
    from playwright.sync_api import sync_playwright

    server = make_server(make_app(STORE), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for scheme in ("light", "dark"):
                size = {"width": 1280, "height": 1280}
                page = browser.new_page(viewport=size, color_scheme=scheme)
                page.goto(f"http://127.0.0.1:{server.port}/{PAGE}")
                page.wait_for_selector(DRAWN)
                page.wait_for_timeout(1000)  # until marks stand where they stay
                page.screenshot(path=PICTURES / f"dashboard-{scheme}.png", full_page=True)
            browser.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    main()
