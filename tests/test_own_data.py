"""Pictures of one's own: COCO's files and ``metadata.jsonl``, classes, fine-tuning, bad folders."""

import collections
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pyarrow.parquet
import pytest
import torch
from conftest import NAN, encoded, image_ids, objects, pixels, row, stream, write
from fsspec.implementations.local import LocalFileSystem
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_published_weights import random_torchvision_detector
from test_sources import read, shard_rows
from torch.utils.data import DataLoader

import frcnn_common as frcnn

# --- a folder of one's own ------------------------------------------------------------------------


KINDS = {7: "disc", 100: "square", 3: "triangle"}  # as the file lists them
CLASSES = frcnn.Classes(("__background__", "triangle", "disc", "square"), (0, 3, 7, 100))
SIDE = 32  # pixels, of a plain picture


def colour(number: int) -> tuple[int, int, int]:
    return (12 * number, 255 - 12 * number, 7 * number)


def box_of(number: int) -> list[float]:
    """Corner and size; no two pictures have the same."""
    return [number % 5 + 1.5, number // 5 + 2.0, 20.0, 18.25]


def kind_of(number: int) -> int:
    return list(KINDS)[number % 3]


def coco_of(numbers, prefix: str = "") -> dict:
    """COCO's annotations: picture 4 is ``4.png``, has id 4 and one box."""
    images = [
        {"id": n, "file_name": f"{prefix}{n}.png", "width": SIDE, "height": SIDE} for n in numbers
    ]
    annotations = [
        {"id": 50 + n, "image_id": n, "category_id": kind_of(n), "bbox": box_of(n)} for n in numbers
    ]
    categories = [{"id": i, "name": name} for i, name in KINDS.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw(folder: Path, numbers) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        PIL.Image.new("RGB", (SIDE, SIDE), colour(number)).save(folder / f"{number}.png")


def put(path: Path, content: dict | list[dict]) -> None:
    """A dictionary as JSON, several as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    path.write_text("\n".join(map(json.dumps, lines)))


def own(folder: Path, change: Callable[[dict], object] = lambda coco: None, count: int = 12) -> Path:
    """A folder of plain pictures beside its ``annotations.json``, in which something is changed."""
    draw(folder, range(1, count + 1))
    coco = coco_of(range(1, count + 1))
    change(coco)
    put(folder / "annotations.json", coco)
    return folder


def own_stream(folder: Path, split: str = "val", **options) -> frcnn.COCOStreamDataset:
    """All pictures of a folder as "val", in their own size."""
    options = {"image_size": SIDE, "bbox_format": None, "val_share": 1.0} | options
    return stream(folder, split, **options)


def served_by(dataset: frcnn.COCOStreamDataset) -> dict[int, tuple]:
    """By ``image_id``: colour of the picture, boxes, and names and ids of their classes."""
    names, ids = dataset.classes
    found = {}
    for image, target in dataset:
        assert target["image_id"] not in found
        shade = tuple(pixels(image).mean((1, 2)).round().int().tolist())
        labels = target["labels"].tolist()
        kinds = [(names[label], ids[label]) for label in labels]
        found[target["image_id"]] = (shade, target["boxes"].tolist(), kinds)
    return found


def expected_of(numbers, kinds=lambda n: (KINDS[kind_of(n)], kind_of(n))) -> dict[int, tuple]:
    corners = {n: [x, y, x + w, y + h] for n, (x, y, w, h) in ((n, box_of(n)) for n in numbers)}
    return {n: (colour(n), [corners[n]], [kinds(n)]) for n in numbers}


# --- COCO's own pictures --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco_folder(coco_tiny, tmp_path_factory) -> Path:
    """The shards of coco-tiny written out as COCO itself is: JSON files and JPEG files."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "annotations").mkdir()
    (folder / "images").mkdir()
    for split in ("train", "val"):
        content = (coco_tiny / f"instances_{split}.json").read_bytes()
        (folder / "annotations" / f"instances_{split}2017.json").write_bytes(content)
        for sample in shard_rows(coco_tiny, split):
            path = folder / "images" / f"{sample['image_id']:012d}.jpg"
            path.write_bytes(sample["image"]["bytes"])
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_coco_folder_gives_what_the_shards_give(split, coco_tiny, coco_folder):
    ours, shards = (
        stream(folder, split, 200, bbox_format=None) for folder in (coco_folder, coco_tiny)
    )
    assert (ours.images, shards.images) == (50, 50)
    assert ours.classes == shards.classes == frcnn.COCO_CLASSES
    found = {target["image_id"]: (image, target) for image, target in ours}
    compared = 0
    for image, target in shards:
        same_image, same = found.pop(target["image_id"])
        assert torch.equal(same_image, image)
        objects = ~same["iscrowd"]  # the shards hold no crowds
        assert objects.all() or split == "val"
        scale = torch.tensor([same["orig_size"][1], same["orig_size"][0]] * 2) / 200
        boxes, expected = same["boxes"][objects] * scale, target["boxes"] * scale
        torch.testing.assert_close(boxes, expected, atol=1e-3, rtol=0)  # pixels of the original
        torch.testing.assert_close(same["area"][objects], target["area"])
        for name, theirs in zip(same["labels"][objects], target["labels"], strict=True):
            assert ours.classes.names[name] == shards.classes.names[theirs]
        compared += len(boxes)
    assert not found
    assert compared == {"train": 465, "val": 377}[split]


# --- layouts --------------------------------------------------------------------------------------


ALL = range(1, 13)
TRAIN, VAL = range(1, 9), range(9, 13)
LAYOUTS = {  # annotation file: its pictures, their folder, what stands before their names
    "by hand, beside": {"annotations.json": (ALL, "", "")},
    "by hand, in images/": {"annotations.json": (ALL, "images", "")},
    "Roboflow": {
        "train/_annotations.coco.json": (TRAIN, "train", ""),
        "valid/_annotations.coco.json": (VAL, "valid", ""),
    },
    "Roboflow, val": {
        "train/_annotations.coco.json": (TRAIN, "train", ""),
        "val/_annotations.coco.json": (VAL, "val", ""),
    },
    "Roboflow, not divided": {"train/_annotations.coco.json": (ALL, "train", "")},
    "annotations.json in train/ and val/": {
        "train/annotations.json": (TRAIN, "train", ""),
        "val/annotations.json": (VAL, "val", ""),
    },
    "CVAT": {"annotations/instances_default.json": (ALL, "images/default", "")},
    "Label Studio": {"result.json": (ALL, "images", "images/")},
    "COCO": {
        "annotations/instances_train.json": (TRAIN, "train", ""),
        "annotations/instances_val.json": (VAL, "val", ""),
    },
    "COCO 2017": {
        "annotations/instances_train2017.json": (TRAIN, "train2017", ""),
        "annotations/instances_val2017.json": (VAL, "val2017", ""),
    },
    "COCO, train only": {"annotations/instances_train.json": (ALL, "train", "")},
}


def laid_out(folder: Path, layout: dict) -> Path:
    for file, (numbers, place, prefix) in layout.items():
        put(folder / file, coco_of(numbers, prefix))
        draw(folder / place, numbers)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_of_the_labelling_tools_is_read(layout, tmp_path):
    folder = laid_out(tmp_path / "my [data]*", layout)
    parts = [stream(folder, split, SIDE, bbox_format=None) for split in ("train", "val")]
    assert [part.classes for part in parts] == [CLASSES] * 2
    train, val = map(served_by, parts)
    assert [part.images for part in parts] == [len(train), len(val)]
    assert train | val == expected_of(ALL)
    if len(layout) == 2:
        assert (set(train), set(val)) == (set(TRAIN), set(VAL))
    else:
        assert (len(train), len(val)) == (10, 2)  # a fifth of twelve, rounded


CATEGORY_COLUMNS = {  # name of the column, what stands in it, and what is to come out
    "numbers": ("categories", kind_of, lambda n: (str(kind_of(n)), kind_of(n))),
    "names": (
        "categories",
        lambda n: KINDS[kind_of(n)],
        lambda n: (KINDS[kind_of(n)], sorted(KINDS.values()).index(KINDS[kind_of(n)])),
    ),
    "category": ("category", kind_of, lambda n: (str(kind_of(n)), kind_of(n))),
}


@pytest.mark.parametrize("parts", [{"": ALL}, {"train": TRAIN, "validation": VAL}], ids=["flat", "parts"])
@pytest.mark.parametrize("column", CATEGORY_COLUMNS)
def test_metadata_jsonl_is_read(column, parts, tmp_path):
    name, category, kinds = CATEGORY_COLUMNS[column]
    for part, numbers in parts.items():
        draw(tmp_path / part, numbers)
        lines = [
            {"file_name": f"{n}.png", "image_id": n}
            | {"objects": {"bbox": [box_of(n)], name: [category(n)]}}
            for n in numbers
        ]
        put(tmp_path / part / "metadata.jsonl", lines)
    train, val = (
        served_by(stream(tmp_path, split, SIDE, bbox_format=None)) for split in ("train", "val")
    )
    assert train | val == expected_of(ALL, kinds)
    assert (len(train), len(val)) == ((10, 2) if len(parts) == 1 else (8, 4))


# --- what is held out -----------------------------------------------------------------------------


def held_out(folder: Path, share: float) -> tuple[set, set]:
    """Ids of "train" and of "val"."""
    ids = []
    for split in ("train", "val"):
        try:
            ids.append({r["image_id"] for r in frcnn.open_source(str(folder), split, share)[0]})
        except FileNotFoundError as error:
            assert re.search(f"holds no pictures for '{split}'", str(error))
            ids.append(set())
    return tuple(ids)


@pytest.fixture(scope="module")
def sixty(tmp_path_factory) -> Path:
    return own(tmp_path_factory.mktemp("sixty"), count=60)


def test_a_fifth_of_one_file_is_held_out(sixty):
    train, val = held_out(sixty, 0.2)
    assert (len(train), len(val)) == (48, 12)
    assert train | val == set(range(1, 61))
    assert held_out(sixty, 0.2) == (train, val)


def test_the_same_pictures_are_held_out_in_every_process(sixty):
    code = "import sys, frcnn_common as f; print(sorted(r['image_id'] for r in "
    code += "f.open_source(sys.argv[1], 'val')[0]))"
    found = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(sixty)]
        found.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert [json.loads(ids) for ids in found] == [sorted(held_out(sixty, 0.2)[1])]


def test_the_order_in_the_file_decides_nothing(sixty, tmp_path):
    def reversed_(coco):
        coco["images"].reverse()
        coco["annotations"].reverse()

    other = own(tmp_path, reversed_, count=60)
    assert held_out(other, 0.2) == held_out(sixty, 0.2)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0, 60), (0.5, 30), (0.01, 1)])
def test_the_share_may_be_anything_from_nothing_to_all(share, count, sixty):
    train, val = held_out(sixty, share)
    assert (len(train), len(val)) == (60 - count, count)


@pytest.mark.parametrize("share", [-0.1, 1.1, NAN])
def test_a_share_that_is_none_is_refused(share, sixty):
    with pytest.raises(ValueError, match="val_share must lie in 0..1, got"):
        stream(sixty, val_share=share)


def test_two_files_leave_the_share_unused(tmp_path):
    folder = laid_out(tmp_path, LAYOUTS["COCO"])
    assert held_out(folder, 0.9) == (set(TRAIN), set(VAL))


# --- boxes of a file ------------------------------------------------------------------------------


def big_boxes(coco: dict) -> None:
    """They fill the picture: as corners they would be boxes inside it as well."""
    for annotation in coco["annotations"]:
        annotation["bbox"] = [3, 2, 28, 29]
        annotation["area"] = 400  # of an outline


@pytest.mark.parametrize("with_area", [True, False])
def test_boxes_of_coco_are_corner_and_size_even_where_both_would_fit(with_area, tmp_path):
    def change(coco):
        big_boxes(coco)
        if not with_area:
            for annotation in coco["annotations"]:
                del annotation["area"]

    for _, target in own_stream(own(tmp_path, change)):
        assert target["boxes"].tolist() == [[3, 2, 31, 31]]


def test_without_an_area_that_of_the_box_is_taken(tmp_path):
    def change(coco):
        coco["annotations"][0]["area"] = 77.5
        coco["annotations"][1]["area"] = None

    areas = {t["image_id"]: t["area"].tolist() for _, t in own_stream(own(tmp_path, change))}
    assert areas == {n: [77.5 if n == 1 else 20 * 18.25] for n in ALL}


def test_without_a_size_that_of_the_picture_is_taken(tmp_path):
    def change(coco):
        for image in coco["images"][:6]:
            del image["width"], image["height"]

    dataset = own_stream(own(tmp_path, change))
    assert served_by(dataset) == expected_of(ALL)
    assert {t["orig_size"] for _, t in dataset} == {(SIDE, SIDE)}


@pytest.mark.parametrize("with_size", [True, False])
def test_a_photograph_is_turned_as_its_camera_says(with_size, tmp_path):
    """Stored 48 × 24 with a note to turn it, annotated as the 24 × 48 that people see."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((24, 48, 3), np.uint8)
    stored[12:, :24] = 255  # below on the left; turned to the right: above on the left
    PIL.Image.fromarray(stored).save(tmp_path / "1.jpg", exif=exif, quality=100)
    coco = coco_of([1])
    coco["images"][0].update(file_name="1.jpg", width=24, height=48)
    coco["annotations"][0]["bbox"] = [0, 0, 12, 24]
    if not with_size:
        del coco["images"][0]["width"], coco["images"][0]["height"]
    put(tmp_path / "annotations.json", coco)
    ((image, target),) = own_stream(tmp_path, image_size=(24, 48))
    assert (target["orig_size"], target["size"]) == ((48, 24), (48, 24))
    assert target["boxes"].tolist() == [[0, 0, 12, 24]]
    white = pixels(image)[0, :48, :24] > 128
    assert white[1:23, 1:11].all()
    assert white.sum() < 12 * 24 * 1.1


# --- ids of classes -------------------------------------------------------------------------------


IDS = {
    "from 0": [(0, "cat"), (1, "dog"), (2, "cow")],
    "from 1": [(1, "cat"), (2, "dog"), (3, "cow")],
    "gaps, not in order": [(7, "cat"), (100, "dog"), (3, "cow")],
    "backwards": [(3, "cat"), (2, "dog"), (1, "cow")],
}


def recategorised(categories: list[tuple[int, str]]) -> Callable[[dict], None]:
    """Picture n shows number n % 3 of them."""

    def change(coco):
        coco["categories"] = [{"id": i, "name": name} for i, name in categories]
        for annotation in coco["annotations"]:
            annotation["category_id"] = categories[annotation["image_id"] % 3][0]

    return change


class Knowing(torch.nn.Module):
    """Finds what is there: the boxes of a folder, by the colour of the picture."""

    def __init__(self, dataset: frcnn.COCOStreamDataset) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.classes, self.num_classes = dataset.classes, len(dataset.classes.names)
        self.SCORE_THR = 0.05
        self.known = [(image[:, 0, 0], target) for image, target in dataset]

    def forward(self, images, image_sizes=None):
        results = []
        for image in images:
            distances = [float((image[:, 0, 0] - shade).abs().sum()) for shade, _ in self.known]
            target = self.known[int(np.argmin(distances))][1]
            scores = torch.full((len(target["boxes"]),), 0.9)
            found = {"boxes": target["boxes"], "labels": target["labels"], "scores": scores}
            results.append(found)
        return results, []


@pytest.mark.parametrize("categories", IDS.values(), ids=IDS)
def test_labels_names_and_ids_belong_together(categories, tmp_path):
    folder = own(tmp_path, recategorised(categories))
    dataset = own_stream(folder)
    assert dataset.classes.names == ("__background__", *(n for _, n in sorted(categories)))
    assert dataset.classes.ids == (0, *(i for i, _ in sorted(categories)))
    for _, target in dataset:
        i, name = categories[target["image_id"] % 3]
        (label,) = target["labels"].tolist()
        assert (dataset.classes.names[label], dataset.classes.ids[label]) == (name, i)
        assert 1 <= label <= 3


@pytest.mark.parametrize("categories", IDS.values(), ids=IDS)
def test_evaluation_and_detections_speak_the_ids_of_the_file(
    categories, tmp_path, monkeypatch, capsys
):
    folder = own(tmp_path / "in", recategorised(categories))
    model = Knowing(own_stream(folder))
    for annotations in (None, folder / "annotations.json"):
        assert frcnn.evaluate(model, own_stream(folder), annotations=annotations)["AP"] > 0.999
    truth, results = frcnn.detect_dataset(model, own_stream(folder))
    evaluation = frcnn.coco_evaluation(truth, results, classes=model.classes)
    assert {d["category_id"] for d in evaluation.cocoDt.anns.values()} == {i for i, _ in categories}
    assert evaluation.params.catIds == sorted(i for i, _ in categories)

    monkeypatch.setattr(frcnn, "load_checkpoint", lambda _: (model, {"run": {"image_size": SIDE}}))
    line = f"detect --checkpoint any.pt --out {tmp_path}/out {folder}"
    assert frcnn.main(line.split()) == 0
    capsys.readouterr()
    for record in json.loads((tmp_path / "out" / "detections.json").read_text()):
        (found,) = record["detections"]
        i, name = categories[int(Path(record["image"]).stem) % 3]
        assert (found["category_id"], found["label"]) == (i, name)


def named_shards(folder: Path, category) -> Path:
    """Shards whose column of categories has a type of its own."""
    rows = [row(i, size=(8, 8), boxes=[[1, 2, 5, 7]] * 2, categories=[0, 2]) for i in range(8)]
    features = datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "width": datasets.Value("int64"),
            "height": datasets.Value("int64"),
            "objects": {
                "bbox_id": datasets.List(datasets.Value("int64")),
                "category": datasets.List(category),
                "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
                "area": datasets.List(datasets.Value("float64")),
            },
        }
    )
    folder.mkdir(exist_ok=True)
    shard = folder / "train-00000-of-00001.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(shard)
    return folder


def test_names_in_the_columns_of_shards_are_taken(tmp_path):
    dataset = stream(named_shards(tmp_path, datasets.ClassLabel(names=["nut", "bolt", "gear"])))
    assert dataset.classes == (("__background__", "nut", "bolt", "gear"), (0, 0, 1, 2))
    assert {tuple(target["labels"].tolist()) for _, target in dataset} == {(1, 3)}


@pytest.mark.parametrize(
    "category", [datasets.Value("int64"), datasets.ClassLabel(names=frcnn.COCO_NAMES[1:])], ids=str
)
def test_without_names_or_with_cocos_they_are_cocos(category, tmp_path):
    dataset = stream(named_shards(tmp_path, category))
    assert dataset.classes is frcnn.COCO_CLASSES
