"""Two sources of rows for `frcnn_common`: a folder of one's own pictures, and drawn scenes.

`frcnn_common.open_source` opens both, `frcnn_common.read_row` reads what they give. A row has the
columns of the Hub's COCO: ``image_id``, ``image``, ``width``, ``height`` and ``objects`` with
``category`` (from 0 on), ``bbox`` and ``area``; ``bbox`` holds corners.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools.coco import COCO

# --------------------------------------------------------------------------------------------------
# A folder of one's own
# --------------------------------------------------------------------------------------------------

# How others call the two parts, and where labelling tools put their annotations: those of one part,
# or (by hand, Roboflow, CVAT, Label Studio) of all pictures.
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
_OF_SPLIT = ("annotations/instances_{}*.json", "{}/annotations.json", "{}/_annotations.coco.json")
_OF_ALL = ("annotations", "_annotations.coco", "annotations/instances_default", "result")


def own_rows(folder: Path, split: str, val_share: float) -> tuple[list[dict], tuple, tuple]:
    """A folder of pictures with COCO's annotations, or with the Hub's ``metadata.jsonl``.

    COCO: a file for each split (`_OF_SPLIT`) or one for all (`_OF_ALL`); the pictures lie beside
    it, in the folder, in ``images/``, or in a folder named as the split. Without annotations for
    "val", ``val_share`` of the pictures is held out. Their ids alone decide which: the same ones on
    every machine and in every run.

    Returns
    -------
    rows : list of dict
        As above, with the path of a picture in place of its bytes, and ``objects.iscrowd``.
    names, ids : tuple
        Of the categories, by label; label 0 is the background.

    Raises
    ------
    ValueError, OSError
        Annotations that cannot be used; one line that names the file and the entry.
    """
    if not 0 <= val_share <= 1:
        raise ValueError(f"val_share must lie in 0..1, got {val_share}")
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - `resolve` would follow links
    parts = _coco_parts(folder) or _image_folder_parts(folder)
    opened = {part: _rows_of(coco, folder, file) for part, (coco, file) in parts.items()}
    (_, *classes), *others = opened.values()
    for _, *theirs in others:
        only_one = sorted({*zip(*theirs)} ^ {*zip(*classes)})
        if only_one:
            what = f"the categories of its annotation files differ, such as {only_one[0]}"
            raise ValueError(f"{folder}: {what}")
    if "val" in opened:
        rows = opened.get(split, ([],))[0]
    else:
        rows = next(iter(opened.values()))[0]
        rows.sort(key=lambda row: hashlib.sha256(b"%d" % row["image_id"]).digest())
        held_out = round(val_share * len(rows))
        rows = rows[:held_out] if split == "val" else rows[held_out:]
    if not rows:
        raise FileNotFoundError(f"{folder} holds no pictures for {split!r}")
    return rows, *classes


def _coco_parts(folder: Path) -> dict[str, tuple[COCO, Path]]:
    """COCO's annotations in a folder: for "train" and "val", or one file for "all"."""
    found = {}
    for split, names in SPLITS.items():
        patterns = [pattern.format(name) for name in names for pattern in _OF_SPLIT]
        found[split] = [file for p in patterns for file in sorted(folder.glob(p))]
    if not any(found.values()):
        files = [folder / f"{name}.json" for name in _OF_ALL]
        found = {"all": [file for file in files if file.is_file()]}
    return {part: (read_annotations(files[0]), files[0]) for part, files in found.items() if files}


def _image_folder_parts(folder: Path) -> dict[str, tuple[COCO, Path]]:
    """What `datasets` reads from ``metadata.jsonl`` (.csv, .parquet), as if COCO had written it."""
    origin = min(folder.rglob("metadata.*"), default=None)
    if origin is None:
        wanted = "no *.parquet, no COCO annotations such as annotations.json, no metadata.jsonl"
        raise FileNotFoundError(f"{folder} holds {wanted}")
    try:
        place = glob.escape(str(folder))  # a folder may be called "a*"
        splits = datasets.load_dataset("imagefolder", data_dir=place, streaming=True)
        encoded = datasets.Image(decode=False)
        rows = {name: list(rows.cast_column("image", encoded)) for name, rows in splits.items()}
        lines = list(itertools.chain(*rows.values()))
        if any("objects" not in line for line in lines):
            raise ValueError("no objects: it has to lie in the folder of the pictures themselves")
        for line in lines:
            columns = line["objects"] or {}  # null where nothing is to be seen
            # Both names are in use.
            columns["category"] = columns.pop("categories", None) or columns.get("category", [])
            line["objects"] = columns
        # A category is a number, or a name, which gets one.
        found = enumerate(sorted({c for line in lines for c in line["objects"]["category"]}))
        ids = {c: c if isinstance(c, int) else number for number, c in found}
        parts = {}
        for split, names in SPLITS.items():
            for name in [name for name in names if name in rows][:1]:
                parts[split] = _as_coco(rows[name], ids), origin
    except Exception as error:  # of whatever kind
        raise ValueError(f"{origin} cannot be used: {_reason(error)}") from error
    return parts


def _as_coco(rows: list[dict], ids: dict) -> COCO:
    images, records = [], []
    for number, row in enumerate(rows, 1):
        image = {"id": row.get("image_id", number), "file_name": row["image"]["path"]}
        images.append(image)
        for values in zip(*row["objects"].values(), strict=True):
            record = dict(zip(row["objects"], values, strict=True))
            record |= {"id": len(records), "image_id": image["id"]}
            records.append(record | {"category_id": ids[record["category"]]})
    kinds = [{"id": i, "name": category} for category, i in ids.items()]
    return indexed({"images": images, "annotations": records, "categories": kinds})


def _rows_of(coco: COCO, folder: Path, file: Path) -> tuple[list[dict], tuple, tuple]:
    """Rows of COCO's annotations, with names and ids of their categories."""
    rows, where = [], f"{file}"
    try:
        _check(coco)
        ids = sorted(coco.cats)
        names = [str(coco.cats[i]["name"]) for i in ids]
        for image in coco.dataset["images"]:
            where = f"{file}: image {image['id']}"
            objects = coco.imgToAnns[image["id"]]
            columns = {
                "category": [ids.index(a["category_id"]) for a in objects],
                "bbox": [_box(a) for a in objects],
                "area": [float(a.get("area") or 0) for a in objects],
                "iscrowd": [int(a.get("iscrowd") or 0) for a in objects],
            }
            row = {"image_id": image["id"], "objects": columns}
            row |= {side: image.get(side) and int(image[side]) for side in ("width", "height")}
            rows.append(row | {"image": _path_of(image["file_name"], folder, file)})
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {_reason(error)}") from error
    if rows and not any(Path(row["image"]).is_file() for row in rows):
        such_as = f"{len(rows)} pictures is there, such as {rows[0]['image']}"
        raise FileNotFoundError(f"{file}: not one of its {such_as}")
    return rows, ("__background__", *names), (0, *ids)


def _box(annotation: dict) -> list[float]:
    """Corner and size as they are written; NaN where there are none.

    One such box is no reason to refuse a folder: the data set leaves it out, and says so.
    """
    try:
        x, y, width, height = map(float, annotation["bbox"])
        return [x, y, width, height]
    except (LookupError, OverflowError, TypeError, ValueError):
        return [math.nan] * 4


def _check(coco: COCO) -> None:
    """Refuse what can only be a mistake in the whole file."""
    for name in ("images", "annotations", "categories"):
        numbers = [entry["id"] for entry in coco.dataset.get(name, [])]
        odd = doubled(numbers)
        odd += [i for i in numbers if not isinstance(i, int) or abs(i) >= 2**63]
        if odd:
            raise ValueError(f"ids of {name} are whole numbers, each its own; got {odd[0]!r}")
    twice = doubled([i["file_name"] for i in coco.dataset["images"] if "file_name" in i])
    if twice:
        raise ValueError(f"the file {twice[0]!r} belongs to two images")
    for a in coco.dataset.get("annotations", []):
        for name, known in (("image_id", coco.imgs), ("category_id", coco.cats)):
            if a.get(name) not in known:
                raise ValueError(f"annotation {a['id']} has the unknown {name} {a.get(name)!r}")


def _path_of(name: str, folder: Path, file: Path) -> str:
    """Where a picture lies: beside the annotations, or where labelling tools put it."""
    # Windows writes backslashes. Half a letter, of a name that is not UTF-8, is spelt out: no
    # picture is found, and the data set names the one that it leaves out.
    name = os.fspath(name).replace("\\", "/").encode(errors="backslashreplace").decode()
    part = file.stem.removeprefix("instances_")
    places = (file.parent, folder, folder / "images", folder / part, folder / "images" / part)
    paths = [Path(os.path.normpath(place / name)) for place in places]
    if not paths[0].is_relative_to(folder):
        raise ValueError(f"the picture {name!r} lies outside of the folder")
    inside = (path for path in paths if path.is_relative_to(folder) and path.is_file())
    return str(next(inside, paths[0]))


def read_annotations(path: str | Path, fill: bool = False) -> COCO:
    """COCO's annotation file, indexed by pycocotools; what is none is refused in one line.

    ``fill`` adds what pycocotools asks for, to evaluate, and tools leave out.
    """
    try:
        dataset = json.loads(Path(path).read_bytes())  # in any UTF, with a mark or without
        sound = isinstance(dataset, dict) and dataset.get("images") and dataset.get("categories")
        if not sound:
            raise ValueError("it holds no images or no categories")
        coco = indexed(dataset)
        for annotation in dataset.get("annotations", []) if fill else []:
            _, _, width, height = _box(annotation)
            area = width * height
            annotation["area"] = annotation.get("area") or (area if 0 < area < math.inf else 0)
            annotation["iscrowd"] = annotation.get("iscrowd") or 0
        return coco
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no COCO annotation file: {_reason(error)}") from error


def indexed(dataset: dict) -> COCO:
    """The same of a dictionary."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def doubled(values: Sequence) -> list:
    """Those that come more than once."""
    return [value for value, count in collections.Counter(values).items() if count > 1]


def _reason(error: Exception) -> str:
    """The same as `first_line`, in words where it is but the name of what is missing."""
    return ("an entry lacks " if isinstance(error, KeyError) else "") + first_line(error)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --------------------------------------------------------------------------------------------------
# The embedded scenes
# --------------------------------------------------------------------------------------------------

# Each symbol stands for the COCO category that it depicts.
GLYPHS = {
    "✈": "airplane", "☂": "umbrella", "✂": "scissors", "♞": "horse",
    "⌨": "keyboard", "☕": "cup", "🐱": "cat", "☎": "cell phone",
}  # fmt: skip
_CATEGORIES = dict(zip(GLYPHS.values(), (4, 25, 76, 17, 66, 41, 15, 67), strict=True))  # COCO's
GLYPH_SCENES = {"train": 20_000, "val": 1_000}  # scenes of one epoch
GLYPH_FIRST_SEED = {"train": 0, "val": 1_000_000_000}  # the two splits never share a seed


def render_glyph_scene(seed: int, size: int = 400) -> dict:
    """One row of the embedded data set: symbols on a coloured, noisy background.

    Parameters
    ----------
    seed : int
        Everything in the scene follows from it; it is the row's ``image_id`` as well.
    size : int
        Side of the square image, pixels.

    Returns
    -------
    dict
        The Hub's columns: ``image_id``, ``image`` (encoded bytes), ``width``, ``height`` and
        ``objects`` with ``bbox_id``, ``category`` 0..79, ``bbox`` (corners, tight around the ink)
        and ``area`` (inked pixels).
    """
    if size < 8:  # pixels: a symbol that is turned would stand out
        raise ValueError(f"a glyph scene has at least 8 pixels a side, got {size}")
    rng = np.random.default_rng(seed)
    most, noise = 5, 8
    canvas = _glyph_background(rng, size)
    masks = _glyph_masks()
    boxes, categories, areas = [], [], []
    for _ in range(rng.integers(1, most + 1)):
        category, mask = masks[rng.integers(len(masks))]
        mask, box = _place_glyph(rng, mask, size, boxes)
        if box is None:
            continue
        canvas.paste(_glyph_colour(rng, canvas.crop(box)), box, mask)
        boxes.append(box)
        categories.append(category)
        areas.append(float(np.count_nonzero(np.asarray(mask) >= 128)))

    grain = rng.integers(-noise, noise + 1, (size, size, 1), dtype=np.int16)
    pixels = np.asarray(canvas, dtype=np.int16) + grain
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    encoded = io.BytesIO()
    picture.save(encoded, "bmp")  # quick: uncompressed
    return {
        "image_id": seed,
        "image": {"bytes": encoded.getvalue(), "path": None},
        "width": size,
        "height": size,
        "objects": {
            "bbox_id": list(range(len(boxes))),
            "category": categories,
            "bbox": [[float(v) for v in box] for box in boxes],
            "area": areas,
        },
    }


def _glyph_background(rng: np.random.Generator, size: int) -> Image.Image:
    """A few soft patches of one muted colour of any brightness."""
    count, tint, spread = 3, 25.0, 22.0
    base = rng.uniform(40, 215) + rng.normal(0, tint, 3)
    patches = base + rng.normal(0, spread, (count, count, 3))  # [count, count, 3]
    image = Image.fromarray(patches.clip(0, 255).astype(np.uint8))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _glyph_colour(rng: np.random.Generator, behind: Image.Image) -> tuple[int, ...]:
    """A colour whose brightness is far enough from that of what lies behind."""
    contrast = 90.0
    luma = np.array([0.299, 0.587, 0.114])
    mean = np.asarray(behind.resize((1, 1), Image.Resampling.BOX))[0, 0]  # [3]
    colour = rng.uniform(0, 255, 3)
    while abs(luma @ colour - luma @ mean) < contrast:
        colour = rng.uniform(0, 255, 3)
    return tuple(int(c) for c in colour)


def _place_glyph(rng, mask, size, taken) -> tuple:
    """Scale and turn a mask, and a box for it that overlaps ``taken`` little, or None: no room."""
    shortest, longest, most_degrees, most_overlap, tries = 0.18, 0.45, 25.0, 0.1, 10
    scale = rng.uniform(shortest, longest) * size / max(mask.size)
    sides = [max(1, round(side * scale)) for side in mask.size]
    mask = mask.resize(sides, reducing_gap=2.0)
    degrees = rng.uniform(-most_degrees, most_degrees)
    mask = mask.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    inked = mask.point(lambda ink: 255 * (ink >= 128))
    mask = mask.crop(inked.getbbox())
    width, height = mask.size
    for _ in range(tries):
        x = int(rng.integers(0, size - width + 1))
        y = int(rng.integers(0, size - height + 1))
        box = (x, y, x + width, y + height)
        if max((_shared(box, other) for other in taken), default=0) <= most_overlap:
            return mask, box
    return mask, None


def _shared(a: tuple, b: tuple) -> float:
    """Shared area of two boxes as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b))
    return max(0, width) * max(0, height) / smaller


@functools.cache
def _glyph_masks(height: int = 256) -> tuple[tuple[int, Image.Image], ...]:
    """Category (0..79) and cropped ink of every glyph, from the font inside matplotlib."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), height)
    masks = []
    for glyph, name in GLYPHS.items():
        canvas = Image.new("L", (2 * height, 2 * height))
        ImageDraw.Draw(canvas).text((height // 2, height // 4), glyph, fill=255, font=font)
        # A margin of no ink: an edge on the border of a mask comes out jagged when it is turned.
        ink = ImageOps.expand(canvas.crop(canvas.getbbox()), border=height // 16)
        masks.append((_CATEGORIES[name], ink))
    return tuple(masks)
