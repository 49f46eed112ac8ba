"""Pictures of one's own: COCO's files and ``metadata.jsonl``, classes, fine-tuning, bad folders."""

import collections
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from conftest import NAN, encoded, image_ids, pixels, row, stream, write
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


def own(folder: Path, change: Callable[[dict], object] | None = None, count: int = 12) -> Path:
    """A folder of plain pictures beside its ``annotations.json``, in which something is changed."""
    draw(folder, range(1, count + 1))
    coco = coco_of(range(1, count + 1))
    if change:
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
        kept = ~same["iscrowd"]  # the shards hold no crowds
        assert kept.all() or split == "val"
        scale = torch.tensor([same["orig_size"][1], same["orig_size"][0]] * 2) / 200
        boxes, expected = same["boxes"][kept] * scale, target["boxes"] * scale
        torch.testing.assert_close(boxes, expected, atol=1e-3, rtol=0)  # pixels of the original
        torch.testing.assert_close(same["area"][kept], target["area"])
        for name, theirs in zip(same["labels"][kept], target["labels"], strict=True):
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


@pytest.mark.parametrize(
    "parts", [{"": ALL}, {"train": TRAIN, "validation": VAL}], ids=["flat", "in parts"]
)
@pytest.mark.parametrize("column", CATEGORY_COLUMNS)
def test_metadata_jsonl_is_read(column, parts, tmp_path):
    name, category, kinds = CATEGORY_COLUMNS[column]
    tmp_path = tmp_path / "my [data]*"
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
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    command = [sys.executable, "-c", code, str(sixty)]
    printed = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    assert json.loads(printed) == sorted(held_out(sixty, 0.2)[1])


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
    with pytest.raises(ValueError, match=r"val_share must lie in 0..1, got"):
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


@pytest.mark.parametrize("with_area", [True, False])
def test_corners_that_a_tool_wrote_by_mistake_are_found_out(with_area, tmp_path, capsys):
    def change(coco):
        for annotation in coco["annotations"]:
            annotation["bbox"] = [19, 18, 31, 30]  # as corner and size it would leave the picture
            if with_area:
                annotation["area"] = 12 * 12

    dataset = own_stream(own(tmp_path, change))
    assert "objects.bbox is xyxy" in capsys.readouterr().out
    assert all(target["boxes"].tolist() == [[19, 18, 31, 30]] for _, target in dataset)


def test_nothing_is_said_of_boxes_as_coco_writes_them(tmp_path, capsys):
    own_stream(own(tmp_path))
    assert capsys.readouterr().out == ""


def test_one_metadata_file_above_two_folders_of_pictures_says_where_it_belongs(tmp_path):
    draw(tmp_path / "train", [1])
    objects = {"bbox": [box_of(1)], "categories": [0]}
    put(tmp_path / "metadata.jsonl", {"file_name": "train/1.png", "objects": objects})
    with pytest.raises(ValueError, match="has to lie in the folder of the pictures"):
        own_stream(tmp_path)


def test_without_an_area_that_of_the_box_is_taken(tmp_path):
    def change(coco):
        coco["annotations"][0]["area"] = 77.5
        coco["annotations"][1]["area"] = None

    areas = {t["image_id"]: t["area"].tolist() for _, t in own_stream(own(tmp_path, change))}
    assert areas == {n: [77.5 if n == 1 else 20 * 18.25] for n in ALL}


def test_in_metadata_jsonl_the_area_is_that_of_the_box_too(tmp_path):
    areas = [t["area"].tolist() for _, t in own_stream(metadata()(tmp_path / "data"))]
    assert areas == [[20 * 18.25]] * 12


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
        self.name, self.SCORE_THR = "tiny", 0.05
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


# --- crowds ---------------------------------------------------------------------------------------


def by_pycocotools(file: Path, records: list[dict], ids: list[int]) -> list[float]:
    """The twelve figures of a user's own file, without anything of this program."""
    truth = COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(records), "bbox")
    evaluation.params.imgIds = ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def crowded(coco: dict) -> None:
    """In every third picture the whole area is a crowd of what the box shows, too."""
    for annotation in coco["annotations"][::3]:
        crowd = {"iscrowd": 1, "bbox": [0, 0, SIDE, SIDE], "area": SIDE * SIDE}
        coco["annotations"].append(annotation | crowd | {"id": annotation["id"] + 50})
    for annotation in coco["annotations"]:  # pycocotools asks for both
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])


def test_crowds_are_marked_for_evaluation_and_never_trained_on(tmp_path):
    folder = own(tmp_path, crowded)
    train = list(own_stream(folder, "train", val_share=0.0))
    assert [len(target["boxes"]) for _, target in train] == [1] * 12
    assert not any(target["iscrowd"].any() for _, target in train)
    val = {target["image_id"]: target for _, target in own_stream(folder)}
    marks = {n: target["iscrowd"].tolist() for n, target in val.items()}
    assert marks == {n: [False, True] if n % 3 == 1 else [False] for n in ALL}
    assert val[1]["boxes"][1].tolist() == [0, 0, SIDE, SIDE]


def test_a_picture_of_crowds_alone_is_left_out_of_training_and_no_mistake(tmp_path):
    def change(coco):
        for annotation in coco["annotations"][:4]:
            annotation["iscrowd"] = 1

    dataset = own_stream(own(tmp_path, change), "train", val_share=0.0)
    assert sorted(served_by(dataset)) == list(range(5, 13))
    assert (dataset.skipped, dataset.dropped) == (0, 0)


@pytest.mark.parametrize("inside_crowds", [True, False])
def test_what_is_found_in_a_crowd_counts_neither_way(inside_crowds, tmp_path, capsys):
    folder = own(tmp_path, crowded)
    dataset = own_stream(folder)
    truth = [target for _, target in dataset]
    results, records = [], []
    for target in truth:
        extra = target["iscrowd"].any() == inside_crowds  # a second, wrong box, surer than the rest
        boxes = [target["boxes"][0].tolist()] + [[20.0, 21.0, 30.0, 31.0]] * int(extra)
        scores = [0.5] + [0.9] * int(extra)
        found = {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores)}
        results.append(found | {"labels": target["labels"][:1].repeat(len(boxes))})
        for (x1, y1, x2, y2), score in zip(boxes, scores, strict=True):
            record = {"image_id": target["image_id"], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            i = dataset.classes.ids[target["labels"][0]]
            records.append(record | {"category_id": i, "score": score})
    ours = frcnn.coco_evaluation(truth, results, classes=dataset.classes).stats.tolist()
    theirs = by_pycocotools(folder / "annotations.json", records, list(ALL))
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert (ours[0] > 0.999) == inside_crowds  # outside of one it is a false alarm


# --- the Hub breaks off ---------------------------------------------------------------------------


class Torn:
    """A file of the network whose first reads end with a timeout."""

    def __init__(self, file, faults: list[int]) -> None:
        self.file, self.faults = file, faults

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def read(self, *size):
        if self.faults and self.faults.pop(0):
            raise TimeoutError("the line was cut")
        return self.file.read(*size)


@pytest.fixture
def faulty_network(monkeypatch):
    """``faulty_network(faults)``: which reads of ``faulty://…`` fail, 1 for each that does."""
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    faults = []

    class Faulty(LocalFileSystem):
        protocol = "faulty"
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).partition(":")[2].lstrip("/") if ":" in str(path) else str(path)

        def unstrip_protocol(self, name):
            return f"faulty://{self._strip_protocol(name)}"

        def open(self, path, mode="rb", **options):
            return Torn(Path(self._strip_protocol(path)).open(mode), faults)

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "faulty", Faulty)
    return faults


@pytest.fixture
def hub_of(monkeypatch):
    """``hub_of(folder)``: its shards pass for a data set of the Hub, over the faulty network."""
    load = datasets.load_dataset

    def build(folder: Path) -> frcnn.COCOStreamDataset:
        def load_dataset(path, split, streaming):
            files = {split: [f"faulty://{shard}" for shard in sorted(folder.iterdir())]}
            return load("parquet", data_files=files, split=split, streaming=streaming)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return stream(frcnn.HUB_SOURCE)

    return build


def test_a_network_that_breaks_off_loses_and_doubles_nothing(faulty_network, hub_of, tmp_path):
    dataset = hub_of(write(tmp_path, *[[row(5 * i + k) for k in range(5)] for i in range(8)]))
    faulty_network[:] = [0, 1, 1] * 100
    assert image_ids(dataset) == list(range(40))
    assert 300 - len(faulty_network) > 30  # two reads of three failed


def test_a_network_that_stays_away_ends_with_one_line(
    faulty_network, hub_of, tmp_path, monkeypatch
):
    dataset = hub_of(write(tmp_path, [row(i) for i in range(4)]))
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 3)
    faulty_network[:] = [1] * 1000
    with pytest.raises(ValueError, match="detection-datasets/coco cannot be read further: ") as end:
        image_ids(dataset)
    assert "\n" not in str(end.value)


# --- classes in checkpoints -----------------------------------------------------------------------


def other_classes(**names: str) -> frcnn.Classes:
    """`CLASSES` with another name or two."""
    return frcnn.Classes(tuple(names.get(name, name) for name in CLASSES.names), CLASSES.ids)


RING = other_classes(disc="ring")


def tiny(classes: frcnn.Classes | None) -> frcnn.FasterRCNN:
    model = frcnn.tiny_faster_rcnn(4)
    model.classes = classes
    return model


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def test_names_and_ids_come_back_out_of_a_checkpoint(tmp_path):
    frcnn.save_checkpoint(tmp_path / "c.pt", tiny(CLASSES))
    model, _ = frcnn.load_checkpoint(tmp_path / "c.pt")
    assert (model.classes, type(model.classes)) == (CLASSES, frcnn.Classes)
    assert model.num_classes == 4
    fresh, _ = frcnn.load_checkpoint(tmp_path / "c.pt", tiny(None))
    assert fresh.classes == CLASSES


def test_a_checkpoint_of_before_there_were_classes_has_cocos(tmp_path):
    frcnn.save_checkpoint(tmp_path / "c.pt", frcnn.tiny_faster_rcnn())
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    del state["classes"]
    torch.save(state, tmp_path / "c.pt")
    assert frcnn.load_checkpoint(tmp_path / "c.pt")[0].classes == frcnn.COCO_CLASSES


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (RING, r"only in the model: ring \(7\); only in \S+c.pt: disc \(7\)"),
        (
            frcnn.Classes(CLASSES.names, (0, 3, 8, 100)),
            r"only in the model: disc \(8\); only in \S+c.pt: disc \(7\)",
        ),
    ],
    ids=["another name", "another id"],
)
def test_a_model_of_other_classes_takes_no_checkpoint(classes, said, tmp_path):
    frcnn.save_checkpoint(tmp_path / "c.pt", tiny(CLASSES))
    model = tiny(classes)
    before = copied(model)
    with pytest.raises(ValueError, match=said):
        frcnn.load_checkpoint(tmp_path / "c.pt", model)
    assert_same(model.state_dict(), before)
    assert model.classes == classes


def test_a_model_is_not_evaluated_on_data_of_other_classes(tmp_path):
    folder = own(tmp_path)
    with pytest.raises(ValueError, match=r"only in the model: ring \(7\); only in .*: disc \(7\)"):
        frcnn.evaluate(tiny(RING), own_stream(folder))


def loader_of(folder: Path, batch: int = 2) -> DataLoader:
    dataset = own_stream(folder, "train", val_share=0.0)
    return DataLoader(dataset, batch, collate_fn=frcnn.frcnn_collate_fn)


def test_training_takes_over_the_classes_of_the_data(tmp_path):
    model = tiny(None)
    frcnn.train(model, loader_of(own(tmp_path)), 1, checkpoint_path=tmp_path / "c.pt")
    assert model.classes == CLASSES
    assert frcnn.load_checkpoint(tmp_path / "c.pt")[0].classes == CLASSES


@pytest.mark.parametrize("count", [3, 5, 81])
def test_training_refuses_a_model_with_another_number_of_classes(count, tmp_path):
    folder = own(tmp_path)
    model = frcnn.tiny_faster_rcnn(count)
    before = copied(model)
    with pytest.raises(ValueError, match=r"has 4 classes.*build the model with num_classes=4"):
        frcnn.train(model, loader_of(folder), 1)
    assert_same(model.state_dict(), before)


# --- fine-tuning ----------------------------------------------------------------------------------


def without_predictor(state: dict) -> dict:
    return {name: value for name, value in state.items() if not name.startswith("predictor.")}


def started_from(path: Path, model: frcnn.FasterRCNN) -> frcnn.FasterRCNN:
    """As ``train --weights FILE`` does it."""
    _, weights, classes, _ = frcnn._read_checkpoint(path)
    frcnn.start_from(model, weights, classes, path)
    return model


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory) -> Path:
    """A file as torchvision publishes it, for 91 ids, of random weights."""
    path = tmp_path_factory.mktemp("torchvision") / "theirs.pth"
    state = random_torchvision_detector().state_dict()
    assert len(state["roi_heads.box_predictor.cls_score.bias"]) == 91
    torch.save(state, path)
    return path


def test_cocos_detector_starts_one_of_other_classes(torchvision_file, capsys):
    coco = frcnn.coco_faster_rcnn()
    state = torch.load(torchvision_file, weights_only=True)
    frcnn.load_coco_weights(coco, state)
    mine = frcnn.coco_faster_rcnn(4)
    mine.classes = CLASSES
    predictor = copied(mine.predictor)
    started_from(torchvision_file, mine)
    assert_same(without_predictor(mine.state_dict()), without_predictor(coco.state_dict()))
    assert_same(mine.predictor.state_dict(), predictor)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "kept all but the predictor, new for 3 classes" in said

    by_state = frcnn.coco_faster_rcnn(4)
    own_predictor = copied(by_state.predictor)
    frcnn.load_coco_weights(by_state, state)
    assert_same(without_predictor(by_state.state_dict()), without_predictor(coco.state_dict()))
    assert_same(by_state.predictor.state_dict(), own_predictor)

    mine.SCORE_THR = 0.0
    found = frcnn.detect(mine, PIL.Image.effect_noise((90, 60), 80).convert("RGB"), (64, 128))
    assert len(found["boxes"]) > 0
    assert set(found["labels"].tolist()) <= {1, 2, 3}


def test_the_shipped_detector_starts_one_of_other_classes():
    shipped = frcnn.load_checkpoint(frcnn.TINY_DETECTOR)[0].cpu()
    model = tiny(CLASSES)
    predictor = copied(model.predictor)
    started_from(frcnn.TINY_DETECTOR, model)
    assert_same(without_predictor(model.state_dict()), without_predictor(shipped.state_dict()))
    assert_same(model.predictor.state_dict(), predictor)


def test_of_the_same_classes_the_predictor_comes_along(capsys):
    shipped = frcnn.load_checkpoint(frcnn.TINY_DETECTOR)[0].cpu()
    model = started_from(frcnn.TINY_DETECTOR, frcnn.tiny_faster_rcnn())
    assert_same(model.state_dict(), shipped.state_dict())
    assert capsys.readouterr().out == ""


def test_as_many_classes_of_other_names_get_a_new_predictor(tmp_path):
    frcnn.save_checkpoint(tmp_path / "c.pt", tiny(RING))
    model = tiny(CLASSES)
    predictor = copied(model.predictor)
    started_from(tmp_path / "c.pt", model)
    assert_same(model.predictor.state_dict(), predictor)
    assert model.classes == CLASSES


@pytest.mark.filterwarnings("ignore:training with frozen stages")
def test_what_is_frozen_stands_still(tmp_path):
    model = tiny(CLASSES)
    model.backbone.freeze(2)
    for layer in model.backbone.modules():  # so that statistics would move
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean += 1
    before = copied(model.backbone)
    frcnn.train(model, loader_of(own(tmp_path)), 2)
    still = ("stem.", "layer1.")
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(still), name
    after = model.backbone.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert not [name for name in moved if name.startswith(still)]
    assert [name for name in moved if name.startswith("layer2.") and "running_mean" in name]
    assert [name for name in moved if name.startswith("layer4.") and name.endswith("weight")]


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(frcnn, "DEVICE", torch.device("cpu"))


@pytest.fixture
def call(capfd):
    """``call("train …")`` → exit code, stdout, lines of stderr that are no progress."""

    def run(line: str):
        capfd.readouterr()
        code = frcnn.main(line.split())
        out, err = capfd.readouterr()
        told = [text for text in re.split(r"[\r\n]+", err) if text and "%|" not in text]
        return code, out, told

    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return own(tmp_path_factory.mktemp("small"), count=20)


TRAIN_TINY = "train --model tiny --image-size 32 --batch 2"


@pytest.fixture
def started(monkeypatch):
    """What `train` is called with; it does not train."""
    calls = []

    def train(model, loader, steps, *arguments, **options):
        calls.append({"model": model, "steps": steps, "weights": copied(model), **options})
        return {name: [0.0] for name in ("loss", *frcnn.LOSS_NAMES)}

    monkeypatch.setattr(frcnn, "train", train)
    monkeypatch.setattr(frcnn, "_draw_validation", lambda *arguments: None)
    return calls


def test_without_weights_the_tiny_model_starts_from_the_glyph_detector(
    call, started, small, tmp_path
):
    code, out, err = call(f"{TRAIN_TINY} --source {small} --checkpoint {tmp_path}/c.pt")
    assert (code, err) == (0, [])
    assert re.search(r"\S*tiny_detector.pt: kept all but the predictor, new for 3", out)
    shipped = frcnn.load_checkpoint(frcnn.TINY_DETECTOR)[0].state_dict()
    (start,) = started
    assert_same(without_predictor(start["weights"]), without_predictor(shipped))
    assert start["run"]["weights"] == "glyphs"
    assert not any(p.requires_grad for p in start["model"].backbone.layer1.parameters())


def test_weights_none_starts_from_nothing(call, started, small, tmp_path):
    line = f"{TRAIN_TINY} --source {small} --checkpoint {tmp_path}/c.pt --weights none --seed 5"
    code, out, err = call(line)
    assert (code, err) == (0, [])
    assert "weights of" not in out
    torch.manual_seed(5)
    assert_same(started[0]["weights"], frcnn.tiny_faster_rcnn(4).state_dict())
    assert all(p.requires_grad for p in started[0]["model"].backbone.parameters())


# 20 pictures, 4 of them held out.
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--epochs 2", 16),
        ("--epochs 2 --batch 3", 10),
        ("--epochs 2 --max-samples 6", 6),
        ("--epochs 2 --val-share 0.5", 10),
        ("--steps 7", 7),
        ("--batch 8", 380),
        ("--batch 64", 47),
    ],
)
def test_epochs_and_defaults_give_the_steps(options, steps, call, started, small, tmp_path):
    line = f"{TRAIN_TINY} --source {small} --checkpoint {tmp_path}/c.pt --weights none {options}"
    assert call(line)[0] == 0
    assert started[0]["steps"] == steps


@pytest.mark.parametrize(("images", "steps"), [(None, 380), (48, 380), (101, 380), (200, 750)])
def test_a_run_takes_thirty_epochs_and_never_fewer_than_380_steps(images, steps, sixty, tmp_path):
    dataset = own_stream(sixty)
    dataset.images = images
    line = f"train --model tiny --checkpoint {tmp_path}/c.pt"
    assert frcnn._planned_steps(frcnn._parse(line.split()), dataset, 8) == steps


def test_epochs_of_a_data_set_of_unknown_size_are_refused(call, tmp_path, monkeypatch):
    """It is one of the Hub, as far as the program can tell."""
    folder = named_shards(tmp_path / "data", datasets.ClassLabel(names=["nut", "bolt", "gear"]))
    load = datasets.load_dataset
    shard = str(next(folder.glob("*.parquet")))

    def load_dataset(path, split, streaming):
        return load("parquet", data_files={split: [shard]}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source: ["train", "test"])
    monkeypatch.setattr(frcnn, "_hub_answers", lambda source: True)
    line = f"{TRAIN_TINY} --source someone/tools --checkpoint {tmp_path}/c.pt"
    code, _, err = call(f"{line} --epochs 2")
    assert code == 2
    assert err == [
        "frcnn_common: error: --epochs needs a source whose size is known, and no --steps"
    ]
    assert not (tmp_path / "c.pt").exists()


def test_epochs_and_steps_together_are_refused(call, small, tmp_path):
    line = f"{TRAIN_TINY} --source {small} --checkpoint {tmp_path}/c.pt --epochs 2 --steps 7"
    code, _, err = call(line)
    assert (code, len(err)) == (2, 1)
    assert "and no --steps" in err[0]


def test_a_picture_that_cannot_be_drawn_spoils_no_finished_run(call, small, tmp_path, monkeypatch):
    def broken(*arguments):
        raise SyntaxError("a torn PNG")

    monkeypatch.setattr(frcnn, "detect", broken)
    code, out, _ = call(f"{TRAIN_TINY} --source {small} --checkpoint {tmp_path}/c.pt --steps 1")
    assert code == 0
    assert f"{tmp_path}/c_val: validation pictures end here: a torn PNG" in out
    assert (tmp_path / "c.pt").exists()


def test_freeze_can_be_taken_back():
    backbone = frcnn.ResNet50(width=8).train()
    backbone.freeze(2)
    assert not backbone.layer1.training
    backbone.freeze(0)
    assert all(p.requires_grad for p in backbone.parameters())
    assert backbone.layer1.training


def test_training_draws_six_validation_pictures(call, tmp_path):
    folder = own(tmp_path / "data", count=50)
    line = f"{TRAIN_TINY} --source {folder} --checkpoint {tmp_path}/own.pt --weights none --steps 1"
    code, out, err = call(line)
    assert (code, err) == (0, [])
    assert f"{tmp_path}/own_val: validation pictures" in out
    drawn = sorted((tmp_path / "own_val").iterdir())
    held_out = {target["image_id"] for _, target in own_stream(folder, val_share=0.2)}
    assert len(drawn) == 6
    assert {int(path.stem) for path in drawn} <= held_out
    assert f"{folder}: 40 images; 1 steps of 2, 32 px; classes " in out
    for path in drawn:
        with PIL.Image.open(path) as image:
            image.load()
            assert max(image.size) >= 400
    assert json.loads(out.splitlines()[-1])["steps"] == 1


def test_fewer_validation_pictures_or_none_are_no_error(call, small, tmp_path):
    for share, count in ((0.1, 2), (0.0, 0)):
        line = f"{TRAIN_TINY} --source {small} --weights none --steps 1 --val-share {share}"
        code, out, err = call(f"{line} --checkpoint {tmp_path}/{count}.pt")
        assert (code, err) == (0, [])
        folder = tmp_path / f"{count}_val"
        assert len(list(folder.iterdir()) if folder.exists() else []) == count
    assert "validation pictures end here" in out


def test_a_fine_tuned_run_resumes_to_the_same_end(call, small, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    line = f"{TRAIN_TINY} --source {small} --steps 6 --save-every 2 --checkpoint {tmp_path}"
    code, _, err = call(f"{line}/whole.pt")
    assert (code, err) == (0, [])
    train_step, count = frcnn._train_step, []

    def stop(*arguments):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(frcnn, "_train_step", stop)
        assert call(f"{line}/part.pt")[0] == 130
    code, _, err = call(f"{line}/part.pt --resume")
    assert (code, err) == (0, [])
    whole, part = (
        torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "part.pt")
    )
    assert_same(part["model"], whole["model"])
    assert part["history"] == whole["history"]
    assert part["classes"] == whole["classes"] == [*CLASSES]


def test_evaluate_takes_the_share_of_the_training(call, small, tmp_path):
    line = f"{TRAIN_TINY} --source {small} --weights none --steps 1 --val-share 0.5"
    assert call(f"{line} --checkpoint {tmp_path}/c.pt")[0] == 0
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frcnn, "evaluate", lambda m, d, **o: seen.append(d.images) or {})
        for more in ("", " --val-share 0.1"):
            assert call(f"evaluate --checkpoint {tmp_path}/c.pt --source {small}{more}")[0] == 0
    assert seen == [10, 2]


def test_evaluate_names_the_classes_that_differ_in_one_line(call, small, tmp_path):
    frcnn.save_checkpoint(tmp_path / "c.pt", tiny(RING))
    code, _, err = call(f"evaluate --checkpoint {tmp_path}/c.pt --source {small}")
    assert (code, len(err)) == (2, 1)
    assert re.search(r"only in the model: ring \(7\); only in \S+: disc \(7\)$", err[0])


def test_detect_refuses_a_checkpoint_that_was_never_trained(call, small, tmp_path):
    frcnn.save_checkpoint(tmp_path / "c.pt", tiny(None))
    code, _, err = call(f"detect --checkpoint {tmp_path}/c.pt {small} --out {tmp_path}/out")
    assert (code, len(err)) == (2, 1)
    assert "c.pt does not say what its classes are called" in err[0]


def test_min_score_decides_what_is_drawn_and_not_what_is_written(call, small, tmp_path):
    model = tiny(CLASSES)
    torch.nn.init.constant_(model.predictor.cls.bias, 0.0)  # of four classes each gets its quarter
    frcnn.save_checkpoint(tmp_path / "c.pt", model)
    found = {}
    for least in ("0.0", "1.1", None):
        option = f"--min-score {least}" if least else ""
        line = f"detect --checkpoint {tmp_path}/c.pt {small}/1.png --out {tmp_path}/{least}"
        code, _, err = call(f"{line} {option}")
        assert (code, err) == (0, [])
        (record,) = json.loads((tmp_path / str(least) / "detections.json").read_text())
        assert (record.pop("min_score"), record.pop("min_score_drawn")) == (
            0.05,
            float(least or 0.5),
        )
        found[least] = record, (tmp_path / str(least) / record["drawn"]).read_bytes()
    assert len(found["0.0"][0]["detections"]) > 0
    assert found["0.0"][0] == found["1.1"][0] == found[None][0]
    assert found["0.0"][1] != found["1.1"][1]
    assert all(0.05 <= d["score"] < 0.5 for d in found[None][0]["detections"])
    assert found[None][1] == found["1.1"][1]


# --- sixty pictures -------------------------------------------------------------------------------


def shapes(folder: Path, count: int = 60, size: tuple[int, int] = (200, 150)) -> Path:
    """Discs, squares and triangles of any colour on noise, with COCO's annotations."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    width, height = size
    images, annotations = [], []
    for number in range(1, count + 1):
        noise = rng.normal(rng.uniform(60, 200), 12, (height, width, 3)).clip(0, 255)
        image = PIL.Image.fromarray(noise.astype(np.uint8))
        pen = PIL.ImageDraw.Draw(image)
        taken = []
        for _ in range(rng.integers(1, 4)):
            side = int(rng.integers(28, 60))
            x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            if any(x < a + s and a < x + side and y < b + s and b < y + side for a, b, s in taken):
                continue
            taken.append((x, y, side))
            kind = int(rng.choice(list(KINDS)))
            ink = tuple(int(v) for v in rng.integers(0, 255, 3))
            low, right = y + side - 1, x + side - 1
            if KINDS[kind] == "disc":
                pen.ellipse((x, y, right, low), fill=ink)
            elif KINDS[kind] == "square":
                pen.rectangle((x, y, right, low), fill=ink)
            else:
                pen.polygon([(x, low), (right, low), (x + side // 2, y)], fill=ink)
            record = {"id": len(annotations) + 1, "image_id": number, "category_id": kind}
            record |= {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
            annotations.append(record)
        image.save(folder / f"{number:03}.png")
        record = {"id": number, "file_name": f"{number:03}.png"}
        images.append(record | {"width": width, "height": height})
    kinds = [{"id": i, "name": name} for i, name in KINDS.items()]
    coco = {"images": images, "annotations": annotations, "categories": kinds}
    put(folder / "annotations.json", coco)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sixty_pictures_are_learnt(seed, call, tmp_path):
    folder, checkpoint = shapes(tmp_path / "in"), tmp_path / "own.pt"
    line = f"train --model tiny --source {folder} --val-share 0.2 --checkpoint {checkpoint}"
    code, out, err = call(f"{line} --seed {seed}")
    assert (code, err) == (0, [])
    assert json.loads(out.splitlines()[-1])["steps"] == 380
    code, out, err = call(f"evaluate --checkpoint {checkpoint} --source {folder}")
    assert (code, err) == (0, [])
    figures = json.loads(out.splitlines()[-1])
    print(f"seed {seed}: {figures}")
    assert figures["AP50"] >= 0.9

    rows = frcnn.open_source(str(folder), "val")[0]
    paths = {r["image"]: r["image_id"] for r in rows}
    assert len(paths) == 12
    pictures = " ".join(paths)
    assert call(f"detect --checkpoint {checkpoint} {pictures} --out {tmp_path}/out")[0] == 0
    records = []
    for record in json.loads((tmp_path / "out" / "detections.json").read_text()):
        for found in record["detections"]:
            x1, y1, x2, y2 = found["box"]
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "image_id": paths[record["image"]]}
            records.append(box | {name: found[name] for name in ("category_id", "score")})
    theirs = by_pycocotools(folder / "annotations.json", records, sorted(paths.values()))
    assert list(figures.values()) == pytest.approx(theirs, abs=1e-6)


# --- bad folders: how each ends -------------------------------------------------------------------


def put_content(content: bytes) -> Callable[[Path], Path]:
    """The pictures are there, and something else stands in the annotation file."""

    def build(folder: Path) -> Path:
        (own(folder) / "annotations.json").write_bytes(content)
        return folder

    return build


def encoded_as(encoding: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = own(folder) / "annotations.json"
        path.write_text(path.read_text(), encoding=encoding)
        return folder

    return build


def changed(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    return lambda folder: own(folder, change)


def entry(name: str, number: int = 4, drop: str = "", **values) -> Callable[[Path], Path]:
    """One entry of a list, the fifth, is changed."""

    def change(coco):
        coco[name][number].update(values)
        coco[name][number].pop(drop, None)

    return changed(change)


def picture(content: bytes | None) -> Callable[[Path], Path]:
    """The fifth picture holds something else, or is not there."""

    def build(folder: Path) -> Path:
        path = own(folder) / "5.png"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        return folder

    return build


def without_pictures(folder: Path) -> Path:
    for path in own(folder).glob("*.png"):
        path.unlink()
    return folder


def without_annotations(folder: Path) -> Path:
    draw(folder, ALL)
    return folder


def nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def metadata(content: str = "", drop: str = "", missing: str = "", **values) -> Callable:
    """Pictures and ``metadata.jsonl``, whose fifth line is changed."""

    def build(folder: Path) -> Path:
        draw(folder, ALL)
        lines = [
            {"file_name": f"{n}.png", "image_id": n}
            | {"objects": {"bbox": [box_of(n)], "categories": [kind_of(n)]}}
            for n in ALL
        ]
        lines[4].update(values)
        for line in lines:
            line.pop(drop, None)
        put(folder / "metadata.jsonl", lines)
        if content:
            text = (folder / "metadata.jsonl").read_text()
            (folder / "metadata.jsonl").write_text(text[: len(text) // 2] + content)
        if missing:
            (folder / missing).unlink()
        return folder

    return build


def other_categories_in_val(folder: Path) -> Path:
    laid_out(folder, LAYOUTS["COCO"])
    coco = coco_of(VAL)
    coco["categories"][0]["name"] = "ring"
    put(folder / "annotations" / "instances_val.json", coco)
    return folder


def outside(absolute: bool) -> Callable[[Path], Path]:
    """A picture that is there, in the folder above."""

    def build(folder: Path) -> Path:
        draw(folder.parent, [5])
        name = folder.parent / "5.png" if absolute else "../5.png"
        return entry("images", file_name=str(name))(folder)

    return build


def above_both(folder: Path) -> Path:
    """From the annotations the path ends inside, from the folder outside, where the picture is."""
    laid_out(folder, LAYOUTS["CVAT"])
    path = folder / "annotations" / "instances_default.json"
    coco = json.loads(path.read_text())
    coco["images"][4]["file_name"] = "../5.png"
    put(path, coco)
    draw(folder.parent, [5])
    return folder


def backslashes(folder: Path) -> Path:
    laid_out(folder, LAYOUTS["Label Studio"])
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text.replace("images/", "images\\\\"))
    return folder


def odd_name(folder: Path) -> Path:
    r"""A picture whose name holds the byte FF; Python reads it as \udcff."""
    entry("images", file_name="5\udcff.png")(folder)
    (folder / "5.png").rename(os.fsdecode(os.fsencode(folder) + b"/5\xff.png"))
    return folder


def twice(name: str, **values) -> Callable[[Path], Path]:
    return changed(lambda coco: coco[name].append(coco[name][4] | values))


SMALL = encoded(PIL.Image.new("RGB", (16, 16)))
WHOLE = encoded(PIL.Image.effect_noise((SIDE, SIDE), 60).convert("RGB"))
FILE = "annotations.json"
# How each ends: "refused" in one line, which names the file and says what; "left out", so many
# pictures (named) and boxes (counted), the rest served; or "served".
BAD_FOLDERS = [
    ("no such folder", lambda folder: folder, "refused", "unknown source"),
    ("an empty folder", nothing, "refused", "holds no .*no COCO annotations"),
    ("pictures without annotations", without_annotations, "refused", "no COCO annotations"),
    ("torn JSON", put_content(b'{"images": [{"id": 1, "file'), "refused", FILE),
    ("an empty file", put_content(b""), "refused", FILE),
    ("JSON that is a list", put_content(b"[1, 2]"), "refused", f"{FILE}.*no images"),
    ("JSON that is not UTF-8", put_content('{"é": 1}'.encode("latin-1")), "refused", FILE),
    ("JSON 100,000 lists deep", put_content(b"[" * 100_000), "refused", FILE),
    ("JSON with a byte order mark", encoded_as("utf-8-sig"), "served", None),
    ("JSON in UTF-16", encoded_as("utf-16"), "served", None),
    ("no images", changed(lambda c: c.pop("images")), "refused", f"{FILE}.*no images"),
    ("images is null", changed(lambda c: c.update(images=None)), "refused", FILE),
    ("images is empty", changed(lambda c: c.update(images=[], annotations=[])), "refused",
     f"{FILE}.*no images"),
    ("no categories", changed(lambda c: c.pop("categories")), "refused", f"{FILE}.*no categories"),
    ("categories is empty", changed(lambda c: c.update(categories=[], annotations=[])), "refused",
     f"{FILE}.*no categories"),
    ("annotations is null", changed(lambda c: c.update(annotations=None)), "refused", FILE),
    ("no picture is there", without_pictures, "refused", f"{FILE}: not one of its 12 pictures"),
    ("a picture is missing", picture(None), "left out", (1, 0)),
    ("a picture is text", picture(b"a line of text"), "left out", (1, 0)),
    ("a picture is empty", picture(b""), "left out", (1, 0)),
    ("a picture is cut", picture(WHOLE[: len(WHOLE) // 2]), "left out", (1, 0)),
    ("a picture of another size", picture(SMALL), "left out", (1, 0)),
    ("an image without file_name", entry("images", drop="file_name"), "refused",
     f"{FILE}: image 5: .* lacks 'file_name'"),
    ("a file_name that is a number", entry("images", file_name=5), "refused",
     f"{FILE}: image 5: .*not int"),
    ("an image without width", entry("images", drop="width"), "left out", (1, 0)),
    ("a width that is a number in text", entry("images", width="32"), "served", None),
    ("a width that is text", entry("images", width="wide"), "refused", f"{FILE}: image 5: .*wide"),
    ("an unknown category", entry("annotations", category_id=8), "refused",
     f"{FILE}: annotation 55 has the unknown category_id 8"),
    ("an annotation without category", entry("annotations", drop="category_id"), "refused",
     f"{FILE}.*category_id"),
    ("an unknown image", entry("annotations", image_id=13), "refused",
     f"{FILE}: annotation 55 has the unknown image_id 13"),
    ("a box of negative width", entry("annotations", bbox=[9, 9, -4, 5]), "left out", (0, 1)),
    ("an empty box", entry("annotations", bbox=[9, 9, 0, 5]), "left out", (0, 1)),
    ("a box of NaN", entry("annotations", bbox=[NAN, 9, 4, 5]), "left out", (0, 1)),
    ("a box of infinity", entry("annotations", bbox=[1, 9, 1e400, 5]), "left out", (0, 1)),
    ("a box of 10 to the 400", entry("annotations", bbox=[1, 9, 10**400, 5]), "left out", (0, 1)),
    ("a box of three numbers", entry("annotations", bbox=[9, 9, 4]), "left out", (0, 1)),
    ("a box of text", entry("annotations", bbox="9 9 4 5"), "left out", (0, 1)),
    ("a box of objects", entry("annotations", bbox=[{}, 9, 4, 5]), "left out", (0, 1)),
    ("an annotation without bbox", entry("annotations", drop="bbox"), "left out", (0, 1)),
    ("a box that leaves its picture", entry("annotations", bbox=[9, 9, 90, 5]), "served",
     [9, 9, 32, 14]),
    ("a box beside its picture", entry("annotations", bbox=[99, 9, 9, 5]), "left out", (0, 1)),
    ("an area that is text", entry("annotations", area="big"), "refused",
     f"{FILE}: image 5: .*big"),
    ("an area below 0", entry("annotations", area=-5), "left out", (1, 0)),
    ("an image twice", twice("images"), "refused", f"{FILE}: ids of images .* 5"),
    ("an annotation twice", twice("annotations"), "refused", f"{FILE}: ids of annotations .* 55"),
    ("a category twice", changed(lambda c: c["categories"].append({"id": 3, "name": "ring"})),
     "refused", f"{FILE}: ids of categories .* 3"),
    ("a category without name", entry("categories", 1, drop="name"), "refused", f"{FILE}.*'name'"),
    ("a file for two images", twice("images", id=13), "refused", f"{FILE}: the file '5.png'"),
    ("an id that is text", changed(lambda c: c["images"].append({"id": "five"})), "refused",
     f"{FILE}: ids of images .* 'five'"),
    ("an id of 2 to the 70", changed(lambda c: c["images"].append({"id": 2**70})), "refused",
     f"{FILE}: ids of images .* {2**70}"),
    ("../ out of the folder", outside(absolute=False), "refused",
     f"{FILE}: .*'../5.png' lies outside"),
    ("an absolute path out of the folder", outside(absolute=True), "refused",
     f"{FILE}: .*lies outside"),
    ("../ out of the folder by another way", above_both, "left out", (1, 0)),
    ("backslashes of Windows", backslashes, "served", None),
    ("a name that is not UTF-8", odd_name, "left out", (1, 0)),
    ("torn metadata.jsonl", metadata('{"file_na'), "refused", "metadata.jsonl"),
    ("metadata.jsonl without objects", metadata(drop="objects"), "refused",
     "metadata.jsonl.*objects"),
    ("metadata.jsonl without file_name", metadata(drop="file_name"), "refused", "file_name"),
    ("a line without objects", metadata(objects=None), "served", []),
    ("a line of a picture that is missing", metadata(missing="5.png"), "left out", (1, 0)),
    ("a line with a box of NaN", metadata(objects={"bbox": [[NAN, 9, 4, 5]], "categories": [3]}),
     "left out", (0, 1)),
    ("other categories in val", other_categories_in_val, "refused", "categories .*differ"),
]  # fmt: skip


def test_bad_folders_are_named_apart():
    names = [name for name, *_ in BAD_FOLDERS]
    assert len(names) == len(set(names)) >= 25


@pytest.mark.parametrize(
    ("build", "outcome", "detail"), [b[1:] for b in BAD_FOLDERS], ids=[b[0] for b in BAD_FOLDERS]
)
def test_a_bad_folder_ends_as_it_should(build, outcome, detail, tmp_path):
    folder = build(tmp_path / "data")
    opened = []

    def open_dataset():
        opened.append(own_stream(folder))
        return opened[0]

    ended, said, served = read(open_dataset)
    assert all("\n" not in line for line in said)
    if outcome == "refused":
        (line,) = said
        assert (ended, served) == ("error", {})
        assert str(folder) in line
        assert re.search(detail, line), line
        return
    assert ended != "error", said
    rows, boxes = detail if outcome == "left out" else (0, 0)
    assert (opened[0].skipped, opened[0].dropped) == (rows, boxes), said
    assert set(served) == (set(ALL) - {5} if rows else set(ALL))
    assert all(re.match(r"image_id 5 \(\S*5\S*png\) skipped: ", line) for line in said), said
    whole = expected_of(ALL)
    for number, target in served.items():
        expected = whole[number][1]
        if number == 5 and boxes:
            expected = []
        elif number == 5 and isinstance(detail, list):
            expected = [detail] if detail else []
        assert target["boxes"].tolist() == expected


def table_of_bad_folders() -> str:
    """What was tried and how it ended, as Markdown."""
    lines = ["| folder | how it ends |", "|---|---|"]
    for name, _, outcome, detail in BAD_FOLDERS:
        left_out = f": pictures {detail[0]}, boxes {detail[1]}" if outcome == "left out" else ""
        lines.append(f"| {name} | {outcome}{left_out} |")
    return "\n".join(lines)


def row_of_the_readme() -> str:
    outcomes = collections.Counter(outcome for _, _, outcome, _ in BAD_FOLDERS)
    ended = f"{outcomes['refused']} refused in one line that names the file, "
    ended += f"{outcomes['left out']} served but for the picture or box, named and counted, "
    return f"| {outcomes.total()} | {ended}{outcomes['served']} served whole |"


def test_the_readme_says_how_bad_folders_end():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    assert row_of_the_readme() in readme
    assert table_of_bad_folders().count("\n") == len(BAD_FOLDERS) + 1
