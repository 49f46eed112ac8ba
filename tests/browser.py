"""In a real browser: a slider of a notebook moves its picture, and no page of site or slides asks the network.

Run by ``make test-browser``, which builds the pages first.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "site").glob("*.html"))
NOTEBOOK = "anchor_walkthrough.ipynb"
PATIENCE = 180  # seconds


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    for flag in (
        "headless=new",
        "no-sandbox",
        "no-first-run",
        *(f"disable-{name}" for name in quiet),
    ):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1400,1000")
    options.add_argument(
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    )  # no network but this machine
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


def requests_of(browser) -> list[str]:
    """Addresses that the page asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]


def test_there_are_pages():
    stems = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {page.name for page in PAGES} == {
        f"{s}{end}" for s in stems | {"index"} for end in (".html", ".slides.html")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_needs_no_network(page, browser):
    browser.get(page.as_uri())
    WebDriverWait(browser, PATIENCE).until(
        lambda b: b.execute_script("return document.readyState") == "complete"
    )
    if "$" in page.read_text(encoding="utf-8") and "index" not in page.name:
        WebDriverWait(browser, PATIENCE).until(
            lambda b: b.find_elements(By.CSS_SELECTOR, ".MathJax, .MathJax_CHTML, mjx-container")
        )
    asked = requests_of(browser)
    assert asked
    assert [url for url in asked if url.startswith(("http", "ws"))] == []
    if ".slides." in page.name and "index" not in page.name:
        WebDriverWait(browser, PATIENCE).until(
            lambda b: b.find_elements(By.CSS_SELECTOR, ".reveal.ready section.present")
        )
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth || i.alt.length < 30).length"
    assert browser.execute_script(broken) == 0
    assert "Math Processing Error" not in browser.page_source


SETTINGS = {
    "notebook-extension/tracker": {
        "windowingMode": "none"
    },  # all cells are in the page, seen or not
    "apputils-extension/notification": {"fetchNews": "false"},
}


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the notebook, so that the tree stays as it is; its address."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, folder)
    for name, values in SETTINGS.items():
        path = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        f"--port={port}",
        "--IdentityProvider.token=lesson",
        f"--ServerApp.root_dir={folder}",
    ]
    options += ["--LabApp.expose_app_in_browser=True", "--allow-root"]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "FRCNN_DATA": "glyphs",
        "FRCNN_FIGURES": str(tmp_path / "figures"),
    }
    environment = os.environ | offline | {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    environment.pop("FRCNN_STILL", None)  # here the controls are wanted
    with (tmp_path / "lab.log").open("w") as log:
        command = [sys.executable, "-m", "jupyter", "lab", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    while server.poll() is None and "is running at" not in (tmp_path / "lab.log").read_text():
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token=lesson"
    server.terminate()
    server.wait(20)


def test_a_slider_moves_its_picture(lab, browser):
    browser.get(lab)
    wait = WebDriverWait(browser, PATIENCE)
    has_kernel = "return [...jupyterapp.shell.widgets('main')].some(panel => panel.sessionContext?.session?.kernel)"
    wait.until(
        lambda b: b.execute_script("return !!window.jupyterapp") and b.execute_script(has_kernel)
    )
    browser.find_element(
        By.CSS_SELECTOR, ".jp-Notebook .jp-Cell"
    ).click()  # the command below goes to what has the focus
    run_all = (
        "jupyterapp.commands.execute('notebook:run-all-cells').then(arguments[0], arguments[0])"
    )
    browser.execute_async_script(run_all)
    handle = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".widget-slider .noUi-handle"))[
        0
    ]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)

    def picture(_) -> str | None:
        box = handle.find_element(By.XPATH, "ancestor::div[contains(@class, 'widget-interact')]")
        return next(
            (image.get_attribute("src") for image in box.find_elements(By.CSS_SELECTOR, "img")),
            None,
        )

    before = wait.until(picture)
    handle.send_keys(Keys.ARROW_RIGHT)
    wait.until(lambda b: picture(b) not in (None, before))
