"""The exercises mark rightly: the checks of the committed notebooks, given what students may type.

One more exercise is one more `Exercise` in the list. Its answers are what is typed between the
brackets of its check: right ones in the forms that a student may choose, wrong ones with a part of
the sentence that must come back. What the checks read from the lesson, and a substitute for what
takes minutes, is set up in `prepare_NN`.
"""

import dataclasses
import functools
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from test_notebooks import definitions

import frcnn_common as frcnn

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"

WRONG_TYPES = (
    *("'text'", "'3'", "[]", "(1, 2, 3)", "{}", "torch.ones(3)", "object()", "-10.0**9"),
    "lambda *_: None",
)


@dataclasses.dataclass(frozen=True)
class Exercise:
    notebook: str
    number: int
    right: tuple[str, ...]
    wrong: dict[str, str]  # typed: a part of the sentence that it gets
    arguments: int = 1
    trains: bool = False  # its solution takes a minute: the run of the notebook marks it

    def __str__(self) -> str:
        return f"{self.notebook}-{self.number}"


# --- what the checks read from the lesson ---------------------------------------------------------


def prepare_02(world: dict, tmp_path: Path) -> None:
    world["model"] = frcnn.tiny_faster_rcnn().eval()


def prepare_04(world: dict, tmp_path: Path) -> None:
    world["model"] = frcnn.tiny_faster_rcnn().eval()
    world["fmaps"] = [torch.randn(1, 3, side, side) for side in (32, 16)]
    world["toy"] = torch.tensor([[1.0, 3, 0, 2], [4.0, 8, 2, 6], [5.0, 1, 7, 3], [0.0, 2, 4, 9]])
    scores = {True: {"AP50": 0.98, "AP75": 0.93}, False: {"AP50": 0.96, "AP75": 0.59}}
    world["scored_with"] = scores.get  # as measured on the trained detector


class KnowsByHeart(torch.nn.Module):
    """Finds all objects of the first scenes, so many, and none of any other."""

    def __init__(self, scenes: int) -> None:
        super().__init__()
        stream = frcnn.COCOStreamDataset(
            "train", 8, source="glyphs", image_size=frcnn.TINY_IMAGE_SIZE
        )
        self.known = [(image, target) for image, target in stream][:scenes]

    def forward(self, images, **_):
        found = []
        for image in images:
            boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
            for known, target in self.known:
                if torch.equal(known, image):
                    boxes, labels = target["boxes"], target["labels"]
            found.append({"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes))})
        return found, None


def prepare_05(world: dict, tmp_path: Path) -> None:
    world["images"], world["targets"] = next(iter(world["glyph_loader"](batch=2)))
    world["KnowsByHeart"] = KnowsByHeart
    world["short_run"](tmp_path / "short.pt")
    world["short_run"] = functools.partial(shutil.copy, tmp_path / "short.pt")  # once is enough


def prepare_06(world: dict, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(300, generator=generator).sort(descending=True).values.double()
    correct = torch.rand(300, generator=generator) < scores  # the lower the score, the more errors
    world["all_rows"] = list(zip(scores.tolist(), correct.tolist(), strict=True))
    world["all_objects"] = 200
    world["thresholds"] = torch.arange(0.05, 1, 0.05).tolist()
    world["ap50_with"] = {0.5: 0.99, 0.9: 0.63}.get  # as measured on the trained detector
    world["f1_of"] = lambda r, k, n: 2 * r / (k + n)  # right ones, rows taken, objects


def prepare_own(world: dict, tmp_path: Path) -> None:
    solution = next(source for source in cells("own") if "def near_duplicates" in source)
    exec(solution.split("\n\n\n")[0], world)


# --- what students type ---------------------------------------------------------------------------

IDS = "sorted(c['id'] for c in coco['categories'])"
GREY = "[np.asarray(p.convert('L').resize((8, 8)), float) for p in ps]"
PAIRS = "for i in range(len(ps)) for j in range(i + 1, len(ps))"
FPN_SUM = "sum(c * n + n for c in cs) + len(cs) * (9 * n * n + n)"
EXERCISES = (
    Exercise(
        "02",
        1,
        right=("215, 16", "215.0, torch.tensor(16)"),
        wrong={
            "427, 32": "stride",  # with the pool
            "215, 32": "stride",
            "427, 16": "pool",
            "217, 16": "pool",
            "211, 16": "pool",
            "float('nan'), 16": "pool",
            "'215', '16'": "quotes",
            "215, None": "two numbers",
            "[215], 16": "two numbers",
        },
        arguments=2,
    ),
    Exercise(
        "02",
        2,
        right=(
            "[(150, 100), (75, 50), (38, 25), (19, 13), (10, 7)]",
            "((150, 100), (75, 50), (38, 25), (19, 13), (10, 7))",
            "[[150, 100], [75.0, 50.0], [38, 25], [19, 13], [10, 7]]",
            "torch.tensor([[150, 100], [75, 50], [38, 25], [19, 13], [10, 7]])",
        ),
        wrong={
            "[(100, 150), (50, 75), (25, 38), (13, 19), (7, 10)]": "rows come first",
            "[(150, 100), (75, 50), (37, 25), (18, 12), (9, 6)]": "P4, P5, P6",  # rounded down
            "[(150, 100), (75, 50), (38, 25), (19, 13), (9, 6)]": "P6: a layer with stride 2",
            "[(300, 200), (150, 100), (75, 50), (38, 25), (19, 13)]": "stride of 4",
            "[(150, 100), (75, 50), (38, 25), (19, 13)]": "five pairs",
            "[(256, 150, 100)] * 5": "five pairs",
            "[150, 75, 38, 19, 10]": "five pairs",
            "['150x100', '75x50', '38x25', '19x13', '10x7']": "five pairs",
            "{'P2': (150, 100), 'P3': (75, 50)}": "five pairs",
        },
    ),
    Exercise(
        "02",
        3,
        right=("157", "157.0", "torch.tensor(157)"),
        wrong={
            "128": "larger",
            "127": "larger",
            "125": "larger",
            "96": "larger",
            "64": "larger",
            "32": "larger",
            "0": "larger",
            "129": "cells on a side",
            "144": "cells on a side",  # the next multiple of 16
            "156": "cells on a side",
            "160": "smaller",  # the next multiple of 32
            "158": "smaller",
            "256": "too far",
            "10**9": "too far",
            "157.5": "whole number",
            "float('nan')": "whole number",
            "'157'": "quotes",
        },
    ),
    Exercise(
        "02",
        4,
        right=(
            f"lambda cs, n: {FPN_SUM}",
            f"lambda in_channels, out_channels: float((lambda cs, n: {FPN_SUM})"
            "(in_channels, out_channels))",
            "lambda cs, n: torch.tensor(cs).sum() * n + 4 * n + 4 * 9 * n**2 + 4 * n",
        ),
        wrong={
            "lambda cs, n: sum(p.numel() for p in frcnn.FPN(cs, n).parameters())": "builds",
            "lambda cs, n: sum(p.numel() for p in HandFPN(cs, n).parameters())": "builds",
            "lambda cs, n: sum(p.numel() for c in cs for p in nn.Conv2d(c, n, 1).parameters())"
            " + 4 * (9 * n * n + n)": "builds",
            "lambda cs, n: sum(c * n for c in cs) + len(cs) * 9 * n * n": "you said",  # no biases
            "lambda cs, n: sum(c * n + n for c in cs)": "you said",  # lateral alone
            "lambda cs, n: {256: 3_344_384}.get(n, 0)": "you said",  # a table
            "lambda cs, n: 3_344_384": "you said",
            "lambda cs, n: '3,344,384'": "no number",
            "lambda cs, n: print(3_344_384)": "no number",
            "3_344_384": "function",
        },
    ),
    Exercise(
        "04",
        1,
        right=("3", "3.0", "torch.tensor(3)"),
        wrong={
            "2": "k0 = 5",  # k0 = 4
            "4": "round down",
            "5": "root",  # of the area itself
            "3.34": "fraction",
            "float('nan')": "fraction",
            "'3'": "quotes",
            "'P3'": "quotes",
        },
    ),
    Exercise(
        "04",
        2,
        right=("'down', 'hardly'", "'Down', 'Hardly'", "' DOWN', 'hardly '"),
        wrong={
            "'up', 'hardly'": "not so with AP75:",
            "'down', 'down'": "not so with AP50:",
            "'up', 'up'": "AP75 and AP50",
            "'hardly', 'down'": "AP75 and AP50",
            "'sinks', 'hardly'": "answer each",
            "-0.34, -0.02": "answer each",
            "'down', None": "answer each",
        },
        arguments=2,
    ),
    Exercise(
        "04",
        3,
        right=("(0, 0, 2, 3)", "[0.0, 0, 2, 3]", "torch.tensor([0.0, 0, 2, 3])"),
        wrong={
            "(0, 0, 3, 3)": "four corners",
            "(1, 1, 2, 2)": "four corners",
            "(0.5, 0.5, 2.5, 2.5)": "four corners",  # the bin of section 4
            "(0, 0, 2)": "four numbers",
            "(0, 0, 2, 3, 1)": "four numbers",
            "3": "four numbers",
            "'0023'": "four numbers",
            "((0, 0), (2, 3))": "four numbers",
            "(0, 0, 8, 12)": "0 to 3",  # pixels
            "(2, 3, 0, 0)": "0 to 3",
            "(0, 0, 0, 3)": "0 to 3",
        },
    ),
    Exercise(
        "04",
        4,
        right=(
            "lambda f, b, s: roi_align_loop(f, b, s,"
            " sampling=math.ceil((b[2] - b[0]).item() / s / 7))",
            "lambda f, b, s: roi_align_loop(f, b, s,"
            " sampling=max(1, -int(-(b[3] - b[1]) // (7 * s))))",
        ),
        wrong={
            "lambda f, b, s: roi_align_loop(f, b, s,"
            " sampling=1 + math.floor((b[2] - b[0]).item() / s / 7))": "side 28, stride 4",
            "lambda f, b, s: roi_align_loop(f, b, s,"
            " sampling=max(1, math.floor((b[2] - b[0]).item() / s / 7)))": "side 40, stride 4",
            "lambda f, b, s: roi_align_loop(f, b, s,"
            " sampling=max(1, round((b[2] - b[0]).item() / s / 7)))": "side 40, stride 4",
            "lambda f, b, s: roi_align_loop(f, b, s,"
            " sampling=math.ceil(b[2].item() / s / 7))": "off by",  # x2 in place of the width
            "lambda f, b, s: roi_align_loop(f, b, 4,"
            " sampling=math.ceil((b[2] - b[0]).item() / 4 / 7))": "stride 8",  # written in
            "lambda f, b, s: roi_align_loop(f, b, s,"
            " sampling=math.ceil((b[2] - b[0]).item() / 4 / 7))": "stride 8",
            "lambda f, b, s: roi_align_loop(f, b, s, sampling={12: 1, 28: 1, 40: 2, 56: 2, 84: 3}"
            "[min((12, 28, 40, 56, 84), key=lambda a: abs(b[2].item() - b[0].item() - a))])": (
                "stride 8"  # a table by the side alone
            ),
            "lambda f, b, s: roi_align_loop(f, b, s, sampling={(12, 4): 1, (28, 4): 1, (40, 4): 2,"
            " (56, 4): 2, (84, 4): 3, (12, 8): 1, (28, 8): 1, (40, 8): 1, (56, 8): 1, (84, 8): 2}"
            ".get((round((b[2] - b[0]).item()), s), 5))": "off by",  # a table of all in sight
            "lambda f, b, s: roi_align_loop(f, b, s, sampling=2)": "off by",
            "lambda f, b, s: roi_align_loop(f, b, s, aligned=False,"
            " sampling=math.ceil((b[2] - b[0]).item() / s / 7))": "off by",
            "lambda f, b, s: f.mean()": "a tensor",
            "lambda f, b, s: torch.full((3, 7, 7), math.nan)": "off by nan",
            "3": "function",
        },
    ),
    Exercise(
        "05",
        1,
        right=("math.log(9)", "2.197", "2.2", "torch.log(torch.tensor(9.0))"),
        wrong={
            "math.log(8)": "8.0 equally",
            "2.08": "8.0 equally",
            "math.log(81)": "81.0 equally",
            "math.log(2)": "2.0 equally",
            "math.log2(9)": "equally",
            "math.log10(9)": "equally",
            "1 / 9": "equally",
            "math.log(1 / 9)": "positive",
            "10**6": "positive number",
            "'log 9'": "quotes",
            "float('nan')": "positive",
        },
    ),
    Exercise(
        "05",
        2,
        right=(
            "0.005, 354_861",
            "0.02 * 4 / 16, 12 * 118_287 / 4",
            "0.02 / 4, 12 * math.ceil(118_287 / 4)",  # as a DataLoader counts
            "0.005, 12 * (118_287 // 4)",  # with drop_last
        ),
        wrong={
            "0.02, 354_861": "not the rate",
            "0.08, 354_861": "not the rate",
            "0.005, 12 * 118_287": "48.000 epochs",
            "0.005, 12 * 118_287 / 16": "3.000 epochs",
            "0.005, 118_287 / 4": "1.000 epochs",
            "0.005, 12 * 118_287 / 4 + 13": "epochs",
            "0.005, float('nan')": "epochs",
            "'0.005', '354861'": "quotes",
            "0.005, None": "two numbers",
        },
        arguments=2,
    ),
    Exercise(
        "05",
        3,
        right=("lambda steps: KnowsByHeart(4)", "lambda steps: KnowsByHeart(4).eval()"),
        wrong={
            "lambda s: 1.0": "must return the detector",
            "lambda s: None": "must return the detector",
            "lambda s: {'loss': [0.1]}": "must return the detector",  # the history
            "lambda s: KnowsByHeart(0)": "first four scenes",
            "lambda s: frcnn.tiny_faster_rcnn()": "first four scenes",  # not trained
            "lambda s: KnowsByHeart(2)": "first four scenes",
            "lambda s: KnowsByHeart(8)": "more than four",
            "KnowsByHeart": "more than four",  # all eight
            "1.0": "function",
        },
        trains=True,
    ),
    Exercise(
        "05",
        4,
        right=(
            "lambda path: train(frcnn.tiny_faster_rcnn(), glyph_loader(size=64, batch=2), 12,"
            " checkpoint_path=path, resume=True)",
            "lambda path: train(frcnn.tiny_faster_rcnn(), glyph_loader(size=64, batch=8), 12,"
            " checkpoint_path=str(path), resume=True, save_every=5)",
        ),
        wrong={
            "'belongs to another run: batch'": "function",  # text made up of the right words
            "lambda path: 'belongs to another run: batch 4 (now 2)'": "no error",
            "lambda path: short_run(path)": "no error",
            "lambda path: train(frcnn.tiny_faster_rcnn(), glyph_loader(size=64, batch=4), 12,"
            " checkpoint_path=path, resume=True)": "no error",  # the same batch
            "lambda path: train(frcnn.tiny_faster_rcnn(), glyph_loader(size=64, batch=1), 1,"
            " checkpoint_path=path)": "no error",  # not resumed
            "lambda path: train(frcnn.tiny_faster_rcnn(), glyph_loader(size=64, batch=2), 20,"
            " checkpoint_path=path, resume=True)": "not by the batch alone",
            "lambda path: train(frcnn.tiny_faster_rcnn(), glyph_loader(size=64, batch=4), 20,"
            " checkpoint_path=path, resume=True)": "not by the batch alone",
            "lambda path: train(frcnn.tiny_faster_rcnn(), glyph_loader(size=64, batch=2), 0,"
            " checkpoint_path=path, resume=True)": "not by the batch alone",
        },
    ),
    Exercise(
        "06",
        1,
        right=("(51 + 50 * 2 / 3) / 101", "0.835", "np.mean([1] * 51 + [2 / 3] * 50)"),
        wrong={
            "5 / 6": "nearly",  # the area
            "0.83": "nearly",
            "(50 + 51 * 2 / 3) / 101": "nearly",
            "0.84": "nearly",
            "2 / 3": "falling curve",
            "0.75": "falling curve",  # the mean of the precisions 1 and 1/2
            "(6 + 5 * 2 / 3) / 11": "falling curve",  # eleven readings, as in VOC 2007
            "1": "falling curve",
            "83.5": "between 0 and 1",
            "'0.835'": "quotes",
            "float('nan')": "between 0 and 1",
        },
    ),
    Exercise(
        "06",
        2,
        right=("'down'", "'Down'", "' DOWN '"),
        wrong={"'up'": "not so", "'Up'": "not so", "'less'": "answer", "-0.36": "answer"},
    ),
    Exercise(
        "06",
        3,
        right=(
            "lambda rows, n: max((s for s, _ in rows), key=lambda t: f1(rows, n, t))",
            "lambda rows, n: max((f1_of(sum(c for _, c in rows[:k]), k, n), rows[k - 1][0])"
            " for k in range(1, len(rows) + 1))[1]",
            "lambda rows, n: np.float32(max((s for s, _ in rows), key=lambda t: f1(rows, n, t)))"
            " - np.float32(1e-4)",  # just below the score: the same rows
        ),
        wrong={
            "lambda rows, n: 0.75": "there is one of",
            "lambda rows, n: 0.5": "there is one of",
            "lambda rows, n: max(thresholds, key=lambda t: f1(all_rows, all_objects, t))": (
                "there is one of"  # a grid, and rows of its own
            ),
            "lambda rows, n: max(thresholds, key=lambda t: f1(rows, n, t))": "there is one of",
            "lambda rows, n: max((sum(c for _, c in rows[:k])**2 / k / n, rows[k - 1][0])"
            " for k in range(1, len(rows) + 1))[1]": "there is one of",  # P · R
            "lambda rows, n: max((sum(c for _, c in rows[:k]) * (1 / k + 1 / n), rows[k - 1][0])"
            " for k in range(1, len(rows) + 1))[1]": "there is one of",  # P + R
            "lambda rows, n: rows[0][0]": "there is one of",  # the best precision
            "lambda rows, n: rows[-1][0]": "there is one of",
            "lambda rows, n: min(s for s, correct in rows if correct)": "there is one of",  # recall
            "lambda rows, n: max((s for s, _ in rows), key=lambda t: f1(rows, n, t + 1e-9))": (
                "the row at the threshold counts too"  # above in place of at least
            ),
            "lambda rows, n: 5": "no index",
            "lambda rows, n: max(range(len(rows)), key=lambda i: f1(rows, n, rows[i][0]))": (
                "no index"
            ),
            "lambda rows, n: [f1(rows, n, s) for s, _ in rows]": "no index",
            "lambda rows, n: None": "no index",
            "lambda rows, n: '0.7'": "no index",
            "0.763": "function",
        },
    ),
    Exercise(
        "own",
        1,
        right=("1067", "1066.67", "torch.tensor(1067)"),
        wrong={
            "1422": "too large",  # as if the height were squeezed from 4000
            "800": "too small",  # as if the width were squeezed from 3000
            "16": "too small",
            "640": "too small",
            "250": "too small",  # 4000 / 16
            "4000": "too large",
        },
    ),
    Exercise(
        "own",
        2,
        right=(
            f"lambda coco: [1 + {IDS}.index(r['category_id']) for r in coco['annotations']]",
            f"lambda coco: torch.tensor([{IDS}.index(r['category_id']) + 1"
            " for r in coco['annotations']])",
        ),
        wrong={
            f"lambda coco: [{IDS}.index(r['category_id']) for r in coco['annotations']]": "label 0",
            "lambda coco: [1 + [c['id'] for c in coco['categories']].index(r['category_id'])"
            " for r in coco['annotations']]": "in which order",
            "lambda coco: [r['category_id'] for r in coco['annotations']]": "in which order",
            "lambda coco: [r['category_id'] - 1 for r in coco['annotations']]": "label 0",
            f"lambda coco: {IDS}": "in which order",
            "lambda coco: coco['labels']": "it stops",
        },
    ),
    Exercise(
        "own",
        3,
        right=(
            "lambda b: [b[0] - b[2] / 2, b[1] - b[3] / 2, b[2], b[3]]",
            "lambda b: (b[0] - b[2] / 2, b[1] - b[3] / 2, *b[2:])",
        ),
        wrong={
            "lambda b: b": "its place is not",
            "lambda b: [b[0] - b[2], b[1] - b[3], b[2], b[3]]": "its place is not",
            "lambda b: [b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2]": (
                "its size is not"  # corners
            ),
            "lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]": "its size is not",
            "lambda b: b[:2]": "four numbers",
            "lambda b: b[9]": "stops it",
        },
    ),
    Exercise(
        "own",
        4,
        right=(
            "near_duplicates",
            f"lambda ps: (lambda g: [(i, j) {PAIRS}"
            f" if np.abs((g[i] - g[i].mean()) - (g[j] - g[j].mean())).mean() < 4])({GREY})",
        ),
        wrong={
            "lambda ps: []": "not found",
            f"lambda ps: [(i, j) {PAIRS}]": "too many",
            f"lambda ps: [(i, j) {PAIRS} if ps[i].tobytes() == ps[j].tobytes()]": "not found",
            f"lambda ps: [(i, j) {PAIRS} if ps[i].size == ps[j].size]": "too many",
            "lambda ps: [1, 2]": "pairs of numbers",
            f"lambda ps: (lambda g: [(i, j) {PAIRS} if np.abs(g[i] - g[j]).mean() < 5])({GREY})": (
                "not found"  # the brighter one
            ),
        },
    ),
)


# --- the tests ------------------------------------------------------------------------------------


@functools.cache
def cells(notebook: str) -> list[str]:
    """Sources of the code cells that hold a check or call one: stubs and solutions."""
    (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    every = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in every if cell.cell_type == "code" and "check_" in cell.source]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """By notebook what its checks see: definitions, stubs, and what is prepared above."""

    @functools.cache
    def world(notebook: str) -> dict:
        torch.manual_seed(0)
        (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
        names = definitions(path.stem).check_1.__globals__
        for source in cells(notebook):
            if "def check_" in source:
                exec(source, names)
        globals()[f"prepare_{notebook}"](names, tmp_path_factory.mktemp(notebook))
        return names

    return world


def verdict(world: dict, exercise: Exercise, typed: str) -> str:
    """What the check says, returned or in an AssertionError. Any other error fails the test."""
    try:
        said = eval(f"check_{exercise.number}({typed})", world)
    except AssertionError as error:
        said = str(error)
    assert isinstance(said, str)
    return said


def each(kind: str) -> list:
    """One parameter for every answer of every exercise, named by its first letters."""
    return [
        pytest.param(exercise, typed, id=f"{exercise}-{typed[:40]}")
        for exercise in EXERCISES
        for typed in getattr(exercise, kind)
    ]


@pytest.mark.parametrize(("exercise", "typed"), each("right"))
def test_a_right_answer_is_taken(exercise, typed, worlds):
    assert verdict(worlds(exercise.notebook), exercise, typed).startswith("right")


@pytest.mark.parametrize(("exercise", "typed"), each("wrong"))
def test_a_wrong_answer_gets_a_sentence_that_helps(exercise, typed, worlds):
    said = verdict(worlds(exercise.notebook), exercise, typed)
    assert not said.startswith("right")
    assert exercise.wrong[typed] in said
    assert len(said.split()) >= 4


@pytest.mark.parametrize("typed", WRONG_TYPES)
@pytest.mark.parametrize("exercise", EXERCISES, ids=str)
def test_a_wrong_type_gets_a_sentence(exercise, typed, worlds):
    said = verdict(worlds(exercise.notebook), exercise, ", ".join([typed] * exercise.arguments))
    assert not said.startswith("right")
    assert len(said.split()) >= 4


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if not e.trains], ids=str)
def test_the_solution_passes_and_the_stub_does_not(exercise, worlds, capsys):
    world = dict(worlds(exercise.notebook))
    check = f"check_{exercise.number}("
    *stub, solution = (source for source in cells(exercise.notebook) if check in source)
    for source in stub:  # the check and the answer, in one cell or in two
        exec(source, world)
    assert capsys.readouterr().out == "your turn\n"
    exec(solution, dict(worlds(exercise.notebook)))
    assert capsys.readouterr().out.startswith(f"{exercise.number}: right")


@pytest.mark.parametrize(
    ("notebook", "name", "holder", "attribute"),
    [("04", "scored_with", "roi_align", "aligned"), ("06", "ap50_with", None, "NMS_THR")],
)
def test_a_check_leaves_the_model_as_it_was(notebook, name, holder, attribute, monkeypatch):
    (path,) = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    function = getattr(definitions(path.stem), name)
    model = frcnn.tiny_faster_rcnn()
    monkeypatch.setitem(function.__globals__, "model", model)
    seen = []

    def broken(model, _):
        seen.append(getattr(getattr(model, holder) if holder else model, attribute))
        raise KeyboardInterrupt

    monkeypatch.setattr(frcnn, "evaluate", broken)
    before = getattr(getattr(model, holder) if holder else model, attribute)
    with pytest.raises(KeyboardInterrupt):
        function(0.75)
    assert seen == [0.75]
    assert getattr(getattr(model, holder) if holder else model, attribute) == before
