"""The committed notebooks as a static site and as lecture slides, both usable in a room without a network.

``python build_site.py html`` writes ``site/*.html``, ``python build_site.py slides`` writes ``site/*.slides.html``.
MathJax, reveal.js and RequireJS are copied beside them, so that no page asks another server for anything.
``python build_site.py fetch`` downloads the latter two, once, into the virtual environment.
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
MATHJAX = "web/mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe"
PACKAGES = {  # on npm: name, version, SHA-256, and what the decks need of it
    "reveal.js": (
        "4.6.1",
        "4f4121ef2b8e7e9398bdecd7b3b6ce5e0ee3a2f5af221708eb6c4ce03bcae6be",
        ("dist/", "plugin/notes/", "LICENSE"),
    ),
    "requirejs": (
        "2.3.7",
        "31f3330c978fb28684622fe71165dc946432cf0210b2ea8a1ca0233e70f2737d",
        ("require.js",),
    ),
}
LONGEST_ON_A_SLIDE = 5  # lines of code; a picture that takes more is shown without its code
STYLE = """<style>
.reveal { --jp-content-font-size1: 22px; --jp-code-font-size: 18px; }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.reveal .jp-OutputArea img { zoom: 1.3; max-height: 430px; }
.reveal .jp-RenderedMarkdown pre { width: 100%; font-size: var(--jp-code-font-size); box-shadow: none; }
.reveal [data-mime-type$="stderr"] { display: none; }
</style>"""
NO_ALT = "No description has been provided for this image"  # what nbconvert writes


def fetch(name: str) -> bytes:
    """A package from npm, downloaded once into the virtual environment."""
    version, digest, _ = PACKAGES[name]
    path = ROOT / ".venv" / f"{name}-{version}.tgz"
    if not path.exists():
        url = f"https://registry.npmjs.org/{name}/-/{path.name}"
        path.write_bytes(urllib.request.urlopen(url, timeout=60).read())
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        path.unlink()
        raise SystemExit(f"{path.name} is not the file that was tested; try again")
    return path.read_bytes()


def unpack(name: str) -> None:
    """What the decks need of a package, into ``site/web``."""
    with tarfile.open(fileobj=io.BytesIO(fetch(name))) as archive:
        for member in archive.getmembers():
            member.name = member.name.removeprefix("package/")
            if member.name.startswith(PACKAGES[name][2]):
                archive.extract(member, SITE / "web" / name, filter="data")


def shows_a_picture(cell: nbformat.NotebookNode) -> bool:
    return any(
        kind.startswith("image/")
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    )


def shown_on_slides(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without the cells that are skipped; code that would push its picture off the screen stays in the notebook."""
    notebook.cells = [
        cell for cell in notebook.cells if cell.metadata.slideshow.slide_type != "skip"
    ]
    for cell in notebook.cells:
        if shows_a_picture(cell) and len(cell.source.splitlines()) > LONGEST_ON_A_SLIDE:
            cell.metadata["transient"] = {"remove_source": True}
    return notebook


def finished(page: str, notebook: nbformat.NotebookNode) -> str:
    """Give every picture of a page the description that its cell carries, and take out scripts without a source."""
    soup = BeautifulSoup(page, "html.parser")
    pictures = soup.find_all("img", alt=NO_ALT)
    for picture, cell in zip(pictures, filter(shows_a_picture, notebook.cells), strict=True):
        picture["alt"] = cell.metadata["alt"]
    for script in soup.find_all("script", src="") + soup.find_all("script", type="module"):
        script.decompose()
    return str(soup).replace("</head>", f"{STYLE}</head>", 1)


def export(kind: str) -> None:
    """One page for each notebook, and an index."""
    (SITE / "web").mkdir(parents=True, exist_ok=True)
    shutil.copytree(STATIC_ASSETS_PATH, SITE / "web" / "mathjax", dirs_exist_ok=True)
    options = {"mathjax_url": MATHJAX, "mermaid_js_url": "", "jquery_url": ""}
    options["widget_renderer_url"] = (
        "data:text/javascript,"  # every control left a still picture: no script is needed
    )
    if kind == "html":
        exporter, ending = HTMLExporter(template_name="lab", require_js_url="", **options), ".html"
    else:
        for name in PACKAGES:
            unpack(name)
        options |= {
            "require_js_url": "web/requirejs/require.js",
            "reveal_url_prefix": "web/reveal.js",
        }
        options |= {"reveal_theme": "white", "reveal_transition": "none", "reveal_number": "c/t"}
        options |= {"reveal_width": "1280", "reveal_height": "720", "font_awesome_url": ""}
        exporter, ending = (
            SlidesExporter(exclude_input_prompt=True, exclude_output_prompt=True, **options),
            ".slides.html",
        )
    links = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        if kind == "slides":
            notebook = shown_on_slides(notebook)
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        (SITE / f"{path.stem}{ending}").write_text(finished(page, notebook), encoding="utf-8")
        links.append(f'<li><a href="{path.stem}{ending}">{title}</a></li>')
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Faster R-CNN from scratch</title>'
    style = "<style>body { font: 20px/1.8 sans-serif; margin: 3em auto; max-width: 40em; }</style>"
    body = f"<h1>Faster R-CNN from scratch</h1><ul>{''.join(links)}</ul></html>"
    (SITE / f"index{ending}").write_text(head + style + body, encoding="utf-8")
    print(f"site/index{ending}")


if __name__ == "__main__":
    if sys.argv[1:] == ["fetch"]:
        for package in PACKAGES:
            fetch(package)
    elif sys.argv[1:] in (["html"], ["slides"]):
        export(sys.argv[1])
    else:
        raise SystemExit("python build_site.py html|slides|fetch")
