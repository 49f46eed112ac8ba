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

from test_sources import read, shard_rows


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


def by_pycocotools(file: Path, records: list[dict]) -> list[float]:
    """The twelve figures of a user's own file, without anything of this program."""
    truth = COCO(str(file))
    evaluation = COCOeval(truth, truth.loadRes(records), "bbox")
    evaluation.params.imgIds = sorted({record["image_id"] for record in records})
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
    assert ours == pytest.approx(by_pycocotools(folder / "annotations.json", records), abs=1e-9)
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
    ("an area that is text", entry("annotations", area="big"), "refused", f"{FILE}: image 5: .*big"),
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
