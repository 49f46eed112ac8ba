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
    for flag in ("headless=new", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in quiet)):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1400,1000")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


def requests_of(browser) -> list[str]:
    """Addresses that the page asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def test_there_are_pages():
    stems = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {page.name for page in PAGES} == {
        f"{s}{end}" for s in stems | {"index"} for end in (".html", ".slides.html")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_needs_no_network(page, browser):
    browser.get(page.as_uri())
    WebDriverWait(browser, PATIENCE).until(lambda b: b.execute_script("return document.readyState") == "complete")
    if "$" in page.read_text(encoding="utf-8") and "index" not in page.name:
        WebDriverWait(browser, PATIENCE).until(
            lambda b: b.find_elements(By.CSS_SELECTOR, ".MathJax, .MathJax_CHTML, mjx-container")
        )
    asked = requests_of(browser)
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth || i.alt.length < 30).length"
    assert browser.execute_script(broken) == 0
    assert "Math Processing Error" not in browser.page_source


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the notebook, so that the tree stays as it is; its address."""
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=lesson", f"--ServerApp.root_dir={tmp_path}"]
    options += ["--LabApp.expose_app_in_browser=True", "--allow-root", "--LabApp.news_url="]
    quiet = {"HF_HUB_OFFLINE": "1", "FRCNN_DATA": "glyphs", "FRCNN_FIGURES": str(tmp_path / "figures")}
    environment = {k: v for k, v in os.environ.items() if k != "FRCNN_STILL"} | quiet
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options], stdout=log, stderr=log, env=environment
        )
    yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token=lesson"
    server.terminate()
    server.wait(20)


def test_a_slider_moves_its_picture(lab, browser):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            browser.get(lab)
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    wait = WebDriverWait(browser, PATIENCE)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-CodeCell"))
    wait.until(
        lambda b: b.execute_script(
            "return !!(window.jupyterapp && jupyterapp.shell.currentWidget.sessionContext?.session?.kernel)"
        )
    )
    browser.execute_async_script(
        "const done = arguments[0]; jupyterapp.commands.execute('notebook:run-all-cells').then(done, done)"
    )
    handles = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".widget-slider .noUi-handle"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handles[0])

    def picture(b):
        box = handles[0].find_element(By.XPATH, "ancestor::div[contains(@class, 'widget-interact')]")
        images = box.find_elements(By.CSS_SELECTOR, "img")
        return images[0].get_attribute("src") if images else None

    before = wait.until(picture)
    handles[0].send_keys(Keys.ARROW_RIGHT)
    wait.until(lambda b: picture(b) not in (None, before))
