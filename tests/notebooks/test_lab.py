"""The notebooks where a reader meets them: JupyterLab, in a real browser."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnlab.doctor import BROWSERS

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
START_SECONDS, RUN_SECONDS = 90, 300


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab on a copy of the notebooks."""
    for name in ("figures", "docs", "attnlab", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    token = secrets.token_hex()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={token}", str(tmp_path / "notebooks")]
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # else what is scrolled out of sight is not in the page
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyterlab", *options]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < until and server.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail((tmp_path / "log").read_text())
        yield f"{address}/lab/tree/01_what_sharing_heads_does.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)


def test_a_reader_opens_the_first_notebook_and_runs_all(lab: str) -> None:
    """A notebook that runs under a test's own kernel may still not open where its readers are: another kernel name,
    a folder without the figures, outputs that no browser draws."""
    from playwright.sync_api import expect, sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is installed; install one: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(lab)
        notebook = page.locator(".jp-Notebook")
        expect(notebook.get_by_role("heading", name="What sharing heads does")).to_be_visible(timeout=60_000)
        page.get_by_role("menuitem", name="Edit", exact=True).click()
        page.get_by_role("menuitem", name="Clear Outputs of All Cells").click()
        expect(notebook.locator(".jp-OutputArea-output")).to_have_count(0)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        expect(page.locator(".jp-RenderedImage img").first).to_be_attached(timeout=1000 * RUN_SECONDS)
        waiting = page.locator(".jp-InputPrompt").filter(has_text="[*]")
        expect(waiting).to_have_count(0, timeout=1000 * RUN_SECONDS)
        assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
        shown = page.locator(".jp-RenderedImage img").first
        shown.scroll_into_view_if_needed()
        assert shown.evaluate("image => image.naturalWidth") > 500
        browser.close()
