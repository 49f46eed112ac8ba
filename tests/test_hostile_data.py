"""Hostile data: a sample is served as promised, or skipped by name and counted, or ends with one clear error."""

import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import SCHEMA, encoded, row, stream, write
from torch.utils.data import DataLoader

import frcnn_common as frcnn

EXAMPLES = 400  # of each property
NAN, INF = float("nan"), float("inf")
GOOD = [3.0, 4.0, 7.0, 8.0]  # as corner and size it would leave an image of 8 × 8
BAD = 4711  # image_id of the hostile row


# --- what is promised ------------------------------------------------------------------------------------------------


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
    """How it ended, what was said on the way, and the targets by ``image_id``; one pass, as a user makes it."""
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
    said = [str(warning.message) for warning in caught]
    assert dataset.skipped == len(said), (
        said
    )  # every row that is left out is named, and nothing else is said
    return "skipped" if said else "served", said, served


# --- rows ------------------------------------------------------------------------------------------------------------

# A builder writes the folder with both splits. The hostile row stands between two good ones, whose many boxes let the
# format of the boxes be decided.


def between_good_ones(hostile: dict) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        rows = [row(1, boxes=[GOOD] * 20), hostile, row(3, boxes=[GOOD] * 20)]
        write(folder, rows, split="train")
        return write(folder, rows, split="val")

    return build


def hostile_row(**changed) -> dict:
    """A row with one good box, then with the given columns and fields of ``objects`` instead of its own."""
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
    ("boxes: 10,000", boxes(*GRID), "served", [*GRID, GOOD]),
    ("boxes: 10,000 that are NaN", boxes(*[[NAN] * 4] * 10_000), "served", [GOOD]),
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


# --- columns ---------------------------------------------------------------------------------------------------------


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
            f"lacks the columns .*{name}",
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


# --- folders and streams ---------------------------------------------------------------------------------------------


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
    ("folder: without shards", empty, "error", r"holds no (train|val)-\*\.parquet"),
    *(
        (f"folder: shard cut at {tenth}/10", cut(tenth), "error", "00001-of-00002.parquet")
        for tenth in range(10)
    ),
    ("folder: shard garbled inside", garbled, "error", "cannot be read further"),
    ("folder: shard is text", text_as_shard, "error", "-0.parquet is no whole parquet file"),
    ("folder: shard is a folder", folder_as_shard, "error", "-0.parquet is no whole parquet file"),
    ("folder: shard without rows", whole(TABLE.slice(0, 0)), "error", "holds no rows"),
]

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
    dataset._stream = datasets.IterableDataset.from_generator(rows)
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


# --- rows and pictures of chance -------------------------------------------------------------------------------------

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
    """Three of four rows are well formed, with boxes of any numbers; one of four has one thing of any kind in it."""
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
    """Boxes and labels of a row by the sentences of the documentation, one box at a time; None: not to be used."""
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
def test_rows_of_chance_do_not_change_the_format_of_the_boxes(hostile):
    good = row(1, boxes=[GOOD] * 300)  # so many that five bad boxes a row are below one of ten
    assert frcnn.detect_bbox_format([*hostile, good]) == "xyxy"


# --- whole epochs ----------------------------------------------------------------------------------------------------


def epoch_of_all(folder: Path) -> tuple[Path, int]:
    """A folder with all hostile rows that fit the Hub's columns, and how many of them are to be skipped."""
    several = [
        h for h in [*PICTURES, *BOXES] if h[2] != "error" and not h[0].startswith("boxes: 10,000")
    ]
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


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Twelve rows in two shards of each split: two corrupt pictures, one bad category, and three boxes of no use."""
    rows = [row(i, boxes=[GOOD] * 20) for i in range(12)]
    for i in (2, 9):
        rows[i]["image"]["bytes"] = b"not a picture"
    rows[5]["objects"]["category"][0] = 80
    rows[7]["objects"]["bbox"][:2] = [[NAN] * 4, [4.0, 4, 4, 4]]
    rows[11]["objects"]["bbox"][3] = [5.0, 2, 1, 7]
    write(tmp_path / "mixed", rows[:6], rows[6:], split="train")
    return write(tmp_path / "mixed", rows[:6], rows[6:], split="val")


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (2, None), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_what_workers_leave_out_is_counted_too(workers, context, mixed):
    dataset = stream(mixed)
    loader = DataLoader(
        dataset,
        2,
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=frcnn.frcnn_collate_fn,
    )
    ids = sorted(target["image_id"] for _, targets in loader for target in targets)
    assert ids == [0, 1, 3, 4, 6, 7, 8, 10, 11]
    assert (dataset.skipped, dataset.dropped) == (3, 3)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_the_count_is_shown_at_the_end(mixed, tmp_path, capsys):
    line = f"--source {mixed} --checkpoint {tmp_path}/c.pt"
    told = f"{mixed}: left out so far: rows 3 (each named in a warning), boxes 3 (not finite or without area)"
    # Nine good rows: the third step of three reads to the end of the epoch.
    assert frcnn.main(f"train --model tiny --image-size 64 --batch 3 --steps 3 {line}".split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["steps"] == 3
    assert out[-2].startswith(f"{mixed}: left out so far: rows 3 (each named in a warning), boxes ")
    assert frcnn.main(f"evaluate {line}".split()) == 0
    *before, shown, result = capsys.readouterr().out.splitlines()
    assert (shown, json.loads(result)["AP"] >= 0) == (told, True)
    assert not any("left out" in text for text in before)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_rows_that_are_all_bad_end_training_and_evaluation_with_one_line(tmp_path, capsys):
    rows = [row(i, b"not a picture", boxes=[GOOD] * 20) for i in range(5)]
    source = write(tmp_path / "bad", rows, split="train")
    write(tmp_path / "bad", rows, split="val")
    frcnn.save_checkpoint(tmp_path / "c.pt", frcnn.tiny_faster_rcnn())
    for command, said in (
        ("train --model tiny --steps 2", "to train on"),
        ("evaluate", "to evaluate on"),
    ):
        assert frcnn.main(f"{command} --source {source} --checkpoint {tmp_path}/c.pt".split()) == 2
        (line,) = (
            text
            for text in re.split(r"[\r\n]+", capsys.readouterr().err)
            if text and "%|" not in text
        )
        assert line.startswith(f"frcnn_common: error: {source} gives not one image ")
        assert line.endswith(said)


def test_two_images_of_one_image_id_are_not_scored_as_one(tmp_path):
    source = write(
        tmp_path / "data", [row(i, boxes=[GOOD] * 20) for i in (1, 2, 1, 3)], split="val"
    )
    with pytest.raises(ValueError, match=r"1 images come more than once, such as image_id 1$"):
        frcnn.evaluate(frcnn.tiny_faster_rcnn(), stream(source, "val", 64))


@pytest.mark.parametrize("name", ["a*", "a?", "[a-z]*", "**", "my [data]", "{a,b}", "ä ö", "%20#"])
def test_a_folder_called_like_a_pattern_gives_its_own_rows(name, tmp_path):
    write(tmp_path / name, [row(1)])
    write(tmp_path / "ab", [row(2)])
    ended, _, served = read(lambda: stream(tmp_path / name))
    assert (ended, list(served)) == ("served", [1])
