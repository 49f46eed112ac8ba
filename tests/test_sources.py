"""Where rows come from: glyph scenes, the Hub, folders of shards, pictures of every kind.

Hostile data: a sample is served as promised, or skipped by name and counted, or the stream ends
with one clear error.
"""

import functools
import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import GOOD, NAN, SCHEMA, encoded, image_ids, pixels, row, stream, write
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import frcnn_common as frcnn
import frcnn_sources
from frcnn_sources import render_glyph_scene

# --- glyph scenes ---------------------------------------------------------------------------------


def test_render_glyph_scene_follows_from_its_seed():
    assert render_glyph_scene(5, 96) == render_glyph_scene(5, 96)
    assert render_glyph_scene(5, 96)["image"] != render_glyph_scene(6, 96)["image"]


def test_scenes_hold_one_to_five_objects_of_all_eight_categories():
    scenes = [render_glyph_scene(seed, 96)["objects"]["category"] for seed in range(120)]
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
        objects = render_glyph_scene(seed, size)["objects"]
        boxes = torch.tensor(objects["bbox"])
        assert (boxes >= 0).all()
        assert (boxes <= size).all()
        areas = frcnn.box_area(boxes)
        assert (areas > 0).all()
        assert (torch.tensor(objects["area"]) <= areas).all()
        assert (torch.tensor(objects["area"]) > 0).all()
        for a, b in itertools.combinations(range(len(boxes)), 2):
            low = torch.maximum(boxes[a, :2], boxes[b, :2])
            high = torch.minimum(boxes[a, 2:], boxes[b, 2:])
            shared = (high - low).clamp(min=0).prod()
            assert shared.item() <= 0.1 * min(areas[a], areas[b]) + 1e-3


def test_glyph_boxes_are_tight_around_the_ink(monkeypatch):
    """A scene painted again without ink: what differs is the ink, and its bounds the box."""
    place = frcnn_sources._place_glyph

    def place_nothing(rng, mask, size, taken):
        mask, box = place(rng, mask, size, taken)
        return mask.point(lambda ink: 0), box

    def picture(scene):
        return np.asarray(PIL.Image.open(io.BytesIO(scene["image"]["bytes"])), dtype=int)

    scenes = [render_glyph_scene(seed, 160) for seed in range(120)]
    alone = [scene for scene in scenes if len(scene["objects"]["bbox"]) == 1]
    monkeypatch.setattr(frcnn_sources, "_place_glyph", place_nothing)
    compared = 0
    for scene in alone:
        empty = render_glyph_scene(scene["image_id"], 160)
        if len(empty["objects"]["bbox"]) != 1:
            continue
        y, x = (picture(scene) != picture(empty)).any(2).nonzero()
        assert scene["objects"]["bbox"] == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]
        compared += 1
    assert compared >= 10


def test_glyph_contrast_suffices():
    luma = np.array([0.299, 0.587, 0.114])
    for seed in range(40):
        scene = render_glyph_scene(seed, 160)
        grey = np.asarray(PIL.Image.open(io.BytesIO(scene["image"]["bytes"]))) @ luma
        for x1, y1, x2, y2 in np.array(scene["objects"]["bbox"], dtype=int):
            inside = grey[y1:y2, x1:x2]
            assert np.percentile(inside, 95) - np.percentile(inside, 5) > 45


def test_train_and_val_scenes_share_no_seed():
    seeds = {
        split: set(range(first, first + frcnn_sources.GLYPH_SCENES[split]))
        for split, first in frcnn_sources.GLYPH_FIRST_SEED.items()
    }
    assert seeds.keys() == {"train", "val"}
    assert not seeds["train"] & seeds["val"]
    for split, expected in seeds.items():
        assert set(image_ids(stream("glyphs", split, 32, max_samples=20))) <= expected


def test_an_epoch_of_glyphs_has_all_its_scenes(monkeypatch):
    monkeypatch.setattr(frcnn_sources, "GLYPH_SCENES", {"train": 7, "val": 3})
    assert image_ids(stream("glyphs", "train", 32)) == list(range(7))
    assert image_ids(stream("glyphs", "val", 32)) == [10**9, 10**9 + 1, 10**9 + 2]


# --- which source is taken ------------------------------------------------------------------------


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
    opened = []
    monkeypatch.setattr(
        frcnn, "open_source", lambda source, *rest: opened.append(source) or (None, None, None)
    )
    frcnn.COCOStreamDataset(bbox_format="xyxy")
    assert opened == ["detection-datasets/coco"]


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
    assert not frcnn.succeeds_within(lambda: time.sleep(5), 0.2)
    assert 0.19 < time.perf_counter() - start < 1.5


def test_the_time_limit_is_five_seconds():
    assert frcnn.NETWORK_TIMEOUT == 5
    assert frcnn.succeeds_within.__defaults__ == (frcnn.NETWORK_TIMEOUT,)


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


# --- the Hub: names of splits, connections that break off -----------------------------------------


@pytest.mark.parametrize(
    "given, asked", [("train", "train"), ("val", "val"), ("validation", "val")]
)
def test_the_hub_is_streamed_by_the_names_of_its_splits(monkeypatch, coco_tiny, given, asked):
    load, calls = datasets.load_dataset, []

    def load_dataset(path, **options):
        if path == "parquet":
            return load(path, **options)
        calls.append((path, options))
        files = sorted(str(file) for file in coco_tiny.glob(f"{asked}-*.parquet"))
        rows = load("parquet", data_files={asked: files}, split=asked, streaming=True)
        return rows.take(4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = stream("detection-datasets/coco", given, 32)
    assert calls == [("detection-datasets/coco", {"split": asked, "streaming": True})]
    assert len(image_ids(dataset)) == 4


# --- folders and shards ---------------------------------------------------------------------------


def test_all_sources_have_the_same_columns(coco_tiny):
    shard = next(coco_tiny.glob("train-*.parquet"))
    real, scene = (pyarrow.parquet.ParquetFile(shard).schema_arrow, render_glyph_scene(0, 64))
    assert set(scene) == set(real.names) == {"image_id", "image", "width", "height", "objects"}
    assert set(scene["objects"]) == {field.name for field in real.field("objects").type}
    assert set(scene["objects"]) == {"bbox_id", "category", "bbox", "area"}


@pytest.mark.parametrize("name", ["a*", "a?", "[a-z]*", "**", "my [data]", "{a,b}", "ä ö", "%20#"])
def test_a_folder_called_like_a_pattern_gives_its_own_rows(name, tmp_path):
    write(tmp_path / name, [row(1)])
    write(tmp_path / "ab", [row(2)])
    ended, _, served = read(lambda: stream(tmp_path / name))
    assert (ended, list(served)) == ("served", [1])


def test_half_a_shard_is_named_when_the_stream_is_opened(tmp_path):
    write(tmp_path, [row(i) for i in range(5)], [row(i) for i in range(5, 10)])
    shard = tmp_path / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=shard.name):
        stream(tmp_path)


def test_a_folder_without_shards_of_the_split_is_named(tmp_path):
    write(tmp_path, [row(1)], split="train")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*val"):
        stream(tmp_path, "val")


# --- detect_bbox_format ---------------------------------------------------------------------------


IMAGE_9 = {"width": 640, "height": 480}  # one box, its segmentation covers 120057.14 square pixels


@pytest.mark.parametrize(
    "bbox, found",
    [([1.08, 187.69, 612.67, 473.53], "xyxy"), ([1.08, 187.69, 611.59, 285.84], "xywh")],
)
def test_detect_bbox_format_decides_by_image_9(bbox, found):
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


def test_detect_bbox_format_does_not_mind_a_bad_box_or_two(coco_tiny):
    rows = shard_rows(coco_tiny)
    rows[0]["objects"]["bbox"][0] = [300.0, 200.0, 100.0, 50.0]
    rows[1]["objects"]["bbox"][0] = [0.0, 0.0, 5000.0, 5000.0]
    assert frcnn.detect_bbox_format(rows) == "xyxy"


def test_detect_bbox_format_refuses_what_is_neither(coco_tiny, tmp_path):
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


# --- decode_image: pictures of every kind ---------------------------------------------------------


def palette_picture() -> PIL.Image.Image:
    image = PIL.Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


COLOURS = {
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


@pytest.mark.parametrize("kind", COLOURS)
def test_decode_image_makes_rgb_of_every_mode(tmp_path, kind):
    make, colour = COLOURS[kind]
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
    """20 × 10 pixels as stored, red left, blue right, with a note to turn it by 90° clockwise."""
    image = PIL.Image.new("RGB", (20, 10), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 20, 10))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    return encoded(image, exif=exif)


def test_decode_image_turns_a_picture_whose_row_has_the_turned_size():
    image = frcnn.decode_image(turned_picture(), (10, 20))
    assert image.size == (10, 20)
    assert [image.getpixel(at) for at in [(0, 0), (9, 0), (0, 19), (9, 19)]] == [
        (255, 0, 0)
    ] * 2 + [(0, 0, 255)] * 2


def test_decode_image_leaves_a_picture_whose_row_has_the_stored_size():
    image = frcnn.decode_image(turned_picture(), (20, 10))
    assert image.size == (20, 10)
    assert [image.getpixel(at) for at in [(0, 0), (0, 9), (19, 0), (19, 9)]] == [
        (255, 0, 0)
    ] * 2 + [(0, 0, 255)] * 2


def test_decode_image_refuses_a_picture_of_another_size():
    with pytest.raises(ValueError, match=r"6 × 6 .* 8 × 5"):
        frcnn.decode_image(encoded(PIL.Image.new("RGB", (6, 6))), (8, 5))


def broken_exif() -> bytes:
    """A picture whose note about the camera is damaged."""
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    image = encoded(PIL.Image.new("RGB", (8, 8)), "webp", exif=exif)
    return image.replace(b"MM\x00*", b"MM\x00i").replace(b"II*\x00", b"IIi\x00")


def test_a_picture_with_a_broken_exif_is_skipped_named_and_counted(tmp_path):
    dataset = stream(write(tmp_path, [row(1), row(4711, broken_exif()), row(3)]))
    with pytest.warns(UserWarning, match="image_id 4711") as caught:
        assert image_ids(dataset) == [1, 3]
    assert len(caught) == 1
    assert dataset.skipped == 1


def test_decode_image_runs_no_program(monkeypatch):
    """An EPS file is a PostScript program; Pillow would start Ghostscript on it."""
    content = encoded(PIL.Image.new("RGB", (8, 8)), "eps")
    monkeypatch.setattr(
        PIL.EpsImagePlugin, "Ghostscript", lambda *arguments, **options: pytest.fail("it was run")
    )
    for size in (None, (8, 8)):
        with pytest.raises(ValueError, match="EPS file is a program"):
            frcnn.decode_image(content, size)


def test_a_path_in_a_row_is_not_opened(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(PIL.Image.new("RGB", (8, 8))))
    sample = row(7) | {"image": {"bytes": None, "path": str(secret)}}
    dataset = stream(write(tmp_path / "data", [row(1), sample]))
    with pytest.warns(UserWarning, match="image_id 7 skipped: its row holds no bytes of an image"):
        assert [target["image_id"] for _, target in dataset] == [1]


# --- decode_image: bombs of pixels ----------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


@functools.cache
def png_of_zeros(width: int, height: int, *more: bytes) -> bytes:
    """A whole, valid PNG, one bit a pixel, made without ever holding its pixels."""
    deflate, some = zlib.compressobj(9), 100
    line = bytes(1 + (width + 7) // 8)  # the filter, then the pixels
    packed = (
        b"".join(deflate.compress(line * min(some, height - y)) for y in range(0, height, some))
        + deflate.flush()
    )
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(more)
        + chunk(b"IDAT", packed)
        + chunk(b"IEND", b"")
    )


def header_alone(kind: str) -> bytes:
    """The first bytes of a picture of 60,000 × 60,000 pixels, and nothing behind them."""
    if kind == "bmp":
        return b"BM" + struct.pack(
            "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0
        )
    if kind == "gif":
        frame = struct.pack("<cHHHHBB", b",", 0, 0, 60_000, 60_000, 0, 8)
        return b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + frame
    if kind == "jpeg":
        return b"\xff\xd8\xff\xc0" + struct.pack(">HBHHBBBB", 11, 8, 60_000, 60_000, 1, 1, 0x11, 0)
    return b"P6 60000 60000 255\n"


BOMBS = {
    "30,000 × 30,000 zeros": lambda: png_of_zeros(30_000, 30_000),
    "13,000 × 13,000 zeros": lambda: png_of_zeros(13_000, 13_000),  # here Pillow would only warn
    "one row of 100 million": lambda: png_of_zeros(100_000_000, 1),
    "text that unpacks to 20 MB": lambda: png_of_zeros(
        8, 8, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000), 9))
    ),
    **{
        f"the head of a {kind}": lambda kind=kind: header_alone(kind)
        for kind in ("bmp", "gif", "jpeg", "ppm")
    },
}


# Run alone, so that the greatest memory is its own: a folder with the bomb between two good rows,
# then `detect`.
LOOK = """
import json, resource, sys, time, warnings
import frcnn_common as frcnn
folder = sys.argv[1]
good, bomb = f"{folder}/good.png", f"{folder}/bomb.png"
detect = ["detect", "--checkpoint", f"{folder}/c.pt", "--out"]
frcnn.main([*detect, f"{folder}/first", good])
dataset = frcnn.COCOStreamDataset("train", None, f"{folder}/data", 64, bbox_format="xyxy")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, start = peak(), time.perf_counter()
ids = [target["image_id"] for _, target in dataset]
seconds = time.perf_counter() - start
code = frcnn.main([*detect, f"{folder}/out", bomb, good])
result = {"ids": ids, "skipped": dataset.skipped, "code": code}
print(json.dumps(result | {"seconds": seconds, "mb": peak() - before}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is of Unix")
def test_a_bomb_of_pixels_costs_one_line_and_no_memory(tmp_path):
    bomb = png_of_zeros(13_000, 13_000)
    assert len(bomb) < 100_000
    bombs = [bomb, png_of_zeros(30_000, 30_000)]
    rows = [
        row(1),
        row(13, bombs[0], (13_000, 13_000)),
        row(30, bombs[1], (30_000, 30_000)),
        row(3),
    ]
    write(tmp_path / "data", rows)
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "good.png").write_bytes(encoded(PIL.Image.new("RGB", (40, 30))))
    frcnn.save_checkpoint(tmp_path / "c.pt", frcnn.tiny_faster_rcnn())
    command = [sys.executable, "-c", LOOK, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(frcnn.__file__).parent)}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["ids"], result["skipped"], result["code"]) == ([1, 3], 2, 2)
    assert result["mb"] < 300  # decoded, the smaller would take 700
    assert result["seconds"] < 5
    told = [line for line in re.split(r"[\r\n]+", done.stderr) if line and "%|" not in line]
    named = [line for line in told if "bomb" in line.lower() or "large" in line]
    assert [line for line in named if line.startswith("frcnn_common: ")] == [
        f"frcnn_common: {tmp_path}/bomb.png is no picture that can be read:"
        f" an image of 13000 × 13000 pixels is too large: at most {frcnn.MAX_PIXELS:,}"
    ]
    assert sum("UserWarning: image_id" in line for line in named) == 2
    # Pillow tells the one who reads the stream in Python, and not the one who types a command.
    pillows = [i for i, line in enumerate(told) if "DecompressionBombWarning" in line]
    assert len(pillows) == 1
    assert pillows[0] < next(i for i, line in enumerate(told) if line.startswith("frcnn_common: "))
    (record,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert record["image"].endswith("good.png")


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # pytest takes the module's filter away
@pytest.mark.parametrize("kind", BOMBS)
def test_decode_image_refuses_a_bomb_before_it_is_decoded(kind, monkeypatch):
    content = BOMBS[kind]()
    PIL.Image.init()  # its plugins make small images of their own
    monkeypatch.setattr(
        PIL.Image.core, "new", lambda *arguments: pytest.fail(f"memory for {arguments}")
    )
    monkeypatch.setattr(
        PIL.Image.core, "fill", lambda *arguments: pytest.fail(f"memory for {arguments}")
    )
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"pixels|too large") as error:
        frcnn.decode_image(content)
    assert time.perf_counter() - start < 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("more", "accepted"), [(0, True), (1, False)])
def test_decode_image_has_an_exact_limit(more, accepted, monkeypatch):
    monkeypatch.setattr(frcnn, "MAX_PIXELS", 300)
    content = encoded(PIL.Image.new("RGB", (300 + more, 1)))
    if accepted:
        assert frcnn.decode_image(content).size == (300, 1)
    else:
        with pytest.raises(
            ValueError, match="an image of 301 × 1 pixels is too large: at most 300"
        ):
            frcnn.decode_image(content)


def test_photographs_of_today_are_below_the_limit():
    assert frcnn.MAX_PIXELS > 9504 * 6336  # 60 megapixels, the largest of the common cameras
    assert frcnn.MAX_PIXELS * 3 * 4 < 2**30 * 1.1  # as float32, RGB: about 1 GB


# --- hostile samples: what is promised ------------------------------------------------------------


EXAMPLES = 400  # of each property
INF = float("inf")
BAD = 4711  # image_id of the hostile row


def keeps_its_promises(image: torch.Tensor, target: dict) -> bool:
    """Everything that the class says about what it yields."""
    (height, width), count = target["size"], len(target["boxes"])
    boxes = target["boxes"]
    return (
        (image.dtype, image.ndim, image.shape[0]) == (torch.float32, 3, 3)
        and bool(image.isfinite().all())
        and 0 < height <= image.shape[1]
        and 0 < width <= image.shape[2]
        and (boxes.dtype, tuple(boxes.shape)) == (torch.float32, (count, 4))
        and bool(boxes.isfinite().all())
        and bool((boxes >= 0).all())
        and bool((boxes[:, 2:] <= torch.tensor([width, height])).all())
        and bool((boxes[:, 2:] > boxes[:, :2]).all())
        and (target["labels"].dtype, tuple(target["labels"].shape)) == (torch.int64, (count,))
        and bool(((target["labels"] >= 1) & (target["labels"] <= 80)).all())
        and (target["area"].dtype, tuple(target["area"].shape)) == (torch.float32, (count,))
        and bool((target["area"].isfinite() & (target["area"] >= 0)).all())
        and type(target["image_id"]) is int
        and [type(side) for side in target["orig_size"]] == [int, int]
    )


def read(
    open_dataset: Callable[[], frcnn.COCOStreamDataset],
) -> tuple[str, list[str], dict[int, dict]]:
    """How it ended, what was said on the way, and the targets by ``image_id``; one pass."""
    served: dict[int, dict] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset = open_dataset()
            for image, target in dataset:
                assert keeps_its_promises(image, target), target
                assert target["image_id"] not in served
                served[target["image_id"]] = target
        except (ValueError, OSError) as error:  # these the command line turns into one line
            return "error", [str(error)], served
    told = [str(warning.message) for warning in caught]
    said = [line for line in told if "boxes left out" not in line]
    # Every row that is left out is named, every box that is left out told, and nothing else.
    assert dataset.skipped == len(said), told
    left_out = r"image_id \S+: (\d+) boxes left out, not finite or without area"
    counts = [int(re.fullmatch(left_out, line)[1]) for line in told if line not in said]
    assert dataset.dropped == sum(counts)
    return "skipped" if said else "served", said, served


# --- hostile samples: rows ------------------------------------------------------------------------


# A builder writes the folder with both splits. The hostile row stands between two good ones, whose
# many boxes let the format of the boxes be decided.


def between_good_ones(hostile: dict) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        rows = [row(1, boxes=[GOOD] * 20), hostile, row(3, boxes=[GOOD] * 20)]
        write(folder, rows, split="train")
        return write(folder, rows, split="val")

    return build


def hostile_row(**changed) -> dict:
    """A row with one good box, the given columns and fields of ``objects`` in place of its own."""
    sample = row(BAD, boxes=[GOOD])
    for name, value in changed.items():
        (sample["objects"] if name in sample["objects"] else sample)[name] = value
    return sample


def picture(content: bytes, size=(8, 8), boxes=(GOOD,)) -> Callable[[Path], Path]:
    return between_good_ones(row(BAD, content, size, boxes))


def noise(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> PIL.Image.Image:
    PIL.Image.init()
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def several_frames(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise().save(buffer, kind, save_all=True, append_images=[noise("L").convert("RGB")] * 3)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    """20 × 10 pixels as stored, with a note of the camera about how it was held."""
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    return encoded(noise(size=(20, 10)), "jpeg", exif=exif)


SIXTEEN_BITS = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
MODES = {
    "grey": encoded(noise("L")),
    "one bit": encoded(noise("1")),
    "grey with alpha": encoded(noise("LA")),
    "palette": encoded(noise("P")),
    "palette with one clear colour": encoded(noise("P"), transparency=0),
    "palette with alpha": encoded(noise("P"), transparency=bytes(range(200))),
    "RGB with a clear colour": encoded(noise(), transparency=(0, 0, 0)),
    "RGBA": encoded(noise("RGBA")),
    "CMYK tiff": encoded(noise("CMYK"), "tiff"),
    "CMYK jpeg": encoded(noise("CMYK"), "jpeg"),
    "YCbCr": encoded(noise("YCbCr"), "jpeg"),
    "LAB": encoded(noise("LAB"), "tiff"),
    "16 bit png": encoded(PIL.Image.fromarray(SIXTEEN_BITS)),
    "16 bit tiff, the other byte order": encoded(
        PIL.Image.fromarray(SIXTEEN_BITS.astype(">u2")), "tiff"
    ),
    "32 bit integers": encoded(PIL.Image.fromarray(SIXTEEN_BITS.astype(np.int32) * 40_000), "tiff"),
    "32 bit floats": encoded(noise("F"), "tiff"),
    "floats that are NaN": encoded(PIL.Image.fromarray(np.full((8, 8), NAN, np.float32)), "tiff"),
    "moving gif": several_frames("gif"),
    "moving png": several_frames("png"),
    "bmp": encoded(noise(), "bmp"),
    "ppm": encoded(noise(), "ppm"),
}
NO_PICTURES = {
    "no bytes": b"",
    "text": b"not a picture",
    "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "zeros": bytes(5000),
    "a zip": b"PK\x05\x06" + bytes(18),
    "a pdf": encoded(noise(), "pdf"),
    "a PostScript program": encoded(noise(), "eps"),
}
WHOLE = {
    kind: encoded(noise(size=(64, 48)), kind)
    for kind in ("jpeg", "png", "gif", "tiff", "bmp", "webp")
}
LINE = {
    "20,000 × 1": (20_000, 1),
    "1 × 20,000": (1, 20_000),
    "1 × 1": (1, 1),
    "33 × 1,333": (33, 1_333),
}
WHOLE_IMAGE = [0.0, 0, 8, 8]
PICTURES = [
    *((f"picture: {name}", picture(content), "served", [GOOD]) for name, content in MODES.items()),
    *(
        (
            f"picture: orientation {note}",
            picture(turned(note), (10, 20)),
            "served",
            [[2.4, 1.6, 5.6, 3.2]],
        )
        for note in (5, 6, 7, 8)
    ),
    *(
        (
            f"picture: orientation {note}",
            picture(turned(note), (20, 10)),
            "served",
            [[1.2, 3.2, 2.8, 6.4]],
        )
        for note in (0, 1, 2, 3, 4, 9, 65_535)
    ),
    *(
        (
            f"picture: {name}",
            picture(encoded(noise(size=size)), size, [(0, 0, *size)]),
            "served",
            [WHOLE_IMAGE],
        )
        for name, size in LINE.items()
    ),
    *(
        (f"picture: {name}", picture(content), "skipped", "image")
        for name, content in NO_PICTURES.items()
    ),
    *(
        (
            f"picture: {kind} cut at {tenth}/10",
            picture(whole[: len(whole) * tenth // 10], (64, 48)),
            "skipped",
            "",
        )
        for kind, whole in WHOLE.items()
        for tenth in range(1, 10)
    ),
    ("picture: null", between_good_ones(hostile_row(image=None)), "skipped", "no bytes"),
    (
        "picture: a path and no bytes",
        between_good_ones(hostile_row(image={"bytes": None, "path": "/etc/passwd"})),
        "skipped",
        "no bytes",
    ),
    (
        "picture: wider than its row says",
        between_good_ones(hostile_row(width=7)),
        "skipped",
        "8 × 8 .* 7 × 8",
    ),
    (
        "picture: on its side",
        picture(encoded(noise(size=(20, 10))), (10, 20)),
        "skipped",
        "20 × 10 .* 10 × 20",
    ),
    ("picture: no width", between_good_ones(hostile_row(width=None)), "skipped", "None × 8"),
    ("picture: width 0", between_good_ones(hostile_row(width=0)), "skipped", "0 × 8"),
    ("picture: height below 0", between_good_ones(hostile_row(height=-8)), "skipped", "8 × -8"),
]


def boxes(*hostile: list[float | None] | None) -> Callable[[Path], Path]:
    """A row whose objects are the given boxes and, last, a good one of category 6."""
    return between_good_ones(
        hostile_row(
            bbox=[*hostile, GOOD],
            category=[5] * len(hostile) + [6],
            area=[1.0] * len(hostile) + [2.0],
            bbox_id=list(range(len(hostile) + 1)),
        )
    )


GRID = [[x / 20, y / 20, x / 20 + 1, y / 20 + 1] for x in range(100) for y in range(100)]
INVALID = {
    "NaN": [1, NAN, 5, 7],
    "all NaN": [NAN] * 4,
    "infinite": [1, 2, INF, 7],
    "minus infinite": [-INF, 2, 5, 7],
    "infinite on both sides": [-INF, -INF, INF, INF],
    "a null in it": [1, None, 5, 7],
    "reversed in x": [5, 2, 1, 7],
    "reversed in y": [1, 7, 5, 2],
    "reversed in both": [5, 7, 1, 2],
    "outside, right": [9, 2, 12, 7],
    "outside, above": [1, -9, 5, -3],
    "touching the image": [8, 0, 12, 8],
    "without width": [4, 2, 4, 7],
    "without height": [1, 4, 5, 4],
    "a point": [4, 4, 4, 4],
    "too thin for float32": [3, 2, 3 + 1e-12, 7],
    "the largest numbers, reversed": [1e308, 1e308, -1e308, -1e308],
}
BOXES = [
    *((f"box: {name}", boxes(box), "served", [GOOD]) for name, box in INVALID.items()),
    ("box: partly outside", boxes([-5, -5, 4, 40]), "served", [[0, 0, 4, 8], GOOD]),
    ("box: around all", boxes([-1e308, -1e308, 1e308, 1e308]), "served", [WHOLE_IMAGE, GOOD]),
    ("box: thin, and held by float32", boxes([0, 2, 1e-40, 7]), "served", [[0, 2, 1e-40, 7], GOOD]),
    ("box: of every invalid kind", boxes(*INVALID.values()), "error", "neither corners nor"),
    ("boxes: 10,000", boxes(*GRID), "skipped", "10,001 objects are too many: at most 5,000"),
    ("boxes: 5,000", boxes(*GRID[:4_999]), "served", [*GRID[:4_999], GOOD]),
    ("boxes: none", between_good_ones(hostile_row(bbox=[], category=[], area=[])), "served", []),
    ("boxes: null", between_good_ones(hostile_row(bbox=None)), "skipped", "objects must hold"),
    ("boxes: null among them", boxes(None), "skipped", "objects must hold"),
    (
        "boxes: of 3 numbers",
        between_good_ones(hostile_row(bbox=[[1, 2, 5]])),
        "skipped",
        "objects must hold",
    ),
    (
        "boxes: of 0 numbers",
        between_good_ones(hostile_row(bbox=[[]])),
        "skipped",
        "objects must hold",
    ),
    (
        "boxes: two halves",
        between_good_ones(hostile_row(bbox=[[1, 2], [5, 7]])),
        "skipped",
        "objects must hold",
    ),
    (
        "boxes: two in one list",
        between_good_ones(hostile_row(bbox=[GOOD * 2], category=[1, 2], area=[1, 1])),
        "skipped",
        "objects must hold",
    ),
    ("boxes: of several lengths", boxes([1, 2, 5, 7, 9]), "skipped", "objects must hold"),
    ("objects: null", between_good_ones(hostile_row(objects=None)), "skipped", "objects must hold"),
    *(
        (
            f"objects: {name}",
            between_good_ones(hostile_row(**changed)),
            "skipped",
            "objects must hold",
        )
        for name, changed in {
            "a category too few": {"category": []},
            "a category too many": {"category": [1, 2]},
            "an area too few": {"area": []},
            "an area too many": {"area": [1, 2]},
            "a box too few": {"bbox": []},
            "a box too many": {"bbox": [GOOD, GOOD]},
            "no categories": {"category": None},
            "no areas": {"area": None},
        }.items()
    ),
    *(
        (
            f"label: {label}",
            between_good_ones(hostile_row(category=[label])),
            "skipped",
            "categories must lie in 0..79",
        )
        for label in (-1, 80, 90, 10**15, None)
    ),
    *(
        (
            f"area: {area}",
            between_good_ones(hostile_row(area=[area])),
            "skipped",
            "area must be finite",
        )
        for area in (NAN, INF, -1.0, 1e300, None)
    ),
]


# --- hostile samples: columns ---------------------------------------------------------------------


def whole(table: pyarrow.Table) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        folder.mkdir()
        for split in ("train", "val"):
            pyarrow.parquet.write_table(table, folder / f"{split}-00000.parquet")
        return folder

    return build


ROWS = [row(i, boxes=[GOOD] * 20) for i in (1, BAD, 3)]
TABLE = pyarrow.Table.from_pylist(ROWS, SCHEMA)


def column(name: str, values: list) -> Callable[[Path], Path]:
    """The three rows with other content in one column, of whatever type it has."""
    return whole(TABLE.set_column(TABLE.schema.get_field_index(name), name, pyarrow.array(values)))


def field(name: str, make: Callable[[], object]) -> Callable[[Path], Path]:
    return column("objects", [sample["objects"] | {name: make()} for sample in ROWS])


def objects_without(name: str) -> Callable[[Path], Path]:
    return column(
        "objects", [{k: v for k, v in sample["objects"].items() if k != name} for sample in ROWS]
    )


def listed(objects: dict) -> list[dict]:
    return [dict(zip(objects, values)) for values in zip(*objects.values())]


GOODS = [GOOD] * 20
COLUMNS = [
    *(
        (
            f"columns: no {name}",
            whole(TABLE.drop_columns([name])),
            "error",
            rf"lacks the columns .*{name}",
        )
        for name in TABLE.schema.names
    ),
    *(
        (
            f"columns: objects without {name}",
            objects_without(name),
            "error",
            rf"lacks the columns \['objects.{name}'\]",
        )
        for name in ("category", "bbox", "area")
    ),
    ("columns: objects without bbox_id", objects_without("bbox_id"), "served", GOODS),
    (
        "columns: one more",
        whole(TABLE.append_column("split", pyarrow.array(["a", "b", "c"]))),
        "served",
        GOODS,
    ),
    (
        "columns: image_id twice",
        whole(TABLE.append_column("image_id", TABLE["width"])),
        "error",
        "image_id",
    ),
    ("columns: image_id of digits", column("image_id", ["1", str(BAD), "3"]), "served", GOODS),
    (
        "columns: image_id of whole floats",
        column("image_id", [1.0, float(BAD), 3.0]),
        "served",
        GOODS,
    ),
    (
        "columns: image_id of fractions",
        column("image_id", [1.5, BAD + 0.5, 3.5]),
        "skipped",
        "whole number",
    ),
    ("columns: image_id of names", column("image_id", ["a", "b", "c"]), "skipped", "int"),
    ("columns: image_id null", column("image_id", [None] * 3), "skipped", "int"),
    ("columns: width of floats", column("width", [8.0] * 3), "served", GOODS),
    ("columns: width of text", column("width", ["8"] * 3), "skipped", "8 × 8 .* '8' × 8"),
    (
        "columns: image is the bytes",
        column("image", [sample["image"]["bytes"] for sample in ROWS]),
        "served",
        GOODS,
    ),
    ("columns: image is a path", column("image", ["/etc/passwd"] * 3), "skipped", "no bytes"),
    ("columns: image is a number", column("image", [1, 2, 3]), "error", "cannot be read further"),
    (
        "columns: objects are numbers",
        column("objects", [1, 2, 3]),
        "error",
        "lacks the columns .*objects.bbox",
    ),
    (
        "columns: objects are text",
        column("objects", ["{}"] * 3),
        "error",
        "lacks the columns .*objects.bbox",
    ),
    (
        "columns: objects are a list",
        column("objects", [listed(sample["objects"]) for sample in ROWS]),
        "error",
        "lacks the columns .*objects.bbox",
    ),
    ("columns: bbox of integers", field("bbox", lambda: [[3, 4, 7, 8]] * 20), "served", GOODS),
    (
        "columns: bbox of text",
        field("bbox", lambda: ["1 2 5 7"] * 20),
        "skipped",
        "objects must hold",
    ),
    (
        "columns: bbox of dictionaries",
        field("bbox", lambda: [{"x": 1}] * 20),
        "skipped",
        "objects must hold",
    ),
    (
        "columns: bbox in one flat list",
        field("bbox", lambda: GOOD * 20),
        "skipped",
        "objects must hold",
    ),
    ("columns: category of whole floats", field("category", lambda: [0.0] * 20), "served", GOODS),
    (
        "columns: category of fractions",
        field("category", lambda: [0.5] * 20),
        "skipped",
        "categories must lie in",
    ),
    (
        "columns: category of names",
        field("category", lambda: ["cat"] * 20),
        "skipped",
        "objects must hold",
    ),
]


# --- hostile samples: folders ---------------------------------------------------------------------


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def cut(tenth: int) -> Callable[[Path], Path]:
    """The second of two shards, cut at so many tenths of its length."""

    def build(folder: Path) -> Path:
        for split in ("train", "val"):
            write(folder, ROWS[:2], ROWS[2:], split=split)
            torn = folder / f"{split}-00001-of-00002.parquet"
            torn.write_bytes(torn.read_bytes()[: torn.stat().st_size * tenth // 10])
        return folder

    return build


def garbled(folder: Path) -> Path:
    """The end of the shard, which is looked at first, is whole; its rows are not."""
    for path in whole(TABLE)(folder).iterdir():
        with path.open("r+b") as file:
            file.seek(4)
            file.write(b"\xff" * 500)
    return folder


def text_as_shard(folder: Path) -> Path:
    for split in ("train", "val"):
        (empty(folder) if not folder.exists() else folder).joinpath(
            f"{split}-0.parquet"
        ).write_text("image_id,image\n")
    return folder


def folder_as_shard(folder: Path) -> Path:
    for split in ("train", "val"):
        (folder / f"{split}-0.parquet").mkdir(parents=True)
    return folder


FOLDERS = [
    ("folder: without shards", empty, "error", r"holds no \*\.parquet, no COCO annotations"),
    *(
        (f"folder: shard cut at {tenth}/10", cut(tenth), "error", "00001-of-00002.parquet")
        for tenth in range(10)
    ),
    ("folder: shard garbled inside", garbled, "error", "cannot be read further"),
    ("folder: shard is text", text_as_shard, "error", "-0.parquet is no whole parquet file"),
    ("folder: shard is a folder", folder_as_shard, "error", "-0.parquet is no whole parquet file"),
    ("folder: shard without rows", whole(TABLE.slice(0, 0)), "error", "holds no rows"),
]


# --- hostile samples: how each ends ---------------------------------------------------------------


HOSTILE = [
    *PICTURES,
    *BOXES,
    *COLUMNS,
    *FOLDERS,
]  # (name, build, outcome, the boxes served or what is said)
READINGS = [("train", *h) for h in HOSTILE] + [
    ("val", *h) for h in BOXES
]  # an image without boxes differs


@pytest.mark.parametrize(
    ("split", "build", "outcome", "detail"),
    [(r[0], *r[2:]) for r in READINGS],
    ids=[f"{r[0]}, {r[1]}" for r in READINGS],
)
def test_hostile_sample_ends_as_it_should(split, build, outcome, detail, tmp_path):
    source = build(tmp_path / "data")
    ended, said, served = read(lambda: stream(source, split, bbox_format=None))
    assert ended == outcome, said
    assert all("\n" not in line for line in said)
    if outcome == "error":
        (line,) = said
        assert re.search(detail, line), line
        assert not served
    elif outcome == "skipped":
        assert BAD not in served
        assert all(re.fullmatch(rf"image_id \S+ skipped: .*{detail}.*", line) for line in said), (
            said
        )
        assert (
            len(said) + len(served) == 3
        )  # the two others are served, or all three are of the same kind
        assert len(said) == 3 or (set(served) == {1, 3} and said[0].startswith(f"image_id {BAD} "))
    else:
        assert served.keys() == ({1, BAD, 3} if detail or split == "val" else {1, 3})
        assert [len(served[i]["boxes"]) for i in (1, 3)] == [20, 20]
        if BAD in served:
            expected = torch.tensor(detail, dtype=torch.float32).reshape(-1, 4)
            torch.testing.assert_close(served[BAD]["boxes"], expected, atol=1e-5, rtol=0)


def test_the_box_that_stays_keeps_its_own_label_and_area(tmp_path):
    hostile = [[NAN] * 4, *([[9.0, 9, 8, 8]] * 1), GOOD, [4.0, 4, 4, 4]]
    sample = hostile_row(bbox=hostile, category=[5, 6, 7, 8], area=[10, 20, 30, 40])
    _, _, served = read(lambda: stream(between_good_ones(sample)(tmp_path / "data")))
    assert (served[BAD]["labels"].tolist(), served[BAD]["area"].tolist()) == ([8], [30])


@pytest.mark.parametrize(
    ("hostile", "expected"),
    [
        ([2, 2, 1e308, 1e308], [[2, 2, 8, 8]]),
        ([1e308, 2, 1e308, 2], []),
        ([-1e308, -1e308, 1e308, 1e308], []),
        ([2, 2, -1, 3], []),
        ([2, 2, 0, 3], []),
        ([-3, -3, 5, 6], [[0, 0, 2, 3]]),
        ([INF, 2, -INF, 2], []),
        ([NAN, 2, 1, 2], []),
    ],
    ids=str,
)
def test_hostile_corner_and_size_become_boxes_inside_or_none(hostile, expected, tmp_path):
    source = boxes(hostile, [1, 1, 2, 3])(tmp_path / "data")
    ended, said, served = read(lambda: stream(source, bbox_format="xywh"))
    assert (ended, said) == ("served", [])
    good_as_size = [3, 4, 8, 8]  # clipped
    assert served[BAD]["boxes"].tolist() == [*expected, [1, 1, 3, 4], good_as_size]


@pytest.mark.parametrize(
    "failure", [OSError, ValueError, RuntimeError, KeyError, EOFError, MemoryError, RecursionError]
)
@pytest.mark.parametrize("place", [0, 1, 16, 40])
def test_a_stream_that_raises_in_the_middle_ends_with_one_clear_error(failure, place, tmp_path):
    def rows() -> Iterator[dict]:
        yield from (row(i) for i in range(place))
        raise failure("the tape tore")

    dataset = stream(between_good_ones(hostile_row())(tmp_path / "data"))
    dataset.rows = datasets.IterableDataset.from_generator(rows)
    ended, (line,), served = read(lambda: dataset)
    assert (ended, list(served)) == (
        "error",
        list(range(place // 16 * 16)),
    )  # rows are taken sixteen at a time
    assert re.fullmatch(r".*data cannot be read further: '?the tape tore'?", line)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (ValueError("first line\nsecond line"), "first line"),
        (KeyError("x"), "'x'"),
    ],
    ids=repr,
)
def test_the_reason_is_one_line_and_never_empty(failure, reason, monkeypatch):
    def fail(*arguments):
        raise failure

    monkeypatch.setattr(frcnn, "prepare_image", fail)
    ended, said, _ = read(lambda: stream("glyphs", max_samples=1))
    assert (ended, said) == ("skipped", [f"image_id 0 skipped: {reason}"])


# --- rows and pictures of chance ------------------------------------------------------------------


SIDES = (1, 30, 33, 64)
ENCODED = {size: encoded(noise(size=size)) for size in itertools.product(SIDES, SIDES)}
number = st.one_of(
    st.floats(-20, 90),
    st.integers(-3, 70),
    st.floats(),  # NaN, infinities, the smallest and the largest
    st.sampled_from([None, 1e308, -1e308, 5e-324, 2**63]),
)
plain_box = st.tuples(*[st.floats(-5, 25)] * 2, *[st.floats(0, 40)] * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
four_numbers = plain_box | st.lists(number, min_size=4, max_size=4)
anything = (
    number
    | st.lists(number, max_size=9)
    | st.text(max_size=3)
    | st.sampled_from([10**400, "3", {}, [[]], b"1"])
)


@st.composite
def rows_of_chance(draw) -> dict:
    """Three of four rows are well formed, boxes of any numbers; one has a thing of any kind."""
    size = draw(st.sampled_from(list(ENCODED)))
    bbox = draw(st.just([]) | st.lists(four_numbers, min_size=1, max_size=5))
    labels, areas = st.integers(0, 79) | st.sampled_from([0.0, 79.0]), st.floats(0, 1e4)
    category, area = (
        draw(st.lists(kind, min_size=len(bbox), max_size=len(bbox))) for kind in (labels, areas)
    )
    objects = {"bbox": bbox, "category": category, "area": area}
    sample = {
        "image_id": draw(st.integers(-(2**63), 2**64)),
        "image": {"bytes": ENCODED[size], "path": None},
    }
    sample |= {"width": size[0], "height": size[1], "objects": objects}
    hostile = draw(
        st.sampled_from(
            [None] * 24 + ["image_id", "width", "height", "objects", *objects, "length"]
        )
    )
    if hostile == "length":
        (add := objects[draw(st.sampled_from(list(objects)))]).extend(
            draw(st.sampled_from([add[:1] * 2, [1.0]]))
        )
    elif hostile in objects and bbox and draw(st.booleans()):
        objects[hostile][draw(st.integers(0, len(bbox) - 1))] = draw(anything)
    elif hostile:
        (objects if hostile in objects else sample)[hostile] = draw(anything)
    return sample


def numbers_of(
    values: object, read: Callable = lambda value: NAN if value is None else float(value)
) -> list:
    """A list of plain numbers, null being NaN; raises where it is something else."""
    if not isinstance(values, list):
        raise TypeError
    return [read(value) for value in values]


def expected_target(
    sample: dict, size: tuple[int, int], flip: bool, bbox_format: str
) -> tuple[list, list] | None:
    """Boxes and labels of a row by the documentation, one box at a time; None: not to be used."""
    try:
        raw = numbers_of(sample["objects"]["bbox"], numbers_of)
        category, area = (numbers_of(sample["objects"][name]) for name in ("category", "area"))
        name_is_whole = (
            isinstance(sample["image_id"], int | str | bytes)
            or float(sample["image_id"]).is_integer()
        )
        int(sample["image_id"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    width, height = sample["width"], sample["height"]
    if (
        not name_is_whole
        or (width, height) not in list(ENCODED)
        or ENCODED[width, height] != sample["image"]["bytes"]
        or len({len(raw), len(category), len(area)}) > 1
        or any(len(one) != 4 for one in raw)
        or any(c not in range(80) for c in category)
        or any(not 0 <= a <= float(np.finfo(np.float32).max) for a in area)
    ):
        return None
    found, labels = [], []
    for (x1, y1, x2, y2), name in zip(raw, category, strict=True):
        if not np.isfinite([x1, y1, x2, y2]).all():
            continue
        if bbox_format == "xywh":
            x2, y2 = x1 + x2, y1 + y2
        x1, x2 = (min(max(x, 0), width) for x in (x1, x2))
        y1, y2 = (min(max(y, 0), height) for y in (y1, y2))
        if flip:
            x1, x2 = width - x2, width - x1
        scaled = [
            x1 * size[1] / width,
            y1 * size[0] / height,
            x2 * size[1] / width,
            y2 * size[0] / height,
        ]
        x1, y1, x2, y2 = np.array(scaled).astype(np.float32).tolist()
        if x2 > x1 and y2 > y1:
            found.append([x1, y1, x2, y2])
            labels.append(int(name) + 1)
    return found, labels


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    rows_of_chance(),
    st.sampled_from([1, 16, 50, (16, 20), (30, 31)]),
    st.booleans(),
    st.sampled_from(["xyxy", "xywh"]),
    st.sampled_from(["train", "val"]),
)
def test_a_row_of_chance_is_served_right_or_named(sample, image_size, flip, bbox_format, split):
    dataset = stream("glyphs", split, image_size, bbox_format, flip=float(flip))
    dataset.source = "rows of chance"
    dataset._rows = lambda reader, readers: iter([sample])
    ended, said, served = read(lambda: dataset)
    if ended == "skipped":
        assert not served
        assert re.fullmatch(rf"image_id {re.escape(str(sample['image_id']))} skipped: .+", said[0])
        assert expected_target(sample, (1, 1), flip, bbox_format) is None
        return
    assert ended == "served"
    _, size = frcnn.prepare_image(
        PIL.Image.new("RGB", (sample["width"], sample["height"])), image_size
    )
    found, labels = expected_target(
        sample, size, flip, bbox_format
    )  # of a row that is no good there is none to unpack
    if served:
        target = served[int(sample["image_id"])]
        assert target["boxes"].tolist() == found
        assert target["labels"].tolist() == labels
        assert target["orig_size"] == (sample["height"], sample["width"])
        assert dataset.dropped == len(sample["objects"]["bbox"]) - len(found)
    else:
        assert (split, found) == ("train", [])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(WHOLE)),
    st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), max_size=12),
    st.floats(0, 1),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore")  # Pillow tells about some damage that it can read around
def test_a_damaged_picture_is_served_or_named(kind, damage, share, is_cut):
    content = bytearray(WHOLE[kind])
    for place, value in damage:
        content[place % len(content)] = value
    content = bytes(content[: int(share * len(content))] if is_cut else content)
    dataset = stream("glyphs", image_size=16)
    dataset._rows = lambda reader, readers: iter([row(1), row(BAD, content, (64, 48)), row(3)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = list(dataset)
    named = [str(w.message) for w in caught if "skipped" in str(w.message)]
    assert all(keeps_its_promises(*sample) for sample in samples)
    ids = [target["image_id"] for _, target in samples]
    assert (ids, named) == ([1, BAD, 3], []) or ids == [1, 3]
    assert dataset.skipped == len(named) == 3 - len(samples)
    assert all(re.fullmatch(rf"image_id {BAD} skipped: .+", line) for line in named)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(st.lists(rows_of_chance(), max_size=4))
def test_detect_bbox_format_does_not_mind_rows_of_chance(hostile):
    good = row(1, boxes=[GOOD] * 300)  # so many that five bad boxes a row are below one of ten
    assert frcnn.detect_bbox_format([*hostile, good]) == "xyxy"


# --- a whole epoch of hostile rows ----------------------------------------------------------------


def epoch_of_all(folder: Path) -> tuple[Path, int]:
    """A folder with all hostile rows that fit the Hub's columns, and how many are to be skipped."""
    several = [h for h in [*PICTURES, *BOXES] if h[2] != "error" and not h[0].startswith("boxes: ")]
    rows, skipped = [], 0
    for i, (_, build, outcome, _) in enumerate(several):
        shard = build(folder / f"one {i}") / "train-00000-of-00001.parquet"
        rows.append(pyarrow.parquet.read_table(shard).to_pylist()[1] | {"image_id": i})
        skipped += outcome == "skipped"
    good = [row(1000 + i, boxes=[GOOD] * 20) for i in range(10)]
    return write(folder / "all", [*rows, *good]), skipped


@pytest.mark.filterwarnings("ignore:image_id .* skipped")
def test_an_epoch_of_all_hostile_rows_trains(tmp_path, capsys):
    source, skipped = epoch_of_all(tmp_path)
    torch.manual_seed(0)
    dataset = stream(source, image_size=64, bbox_format=None)
    count = sum(1 for _ in stream(source, image_size=64))
    loader = DataLoader(dataset, 8, collate_fn=frcnn.frcnn_collate_fn)
    model = frcnn.tiny_faster_rcnn()
    history = frcnn.train(
        model, loader, count // 8 + 1
    )  # the last step begins the second epoch or ends the first
    assert all(np.isfinite(history[name]).all() for name in frcnn.LOSS_NAMES)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert dataset.skipped >= skipped > 50
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"{source}: left out so far: rows {dataset.skipped} (")
