"""In a real browser: what a reader sees of the site and the slides, and a slider that moves.

Run by ``make test-browser``, which builds the pages first.
"""

import json
import os
import re
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
INDEXES = [page for page in PAGES if page.name.startswith("index.")]
DECKS = [page for page in PAGES if ".slides." in page.name and page not in INDEXES]
LESSONS = [page for page in PAGES if page not in DECKS + INDEXES]
NOTEBOOK = "anchor_walkthrough.ipynb"
PATIENCE = 180  # seconds


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    flags = ["headless=new", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in quiet)]
    flags += [f"user-data-dir={tmp_path / 'profile'}", "window-size=1400,1000"]
    flags += ["host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # this machine only
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


def requests_of(browser) -> tuple[list[str], list[str]]:
    """Addresses that the page asked for, and those of them that did not come."""
    asked, failed = {}, []
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        values = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            asked[values["requestId"]] = values["request"]["url"]
        elif event["method"] == "Network.loadingFailed" and values["requestId"] in asked:
            failed.append(asked[values["requestId"]])  # else: the empty page that came before
    # MathJax has an empty font of its own, whose address is about:blank
    return list(asked.values()), [url for url in failed if url != "about:blank"]


def opened(browser, page: Path) -> None:
    """The page is loaded, its formulas are set, and a deck has begun."""
    browser.get(page.as_uri())
    wait = WebDriverWait(browser, PATIENCE)
    wait.until(lambda b: b.execute_script("return document.readyState") == "complete")
    if page not in INDEXES:
        typeset(browser)
    if page in DECKS:
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".reveal.ready section.present"))


def typeset(browser) -> None:
    """Wait until MathJax has nothing left to do."""
    browser.execute_async_script("const done = arguments[0]; MathJax.Hub.Queue(() => done())")


def test_there_are_pages():
    stems = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {page.name for page in PAGES} == {
        f"{s}{end}" for s in stems | {"index"} for end in (".html", ".slides.html")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_needs_no_network_and_lacks_no_file(page, browser):
    opened(browser, page)
    broken = "i => !i.complete || !i.naturalWidth || i.alt.length < 30"
    assert browser.execute_script(f"return [...document.images].filter({broken}).length") == 0
    asked, failed = requests_of(browser)
    assert asked
    assert [url for url in asked if url.startswith(("http", "ws"))] == []
    assert failed == []


# Of each formula on a page or on the slide that is shown: its width, and that of each letter.
FORMULAS = """
const wide = element => element.getBoundingClientRect().width;
const place = window.Reveal ? Reveal.getCurrentSlide() : document;
return [...place.querySelectorAll(".MathJax")].map(formula => {
  const letters = [...formula.querySelectorAll(".mi, .mn, .mo, .mtext")];
  const seen = letters.filter(letter => letter.innerText.trim());
  return {width: wide(formula), letters: seen.map(wide)};
});"""
# What stands in the text of a page or slide, formulas and code left out.
PROSE = """
const copy = (document.querySelector(".reveal") || document.body).cloneNode(true);
copy.querySelectorAll("pre, code, script, style, .MathJax, .MathJax_Preview, .jp-CodeCell")
  .forEach(element => element.remove());
return copy.textContent;"""
SLIDES_WITH_FORMULAS = """
return Reveal.getSlides().filter(s => s.querySelector(".MathJax")).map(s => Reveal.getIndices(s));
"""


def fonts_of_formulas(browser) -> list[dict]:
    """The fonts that the browser really used for the formulas that can be seen."""
    for domain in ("DOM", "CSS"):
        browser.execute_cdp_cmd(f"{domain}.enable", {})
    root = browser.execute_cdp_cmd("DOM.getDocument", {"depth": 0})["root"]["nodeId"]
    place = ".present:not(.stack) " if browser.find_elements(By.CSS_SELECTOR, ".reveal") else ""
    query = {"nodeId": root, "selector": f"{place}.MathJax span"}
    nodes = browser.execute_cdp_cmd("DOM.querySelectorAll", query)["nodeIds"]
    return [
        font
        for node in nodes
        for font in browser.execute_cdp_cmd("CSS.getPlatformFontsForNode", {"nodeId": node})[
            "fonts"
        ]
    ]


def have_widths(browser) -> bool:
    formulas = browser.execute_script(FORMULAS)
    letters = [min(formula["letters"], default=0) for formula in formulas]
    return bool(formulas) and min(f["width"] for f in formulas) > 2 and min(letters) > 1  # px


def assert_formulas_are_drawn(browser) -> None:
    WebDriverWait(browser, 60).until(have_widths)  # a deck sets a slide anew when it comes
    fonts = fonts_of_formulas(browser)
    assert len(fonts) >= len(browser.execute_script(FORMULAS))
    assert {font["familyName"].split()[0] for font in fonts} == {"STIX"}
    assert all(font["isCustomFont"] for font in fonts)  # from a file of the page


@pytest.mark.parametrize("page", [p for p in PAGES if p not in INDEXES], ids=lambda page: page.name)
def test_formulas_are_drawn_in_the_font_that_is_shipped(page, browser):
    opened(browser, page)
    if page in DECKS:
        browser.execute_script("Reveal.configure({fragments: false})")  # a slide is shown at once
        slides = browser.execute_script(SLIDES_WITH_FORMULAS)
        assert slides or page.name.startswith("own_data")  # whose one formula is not on a slide
        for slide in slides:
            browser.execute_script("Reveal.slide(arguments[0].h, arguments[0].v)", slide)
            assert_formulas_are_drawn(browser)
    else:
        unfold = "document.querySelectorAll('details').forEach(d => { d.open = true; })"
        browser.execute_script(unfold)  # as a reader does who looks at the solutions
        assert_formulas_are_drawn(browser)
    assert requests_of(browser)[1] == []
    prose = browser.execute_script(PROSE)
    assert len(prose.split()) > 300
    assert re.findall(r"\$.{0,40}|\\[a-zA-Z(\[].{0,40}|Math Processing Error", prose) == []
    assert browser.find_elements(By.CSS_SELECTOR, ".MathJax_Error, .merror, .noError") == []


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.name)
def test_a_solution_is_seen_only_when_it_is_opened(page, browser):
    notebook = json.loads((ROOT / "notebooks" / f"{page.stem}.ipynb").read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if "hide-cell" in c["metadata"].get("tags", [])]
    assert cells
    opened(browser, page)
    folded = browser.find_elements(By.TAG_NAME, "details")
    assert len(folded) == len(cells)
    for number, (details, cell) in enumerate(zip(folded, cells, strict=True), 1):
        (summary,) = details.find_elements(By.TAG_NAME, "summary")
        code, output = details.find_elements(By.CSS_SELECTOR, "pre")[:2]
        assert summary.text == f"Solution to exercise {number}"
        assert (code.is_displayed(), output.is_displayed()) == (False, False)
        summary.click()
        assert (code.is_displayed(), output.is_displayed()) == (True, True)
        assert "".join(cell["source"]).splitlines()[-1].strip() in code.text
        assert f"{number}: right" in details.text


SETTINGS = {
    # all cells are in the page, seen or not
    "notebook-extension/tracker": {"windowingMode": "none"},
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


# JavaScript: the notebook that is open has a kernel
HAS_KERNEL = """
return !!window.jupyterapp && [...jupyterapp.shell.widgets("main")]
  .some(panel => panel.sessionContext?.session?.kernel);"""
RUN_ALL = "jupyterapp.commands.execute('notebook:run-all-cells').then(arguments[0], arguments[0])"


def test_a_slider_moves_its_picture(lab, browser):
    browser.get(lab)
    wait = WebDriverWait(browser, PATIENCE)
    wait.until(lambda b: b.execute_script(HAS_KERNEL))
    # the command below goes to what has the focus
    browser.find_element(By.CSS_SELECTOR, ".jp-Notebook .jp-Cell").click()
    browser.execute_async_script(RUN_ALL)
    sliders = (By.CSS_SELECTOR, ".widget-slider .noUi-handle")
    handle = wait.until(lambda b: b.find_elements(*sliders))[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)

    def picture(_) -> str | None:
        box = handle.find_element(By.XPATH, "ancestor::div[contains(@class, 'widget-interact')]")
        pictures = box.find_elements(By.CSS_SELECTOR, "img")
        return pictures[0].get_attribute("src") if pictures else None

    before = wait.until(picture)
    handle.send_keys(Keys.ARROW_RIGHT)
    wait.until(lambda b: picture(b) not in (None, before))
