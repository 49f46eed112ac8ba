"""The stream: the same samples from every source, each image exactly once, and bad data named."""

import io
import itertools
import time
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

import frcnn_common as frcnn

SCHEMA = pyarrow.schema(
    {
        "image_id": pyarrow.int64(),
        "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
        "width": pyarrow.int64(),
        "height": pyarrow.int64(),
        "objects": pyarrow.struct(
            {
                "bbox_id": pyarrow.list_(pyarrow.int64()),
                "category": pyarrow.list_(pyarrow.int64()),
                "bbox": pyarrow.list_(pyarrow.list_(pyarrow.float64())),
                "area": pyarrow.list_(pyarrow.float64()),
            }
        ),
    }
)


def encoded(image: PIL.Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def row(
    image_id: int, image: bytes | None = None, size=(8, 8), boxes=((1, 2, 5, 7),), categories=None
) -> dict:
    """A row of the Hub's columns; a small plain picture unless told otherwise."""
    return {
        "image_id": image_id,
        "image": {
            "bytes": encoded(PIL.Image.new("RGB", size)) if image is None else image,
            "path": None,
        },
        "width": size[0],
        "height": size[1],
        "objects": {
            "bbox_id": list(range(len(boxes))),
            "category": list(categories or [0] * len(boxes)),
            "bbox": [[float(v) for v in box] for box in boxes],
            "area": [1.0] * len(boxes),
        },
    }


def write(folder: Path, *shards: list[dict], split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(shards):
        table = pyarrow.Table.from_pylist(rows, schema=SCHEMA)
        pyarrow.parquet.write_table(table, folder / f"{split}-{i:05d}-of-{len(shards):05d}.parquet")
    return folder


def stream(
    source, split="train", image_size=8, bbox_format="xyxy", **options
) -> frcnn.COCOStreamDataset:
    return frcnn.COCOStreamDataset(
        split, source=source, image_size=image_size, bbox_format=bbox_format, **options
    )


def image_ids(dataset, workers: int = 0, batch: int = 2) -> list[int]:
    loader = DataLoader(dataset, batch, num_workers=workers, collate_fn=frcnn.frcnn_collate_fn)
    return [target["image_id"] for _, targets in loader for target in targets]


def pixels(sample: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: ``[3, S, S]`` in 0..255."""
    return (sample * frcnn.IMAGENET_STD + frcnn.IMAGENET_MEAN) * 255


# --- glyph scenes ----------------------------------------------------------------------------------------------------


def test_scene_follows_from_its_seed():
    assert frcnn.render_glyph_scene(5, 96) == frcnn.render_glyph_scene(5, 96)
    assert frcnn.render_glyph_scene(5, 96)["image"] != frcnn.render_glyph_scene(6, 96)["image"]


def test_scenes_hold_one_to_five_objects_of_all_eight_categories():
    scenes = [frcnn.render_glyph_scene(seed, 96)["objects"]["category"] for seed in range(120)]
    assert {len(scene) for scene in scenes} == {1, 2, 3, 4, 5}
    names = {frcnn.COCO_NAMES[category + 1] for scene in scenes for category in scene}
    assert names == {
        "airplane",
        "umbrella",
        "scissors",
        "horse",
        "keyboard",
        "cup",
        "cat",
        "cell phone",
    }


@pytest.mark.parametrize("size", [96, 160])
def test_glyph_boxes_lie_inside_and_overlap_little(size):
    for seed in range(80):
        objects = frcnn.render_glyph_scene(seed, size)["objects"]
        boxes = torch.tensor(objects["bbox"])
        assert (boxes >= 0).all()
        assert (boxes <= size).all()
        areas = frcnn.box_area(boxes)
        assert (areas > 0).all()
        assert (torch.tensor(objects["area"]) <= areas).all()
        assert (torch.tensor(objects["area"]) > 0).all()
        for a, b in itertools.combinations(range(len(boxes)), 2):
            shared = frcnn._intersection(boxes[a : a + 1], boxes[b : b + 1])
            assert shared.item() <= 0.1 * min(areas[a], areas[b]) + 1e-3


def test_glyph_boxes_are_tight_around_the_ink(monkeypatch):
    """A scene of one glyph, painted again with a mask without ink: what differs is the ink, and its bounds the box."""
    place = frcnn._place_glyph

    def place_nothing(rng, mask, size, taken):
        mask, box = place(rng, mask, size, taken)
        return mask.point(lambda ink: 0), box

    def picture(scene):
        return np.asarray(PIL.Image.open(io.BytesIO(scene["image"]["bytes"])), dtype=int)

    scenes = [frcnn.render_glyph_scene(seed, 160) for seed in range(120)]
    alone = [scene for scene in scenes if len(scene["objects"]["bbox"]) == 1]
    monkeypatch.setattr(frcnn, "_place_glyph", place_nothing)
    compared = 0
    for scene in alone:
        empty = frcnn.render_glyph_scene(scene["image_id"], 160)
        if len(empty["objects"]["bbox"]) != 1:
            continue
        y, x = (picture(scene) != picture(empty)).any(2).nonzero()
        assert scene["objects"]["bbox"] == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
        compared += 1
    assert compared >= 10


def test_glyph_contrast_suffices():
    luma = np.array([0.299, 0.587, 0.114])
    for seed in range(40):
        scene = frcnn.render_glyph_scene(seed, 160)
        grey = np.asarray(PIL.Image.open(io.BytesIO(scene["image"]["bytes"]))) @ luma
        for x1, y1, x2, y2 in np.array(scene["objects"]["bbox"], dtype=int):
            inside = grey[y1:y2, x1:x2]
            assert np.percentile(inside, 95) - np.percentile(inside, 5) > 45


def test_train_and_val_scenes_share_no_seed():
    seeds = {
        split: set(range(first, first + frcnn.GLYPH_SCENES[split]))
        for split, first in frcnn.GLYPH_FIRST_SEED.items()
    }
    assert seeds.keys() == {"train", "val"}
    assert not seeds["train"] & seeds["val"]
    for split, expected in seeds.items():
        assert set(image_ids(stream("glyphs", split, 32, max_samples=20))) <= expected


def test_an_epoch_of_glyphs_has_all_its_scenes(monkeypatch):
    monkeypatch.setattr(frcnn, "GLYPH_SCENES", {"train": 7, "val": 3})
    assert image_ids(stream("glyphs", "train", 32)) == list(range(7))
    assert image_ids(stream("glyphs", "val", 32)) == [10**9, 10**9 + 1, 10**9 + 2]


# --- columns, sources and samples ------------------------------------------------------------------------------------


def test_all_sources_have_the_same_columns(coco_tiny):
    shard = next(coco_tiny.glob("train-*.parquet"))
    real, scene = pyarrow.parquet.ParquetFile(shard).schema_arrow, frcnn.render_glyph_scene(0, 64)
    assert set(scene) == set(real.names) == {"image_id", "image", "width", "height", "objects"}
    assert set(scene["objects"]) == {field.name for field in real.field("objects").type}
    assert set(scene["objects"]) == {"bbox_id", "category", "bbox", "area"}


def test_samples_are_alike_from_all_sources(coco_tiny):
    samples = [next(iter(stream(source, image_size=64))) for source in ("glyphs", coco_tiny)]
    assert samples[0][1].keys() == samples[1][1].keys()
    for image, target in samples:
        count = len(target["boxes"])
        assert count > 0
        assert (image.dtype, image.shape) == (torch.float32, (3, 64, 64))
        assert (target["boxes"].dtype, target["boxes"].shape) == (torch.float32, (count, 4))
        assert (target["labels"].dtype, target["labels"].shape) == (torch.int64, (count,))
        assert target["area"].shape == (count,)
        assert isinstance(target["image_id"], int)
        assert len(target["orig_size"]) == 2


@pytest.mark.parametrize(
    "given, asked", [("train", "train"), ("val", "val"), ("validation", "val")]
)
def test_the_hub_is_streamed_by_the_names_of_its_splits(monkeypatch, coco_tiny, given, asked):
    load, calls = datasets.load_dataset, []

    def load_dataset(path, **options):
        if path == "parquet":
            return load(path, **options)
        calls.append((path, options))
        return frcnn._open_folder(coco_tiny, asked).take(4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = stream("detection-datasets/coco", given, 32)
    assert calls == [("detection-datasets/coco", {"split": asked, "streaming": True})]
    assert len(image_ids(dataset)) == 4


def test_validation_means_val(coco_tiny):
    assert image_ids(stream(coco_tiny, "validation", 32, max_samples=3)) == [397133, 37777, 252219]


def test_boxes_are_scaled_to_the_square_and_labels_start_at_1(tmp_path):
    rows = [row(1, size=(40, 20), boxes=[(10, 5, 30, 15), (0, 0, 40, 20)], categories=[0, 79])]
    image, target = next(iter(stream(write(tmp_path, rows), image_size=80)))
    assert image.shape == (3, 80, 80)
    assert target["boxes"].tolist() == [[20, 20, 60, 60], [0, 0, 80, 80]]
    assert target["labels"].tolist() == [1, 80]
    assert target["orig_size"] == (20, 40)  # height, width
    assert target["image_id"] == 1


def test_image_is_normalised_with_imagenets_statistics(tmp_path):
    rows = [row(1, encoded(PIL.Image.new("RGB", (8, 8), (10, 100, 250))))]
    image, _ = next(iter(stream(write(tmp_path, rows))))
    expected = (
        torch.tensor([10, 100, 250]) / 255 - frcnn.IMAGENET_MEAN.flatten()
    ) / frcnn.IMAGENET_STD.flatten()
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 8, 8), atol=1e-5, rtol=0)


def test_boxes_are_clipped_to_the_image(tmp_path):
    rows = [row(1, size=(40, 20), boxes=[(-5, -5, 50, 10)])]
    assert next(iter(stream(write(tmp_path, rows), image_size=40)))[1]["boxes"].tolist() == [
        [0, 0, 40, 20]
    ]


def test_collate_stacks_images_and_lists_targets():
    samples = list(itertools.islice(stream("glyphs", image_size=32), 3))
    images, targets = frcnn.frcnn_collate_fn(samples)
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[2], samples[2][0])
    assert targets == [target for _, target in samples]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "nowhere/coco"}, "nowhere/coco"),
        ({"source": "glyphs", "split": "test"}, "test"),
        ({"source": "glyphs", "max_samples": 0}, "max_samples"),
        ({"source": "glyphs", "image_size": 0}, "image_size"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        frcnn.COCOStreamDataset(**options)


# --- bbox format -----------------------------------------------------------------------------------------------------

IMAGE_9 = {"width": 640, "height": 480}  # one box, its segmentation covers 120057.14 square pixels


@pytest.mark.parametrize(
    "bbox, found",
    [([1.08, 187.69, 612.67, 473.53], "xyxy"), ([1.08, 187.69, 611.59, 285.84], "xywh")],
)
def test_image_9_decides_the_format(bbox, found):
    assert (
        frcnn.detect_bbox_format([IMAGE_9 | {"objects": {"bbox": [bbox], "area": [120057.14]}}])
        == found
    )


def shard_rows(coco_tiny: Path, split: str = "val") -> list[dict]:
    return pyarrow.parquet.read_table(next(coco_tiny.glob(f"{split}-*.parquet"))).to_pylist()


def to_xywh(rows: list[dict]) -> list[dict]:
    for objects in (r["objects"] for r in rows):
        objects["bbox"] = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in objects["bbox"]]
    return rows


@pytest.mark.parametrize("split", ["train", "val"])
def test_corners_and_sizes_give_the_same_boxes(coco_tiny, tmp_path, capsys, split):
    sizes = write(tmp_path, to_xywh(shard_rows(coco_tiny, split)), split=split)
    as_corners = stream(coco_tiny, split, 64, bbox_format=None, max_samples=10)
    assert "xyxy" in capsys.readouterr().out
    as_sizes = stream(sizes, split, 64, bbox_format=None, max_samples=10)
    assert "xywh" in capsys.readouterr().out
    assert (as_corners.bbox_format, as_sizes.bbox_format) == ("xyxy", "xywh")
    for (_, a), (_, b) in zip(as_corners, as_sizes, strict=True):
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-4, rtol=0)


def test_a_bad_box_or_two_do_not_change_the_decision(coco_tiny):
    rows = shard_rows(coco_tiny)
    rows[0]["objects"]["bbox"][0] = [300.0, 200.0, 100.0, 50.0]
    rows[1]["objects"]["bbox"][0] = [0.0, 0.0, 5000.0, 5000.0]
    assert frcnn.detect_bbox_format(rows) == "xyxy"


def test_a_format_that_is_neither_is_refused(coco_tiny, tmp_path):
    rows = shard_rows(coco_tiny)
    for r in rows:  # fractions of the image
        scale = [r["width"], r["height"]] * 2
        r["objects"]["bbox"] = [[v / s for v, s in zip(box, scale)] for box in r["objects"]["bbox"]]
    with pytest.raises(ValueError, match="neither corners nor"):
        frcnn.detect_bbox_format(rows)
    with pytest.raises(ValueError, match="bbox_format"):
        stream(write(tmp_path, rows, split="val"), "val", bbox_format=None)


@pytest.mark.parametrize(
    "forced, boxes", [("xyxy", [[10, 10, 20, 15]]), ("xywh", [[10, 10, 30, 25]])]
)
def test_a_forced_format_is_taken(tmp_path, forced, boxes):
    rows = [row(1, size=(64, 64), boxes=[(10, 10, 20, 15)])]
    target = next(iter(stream(write(tmp_path, rows), image_size=64, bbox_format=forced)))[1]
    assert target["boxes"].tolist() == boxes


# --- each image once -------------------------------------------------------------------------------------------------

ROWS = 22  # divides by neither 3 nor 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[int, Path]:
    """The same rows in one shard and in four."""
    folder, rows = tmp_path_factory.mktemp("shards"), [row(i) for i in range(ROWS)]
    return {
        1: write(folder / "one", rows),
        4: write(folder / "four", *(rows[i : i + 6] for i in range(0, ROWS, 6))),
    }


@pytest.mark.parametrize("max_samples", [None, 9])
@pytest.mark.parametrize("buffer", [0, 8])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_every_image_comes_once(shards, workers, count, buffer, max_samples):
    dataset = stream(shards[count], shuffle_buffer=buffer, max_samples=max_samples)
    dataset.set_epoch(2 * workers)  # 0 and others
    seen = image_ids(dataset, workers)
    assert sorted(seen) == list(range(max_samples or ROWS))
    assert (seen == sorted(seen)) == (not buffer) or workers > 1


@pytest.mark.parametrize("max_samples", [None, 7])
@pytest.mark.parametrize("buffer", [0, 8])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_every_scene_comes_once(monkeypatch, workers, buffer, max_samples):
    monkeypatch.setattr(frcnn, "GLYPH_SCENES", {"train": 11, "val": 3})
    seen = image_ids(
        stream("glyphs", image_size=32, shuffle_buffer=buffer, max_samples=max_samples), workers
    )
    assert sorted(seen) == list(range(max_samples or 11))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("buffer", [0, 8])
def test_every_worker_gets_data(shards, count, buffer):
    # datasets#8669: a shuffled stream can leave some workers without any
    dataset = stream(shards[count], shuffle_buffer=buffer)
    loader = DataLoader(dataset, 1, num_workers=2, collate_fn=frcnn.frcnn_collate_fn)
    readers = [targets[0]["position"][0] for _, targets in loader]
    assert min(readers.count(0), readers.count(1)) >= 9


def test_max_samples_above_the_number_of_rows_gives_all(shards):
    assert sorted(image_ids(stream(shards[1], max_samples=1000), workers=2)) == list(range(ROWS))


# --- order and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["glyphs", 1, 4])
def test_shuffle_follows_from_seed_and_epoch(monkeypatch, shards, source):
    monkeypatch.setattr(frcnn, "GLYPH_SCENES", {"train": ROWS, "val": 3})

    def order(seed, epoch):
        dataset = stream(shards.get(source, source), shuffle_buffer=8, seed=seed)
        dataset.set_epoch(epoch)
        return image_ids(dataset)

    first = order(0, 0)
    assert first == order(0, 0)
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert sorted(first) == sorted(order(1, 1)) == list(range(ROWS))


@pytest.mark.parametrize("count", [1, 4])
def test_a_shuffled_pass_ends_without_a_pause(monkeypatch, shards, count):
    # `datasets` waits for 5 seconds behind a pass that it read several shards at a time for
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
    assert len(image_ids(stream(shards[count], shuffle_buffer=8))) == ROWS


def test_without_a_buffer_the_order_is_the_files(shards):
    assert image_ids(stream(shards[4])) == list(range(ROWS))


@pytest.mark.parametrize(
    "count, buffer, max_samples", [(1, 0, None), (1, 8, None), (4, 8, None), (4, 0, 13), (1, 8, 13)]
)
@pytest.mark.parametrize("workers, used", [(0, 1), (0, 5), (2, 1), (2, 2), (2, 5), (3, 4)])
def test_resume_gives_exactly_the_rest(shards, workers, used, count, buffer, max_samples):
    """State is kept as `_batches` keeps it while it trains."""

    def batches(state=None):
        dataset = stream(shards[count], shuffle_buffer=buffer, max_samples=max_samples, flip=0.5)
        if state:
            dataset.resume(state)
        dataset.set_epoch(3)
        return iter(DataLoader(dataset, 2, num_workers=workers, collate_fn=frcnn.frcnn_collate_fn))

    state = {"epoch": 3, "rows": {}, "last": -1}
    run = batches()
    for _, targets in itertools.islice(run, used):
        for reader, rows in (target["position"] for target in targets):
            state["rows"][reader], state["last"] = rows, reader
    rest = [([t["image_id"] for t in targets], images) for images, targets in run]
    resumed = [([t["image_id"] for t in targets], images) for images, targets in batches(state)]
    assert [ids for ids, _ in resumed] == [ids for ids, _ in rest]
    assert len(rest) > 1
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, resumed))


def test_resume_concerns_its_own_epoch_alone(shards):
    dataset = stream(shards[1])
    dataset.resume({"epoch": 0, "rows": {0: 20}, "last": 0})
    assert image_ids(dataset) == [20, 21]
    dataset.set_epoch(1)
    assert image_ids(dataset) == list(range(ROWS))


def test_resume_counts_rows_that_gave_no_sample(tmp_path):
    rows = [row(i, boxes=() if i % 2 else [(1, 1, 4, 4)]) for i in range(10)]
    source = write(tmp_path, rows)
    samples = iter(stream(source))
    position = [next(samples)[1]["position"] for _ in range(3)][-1]
    dataset = stream(source)
    dataset.resume({"epoch": 0, "rows": dict([position]), "last": position[0]})
    assert image_ids(dataset) == [6, 8]


# --- pictures of every kind ------------------------------------------------------------------------------------------


def palette_picture() -> PIL.Image.Image:
    image = PIL.Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


PICTURES = {
    "grey": (lambda: encoded(PIL.Image.new("L", (6, 6), 100)), (100, 100, 100)),
    "one bit": (lambda: encoded(PIL.Image.new("1", (6, 6), 1)), (255, 255, 255)),
    "grey with alpha": (lambda: encoded(PIL.Image.new("LA", (6, 6), (70, 255))), (70, 70, 70)),
    "palette": (lambda: encoded(palette_picture()), (200, 100, 50)),
    "gif": (lambda: encoded(palette_picture(), "gif"), (200, 100, 50)),
    "RGBA": (lambda: encoded(PIL.Image.new("RGBA", (6, 6), (10, 20, 30, 255))), (10, 20, 30)),
    "CMYK": (lambda: encoded(PIL.Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "tiff"), (255, 0, 0)),
    "CMYK jpeg": (
        lambda: encoded(PIL.Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "jpeg"),
        (255, 0, 0),
    ),
    "16 bit": (
        lambda: encoded(PIL.Image.fromarray(np.full((6, 6), 0x8040, np.uint16))),
        (128, 128, 128),
    ),
    "16 bit tiff": (
        lambda: encoded(PIL.Image.fromarray(np.full((6, 6), 0x4010, np.uint16)), "tiff"),
        (64, 64, 64),
    ),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_every_mode_become_rgb(tmp_path, kind):
    make, colour = PICTURES[kind]
    dataset = stream(write(tmp_path, [row(1, make(), (6, 6))]), image_size=6)
    image, _ = next(iter(dataset))
    expected = torch.tensor(colour).float().view(3, 1, 1).expand(3, 6, 6)
    torch.testing.assert_close(pixels(image), expected, atol=2, rtol=0)  # JPEG rounds
    assert dataset.skipped == 0


def test_one_pixel_is_a_picture(tmp_path):
    rows = [row(1, encoded(PIL.Image.new("RGB", (1, 1), (9, 8, 7))), (1, 1), [(0, 0, 1, 1)])]
    image, target = next(iter(stream(write(tmp_path, rows), image_size=16)))
    torch.testing.assert_close(pixels(image)[:, 7, 7], torch.tensor([9.0, 8, 7]), atol=1e-3, rtol=0)
    assert target["boxes"].tolist() == [[0, 0, 16, 16]]


def turned_picture() -> bytes:
    """20 × 10 pixels as stored, red left and blue right, with a note to turn it by 90° clockwise."""
    image = PIL.Image.new("RGB", (20, 10), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 20, 10))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    return encoded(image, exif=exif)


def test_a_picture_is_turned_where_its_row_has_the_turned_size():
    image = frcnn.decode_image(turned_picture(), (10, 20))
    assert image.size == (10, 20)
    assert [image.getpixel(at) for at in [(0, 0), (9, 0), (0, 19), (9, 19)]] == [
        (255, 0, 0)
    ] * 2 + [(0, 0, 255)] * 2


def test_a_picture_is_not_turned_where_its_row_has_the_stored_size():
    image = frcnn.decode_image(turned_picture(), (20, 10))
    assert image.size == (20, 10)
    assert [image.getpixel(at) for at in [(0, 0), (0, 9), (19, 0), (19, 9)]] == [
        (255, 0, 0)
    ] * 2 + [(0, 0, 255)] * 2


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"6 × 6 .* 8 × 5"):
        frcnn.decode_image(encoded(PIL.Image.new("RGB", (6, 6))), (8, 5))


# --- bad data --------------------------------------------------------------------------------------------------------


def broken_exif() -> bytes:
    """A picture whose note about the camera is damaged."""
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    image = encoded(PIL.Image.new("RGB", (8, 8)), "webp", exif=exif)
    return image.replace(b"MM\x00*", b"MM\x00i").replace(b"II*\x00", b"IIi\x00")


CORRUPT = {
    "no picture": lambda: b"not a picture",
    "nothing": lambda: b"",
    "half": lambda: (whole := encoded(PIL.Image.effect_noise((8, 8), 90).convert("RGB"), "jpeg"))[
        : len(whole) // 2
    ],
    "another size": lambda: encoded(PIL.Image.new("RGB", (4, 4))),
    "broken exif": broken_exif,
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_picture_is_skipped_named_and_counted(tmp_path, kind):
    dataset = stream(write(tmp_path, [row(1), row(4711, CORRUPT[kind]()), row(3)]))
    with pytest.warns(UserWarning, match="image_id 4711") as caught:
        assert image_ids(dataset) == [1, 3]
    assert len(caught) == 1
    assert dataset.skipped == 1


def test_a_category_out_of_range_is_skipped_and_named(tmp_path):
    dataset = stream(write(tmp_path, [row(1), row(4711, categories=[80])]))
    with pytest.warns(UserWarning, match=r"image_id 4711.*80"):
        assert image_ids(dataset) == [1]
    assert dataset.skipped == 1


def test_half_a_shard_is_named(tmp_path):
    write(tmp_path, [row(i) for i in range(5)], [row(i) for i in range(5, 10)])
    shard = tmp_path / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=shard.name):
        stream(tmp_path)


def test_a_folder_without_shards_of_the_split_is_named(tmp_path):
    write(tmp_path, [row(1)], split="train")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*val"):
        stream(tmp_path, "val")


def test_a_shard_without_a_column_is_named(tmp_path):
    table = pyarrow.Table.from_pylist([row(1)], schema=SCHEMA).drop_columns(["objects"])
    pyarrow.parquet.write_table(table, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0.parquet.*objects"):
        stream(tmp_path)


@pytest.mark.parametrize(
    "boxes", [(), [(4, 4, 4, 6)], [(4, 4, 2, 6)], [(9, 9, 12, 12)], [(1, 1, float("nan"), 5)]]
)
def test_images_without_a_valid_box_are_skipped_in_train_and_kept_in_val(tmp_path, boxes):
    rows = [row(1, boxes=boxes), row(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is wrong with them
        assert image_ids(stream(write(tmp_path, rows))) == [2]
        _, target = next(iter(stream(write(tmp_path, rows, split="val"), "val")))
    assert target["image_id"] == 1
    assert (target["boxes"].dtype, target["boxes"].shape) == (torch.float32, (0, 4))
    assert (target["labels"].dtype, target["labels"].shape) == (torch.int64, (0,))


def test_the_box_of_height_0_is_dropped_and_the_others_keep_their_labels(tmp_path):
    # COCO's image 200365 (cocoapi#355)
    boxes = [(10, 20, 100, 50), (296.65, 388.33, 1.03, 0.0), (200, 300, 60, 80)]
    rows = [row(200365, size=(640, 480), boxes=boxes, categories=[4, 5, 6])]
    _, target = next(iter(stream(write(tmp_path, rows), image_size=64, bbox_format="xywh")))
    assert target["labels"].tolist() == [5, 7]
    expected = torch.tensor([[10.0, 20, 110, 70], [200, 300, 260, 380]]) * torch.tensor(
        [0.1, 64 / 480] * 2
    )
    torch.testing.assert_close(target["boxes"], expected, atol=1e-4, rtol=0)
    assert target["area"].shape == (2,)


# --- flip ------------------------------------------------------------------------------------------------------------


def test_a_flipped_box_still_fits_its_object(tmp_path):
    image = PIL.Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (5, 10, 20, 30))
    source = write(tmp_path, [row(1, encoded(image), (64, 64), [(5, 10, 20, 30)])])
    for flip, expected in [(0.0, [5, 10, 20, 30]), (1.0, [44, 10, 59, 30])]:
        sample, target = next(iter(stream(source, image_size=64, flip=flip)))
        y, x = (pixels(sample)[0] > 128).nonzero().unbind(1)
        assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == expected
        assert target["boxes"].tolist() == [expected]


def test_flips_change_with_the_epoch_and_come_back(shards):
    dataset = stream(shards[1], flip=0.5)

    def flips(epoch):
        dataset.set_epoch(epoch)
        return [
            bool(target["boxes"][0, 0] == 3) for _, target in dataset
        ]  # x1 = 8 - 5 instead of 1

    first = flips(0)
    assert 4 < sum(first) < ROWS - 4
    assert first != flips(1)
    assert first == flips(0)


# --- no source named -------------------------------------------------------------------------------------------------


def test_the_environment_names_the_source(monkeypatch, coco_tiny):
    monkeypatch.setenv("FRCNN_DATA", str(coco_tiny))
    monkeypatch.setattr(frcnn, "_hub_answers", lambda: pytest.fail("the Hub was asked"))
    assert image_ids(frcnn.COCOStreamDataset("val", max_samples=1, image_size=32)) == [397133]


def test_without_the_hub_one_line_says_so_and_glyphs_come(monkeypatch, capsys):
    monkeypatch.delenv("FRCNN_DATA")
    monkeypatch.setattr(frcnn, "_hub_answers", lambda: False)
    dataset = frcnn.COCOStreamDataset(image_size=32)
    printed = capsys.readouterr().out
    assert dataset.source == "glyphs"
    assert printed.count("\n") == 1
    assert "Hub" in printed
    assert "glyph" in printed


def test_a_hub_that_answers_is_used(monkeypatch):
    monkeypatch.delenv("FRCNN_DATA")
    monkeypatch.setattr(frcnn, "_hub_answers", lambda: True)
    monkeypatch.setattr(frcnn.COCOStreamDataset, "_open", lambda self: self.source)
    assert frcnn.COCOStreamDataset(bbox_format="xyxy")._stream == "detection-datasets/coco"


@pytest.fixture
def hub(monkeypatch):
    """Put something in the place of the question to the Hub."""

    def answer_with(function):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "dataset_info", lambda self, *args, **options: function()
        )

    return answer_with


def test_a_server_that_hangs_is_given_up_after_the_time_limit():
    start = time.perf_counter()
    assert not frcnn._answers(lambda: time.sleep(5), 0.2)
    assert 0.19 < time.perf_counter() - start < 1.5


def test_the_time_limit_is_five_seconds():
    assert frcnn.NETWORK_TIMEOUT == 5
    assert frcnn._answers.__defaults__ == (frcnn.NETWORK_TIMEOUT,)


def test_a_hub_that_answers_or_refuses_is_told_apart(hub):
    hub(lambda: "here")
    assert frcnn._hub_answers()

    def refuse():
        raise OSError("no route")

    hub(refuse)
    start = time.perf_counter()
    assert not frcnn._hub_answers()
    assert time.perf_counter() - start < 1  # at once


def test_offline_mode_asks_nobody(hub, monkeypatch):
    hub(lambda: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert not frcnn._hub_answers()


# --- a stream that breaks off ----------------------------------------------------------------------------------------


class Faulty:
    """Stands between the stream and its reader and drops the connection after so many rows, again and again."""

    def __init__(self, stream, rows_until_fault: list[int]) -> None:
        self.stream, self.rows_until_fault, self.opened = stream, rows_until_fault, 0

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def iter(self, batch_size):
        self.opened += 1
        limit = self.rows_until_fault.pop(0) if self.rows_until_fault else None
        for count, batch in enumerate(
            self.stream.iter(1)
        ):  # small batches, so that a fault may come between any rows
            if count == limit:
                raise ConnectionResetError("the line was cut")
            yield batch


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """``remote(faults)`` → (a data set of 12 rows that passes for one on the Hub, its faulty stream, waits)."""
    waits = []
    monkeypatch.setattr(frcnn.time, "sleep", waits.append)

    def build(faults: list[int], **options):
        dataset = stream(write(tmp_path / "data", [row(i) for i in range(12)]), **options)
        dataset.source = frcnn.HUB_SOURCE
        faulty = []

        def split(stream, *arguments, **named):
            faulty.append(Faulty(real(stream, *arguments, **named), faults))
            return faulty[-1]

        real = frcnn.split_dataset_by_node
        monkeypatch.setattr(frcnn, "split_dataset_by_node", split)
        return dataset, faulty, waits

    return build


@pytest.mark.parametrize("shuffle_buffer", [0, 5])
@pytest.mark.filterwarnings("ignore:.*broke off")
def test_a_dropped_connection_loses_and_doubles_nothing(shuffle_buffer, remote):
    dataset, faulty, waits = remote([3, 3, 7], shuffle_buffer=shuffle_buffer)
    assert sorted(image_ids(dataset)) == list(range(12))
    assert faulty[0].opened == 4
    assert waits == [
        1,
        2,
        1,
    ]  # the second try got no further: it waited longer; the third fault came after progress


def test_each_try_is_told(remote):
    dataset, _, _ = remote([3])
    with pytest.warns(UserWarning, match=r"coco broke off \(the line was cut\); next try in 1 s"):
        image_ids(dataset)


@pytest.mark.filterwarnings("ignore:.*broke off")
def test_a_network_that_stays_away_is_a_clear_end(remote):
    dataset, _, waits = remote([4] * 100)
    with pytest.raises(ValueError, match=r"coco cannot be read further: the line was cut"):
        image_ids(dataset)
    assert waits == list(frcnn.RETRY_DELAYS)


def test_a_damaged_folder_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(frcnn.time, "sleep", lambda seconds: pytest.fail("waited"))
    dataset = stream(write(tmp_path / "data", [row(i) for i in range(4)]))
    monkeypatch.setattr(frcnn, "split_dataset_by_node", lambda s, *_, **__: Faulty(s, [1]))
    with pytest.raises(ValueError, match="cannot be read further"):
        image_ids(dataset)


# --- images that keep their aspect -----------------------------------------------------------------------------------


def test_aspect_is_kept_with_boxes_and_true_sizes(tmp_path):
    folder = write(
        tmp_path / "data",
        [
            row(1, size=(40, 20), boxes=[(4, 2, 20, 10)]),
            row(2, size=(20, 30), boxes=[(5, 6, 10, 12)]),
        ],
    )
    dataset = stream(folder, image_size=(64, 100))
    images, targets = next(iter(DataLoader(dataset, 2, collate_fn=frcnn.frcnn_collate_fn)))
    assert images.shape == (2, 3, 96, 128)
    assert [target["size"] for target in targets] == [
        (50, 100),
        (96, 64),
    ]  # 100 is the limit; short side 64
    assert [target["orig_size"] for target in targets] == [(20, 40), (30, 20)]
    torch.testing.assert_close(targets[0]["boxes"], torch.tensor([[10.0, 5, 50, 25]]))
    torch.testing.assert_close(targets[1]["boxes"], torch.tensor([[16.0, 19.2, 32, 38.4]]))
    assert images[0, :, 50:].abs().sum() == images[0, :, :, 100:].abs().sum() == 0
    assert images[0, :, :50, :100].abs().min() > 0


def test_a_flip_of_an_image_that_keeps_its_aspect(tmp_path):
    folder = write(tmp_path / "data", [row(1, size=(40, 20), boxes=[(4, 2, 20, 10)])])
    ((_, target),) = stream(folder, image_size=(64, 100), flip=1.0)
    torch.testing.assert_close(target["boxes"], torch.tensor([[50.0, 5, 90, 25]]))
