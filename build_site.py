"""The committed notebooks as a static site and as lecture slides, both usable without a network.

``python build_site.py html`` writes ``site/*.html``.
``python build_site.py slides`` writes ``site/*.slides.html``.
MathJax and reveal.js are copied beside them from the packages that ship them, so that no page asks
another server for anything.
"""

import shutil
import sys
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from jupyter_server_mathjax.app import STATIC_ASSETS_PATH
from nbconvert import HTMLExporter, SlidesExporter
from sphinx_revealjs.utils import get_revealjs_path

ROOT = Path(__file__).resolve().parent
SITE = ROOT / "site"
MATHJAX = "web/mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe"
NEEDED_OF_REVEAL = ("dist", "plugin/notes", "LICENSE")
LONGEST_ON_A_SLIDE = 5  # lines of code; a picture that takes more is shown without its code
STYLE = """<style>
.reveal { --jp-content-font-size1: 22px; --jp-code-font-size: 18px; }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.reveal .jp-OutputArea img { zoom: 1.3; max-height: 430px; }
.reveal .jp-RenderedMarkdown pre {
  width: 100%; font-size: var(--jp-code-font-size); box-shadow: none;
}
.reveal [data-mime-type$="stderr"] { display: none; }
details { margin: 1em 0; }
summary {
  cursor: pointer; margin-left: calc(var(--jp-cell-prompt-width) + 10px);
  font: var(--jp-content-font-size1) var(--jp-content-font-family);
}
</style>"""
# STIX-Web is the one font that comes with this MathJax; by default it asks for another one.
FONT = """<script type="text/x-mathjax-config">
MathJax.Hub.Config({"HTML-CSS": {
  availableFonts: [], preferredFont: null, imageFont: null, webFont: "STIX-Web"
}});
</script>"""
# The template loads reveal.js through RequireJS. Plain scripts do the same, and need no third one.
DECK = """<script src="web/reveal.js/dist/reveal.js"></script>
<script src="web/reveal.js/plugin/notes/notes.js"></script>
<script>function require(options, files, start) { start(Reveal, RevealNotes); }</script>"""
NO_ALT = "No description has been provided for this image"  # what nbconvert writes


def copy_reveal() -> None:
    """What the decks need of reveal.js, into ``site/web``."""
    for name in NEEDED_OF_REVEAL:
        source, target = get_revealjs_path() / name, SITE / "web" / "reveal.js" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)


def shows_a_picture(cell: nbformat.NotebookNode) -> bool:
    return any(
        kind.startswith("image/")
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    )


def shown_on_slides(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without the cells that are skipped, and without code that would push its picture off."""
    notebook.cells = [
        cell for cell in notebook.cells if cell.metadata.slideshow.slide_type != "skip"
    ]
    for cell in notebook.cells:
        if shows_a_picture(cell) and len(cell.source.splitlines()) > LONGEST_ON_A_SLIDE:
            cell.metadata["transient"] = {"remove_source": True}
    return notebook


def fold_solutions(soup: BeautifulSoup) -> None:
    """Put every solution, and the prose that opens it ("**2** ..."), into a closed <details>."""
    for number, cell in enumerate(soup.select(".celltag_hide-cell"), 1):
        prose = cell.find_previous_sibling()
        details = cell.wrap(soup.new_tag("details"))
        if prose.get_text().split()[:1] == [str(number)]:
            details.insert(0, prose)
        summary = soup.new_tag("summary")
        summary.string = f"Solution to exercise {number}"
        details.insert(0, summary)


def finished(page: str, notebook: nbformat.NotebookNode) -> str:
    """A page with described pictures and folded solutions, without scripts that lack a source."""
    soup = BeautifulSoup(page, "html.parser")
    pictures = soup.find_all("img", alt=NO_ALT)
    for picture, cell in zip(pictures, filter(shows_a_picture, notebook.cells), strict=True):
        picture["alt"] = cell.metadata["alt"]
    for script in soup.find_all("script", src="") + soup.find_all("script", type="module"):
        script.decompose()
    fold_solutions(soup)
    return str(soup).replace("</head>", f"{STYLE}{FONT}</head>", 1)


def export(kind: str) -> None:
    """One page for each notebook, and an index."""
    (SITE / "web").mkdir(parents=True, exist_ok=True)
    shutil.copytree(STATIC_ASSETS_PATH, SITE / "web" / "mathjax", dirs_exist_ok=True)
    options = {"mathjax_url": MATHJAX, "mermaid_js_url": "", "jquery_url": "", "require_js_url": ""}
    # every control left a still picture: no script is needed
    options["widget_renderer_url"] = "data:text/javascript,"
    if kind == "html":
        exporter, ending = HTMLExporter(template_name="lab", **options), ".html"
    else:
        copy_reveal()
        options["reveal_url_prefix"] = "web/reveal.js"
        options |= {"reveal_theme": "white", "reveal_transition": "none", "reveal_number": "c/t"}
        options |= {"reveal_width": "1280", "reveal_height": "720", "font_awesome_url": ""}
        options |= {"exclude_input_prompt": True, "exclude_output_prompt": True}
        exporter, ending = SlidesExporter(**options), ".slides.html"
    links = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        if kind == "slides":
            notebook = shown_on_slides(notebook)
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        page = finished(page, notebook)
        if kind == "slides":
            page = page.replace("</head>", f"{DECK}</head>", 1)
        (SITE / f"{path.stem}{ending}").write_text(page, encoding="utf-8")
        links.append(f'<li><a href="{path.stem}{ending}">{title}</a></li>')
    title = "Faster R-CNN from scratch"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    style = "<style>body { font: 20px/1.8 sans-serif; margin: 3em auto; max-width: 40em; }</style>"
    body = f"<h1>{title}</h1><ul>{''.join(links)}</ul></html>"
    (SITE / f"index{ending}").write_text(head + style + body, encoding="utf-8")
    print(f"site/index{ending}")


if __name__ == "__main__":
    if sys.argv[1:] not in (["html"], ["slides"]):
        raise SystemExit("python build_site.py html|slides")
    export(sys.argv[1])
