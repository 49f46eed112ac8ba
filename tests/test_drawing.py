"""Drawing: boxes where they belong, labels that can be read, files that do not change."""

import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

import frcnn_common as frcnn
import frcnn_lesson
import frcnn_sources

BOXES = [[10.0, 20.0, 40.0, 60.0], [50.0, 30.0, 90.0, 95.0]]


@pytest.fixture
def ax():
    return Figure(figsize=(4, 4)).add_axes((0, 0, 1, 1))


def drawn(ax):
    """Corners of the rectangles."""
    return [list(patch.get_bbox().extents) for patch in ax.patches]


def words(ax):
    return [text.get_text() for text in ax.texts]


def picture(height=100, width=100):
    return PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


# --- boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "boxes",
    [
        BOXES,
        np.array(BOXES),
        torch.tensor(BOXES),
        torch.tensor(BOXES, dtype=torch.int64),
        torch.tensor(BOXES).half(),
    ],
    ids=["list", "array", "tensor", "whole", "half"],
)
def test_one_rectangle_a_box_at_its_place(boxes, ax):
    frcnn.draw_boxes(ax, picture(), boxes)
    assert drawn(ax) == BOXES
    assert words(ax) == []


def test_boxes_with_a_gradient_are_drawn(ax):
    frcnn.draw_boxes(
        ax,
        picture(),
        torch.tensor(BOXES, requires_grad=True),
        scores=torch.rand(2, requires_grad=True),
    )
    assert drawn(ax) == BOXES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_boxes_on_the_gpu_are_drawn(ax):
    labels, scores = torch.tensor([1, 2], device="cuda"), torch.tensor([0.5, 0.6], device="cuda")
    frcnn.draw_boxes(
        ax,
        torch.zeros(3, 99, 99, device="cuda"),
        torch.tensor(BOXES, device="cuda"),
        labels,
        scores,
    )
    assert drawn(ax) == BOXES
    assert words(ax) == ["person 0.50", "bicycle 0.60"]


@pytest.mark.parametrize(
    "boxes", [[], np.zeros((0, 4)), torch.zeros(0, 4)], ids=["list", "array", "tensor"]
)
def test_no_boxes_draw_the_image_alone(boxes, ax):
    frcnn.draw_boxes(ax, picture(), boxes, labels=[], scores=[])
    assert drawn(ax) == []
    assert len(ax.images) == 1


def test_no_image_draws_onto_what_is_there(ax):
    frcnn.draw_boxes(ax, picture(), BOXES[:1])
    limits = ax.get_xlim(), ax.get_ylim()
    frcnn.draw_boxes(ax, None, BOXES[1:])
    assert drawn(ax) == BOXES
    assert len(ax.images) == 1
    assert (ax.get_xlim(), ax.get_ylim()) == limits


def test_rectangle_lands_on_its_pixels(ax):
    frcnn.draw_boxes(
        ax,
        np.zeros((100, 100, 3), dtype=np.uint8),
        [[25, 50, 75, 90]],
        color="#ff0000",
        linewidth=1,
    )
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    y, x = np.nonzero(np.asarray(canvas.buffer_rgba())[..., 0] > 200)
    shown = (
        np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) * 100 / canvas.get_width_height()[0]
    )
    assert shown == pytest.approx(
        [25, 50, 75, 90], abs=0.3
    )  # continuous coordinates: 0 is the edge of the picture


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([1, 80], [0.5, 0.987], ["person 0.50", "toothbrush 0.99"]),
        (torch.tensor([17, 3]), None, ["dog", "car"]),
        (None, torch.tensor([0.25, 1.0]), ["0.25", "1.00"]),
        (np.array([17, 3]), np.array([0.1, 0.2]), ["dog 0.10", "car 0.20"]),
    ],
    ids=["lists", "labels", "scores", "arrays"],
)
def test_label_has_class_name_and_score(labels, scores, expected, ax):
    frcnn.draw_boxes(ax, picture(), BOXES, labels, scores)
    assert words(ax) == expected


@pytest.mark.parametrize("wrong", [{"labels": [1]}, {"scores": [0.5, 0.5, 0.5]}], ids=str)
def test_labels_of_another_number_are_refused(wrong, ax):
    with pytest.raises(ValueError, match="argument"):
        frcnn.draw_boxes(ax, picture(), BOXES, **wrong)


@pytest.mark.parametrize("inches", [2.5, 4, 8])
@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 30, 30),
        (0, 3, 99, 99),
        (70, 0, 100, 30),
        (60, 40, 100, 99),
        (95, 0, 100, 100),
        (0, 90, 30, 100),
    ],
    ids=str,
)
def test_label_stays_in_the_picture(box, inches, ax):
    ax.figure.set_size_inches(inches, inches)
    frcnn.draw_boxes(ax, picture(), [box], [frcnn.COCO_NAMES.index("traffic light")], [0.99])
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    text, frame = ax.texts[0].get_window_extent(renderer), ax.get_window_extent(renderer)
    assert frame.x0 - 1 <= text.x0 < text.x1 <= frame.x1 + 1
    assert frame.y0 - 1 <= text.y0 < text.y1 <= frame.y1 + 1


def test_label_keeps_to_its_box_in_the_middle(ax):
    frcnn.draw_boxes(ax, picture(), [[20, 40, 60, 80]], [1])
    assert ax.texts[0].get_position() == (20, 40)


# --- colours --------------------------------------------------------------------------------------


def test_palette_colours_are_distinct():
    colours = np.array([to_rgb(colour) for colour in frcnn.PALETTE])
    apart = np.abs(colours[:, None] - colours).max(-1) + np.eye(len(colours))
    assert len(colours) >= 6
    assert apart.min() > 0.2


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_every_label_can_be_read(ax):
    for label in range(len(frcnn.PALETTE)):
        frcnn.draw_boxes(ax, None, BOXES[:1], [label])
        text = ax.texts[-1]
        lights = luminance(text.get_color()), luminance(text.get_bbox_patch().get_facecolor())
        assert (max(lights) + 0.05) / (min(lights) + 0.05) >= 4.5


def test_the_glyphs_have_eight_colours():
    labels = [frcnn.COCO_NAMES.index(name) for name in frcnn_sources.GLYPHS.values()]
    assert len({frcnn.PALETTE[label % len(frcnn.PALETTE)] for label in labels}) == 8
    colours = frcnn.class_colors(labels)
    assert all(colours[label] == frcnn.PALETTE[label % len(frcnn.PALETTE)] for label in labels)


def test_classes_of_one_picture_have_different_colours(ax):
    many = len(frcnn.PALETTE)
    colours = frcnn.class_colors([3, 3 + many, 3 + 2 * many, None, 4])
    assert len({colours[label] for label in (3, 3 + many, 3 + 2 * many, 4)}) == 4
    assert colours[3] == frcnn.PALETTE[3]
    frcnn.draw_boxes(ax, picture(), BOXES, [3, 3 + many])
    assert len({to_hex(patch.get_edgecolor()) for patch in ax.patches}) == 2
    assert len(frcnn.class_colors(range(1, 81))) == 81  # more classes than colours: some share


def test_each_class_has_its_colour(ax):
    frcnn.draw_boxes(ax, picture(), BOXES + BOXES[:1], [1, 2, 1])
    first, second, third = (to_hex(patch.get_edgecolor()) for patch in ax.patches)
    assert first == third != second


def test_one_colour_for_all_boxes(ax):
    frcnn.draw_boxes(ax, picture(), BOXES, [1, 2], color="#123456", linestyle="--", linewidth=3)
    assert {to_hex(patch.get_edgecolor()) for patch in ax.patches} == {"#123456"}
    assert {(patch.get_linestyle(), patch.get_linewidth()) for patch in ax.patches} == {("--", 3)}


# --- pictures -------------------------------------------------------------------------------------


def test_to_picture_undoes_image_to_tensor():
    original = picture(7, 5)
    shown = frcnn.to_picture(frcnn.image_to_tensor(original))
    assert shown.shape == (7, 5, 3)
    assert shown == pytest.approx(np.asarray(original) / 255, abs=1 / 255)


def test_to_picture_stays_in_range():
    shown = frcnn.to_picture(torch.tensor([-9.0, 0.0, 9.0]).expand(3, 2, 3))
    assert (shown.min(), shown.max()) == (0, 1)


@pytest.mark.parametrize("kind", ["picture", "array"])
def test_to_picture_keeps_pictures_and_arrays(kind):
    original = picture(7, 5)
    given = original if kind == "picture" else np.asarray(original)
    assert np.array_equal(frcnn.to_picture(given), np.asarray(original))


@pytest.mark.parametrize("kind", ["tensor", "array", "picture"])
def test_image_is_drawn_without_axis(kind, ax):
    original = picture(60, 80)
    image = {
        "tensor": frcnn.image_to_tensor(original),
        "array": np.asarray(original),
        "picture": original,
    }[kind]
    frcnn.draw_boxes(ax, image, BOXES[:1])
    assert ax.images[0].get_array().shape == (60, 80, 3)
    assert not ax.axison


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_figure_file_is_the_same_twice(name, monkeypatch, tmp_path):
    files = []
    for folder in ("one", "two"):
        ax = Figure(figsize=(2, 2)).subplots()
        frcnn.draw_boxes(ax, picture(), BOXES, [1, 2], [0.5, 0.6])
        monkeypatch.setattr(frcnn_lesson, "FIGURES", tmp_path / folder)
        frcnn_lesson.save_figure(ax.figure, name)
        files.append((tmp_path / folder / name).read_bytes())
    assert len(files[0]) > 1000
    assert files[0] == files[1]
    assert b"matplotlib" not in files[0].lower()  # its version would change the file


def test_figures_go_where_the_environment_says(tmp_path):
    code = "import frcnn_lesson as f, matplotlib.figure as m; f.save_figure(m.Figure(), 'a.png')"
    environment = os.environ | {"FRCNN_FIGURES": str(tmp_path / "there")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "a.png"]
