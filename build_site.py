"""The committed notebooks as a static site and as lecture slides, both usable in a room without a network.

``python build_site.py html`` writes ``site/*.html``, ``python build_site.py slides`` writes ``site/*.slides.html``.
MathJax and reveal.js are copied beside them, so that no page asks another server for anything.
"""

import hashlib
import io
import shutil
import sys
import tarfile
import urllib.request
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from jupyter_server_mathjax.app import STATIC_ASSETS_PATH
from nbconvert import HTMLExporter, SlidesExporter

ROOT = Path(__file__).resolve().parent
SITE = ROOT / "site"
MATHJAX = "web/MathJax/MathJax.js?config=TeX-AMS_CHTML-full,Safe"
REVEAL = "https://registry.npmjs.org/reveal.js/-/reveal.js-4.6.1.tgz"
REVEAL_SHA256 = "4f4121ef2b8e7e9398bdecd7b3b6ce5e0ee3a2f5af221708eb6c4ce03bcae6be"
LONGEST_ON_A_SLIDE = 12  # lines of code; a picture that takes more is shown without its code
STYLE = """<style>
.reveal pre, .reveal .jp-OutputArea-output pre { white-space: pre-wrap; overflow-wrap: anywhere; }
</style>"""
NO_ALT = "No description has been provided for this image"  # what nbconvert writes


def fetch_reveal() -> None:
    """Unpack reveal.js into ``site/web``, downloaded once into the virtual environment."""
    package = ROOT / ".venv" / REVEAL.rpartition("/")[2]
    if not package.exists():
        package.write_bytes(urllib.request.urlopen(REVEAL, timeout=60).read())
    if hashlib.sha256(package.read_bytes()).hexdigest() != REVEAL_SHA256:
        package.unlink()
        raise SystemExit(f"{REVEAL} is not the file that was tested; try again")
    with tarfile.open(fileobj=io.BytesIO(package.read_bytes())) as archive:
        for member in archive.getmembers():
            member.name = member.name.removeprefix("package/")
            if member.name.startswith(("dist/", "plugin/notes/")):
                archive.extract(member, SITE / "web" / "reveal.js", filter="data")


def described(page: str, notebook: nbformat.NotebookNode, skipped: bool) -> str:
    """Give every picture of a page the description that its cell carries (metadata ``alt``)."""
    descriptions = [
        cell.metadata["alt"]
        for cell in notebook.cells
        if not (skipped and cell.metadata.get("slideshow", {}).get("slide_type") == "skip")
        for output in cell.get("outputs", [])
        if any(kind.startswith("image/") for kind in output.get("data", {}))
    ]
    soup = BeautifulSoup(page, "html.parser")
    for picture, description in zip(soup.find_all("img", alt=NO_ALT), descriptions, strict=True):
        picture["alt"] = description
    return str(soup)


def without_long_code(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """For a deck: a picture fills its slide, so code that would push it off the screen stays in the notebook."""
    for cell in notebook.cells:
        has_picture = any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {}))
        if has_picture and len(cell.source.splitlines()) > LONGEST_ON_A_SLIDE:
            cell.metadata["transient"] = {"remove_source": True}
    return notebook


def export(kind: str) -> None:
    """One page for each notebook, and for the site an index."""
    local = {"mathjax_url": MATHJAX, "require_js_url": "", "mermaid_js_url": "", "jquery_url": ""}
    if kind == "html":
        exporter, ending = HTMLExporter(template_name="lab", **local), ".html"
    else:
        fetch_reveal()
        options = {"reveal_url_prefix": "web/reveal.js", "reveal_theme": "white", "font_awesome_url": ""}
        exporter, ending = SlidesExporter(**options, **local), ".slides.html"
    (SITE / "web").mkdir(parents=True, exist_ok=True)
    shutil.copytree(Path(STATIC_ASSETS_PATH) / "MathJax", SITE / "web" / "MathJax", dirs_exist_ok=True)
    links = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if kind == "slides":
            notebook = without_long_code(notebook)
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        page = page.replace("</head>", f"{STYLE}</head>", 1)
        (SITE / f"{path.stem}{ending}").write_text(described(page, notebook, kind == "slides"), encoding="utf-8")
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        links.append(f'<li><a href="{path.stem}{ending}">{title}</a></li>')
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Faster R-CNN from scratch</title>'
    (SITE / f"index{ending}").write_text(f"{head}<ul>{''.join(links)}</ul></html>", encoding="utf-8")
    print(SITE / f"index{ending}")


if __name__ == "__main__":
    if sys.argv[1:] not in (["html"], ["slides"]):
        raise SystemExit("python build_site.py html|slides")
    export(sys.argv[1])
