"""What every notebook keeps to, read from the committed files."""

import re
import statistics
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines(cell) -> int:
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") for line in cell.source.splitlines()
    )


def test_is_the_output_of_one_clean_run(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if "widget" in str(output.get("data", {}).keys())]


def test_holds_no_path_of_a_machine_and_is_at_most_1_mb(request, notebook):
    path = request.node.callspec.params["notebook"]
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|Users|work)/|[A-Z]:\\\\", text)
    assert path.stat().st_size <= 2**20


def test_code_follows_prose(notebook):
    pairs = zip(notebook.cells, notebook.cells[1:], strict=False)
    after = [before.cell_type == "markdown" for before, cell in pairs if cell.cell_type == "code"]
    assert sum(after) / len(after) >= 0.9


def test_cells_are_short(notebook):
    lengths = [lines(cell) for cell in code_cells(notebook)]
    assert statistics.median(lengths) <= 8
    assert max(lengths) <= 40


def test_prose_and_code_are_in_proportion(notebook):
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert 5 <= words / sum(lines(cell) for cell in code_cells(notebook)) <= 15


def test_results_are_asserted(notebook):
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert len(re.findall(r"^\s*assert\b|assert_\w+\(", source, re.MULTILINE)) >= 5


def test_no_cell_is_idle(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"\bhelp\(|sys\.path|^!|%pip", cell.source, re.MULTILINE)


def test_opens_and_closes_as_the_others_do(notebook):
    assert re.match(r"# .+\n\n\*\*Needs\*\*", notebook.cells[0].source)
    assert "**Gives**" in notebook.cells[0].source
    assert any("draw_detector(" in cell.source for cell in code_cells(notebook)[:3])
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "## Summary" in prose
    assert 3 <= len(re.findall(r"^\*\*\d · ", prose, re.MULTILINE)) <= 5
    solutions = [
        cell for cell in code_cells(notebook) if "hide-cell" in cell.metadata.get("tags", [])
    ]
    assert len(solutions) >= 3
    for number, cell in enumerate(solutions, 1):
        # folded, JupyterLab shows the first line of a cell: it must not be the answer
        first = cell.source.splitlines()[0]
        assert first == f"# Solution to exercise {number} (unfold to read)"
        assert cell.metadata["jupyter"] == {"outputs_hidden": True, "source_hidden": True}


def test_every_picture_is_described(notebook):
    for cell in code_cells(notebook):
        if any(
            kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})
        ):
            assert len(cell.metadata.get("alt", "")) >= 30, cell.source


def test_a_deck_is_chosen_by_hand(notebook):
    kinds = [cell.metadata.get("slideshow", {}).get("slide_type") for cell in notebook.cells]
    shown = [kind for kind in kinds if kind not in ("skip", None)]
    assert None not in kinds
    assert kinds.count("slide") + kinds.count("subslide") >= 8
    assert len(shown) < 0.8 * len(kinds)
