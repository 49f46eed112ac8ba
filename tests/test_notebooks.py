"""What every notebook keeps to, and that what it builds by hand does what `frcnn_common` does.

All read from the committed files.
"""

import ast
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import types
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from torch.testing import assert_close

import frcnn_common as frcnn

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


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


def test_lines_of_code_are_short(notebook):
    sources = [cell.source.splitlines() for cell in code_cells(notebook)]
    code = [line for source in sources for line in source if line.strip()]
    lengths = sorted(len(line) for line in code if not line.strip().startswith("#"))
    assert lengths[-1] <= 100
    assert lengths[len(lengths) * 9 // 10] <= 92
    assert statistics.median(lengths) <= 48


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


# --- warnings -------------------------------------------------------------------------------------

ALLOWED = {
    # Matplotlib is given tensors, which do not take what NumPy 2 passes to `__array__`.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    "ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning",
    # Our own, and meant: 05 measures the step of a frozen model, for which weights do not matter.
    "ignore:training with frozen stages of random weights:UserWarning",
    # Of ipykernel, about itself, when a kernel is shut down.
    "ignore:For consistency across implementations:PendingDeprecationWarning",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_a_warning_that_is_not_named(path, tmp_path):
    """Every warning but `ALLOWED` is an error in the kernel and the processes that it starts."""
    saved = ROOT / "checkpoints" / "tiny.pt"
    if saved.exists():
        (tmp_path / "checkpoints").mkdir()
        shutil.copy(saved, tmp_path / "checkpoints")
    environment = os.environ | {
        "PYTHONWARNINGS": ",".join(["error", *sorted(ALLOWED)]),
        "FRCNN_STILL": "1",
        "FRCNN_FIGURES": str(tmp_path / "figures"),
        "FRCNN_CHECKPOINTS": str(tmp_path / "checkpoints"),
    }
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources=resources
    ).execute(env=environment)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)


def test_what_a_warning_would_stop_is_stopped(tmp_path):
    """The names above let nothing else through."""
    environment = os.environ | {"PYTHONWARNINGS": ",".join(["error", *sorted(ALLOWED)])}
    for category in (
        "UserWarning",
        "DeprecationWarning",
        "FutureWarning",
        "RuntimeWarning",
        "ResourceWarning",
    ):
        code = f"import warnings; warnings.warn('something else', {category})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1, category
        assert done.stderr.splitlines()[-1] == f"{category}: something else"


# --- what is built by hand does what frcnn_common does --------------------------------------------

SIZES, STRIDES = (16, 32, 64, 128, 256), (4, 8, 16, 32, 64)


def is_literal(statement: ast.stmt) -> bool:
    try:
        return isinstance(statement, ast.Assign) and bool(ast.literal_eval(statement.value))
    except ValueError:
        return False


def definitions(name: str) -> types.SimpleNamespace:
    """Imports, literals, functions and classes of a notebook: no results, and no solutions."""
    found: dict = {}
    for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type != "code" or "hide-cell" in cell.metadata.get("tags", []):
            continue
        for statement in ast.parse(cell.source).body:
            kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
            if isinstance(statement, kinds) or is_literal(statement):
                with contextlib.suppress(
                    NameError
                ):  # its default value is a result: it cannot stand alone
                    exec(compile(ast.Module([statement], []), name, "exec"), found)
    return types.SimpleNamespace(**found)


@pytest.fixture(scope="module")
def lesson():
    names = [path.stem for path in NOTEBOOKS]
    return {name[:2]: definitions(name) for name in names}


def boxes(count: int, side: float = 128) -> torch.Tensor:
    corner = torch.rand(count, 2) * side * 0.7  # [N, 2]
    return torch.cat((corner, corner + 2 + torch.rand(count, 2) * side * 0.4), dim=1)


# --- twins of 01 and 03: boxes, labels, sampling --------------------------------------------------


def test_formats_flips_and_sizes(lesson):
    raw = boxes(50)
    assert_close(lesson["01"].to_corners(raw).numpy(), frcnn.to_corners(raw.numpy(), "xywh"))
    flipped = lesson["01"].flip_boxes(raw, 128)
    assert_close(lesson["01"].flip_boxes(flipped, 128), raw)
    assert_close(frcnn.box_area(flipped), frcnn.box_area(raw))
    result = {"boxes": raw, "labels": torch.ones(50), "scores": torch.ones(50)}
    assert_close(
        lesson["01"].resize_boxes(raw, (128, 128), (64, 256)),
        frcnn.rescale_result(result, (128, 128), (64, 256))["boxes"],
    )


def test_iou(lesson):
    a, b = torch.cat((boxes(40), torch.zeros(1, 4))), boxes(30)
    assert_close(lesson["01"].iou_matrix(a, b), frcnn.box_iou(a, b))
    assert_close(
        lesson["01"].iou_by_hand(a[0].tolist(), b[0].tolist()), frcnn.box_iou(a, b)[0, 0].item()
    )


@pytest.mark.parametrize("notebook", ["01", "03"])
def test_deltas(notebook, lesson):
    anchors, gt = boxes(100), boxes(100)
    assert_close(lesson[notebook].encode(anchors, gt), frcnn.encode_boxes(anchors, gt))
    deltas = torch.randn(100, 4) * 3  # far enough for the clamp
    assert_close(lesson[notebook].decode(anchors, deltas), frcnn.decode_boxes(anchors, deltas))


@pytest.mark.parametrize("objects", [0, 1, 20])
def test_labels_of_anchors(objects, lesson):
    anchors, gt = boxes(500), boxes(objects)
    labels, matched = lesson["01"].label_anchors(anchors, gt)
    expected, expected_match = frcnn.match_boxes(anchors, gt, 0.7, 0.3, best_is_positive=True)
    assert torch.equal(labels, expected)
    assert torch.equal(matched, expected_match)
    chosen = lesson["01"].sample_anchors(labels, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(
        chosen, frcnn.sample_boxes(labels, 256, 0.5, torch.Generator().manual_seed(3)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_target_generator_is_made_of_the_modules_parts(lesson):
    anchors, gt = boxes(500), boxes(5)
    labels, matched, deltas = lesson["01"].AnchorTargetGenerator()(
        anchors, gt, torch.Generator().manual_seed(3)
    )
    every, expected_match = frcnn.match_boxes(anchors, gt, 0.7, 0.3, best_is_positive=True)
    positives, negatives = frcnn.sample_boxes(every, 256, 0.5, torch.Generator().manual_seed(3))
    assert sorted((labels == 1).nonzero()[:, 0].tolist()) == sorted(positives.tolist())
    assert sorted((labels == 0).nonzero()[:, 0].tolist()) == sorted(negatives.tolist())
    assert_close(
        deltas[positives], frcnn.encode_boxes(anchors[positives], gt[expected_match[positives]])
    )
    assert torch.equal(matched, expected_match)


# --- twins of 02: backbone and pyramid ------------------------------------------------------------


def same_weights(theirs, ours):
    """The weights of ``ours`` in ``theirs``: both hold the same shapes in the same order."""
    state = list(ours.state_dict().values())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state, strict=True)))
    return theirs.eval(), ours.eval()


def test_bottleneck(lesson):
    by_hand, ours = same_weights(
        lesson["02"].HandBottleneck(64, 16, stride=1), frcnn.Bottleneck(64, 16, stride=1)
    )
    x = torch.randn(2, 64, 15, 17)
    assert_close(by_hand(x), ours(x))


def test_backbone_and_pyramid(lesson):
    backbone, ours = same_weights(lesson["02"].HandResNet50(width=8), frcnn.ResNet50(width=8))
    x = torch.randn(1, 3, 100, 140)
    assert_close(backbone(x), ours(x))
    widths = (32, 64, 128, 256)
    ours = frcnn.FPN(widths, 16)
    pyramid = lesson["02"].HandFPN(widths, 16)
    pyramid.lateral.load_state_dict(ours.lateral.state_dict())
    pyramid.output.load_state_dict(ours.output.state_dict())
    assert_close(pyramid(backbone(x)), ours(backbone(x)))


def test_frozen_batch_norm(lesson):
    by_hand, ours = lesson["02"].HandFrozenBatchNorm(8), frcnn.FrozenBatchNorm2d(8)
    statistics = {
        name: torch.rand(8) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")
    }
    for norm in (by_hand, ours):
        norm.load_state_dict(statistics)
    x = torch.randn(2, 8, 5, 5)
    assert_close(by_hand(x), ours(x))


# --- twins of 03: anchors, head, proposals, losses ------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"offset": 0.0, "strides": None, "inverse_ratios": True, "rounded": True}]
)
@pytest.mark.parametrize("size", [(128, 128), (96, 160), (250, 333)])
def test_anchors(size, options, lesson):
    grids = lesson["03"].pyramid_grids(*size)
    maps = [torch.zeros(1, 1, *grid) for grid in grids]
    expected = frcnn.AnchorGenerator(**({"anchor_sizes": SIZES, "strides": STRIDES} | options))(
        maps, size
    )
    options = {"strides": STRIDES} | options
    assert_close(lesson["03"].pyramid_anchors(grids, size, SIZES, **options), expected)


def test_rpn_head(lesson):
    ours = frcnn.RPNHead(16, 3)
    by_hand = lesson["03"].HandRPNHead(16, 3)
    by_hand, ours = same_weights(by_hand, ours)
    maps = [torch.randn(2, 16, 8, 6), torch.randn(2, 16, 4, 3)]
    assert_close(by_hand(maps), ours(maps))


@pytest.mark.parametrize("name", ["nms_loop", "nms_matrix"])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_nms(name, count, lesson):
    found, scores = boxes(count), torch.rand(count).round(decimals=1)  # with ties
    assert torch.equal(
        getattr(lesson["03"], name)(found, scores, 0.5), frcnn.nms(found, scores, 0.5)
    )


def test_proposals_and_losses_of_the_rpn(lesson):
    model = frcnn.tiny_faster_rcnn()
    maps = [torch.randn(1, 64, side, side) for side in (32, 16, 8, 4, 2)]
    logits, deltas = (torch.cat(levels, dim=1) for levels in model.rpn.head(maps))
    deltas, counts = (
        deltas + 0.2 * torch.randn_like(deltas),
        [3 * side**2 for side in (32, 16, 8, 4, 2)],
    )
    anchors = model.rpn.anchor_gen(maps, (128, 128))
    rpn = model.rpn.eval()
    expected = rpn.propose(anchors, logits, deltas, counts, torch.tensor([[128, 128]]))[0]
    after = rpn.post_nms if isinstance(rpn.post_nms, int) else rpn.post_nms[1]
    before = rpn.pre_nms if isinstance(rpn.pre_nms, int) else rpn.pre_nms[1]
    by_hand = lesson["03"].propose(
        anchors, logits[0], deltas[0], counts, (128, 128), before, after, rpn.nms_thr, rpn.min_sz
    )
    assert_close(by_hand, expected)

    gt = boxes(4)
    rpn.RPN_BATCH = 10**6  # every anchor that has a label: nothing is left to chance
    rpn.POS_FRAC = 1.0
    expected = rpn.losses(anchors, logits, deltas, [{"boxes": gt, "image_id": 0}])
    labels, matched = frcnn.match_boxes(anchors, gt, 0.7, 0.3, best_is_positive=True)
    sampled, positive = labels >= 0, labels == 1
    targets = frcnn.encode_boxes(anchors[positive], gt[matched[positive]])
    by_hand = lesson["03"].rpn_losses(
        logits[0, sampled], labels[sampled], deltas[0, positive], targets
    )
    assert_close(by_hand, expected)


# --- twins of 04: ROI head ------------------------------------------------------------------------


def test_levels(lesson):
    sizes = boxes(500, side=900)
    assert torch.equal(lesson["04"].assign_levels(sizes), frcnn.ROIAlign().assign_levels(sizes))
    assert [
        lesson["04"].level_of(box) - 2 for box in sizes.tolist()
    ] == frcnn.ROIAlign().assign_levels(sizes).tolist()


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(aligned, lesson):
    maps = [torch.randn(1, 5, side, side) for side in (32, 16, 8, 4)]
    rois = boxes(12)
    expected = frcnn.ROIAlign(k0=5, aligned=aligned)(maps, [rois], (128, 128))
    assert_close(
        lesson["04"].pool_pyramid(maps, rois, k0=5, aligned=aligned), expected, atol=1e-5, rtol=1e-5
    )


def test_roi_align_as_one_sum(lesson):
    fmap, rois = torch.randn(5, 32, 32), boxes(12)
    one_level = frcnn.ROIAlign(k_min=2, k_max=2)
    expected = one_level([fmap[None]], [rois], (128, 128))
    assert_close(lesson["04"].roi_align_one_sum(fmap, rois, 4), expected, atol=1e-5, rtol=1e-5)


def test_box_head(lesson):
    by_hand = lesson["04"].BoxHead(5 * 49, 32, 9)
    head, predictor = frcnn.TwoMLPHead(5 * 49, 32), frcnn.FastRCNNPredictor(32, 9)
    ours = torch.nn.Sequential(head, predictor)
    by_hand, ours = same_weights(by_hand, ours)
    pooled = torch.randn(6, 5, 7, 7)
    logits, deltas = ours(pooled)
    assert_close(by_hand(pooled), (logits, deltas.view(6, 9, 4)), atol=1e-5, rtol=1e-5)
    classes = torch.randint(0, 9, (6,))
    assert_close(
        lesson["04"].pick_deltas(deltas.view(6, 9, 4), classes),
        torch.stack([deltas.view(6, 9, 4)[row, label] for row, label in enumerate(classes)]),
    )


@pytest.mark.parametrize("objects", [0, 3])
def test_sampled_proposals_and_losses_of_the_roi_head(objects, lesson):
    model = frcnn.tiny_faster_rcnn()
    target = {"boxes": boxes(objects), "labels": torch.arange(objects) + 1, "image_id": 0}
    proposals = torch.cat((boxes(40), target["boxes"] + 1))
    model.ROI_BATCH, model.ROI_POS_FRAC = (
        10**6,
        1.0,
    )  # everything: the order is all that chance leaves
    sampled, labels, expected = model.sample_proposals([proposals], [target])
    by_hand = lesson["04"].sample_rois(proposals, target, 10**6, 1.0, weights=model.box_weights)

    def in_order(rows):
        table = torch.cat(
            (rows[0], rows[1][:, None], rows[2] * (rows[1] > 0)[:, None]), dim=1
        )  # [S, 9]
        return sorted(table.tolist())

    assert_close(
        torch.tensor(in_order(by_hand)), torch.tensor(in_order((sampled[0], labels, expected)))
    )
    logits, deltas = torch.randn(len(labels), 81), torch.randn(len(labels), 81, 4)
    assert_close(
        lesson["04"].roi_losses(logits, deltas, labels, expected),
        model.losses(logits, deltas, labels, expected),
    )


# --- twins of the walkthrough ---------------------------------------------------------------------


def test_the_walkthroughs_arrays_are_the_modules_anchors(lesson):
    walk = lesson["an"]
    assert_close(
        walk.generate_anchors(32, (0.5, 1, 2), (1, 1.5)),
        walk.generate_anchors_loop(32, (0.5, 1, 2), (1, 1.5)),
    )
    ours = frcnn.AnchorGenerator(
        (32,), (0.5, 1, 2), (8,), inverse_ratios=True
    )  # it means height / width
    expected = ours([torch.zeros(1, 1, 5, 7)], (40, 56))
    found = walk.shift((5, 7), 8, walk.generate_anchors(32, (0.5, 1, 2), (1,)))
    assert_close(torch.from_numpy(found).float(), expected)
    pyramid = walk.Anchors(ratios=(0.5, 1, 2), scales=(1,))
    maps = [torch.zeros(1, 1, -(-100 // s), -(-150 // s)) for s in (8, 16, 32, 64, 128)]
    ours = frcnn.AnchorGenerator(
        (32, 64, 128, 256, 512), (0.5, 1, 2), (8, 16, 32, 64, 128), inverse_ratios=True
    )
    assert_close(pyramid.forward(torch.zeros(1, 3, 100, 150))[0].cpu(), ours(maps, (100, 150)))
