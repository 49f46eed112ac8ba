"""Faster R-CNN with a feature pyramid, from scratch, in one file.

The file reads in the order in which data flows: constants, boxes, data, backbone, proposals, ROI head,
detector, training, evaluation, drawing, command line. The notebooks build the same parts by hand.

Conventions, everywhere in this file:

* a box is ``(x1, y1, x2, y2)`` in pixels of the network input, continuous coordinates, no "+1" in widths;
* label 0 is background, 1..80 are the COCO categories;
* in shapes, B is images, N and M boxes, K objects of one image, A anchors of one image, C channels or classes.

Papers: Fast R-CNN (Girshick, 2015), Faster R-CNN (Ren et al., 2015), FPN (Lin et al., 2017), ResNet (He et al., 2016),
Mask R-CNN (He et al., 2017; for ROIAlign).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import glob
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import filelock
import matplotlib
import matplotlib.axes
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import matplotlib.patheffects
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
import pyarrow
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets.distributed import split_dataset_by_node
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.models import ResNet50_Weights, WeightsEnum
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# 1. Constants
# ---------------------------------------------------------------------------------------------------------------------

IMG_SIZE = 400  # side of the square network input, pixels
NUM_CLASSES = 81  # background and the 80 COCO categories
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TINY_IMAGE_SIZE = 128  # input of the laptop configuration, pixels
TINY_BATCH = 8
TINY_STEPS = 380

# Statistics of ImageNet's RGB channels on the 0..1 scale: what published backbones were trained with.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # [3, 1, 1]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # [3, 1, 1]

COCO_NAMES = (
    "__background__", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep",
    "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

# COCO numbered 91 categories and published 80 of them; these ids were never used.
_COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS = tuple(i for i in range(91) if i not in _COCO_UNUSED_IDS)  # label -> official id

MAX_PIXELS = 89_478_485  # of a picture: larger ones are refused before they fill the memory; where Pillow only warns
warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)

HUB_SOURCE = "detection-datasets/coco"
NETWORK_TIMEOUT = 5.0  # seconds until a server counts as out of reach
RETRY_DELAYS = (1, 2, 4, 8, 16)  # seconds between tries to go on with a stream that broke off

# Each symbol of the embedded scenes stands for the COCO category that it depicts.
GLYPHS = {
    "✈": "airplane",
    "☂": "umbrella",
    "✂": "scissors",
    "♞": "horse",
    "⌨": "keyboard",
    "☕": "cup",
    "🐱": "cat",
    "☎": "cell phone",
}
GLYPH_SCENES = {"train": 20_000, "val": 1_000}  # scenes of one epoch
GLYPH_FIRST_SEED = {"train": 0, "val": 1_000_000_000}  # the two splits never share a seed

ROOT = Path(__file__).resolve().parent
FIGURES = Path(os.environ.get("FRCNN_FIGURES", ROOT / "figures"))
CHECKPOINTS = Path(os.environ.get("FRCNN_CHECKPOINTS", ROOT / "checkpoints"))


def process_rank() -> tuple[int, int]:
    """Number of this process among those that train together, and how many they are: ``(0, 1)`` where it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on each of them."""
    x = x.contiguous().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def say(text: str) -> None:
    """Print once, however many processes there are."""
    if process_rank()[0] == 0:
        print(text)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Boxes
# ---------------------------------------------------------------------------------------------------------------------


def box_area(boxes: Tensor) -> Tensor:
    """Areas ``[...]`` in square pixels of boxes ``[..., 4]``."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Shared areas ``[N, M]`` of boxes ``[N, 4]`` and ``[M, 4]``."""
    ax1, ay1, ax2, ay2 = boxes_a[:, None].unbind(-1)  # 4 × [N, 1]
    bx1, by1, bx2, by2 = boxes_b.unbind(-1)  # 4 × [M]
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)  # [N, M]
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)  # [N, M]
    return width.mul_(height)


def box_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Intersection over union of every box of one set with every box of another.

    Parameters
    ----------
    boxes_a, boxes_b : Tensor ``[N, 4]``, ``[M, 4]``
        Corners in the same pixels. Half precision is computed in float32: an area of 256 × 256 overflows float16.

    Returns
    -------
    Tensor ``[N, M]``
        Values in 0..1. A pair without any area gives 0, never NaN.
    """
    boxes_a, boxes_b = boxes_a.float(), boxes_b.float()
    shared = _intersection(boxes_a, boxes_b)  # [N, M]
    union = box_area(boxes_a)[:, None] + box_area(boxes_b) - shared  # [N, M]
    return torch.where(union > 0, shared / union, 0.0)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Move the corners of boxes ``[..., 4]`` into images of ``sizes`` ``[..., 2]`` (height, width; broadcast)."""
    height, width = sizes.to(boxes).unbind(-1)
    limit = torch.stack((width, height, width, height), dim=-1)  # [..., 4]
    return torch.minimum(boxes.clamp(min=0), limit)


def encode_boxes(
    proposals: Tensor, gt_boxes: Tensor, weights: Sequence[float] = (1, 1, 1, 1)
) -> Tensor:
    """Regression targets that turn a proposal into its ground-truth box (R-CNN, appendix C).

    Parameters
    ----------
    proposals, gt_boxes : Tensor ``[N, 4]``
        Pairs of boxes in pixels, width and height above 0.
    weights : four numbers
        Factors on ``(tx, ty, tw, th)``: they bring the targets near unit variance.

    Returns
    -------
    Tensor ``[N, 4]``
        ``(tx, ty, tw, th)``: centre shift in units of the proposal's size, log of the size ratio.
    """
    proposals, gt_boxes = proposals.float(), gt_boxes.float()
    size = proposals[..., 2:] - proposals[..., :2]  # [N, 2] width, height
    gt_size = gt_boxes[..., 2:] - gt_boxes[..., :2]  # [N, 2]
    centre, gt_centre = proposals[..., :2] + size / 2, gt_boxes[..., :2] + gt_size / 2  # [N, 2]
    deltas = torch.cat(((gt_centre - centre) / size, torch.log(gt_size / size)), dim=-1)  # [N, 4]
    return deltas * deltas.new_tensor(weights)


def decode_boxes(
    anchors: Tensor,
    deltas: Tensor,
    weights: Sequence[float] = (1, 1, 1, 1),
    max_log_scale: float = 4.0,
) -> Tensor:
    """Apply regression outputs to boxes: the inverse of `encode_boxes`, always in float32.

    Parameters
    ----------
    anchors, deltas : Tensor ``[..., 4]``
        Boxes in pixels and ``(tx, ty, tw, th)`` for each; leading dimensions broadcast.
    weights : four numbers
        The factors that `encode_boxes` was given.
    max_log_scale : float
        ``tw`` and ``th`` are clamped from above only: a wild output must not overflow ``exp``, a small box may shrink.

    Returns
    -------
    Tensor ``[..., 4]``
        Boxes in pixels, not clipped to the image.
    """
    anchors = anchors.float()
    deltas = deltas.float() / torch.tensor(weights, dtype=torch.float32, device=deltas.device)
    size = anchors[..., 2:] - anchors[..., :2]  # [..., 2]
    centre = anchors[..., :2] + size / 2 + deltas[..., :2] * size  # [..., 2]
    half = size * torch.exp(deltas[..., 2:].clamp(max=max_log_scale)) / 2  # [..., 2]
    return torch.cat((centre - half, centre + half), dim=-1)  # [..., 4]


_NMS_BLOCK, _NMS_RIVALS = (
    256,
    512,
)  # boxes settled together; kept ones met at a time: what fits into the cache


def _float32_below(threshold: float) -> float:
    """The largest float32 that is not above ``threshold``, so that ``iou > it`` decides as exact arithmetic does."""
    rounded = np.float32(threshold)
    return float(
        rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf))
    )


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression in which a box suppresses only boxes of its own group. Exact, pure PyTorch.

    Boxes are sorted by group, then score, and settled block by block. A block meets only boxes that were already
    kept, so no N × N matrix is built. Inside a block, "kept" means "not suppressed by a kept box before me"; that
    sentence is applied until nothing changes, which gives the same answer as going box by box.

    Parameters
    ----------
    boxes : Tensor ``[N, 4]``
        Pixels.
    scores, groups : Tensor ``[N]``
        Any float; any integers ≥ 0 (a pyramid level, a class, an image).
    iou_threshold : float
        A box goes when its IoU with a better box of its group is above this.

    Returns
    -------
    Tensor int64 ``[D]``
        Indices of the kept boxes, highest score first; equal scores keep their input order.
    """
    threshold = _float32_below(iou_threshold)
    by_score = scores.argsort(descending=True, stable=True)  # [N]
    order = by_score[groups[by_score].argsort(stable=True)]  # [N] by group, then score
    boxes, groups = boxes.float()[order], groups[order]  # [N, 4], [N]
    number = torch.cat(
        (groups[:1] * 0, (groups[1:] != groups[:-1]).cumsum(0))
    )  # [N] 0, 1, 2, …: exact as a float
    rows = torch.stack(
        (*boxes.unbind(1), box_area(boxes), number.float())
    )  # [6, N] x1, y1, x2, y2, area, group
    several = bool(len(order)) and bool(number[-1] > 0)

    def suppresses(winners: Tensor, losers: Tensor) -> Tensor:  # [6, P], [6, Q] -> [P, Q]
        winners, losers = winners[:, :, None], losers[:, None]  # [6, P, 1], [6, 1, Q]
        sides = (
            torch.minimum(winners[2:4], losers[2:4])
            .sub_(torch.maximum(winners[:2], losers[:2]))
            .clamp_(min=0)
        )
        shared = sides[0].mul_(sides[1])  # [P, Q]
        over = shared / (winners[4] + losers[4] - shared) > threshold  # 0/0 is NaN: not above
        return over & (winners[5] == losers[5]) if several else over

    kept, positions = rows[:, :0], [order[:0]]
    for start in range(0, len(order), _NMS_BLOCK):
        block = rows[:, start : start + _NMS_BLOCK]  # [6, Q]
        position = torch.arange(start, start + block.shape[1], device=order.device)  # [Q]
        # Sorted by group: of all boxes kept so far only those of the block's first group can matter.
        rivals = kept[:, kept[5] == block[5, 0]] if several else kept  # [6, P]
        for winners in rivals.split(_NMS_RIVALS, dim=1):
            free = ~suppresses(winners, block).any(0)  # [Q]
            block, position = block[:, free], position[free]  # Q shrinks
        over = suppresses(block, block).triu(diagonal=1)  # [Q, Q] over[i, j]: i would suppress j
        alive = ~over.any(0)  # [Q] a first guess: nobody here suppresses me
        while True:
            settled = ~(over & alive[:, None]).any(0)  # [Q]
            if torch.equal(settled, alive):
                break
            alive = settled
        kept = torch.cat((kept, block[:, alive]), dim=1)
        positions.append(position[alive])

    is_kept = torch.zeros_like(order, dtype=torch.bool)
    is_kept[order[torch.cat(positions)]] = True
    return by_score[is_kept[by_score]]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: indices ``[D]`` of the kept boxes, highest score first (see `batched_nms`)."""
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Data
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _glyph_masks(height: int = 256) -> tuple[tuple[int, PIL.Image.Image], ...]:
    """Category (0..79) and cropped ink mask of every glyph, from the font that ships inside matplotlib."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = PIL.ImageFont.truetype(str(path), height)
    masks = []
    for glyph, name in GLYPHS.items():
        canvas = PIL.Image.new("L", (2 * height, 2 * height))
        PIL.ImageDraw.Draw(canvas).text((height // 2, height // 4), glyph, fill=255, font=font)
        # A margin of no ink: an edge that lies on the border of a mask comes out jagged when the mask is turned.
        ink = PIL.ImageOps.expand(canvas.crop(canvas.getbbox()), border=height // 16)
        masks.append((COCO_NAMES.index(name) - 1, ink))
    return tuple(masks)


def _place_glyph(
    rng: np.random.Generator, mask: PIL.Image.Image, size: int, taken: list
) -> tuple | None:
    """Scale, turn and place one mask where it overlaps ``taken`` boxes little: (mask, box), or None: no room."""
    shortest, longest, most_degrees, most_overlap, tries = 0.18, 0.45, 25.0, 0.1, 10
    scale = rng.uniform(shortest, longest) * size / max(mask.size)
    mask = mask.resize(
        (max(1, round(mask.width * scale)), max(1, round(mask.height * scale))), reducing_gap=2.0
    )
    mask = mask.rotate(
        rng.uniform(-most_degrees, most_degrees), PIL.Image.Resampling.BICUBIC, expand=True
    )
    mask = mask.crop(
        mask.point(lambda ink: 255 * (ink >= 128)).getbbox()
    )  # tight around what is at least half inked
    width, height = mask.size
    for _ in range(tries):
        x, y = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
        shared = [
            max(0, min(x + width, x2) - max(x, x1))
            * max(0, min(y + height, y2) - max(y, y1))
            / min(width * height, (x2 - x1) * (y2 - y1))
            for x1, y1, x2, y2 in taken
        ]
        if max(shared, default=0) <= most_overlap:
            return mask, (x, y, x + width, y + height)
    return None


def render_glyph_scene(seed: int, size: int = IMG_SIZE) -> dict:
    """One row of the embedded data set: symbols on a coloured, noisy background. The same seed gives the same scene.

    Parameters
    ----------
    seed : int
        Everything in the scene follows from it; it is the row's ``image_id`` as well.
    size : int
        Side of the square image, pixels.

    Returns
    -------
    dict
        The Hub's columns: ``image_id``, ``image`` (encoded bytes), ``width``, ``height`` and ``objects`` with
        ``bbox_id``, ``category`` 0..79, ``bbox`` (corners, tight around the ink) and ``area`` (inked pixels).
    """
    rng = np.random.default_rng(seed)
    most_objects, patches, tint, spread, noise, contrast = 5, 3, 25.0, 22.0, 8, 90.0
    luma = np.array([0.299, 0.587, 0.114])
    base = rng.uniform(40, 215) + rng.normal(0, tint, 3)  # [3] a muted colour of any brightness
    coarse = np.clip(base + rng.normal(0, spread, (patches, patches, 3)), 0, 255).astype(
        np.uint8
    )  # [p, p, 3]
    canvas = PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC)

    masks, boxes, objects = (
        _glyph_masks(),
        [],
        {"bbox_id": [], "category": [], "bbox": [], "area": []},
    )
    for _ in range(rng.integers(1, most_objects + 1)):
        category, mask = masks[rng.integers(len(masks))]
        placed = _place_glyph(rng, mask, size, boxes)
        if placed is None:
            continue
        mask, box = placed
        behind = luma @ np.asarray(canvas.crop(box).resize((1, 1), PIL.Image.Resampling.BOX))[0, 0]
        colour = rng.uniform(0, 255, 3)
        while abs(luma @ colour - behind) < contrast:
            colour = rng.uniform(0, 255, 3)
        canvas.paste(tuple(int(c) for c in colour), box, mask)
        objects["bbox_id"].append(len(boxes))
        objects["category"].append(category)
        objects["bbox"].append([float(v) for v in box])
        objects["area"].append(float(np.count_nonzero(np.asarray(mask) >= 128)))
        boxes.append(box)

    pixels = np.asarray(canvas, dtype=np.int16) + rng.integers(
        -noise, noise + 1, (size, size, 1), dtype=np.int16
    )
    encoded = io.BytesIO()  # BMP: uncompressed, the fastest way through the stream
    PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(encoded, "bmp")
    image = {"bytes": encoded.getvalue(), "path": None}
    return {"image_id": seed, "image": image, "width": size, "height": size, "objects": objects}


def _glyph_rows(shards: list[tuple[int, int, int]], size: int) -> Iterator[dict]:
    """Scenes of the shards ``(first seed, end, step)``."""
    for shard in shards:
        yield from (render_glyph_scene(seed, size) for seed in range(*shard))


_COLUMNS = ("image_id", "image", "width", "height", "objects")
_OBJECT_FIELDS = ("category", "bbox", "area")  # those that are read
_ROWS_AT_ONCE = 16  # taken from a stream together: one at a time costs four times as much


def _rows_of(columns: dict[str, list]) -> list[dict]:
    """Columns of some rows, as a stream gives them, as that many rows."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _to_corners(boxes: np.ndarray, bbox_format: str) -> np.ndarray:
    """Boxes ``[K, 4]`` as corners, whichever way the source wrote them ("xyxy" or "xywh")."""
    return (
        boxes
        if bbox_format == "xyxy"
        else np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    )


def _boxes_and(row: dict, *fields: str) -> list[np.ndarray]:
    """The boxes ``[K, 4]`` of a row's objects, as they are written, and further fields ``[K]``, all as numbers.

    Raises
    ------
    ValueError
        Where they are no numbers, or not as many of each.
    """
    try:
        boxes, *others = (
            np.array(row["objects"][field], dtype=np.float64) for field in ("bbox", *fields)
        )
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"objects must hold numbers in {('bbox', *fields)}: {_first_line(error)}"
        ) from error
    boxes = boxes.reshape(0, 4) if boxes.shape == (0,) else boxes
    shapes, count = [list(values.shape) for values in (boxes, *others)], list(boxes.shape[:1])
    if shapes != [[*count, 4]] + [count] * len(others):
        raise ValueError(
            f"objects must hold K times 4 numbers in bbox and K in {fields}, got the shapes {shapes}"
        )
    return [boxes, *others]


def detect_bbox_format(rows: Sequence[dict]) -> str:
    """Decide from the data whether ``objects.bbox`` holds corners ("xyxy") or corner and size ("xywh").

    Corners never have x2 < x1 or y2 < y1, no reading leaves the image, and ``area`` never exceeds the box. The reading
    that breaks these rules least is taken, and it may break them for one box of ten: data sets have bad boxes. Rows
    that cannot be read are left to the stream, which names and skips them.

    Raises
    ------
    ValueError
        Where neither reading fits.
    """
    tolerated, slack = 0.1, 1.0  # share of boxes; pixels that an annotation may leave the image by
    broken = {"xyxy": 0, "xywh": 0}
    count = 0
    for row in rows:
        with contextlib.suppress(OverflowError, TypeError, ValueError), np.errstate(all="ignore"):
            raw, area = _boxes_and(row, "area")  # [K, 4], [K]
            size = np.array([row["width"], row["height"]], dtype=np.float64)
            count += len(raw)
            for name in broken:
                corners = _to_corners(raw, name)
                wrong = (corners[:, 2:] < corners[:, :2]).any(1) | (
                    corners[:, 2:] > size + slack
                ).any(1)  # [K]
                broken[name] += int((wrong | (area > box_area(corners) + slack)).sum())
    best = min(broken, key=broken.get)  # corners where both fit, as on the Hub
    if broken[best] > tolerated * count:
        raise ValueError(
            f"objects.bbox is neither corners nor corner and size: of {count} boxes {broken['xyxy']} contradict"
            f" (x1, y1, x2, y2) and {broken['xywh']} contradict (x, y, width, height); choose with bbox_format"
        )
    return best


def decode_image(encoded: bytes, size: tuple[int, int] | None = None) -> PIL.Image.Image:
    """An RGB picture from JPEG, PNG, … bytes of any mode, turned as its boxes expect it.

    Parameters
    ----------
    encoded : bytes
        The file's content.
    size : (width, height), optional
        What the annotation says. A camera may store a picture lying on its side with a note (EXIF) to turn it;
        the boxes were drawn on the one whose size the annotation gives. None: turned as the note says.

    Raises
    ------
    ValueError, OSError
        Where the bytes are no picture, a program (EPS), one of another size or of more than `MAX_PIXELS`.
    """
    try:
        image = PIL.Image.open(io.BytesIO(encoded))
    except PIL.UnidentifiedImageError:  # its own message holds an address in memory and no more
        raise ValueError("not an image in any format that Pillow knows") from None
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if image.format == "EPS":  # a program: Pillow would let Ghostscript run it
        raise ValueError("an EPS file is a program and not an image")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"an image of {image.width} × {image.height} pixels is too large: at most {MAX_PIXELS:,}"
        )
    if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        upright = PIL.ImageOps.exif_transpose(image)
        image = upright if size in (None, upright.size) else image
    if size not in (None, image.size):
        width, height = size
        raise ValueError(
            f"the image has {image.width} × {image.height} pixels, its row says {width!r} × {height!r}"
        )
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip, not scale
        image = PIL.Image.fromarray(
            (np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        )
    image.load()  # a torn file fails here
    image.info.pop("transparency", None)  # colours alone count; Pillow would warn of some palettes
    return image if image.mode == "RGB" else image.convert("RGB")


def image_to_tensor(image: PIL.Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """An RGB picture as float32 ``[3, H, W]``, normalised with ImageNet's mean and standard deviation.

    With ``size`` (height, width) it is resized first, as Pillow's bilinear filter does it, in a quarter of the time.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]
    if size not in (None, tuple(pixels.shape[1:])):
        pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[
            0
        ]  # [3, H', W']
    return pixels.float().mul_(1 / (255 * IMAGENET_STD)).sub_(IMAGENET_MEAN / IMAGENET_STD)


def prepare_image(
    image: PIL.Image.Image, image_size: int | tuple[int, int], multiple: int = 32
) -> tuple[Tensor, tuple[int, int]]:
    """An RGB picture as normalised network input ``[3, H, W]``, and its size (height, width) without padding.

    Parameters
    ----------
    image : PIL image
        RGB.
    image_size : int, or (shortest, longest)
        A number: a square of that side, as the lessons use it. A pair: the aspect is kept, the short side becomes
        ``shortest`` unless the long one would exceed ``longest``; resized as the published weights expect it,
        bilinear without antialiasing, sizes rounded down.
    multiple : int
        What keeps its aspect is padded, right and below, to a multiple of this: the coarsest stride of the backbone.
    """
    if isinstance(image_size, int):
        square = (image_size, image_size)
        return image_to_tensor(image, square), square
    scale = min(image_size[0] / min(image.size), image_size[1] / max(image.size))
    height, width = (max(1, math.floor(side * scale)) for side in (image.height, image.width))
    pixels = image_to_tensor(image)[None]  # [1, 3, H, W]
    pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)[
        0
    ]  # [3, H', W']
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple)), (
        height,
        width,
    )  # 0 is ImageNet's mean


def _answers(ask: Callable[[], object], seconds: float = NETWORK_TIMEOUT) -> bool:
    """Whether a call succeeds within so many seconds; a look-up of a host's name ignores every time-out of its own."""
    answered = threading.Event()

    def call() -> None:
        with contextlib.suppress(Exception):  # any failure means the same: no network today
            ask()
            answered.set()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _hub_answers() -> bool:
    """Whether the Hub tells about its COCO; the library alone would retry for 24 seconds, noisily."""
    if datasets.config.HF_HUB_OFFLINE:
        return False
    import huggingface_hub

    return _answers(
        lambda: huggingface_hub.HfApi().dataset_info(HUB_SOURCE, timeout=NETWORK_TIMEOUT)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _open_folder(folder: Path, split: str) -> datasets.IterableDataset:
    """Stream ``split-*.parquet`` of a folder, after a look at the end of every shard: a torn one is named here."""
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{folder} holds no {split}-*.parquet")
    for shard in shards:
        try:
            metadata = pyarrow.parquet.read_metadata(shard)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{shard} is no whole parquet file: {_first_line(error)}") from error
        if not metadata.num_rows:  # `datasets` stops at it
            raise ValueError(f"{shard} holds no rows")
        schema = metadata.schema.to_arrow_schema()
        objects = dict(zip(schema.names, schema.types)).get("objects")
        fields = (
            [field.name for field in objects] if isinstance(objects, pyarrow.StructType) else []
        )
        missing = [name for name in _COLUMNS if name not in schema.names]
        missing += [
            f"objects.{name}"
            for name in _OBJECT_FIELDS
            if objects is not None and name not in fields
        ]
        if missing:
            raise ValueError(f"{shard} lacks the columns {missing}; it has {schema.names}")
    files = [glob.escape(str(shard.absolute())) for shard in shards]  # a folder may be called "a*"
    return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True)


class COCOStreamDataset(IterableDataset):
    """Stream of ``(image, target)`` from the Hub's COCO, a folder of parquet shards, or the embedded glyph scenes.

    Parameters
    ----------
    split : {"train", "val"}
        "validation" is taken as "val". Images without one valid box are skipped in "train" and kept in "val".
    max_samples : int, optional
        Use only the first so many rows, counted over all workers and ranks together.
    source : str, optional
        "detection-datasets/coco" (the Hub), a folder, or "glyphs". None: ``$FRCNN_DATA``, else the Hub, else, where
        it does not answer, the glyph scenes, said in one line.
    image_size : int, or (shortest, longest)
        Side of a square output, or sides of one that keeps its aspect, pixels: see `prepare_image`.
    shuffle_buffer : int
        Rows in the stream's shuffle buffer; 0 keeps the order.
    seed : int
        Of shuffle and flips. `set_epoch` changes both from epoch to epoch.
    flip : float
        Share of the images that are mirrored left to right, 0..1.
    bbox_format : {"xyxy", "xywh"}, optional
        How ``objects.bbox`` is meant. None: decided from the first rows and printed.

    Yields
    ------
    image : Tensor float32 ``[3, H, W]``
        ImageNet-normalised.
    target : dict
        ``boxes`` float32 ``[K, 4]`` in pixels of the output, ``labels`` int64 ``[K]`` in 1..80,
        ``area`` float32 ``[K]`` in square pixels of the original (COCO's, of the segmentation),
        ``image_id`` int, ``size`` and ``orig_size`` (height, width) of output and original,
        ``position`` (worker, rows that it has read of this epoch): where to resume.
    """

    def __init__(
        self,
        split: str = "train",
        max_samples: int | None = None,
        source: str | None = None,
        image_size: int | tuple[int, int] = IMG_SIZE,
        shuffle_buffer: int = 0,
        seed: int = 0,
        flip: float = 0.0,
        bbox_format: str | None = None,
    ) -> None:
        super().__init__()
        split = {"validation": "val"}.get(split, split)
        if split not in GLYPH_SCENES:
            raise ValueError(f"split is {split!r}; there are 'train' and 'val'")
        if np.min(image_size) < 1 or (max_samples is not None and max_samples < 1):
            raise ValueError(
                f"max_samples and image_size must be at least 1, got {max_samples} and {image_size}"
            )
        self.split, self.max_samples, self.image_size = split, max_samples, image_size
        self.shuffle_buffer, self.seed, self.flip, self.epoch = shuffle_buffer, seed, flip, 0
        most_workers = 256  # each counts into its own cell of memory that all of them share
        self._skipped, self._dropped = (
            multiprocessing.RawArray("q", most_workers) for _ in range(2)
        )
        self.rank, self.world = process_rank()
        self._resume: dict = {}
        self.source = str(source or os.environ.get("FRCNN_DATA") or self._hub_or_glyphs())
        self._stream = None if self.source == "glyphs" else self._open()
        if bbox_format is None and self._stream is not None:
            sample = 64  # rows that the decision is based on
            bbox_format = detect_bbox_format(list(self._steady(lambda: self._stream.take(sample))))
            say(f"{self.source}: objects.bbox is {bbox_format}, decided from the first rows")
        self.bbox_format = bbox_format or "xyxy"

    @staticmethod
    def _hub_or_glyphs() -> str:
        if _hub_answers():
            return HUB_SOURCE
        say(
            f"The Hugging Face Hub does not answer: using the embedded glyph scenes instead of {HUB_SOURCE}."
        )
        return "glyphs"

    def _open(self) -> datasets.IterableDataset:
        if self.source == HUB_SOURCE:
            stream = datasets.load_dataset(HUB_SOURCE, split=self.split, streaming=True)
        elif Path(self.source).is_dir():
            stream = _open_folder(Path(self.source), self.split)
        else:
            raise ValueError(
                f"unknown source {self.source!r}: neither 'glyphs', '{HUB_SOURCE}' nor a folder"
            )
        return stream.cast_column(
            "image", datasets.Image(decode=False)
        )  # decoded here, and only what is used

    @property
    def skipped(self) -> int:
        """Rows that could not be used, so far, in this process and its workers."""
        return sum(self._skipped)

    @property
    def dropped(self) -> int:
        """Boxes that were left out, not finite or without area, so far, in this process and its workers."""
        return sum(self._dropped)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass. Epochs count from 0; call it before making the iterator."""
        self.epoch = epoch

    def resume(self, state: dict) -> None:
        """Continue inside an epoch behind the samples that were used: ``{"epoch", "rows": {worker: rows}, "last"}``.

        ``last`` is the worker of the last batch. A `DataLoader` starts with worker 0, so on this one epoch worker 0
        takes the part of the worker that was next. Rows before the position are read again and thrown away, without
        decoding them: so the shuffle buffer is what it was, and no sample is lost or doubled.
        """
        self.epoch, self._resume = state["epoch"], state

    def _steady(self, open_rows: Callable[[], Iterator[dict]]) -> Iterator[dict]:
        """Rows of a stream, taken up again where it broke off. A damaged file is no better at the second try."""
        delays, given = RETRY_DELAYS if self.source == HUB_SOURCE else (), 0
        waits = iter(delays)
        while True:
            try:
                for row in itertools.islice(open_rows(), given, None):
                    given, waits = given + 1, iter(delays)
                    yield row
                return
            except Exception as error:
                wait = next(waits, None)
                if wait is None:
                    raise ValueError(
                        f"{self.source} cannot be read further: {_first_line(error)}"
                    ) from error
                warnings.warn(
                    f"{self.source} broke off ({_first_line(error)}); next try in {wait} s",
                    stacklevel=2,
                )
                time.sleep(wait)

    def _rows(self, reader: int, readers: int) -> Iterator[dict]:
        """This reader's share of the epoch's rows: each row goes to exactly one reader."""
        if self.source == "glyphs":
            first, count = (
                GLYPH_FIRST_SEED[self.split],
                min(self.max_samples or math.inf, GLYPH_SCENES[self.split]),
            )
            shards = [(first + i, first + count, readers) for i in range(readers)]
            stream = datasets.IterableDataset.from_generator(
                _glyph_rows, gen_kwargs={"shards": shards, "size": int(np.min(self.image_size))}
            )
        else:
            stream = (
                self._stream if self.max_samples is None else self._stream.take(self.max_samples)
            )
        if self.shuffle_buffer:
            # One input shard at a time: reading several starts threads, and `datasets` waits 5 s for them to end.
            stream = stream.shuffle(
                seed=self.seed, buffer_size=self.shuffle_buffer, max_buffer_input_shards=1
            )
        # Whole shards for each reader where they divide evenly; else all read the same stream and take turns.
        by_shard = self.source == "glyphs" or (
            self.max_samples is None and stream.num_shards % readers == 0
        )
        stream = split_dataset_by_node(
            stream, reader, readers, strategy="shards" if by_shard else "examples"
        )
        if self.shuffle_buffer:
            stream.set_epoch(
                self.epoch
            )  # last: every method above returns a stream that is at epoch 0 again
        # `iter(batch)` and not `__iter__`: inside a DataLoader worker the latter would divide the shards once more.
        yield from self._steady(
            lambda: (row for batch in stream.iter(_ROWS_AT_ONCE) for row in _rows_of(batch))
        )

    def __iter__(self) -> Iterator[tuple[Tensor, dict]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        done = 0
        if self._resume and self._resume["epoch"] == self.epoch:
            worker = (worker + self._resume["last"] + 1) % workers
            done = self._resume["rows"].get(worker, 0)
        # In this order n processes take together, step by step, what one process takes with n times the batch.
        rows = self._rows(self.rank * workers + worker, self.world * workers)
        for count, row in enumerate(rows, start=1):
            if count <= done:
                continue
            try:
                image, target = self._sample(row)
            except (
                Exception
            ) as error:  # of whatever kind: decoders raise SyntaxError, struct.error and more
                self._skipped[worker % len(self._skipped)] += 1
                warnings.warn(
                    f"image_id {row.get('image_id')} skipped: {_first_line(error)}", stacklevel=2
                )
                continue
            self._dropped[worker % len(self._dropped)] += len(row["objects"]["bbox"]) - len(
                target["boxes"]
            )
            if self.split == "train" and not len(target["boxes"]):
                continue
            yield image, target | {"position": (worker, count)}

    def _sample(self, row: dict) -> tuple[Tensor, dict]:
        size = (row["width"], row["height"])
        if not (row["image"] and row["image"]["bytes"]):
            raise ValueError("its row holds no bytes of an image")
        image = decode_image(row["image"]["bytes"], size)
        raw, category, area = _boxes_and(row, "category", "area")  # [K, 4], [K], [K]
        bad = category[
            ~((category >= 0) & (category < NUM_CLASSES - 1) & (category == np.floor(category)))
        ]
        if len(bad):
            raise ValueError(
                f"categories must lie in 0..{NUM_CLASSES - 2}, got {', '.join(f'{c:g}' for c in bad[:5])}"
            )
        if not ((area >= 0) & (area <= np.finfo(np.float32).max)).all():
            raise ValueError("objects.area must be finite and not below 0")
        labels, area = (
            category.astype(np.int64) + 1,
            area.astype(np.float32),
        )  # 0 becomes background
        with np.errstate(over="ignore", invalid="ignore"):
            boxes = _to_corners(raw, self.bbox_format).clip(0, size * 2)
        image_id = int(row["image_id"])
        if isinstance(row["image_id"], float) and image_id != row["image_id"]:
            raise ValueError("image_id must be a whole number")
        if np.random.default_rng((self.seed, self.epoch, abs(image_id))).random() < self.flip:
            image = PIL.ImageOps.mirror(image)
            boxes[:, [0, 2]] = (
                size[0] - boxes[:, [2, 0]]
            )  # continuous coordinates: x' = W - x, no "- 1"
        pixels, (height, width) = prepare_image(image, self.image_size)  # [3, H, W]
        boxes = (boxes * np.array([width, height] * 2) / np.array(size * 2)).astype(np.float32)
        valid = (boxes[:, 2:] > boxes[:, :2]).all(1) & np.isfinite(raw).all(
            1
        )  # [K] no height, no width: log(0)
        return pixels, {
            "boxes": torch.from_numpy(boxes[valid]),
            "labels": torch.from_numpy(labels[valid]),
            "area": torch.from_numpy(area[valid]),
            "image_id": image_id,
            "size": (height, width),
            "orig_size": (image.height, image.width),
        }


def frcnn_collate_fn(batch: list[tuple[Tensor, dict]]) -> tuple[Tensor, list[dict]]:
    """Stack the images to ``[B, 3, H, W]``, smaller ones padded with 0, which is the mean, right and below.

    The targets stay a list, since each image has its own number of objects.
    """
    images, targets = zip(*batch, strict=True)
    if len({image.shape for image in images}) > 1:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        images = [
            F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
            for image in images
        ]
    return torch.stack(images), list(targets)


def sizes_without_padding(images: Tensor, targets: Sequence[dict]) -> dict[str, list]:
    """``{"image_sizes": …}`` for `FasterRCNN.forward` where any image of the batch is padded, else ``{}``."""
    sizes = [target["size"] for target in targets]
    return {} if all(size == tuple(images.shape[-2:]) for size in sizes) else {"image_sizes": sizes}


# ---------------------------------------------------------------------------------------------------------------------
# 4. Backbone
# ---------------------------------------------------------------------------------------------------------------------


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine part are constants: a scale and a shift for each channel.

    Detection batches are too small for batch statistics, so published detectors keep ImageNet's. The COCO weights of
    torchvision want ``eps=0``.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` → the same shape."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return mean_over_processes(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return mean_over_processes(grad)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose batch is that of all processes together. (`nn.SyncBatchNorm` can do it on CUDA alone.)"""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` → the same shape."""
        world = process_rank()[1]
        if world == 1 or not self.training:
            return super().forward(x)
        values = x.float()
        moments = torch.stack((values.mean((0, 2, 3)), values.square().mean((0, 2, 3))))  # [2, C]
        mean, square = _MeanOverProcesses.apply(moments)  # 2 × [C]
        var, count = square - mean.square(), values[:, 0].numel() * world
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()  # [C]
        shift = self.bias - mean * scale  # [C]
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


class Bottleneck(nn.Module):
    """Residual block 1×1 → 3×3 → 1×1 (ResNet, section 4.1), with the stride on the 3×3 convolution.

    Parameters
    ----------
    in_ch, out_ch : int
        Channels that come in; channels of the 3×3 convolution. ``expansion · out_ch`` channels go out.
    stride : int
        Of the 3×3 convolution, as torchvision's weights want it (the original had it on the first 1×1).
    downsample : Module, optional
        Brings the shortcut to the output's shape.
    norm : callable
        Channels → normalisation layer.
    """

    expansion = 4

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm: Callable[[int], nn.Module] = SyncedBatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 1, bias=False)
        self.bn1 = norm(out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, stride, padding=1, bias=False)
        self.bn2 = norm(out_ch)
        self.conv3 = nn.Conv2d(out_ch, self.expansion * out_ch, 1, bias=False)
        self.bn3 = norm(self.expansion * out_ch)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_ch, H, W]`` → ``[B, 4 · out_ch, H / stride, W / stride]``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + shortcut, inplace=True)


@contextlib.contextmanager
def _running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Batch norm inside uses its batch but does not learn from it: checkpointing runs every forward pass twice."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class ResNet50(nn.Module):
    """The backbone: stem and four stages of 3, 4, 6 and 3 bottlenecks (ResNet, table 1).

    Parameters
    ----------
    width : int
        Channels of the stem, 64 in the paper. All other channel counts scale with it.
    norm : callable
        Channels → normalisation layer: `FrozenBatchNorm2d` for published weights, live batch norm from scratch.
    frozen_stages : int
        How many of stem, layer1, … layer4 do not learn. Their batch statistics stand still as well.
    checkpointing : bool
        In training, keep only the input of each learning stage and compute its inside again on the way back.
    """

    depths = (3, 4, 6, 3)

    def __init__(
        self,
        width: int = 64,
        norm: Callable[[int], nn.Module] = SyncedBatchNorm2d,
        frozen_stages: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        channels, self.out_channels = width, []
        for i, depth in enumerate(self.depths):
            inner, outer, stride = (
                width * 2**i,
                width * 2**i * Bottleneck.expansion,
                1 if i == 0 else 2,
            )
            shortcut = nn.Sequential(nn.Conv2d(channels, outer, 1, stride, bias=False), norm(outer))
            blocks = [Bottleneck(channels, inner, stride, shortcut, norm)]
            blocks += [Bottleneck(outer, inner, norm=norm) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            channels = outer
            self.out_channels.append(outer)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck) and isinstance(module.bn3, nn.BatchNorm2d):
                nn.init.zeros_(
                    module.bn3.weight
                )  # every block begins as its shortcut (Goyal et al., 2017, section 5.1)
        self.frozen, self.checkpointing = self.stages()[:frozen_stages], checkpointing
        for stage in self.frozen:
            stage.requires_grad_(False)
        self.has_weights = False
        self.register_load_state_dict_post_hook(
            lambda module, _: setattr(module, "has_weights", True)
        )

    def stages(self) -> tuple[nn.Module, ...]:
        """Stem and the four layers, in order."""
        return (self.stem, self.layer1, self.layer2, self.layer3, self.layer4)

    def train(self, mode: bool = True) -> ResNet50:
        """As in `nn.Module`, but frozen stages stay in eval mode: their statistics are part of what is frozen."""
        super().train(mode)
        for stage in self.frozen:
            stage.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[B, 3, H, W]`` → ``(C2, C3, C4, C5)`` at strides 4, 8, 16, 32."""
        if self.training and self.frozen and not self.has_weights:
            warnings.warn(
                "training with frozen stages of random weights: load weights or freeze nothing",
                stacklevel=2,
            )
            self.has_weights = True  # once is enough
        maps = []
        for stage in self.stages():
            if (
                self.checkpointing
                and stage.training
                and torch.is_grad_enabled()
                and stage is not self.stem
            ):
                held = functools.partial(_running_statistics_held, stage)
                contexts = lambda held=held: (contextlib.nullcontext(), held())  # noqa: E731
                x = checkpoint(stage, x, use_reentrant=False, context_fn=contexts)
            else:
                x = stage(x)
            maps.append(x)
        return tuple(maps[1:])


class FPN(nn.Module):
    """Feature pyramid (FPN, section 3): every level gets strong features at its own resolution.

    Parameters
    ----------
    in_channels : four ints
        Channels of C2 … C5.
    out_channels : int
        Channels of every level of the pyramid.
    """

    def __init__(
        self, in_channels: Sequence[int] = (256, 512, 1024, 2048), out_channels: int = 256
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.lateral = nn.ModuleList(
            nn.Conv2d(channels, out_channels, 1) for channels in in_channels
        )
        self.output = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels
        )
        for conv in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """``(C2, C3, C4, C5)`` → ``[P2, P3, P4, P5, P6]``, all with ``out_channels`` channels."""
        laterals = [conv(feature) for conv, feature in zip(self.lateral, features, strict=True)]
        merged = [laterals[-1]]
        for lateral in laterals[-2::-1]:
            # Nearest to the very size of the finer map: with odd sizes a factor of 2 would not add up.
            merged.insert(
                0, lateral + F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest")
            )
        pyramid = [conv(level) for conv, level in zip(self.output, merged, strict=True)]
        return [
            *pyramid,
            F.max_pool2d(pyramid[-1], kernel_size=1, stride=2),
        ]  # P6: every second cell of P5


# ---------------------------------------------------------------------------------------------------------------------
# 5. Proposals
# ---------------------------------------------------------------------------------------------------------------------

_SMOOTH_L1_BETA = (
    1 / 9
)  # where the box losses turn from quadratic to linear, in units of the regression targets


class AnchorGenerator(nn.Module):
    """The boxes that the RPN starts from: one size a level, every ratio at every cell (FPN, section 4.1).

    Parameters
    ----------
    anchor_sizes : ints
        Square root of the area, pixels, one for each level.
    aspect_ratios : floats
        Width / height. (Published detectors say ratio and mean height / width: see ``inverse_ratios``.)
    strides : ints, optional
        Pixels from cell to cell, one for each level. None: image size // grid size, as torchvision does it; for P6
        that is not 64 unless the image's sides divide by 64.
    offset : float
        Where the centre sits in its cell: 0.5 the middle, 0 the top left corner, as published weights want it.
    inverse_ratios : bool
        Read ``aspect_ratios`` as height / width.
    rounded : bool
        Round the corners of the anchor at the origin, as torchvision does.
    """

    def __init__(
        self,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        strides: Sequence[int] | None = (4, 8, 16, 32, 64),
        offset: float = 0.5,
        inverse_ratios: bool = False,
        rounded: bool = False,
    ) -> None:
        super().__init__()
        self.anchor_sizes, self.aspect_ratios, self.strides = anchor_sizes, aspect_ratios, strides
        self.offset, self.inverse_ratios, self.rounded = offset, inverse_ratios, rounded
        self._last: tuple = (
            None,
            None,
        )  # shapes, anchors: a stream of equal sizes computes them once

    def base_anchors(self, size: float) -> Tensor:
        """``[R, 4]``: one box for each ratio, area ``size²``, centred at the origin."""
        ratios = torch.tensor(self.aspect_ratios, dtype=torch.float32)  # [R]
        ratios = 1 / ratios if self.inverse_ratios else ratios
        half = (
            size / 2 * torch.stack((ratios.sqrt(), 1 / ratios.sqrt()), dim=1)
        )  # [R, 2] width, height
        boxes = torch.cat((-half, half), dim=1)  # [R, 4]
        return boxes.round() if self.rounded else boxes

    def forward(self, feature_maps: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Anchors ``[A, 4]`` in pixels: level after level, row after row, ratio fastest."""
        grids = tuple(tuple(feature.shape[-2:]) for feature in feature_maps)
        key = (grids, tuple(image_size), feature_maps[0].device)
        if self._last[0] == key:
            return self._last[1]
        anchors = []
        for level, ((rows, columns), size) in enumerate(zip(grids, self.anchor_sizes, strict=True)):
            if self.strides is None:
                stride_y, stride_x = image_size[0] // rows, image_size[1] // columns
            else:
                stride_y = stride_x = self.strides[level]
            y = (torch.arange(rows) + self.offset) * stride_y  # [rows]
            x = (torch.arange(columns) + self.offset) * stride_x  # [columns]
            y, x = torch.meshgrid(y, x, indexing="ij")  # 2 × [rows, columns]
            shifts = torch.stack((x, y, x, y), dim=-1)  # [rows, columns, 4]
            anchors.append(
                (shifts[:, :, None] + self.base_anchors(size)).reshape(-1, 4)
            )  # [rows · columns · R, 4]
        self._last = (key, torch.cat(anchors).to(feature_maps[0].device))
        return self._last[1]


_MATCH_PAIRS = (
    2**24
)  # of a box and an object that are compared at a time: what fits into any memory


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, pos_thr: float, neg_thr: float, best_is_positive: bool
) -> tuple[Tensor, Tensor]:
    """Give each box the ground-truth object that it overlaps most, and a label (Faster R-CNN, section 3.1.2).

    Parameters
    ----------
    boxes, gt_boxes : Tensor ``[N, 4]``, ``[K, 4]``
        Pixels. K may be 0: then every box is background.
    pos_thr, neg_thr : float
        IoU from which a box is positive, and below which it is negative; between the two it is ignored.
    best_is_positive : bool
        Also take every box that ties for some object's best IoU, so that no object goes without a positive.

    Returns
    -------
    labels : Tensor int64 ``[N]``
        1 positive, 0 negative, -1 ignored.
    matched : Tensor int64 ``[N]``
        Index of the object in ``gt_boxes``; of meaning for positives.
    """
    labels = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)  # [N]
    matched, ties = torch.zeros_like(labels), torch.zeros_like(labels, dtype=torch.bool)  # [N], [N]
    best = torch.full_like(labels, -1, dtype=torch.float32)  # [N]
    some = max(
        1, _MATCH_PAIRS // max(1, len(boxes))
    )  # objects at a time: all, where there are not thousands
    for first in range(0, len(gt_boxes), some):
        iou = box_iou(gt_boxes[first : first + some], boxes)  # [k, N]
        overlap, index = iou.max(dim=0)  # [N], [N]
        better = overlap > best
        best, matched = (
            torch.where(better, overlap, best),
            torch.where(better, index + first, matched),
        )
        if best_is_positive:
            best_of_object = iou.amax(dim=1, keepdim=True)  # [k, 1]
            ties |= ((iou == best_of_object) & (best_of_object > 0)).any(
                dim=0
            )  # untouched objects tie with all at 0
    labels[best >= neg_thr] = -1
    labels[best >= pos_thr] = 1
    labels[ties] = 1
    return labels, matched


def image_generators(targets: Sequence[dict], device: torch.device) -> list[torch.Generator]:
    """A source of random numbers for each image, which does not depend on what else is in the batch.

    Several processes with a part of the batch each then draw what one process draws with all of it.
    """
    step, spread, seeds = (
        int(torch.randint(2**32, ())),
        2_654_435_761,
        2**32,
    )  # a CPU generator reads 32 bits
    ids = [int(target.get("image_id", i)) for i, target in enumerate(targets)]
    return [
        torch.Generator(device).manual_seed((step + spread * image_id) % seeds) for image_id in ids
    ]


def sample_boxes(
    labels: Tensor, size: int, pos_frac: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw at random at most ``size · pos_frac`` positives, and negatives to fill up to ``size``.

    Returns
    -------
    positives, negatives : Tensor int64
        Indices into ``labels`` ``[N]`` (1 or more: positive, 0: negative, -1: never drawn).
    """
    positives, negatives = (labels > 0).nonzero()[:, 0], (labels == 0).nonzero()[:, 0]
    num_positives = min(len(positives), int(size * pos_frac))
    num_negatives = min(len(negatives), size - num_positives)
    draw = functools.partial(torch.randperm, device=labels.device, generator=generator)
    return positives[draw(len(positives))[:num_positives]], negatives[
        draw(len(negatives))[:num_negatives]
    ]


class RPNHead(nn.Module):
    """A shared k×k convolution and two 1×1 siblings: objectness and box deltas of every anchor.

    Parameters
    ----------
    in_ch, k : int
        Channels of the pyramid; anchors of a cell.
    """

    def __init__(self, in_ch: int = 256, k: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_ch, in_ch, 3, padding=1)
        self.objectness = nn.Conv2d(in_ch, k, 1)
        self.deltas = nn.Conv2d(in_ch, 4 * k, 1)
        for conv in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of the pyramid → logits ``[B, H · W · k]`` and deltas ``[B, H · W · k, 4]``, each a list over levels."""
        logits, deltas = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature), inplace=True)  # [B, C, H, W]
            # Channels last, then flat: the order of the anchors, row after row, ratio fastest.
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))  # [B, H · W · k]
            deltas.append(
                self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1, 4)
            )  # [B, H · W · k, 4]
        return logits, deltas


class RegionProposalNetwork(nn.Module):
    """Where could an object be? Scores and shifts every anchor, keeps the best (Faster R-CNN, section 3.1).

    Parameters
    ----------
    head, anchor_gen : Module
        `RPNHead` and `AnchorGenerator` (or anything with their calls).
    pre_nms : int or (int, int)
        Best anchors of each level that meet NMS; one number, or one for training and one for test.
    post_nms : int or (int, int)
        Proposals of an image, likewise.
    nms_thr : float
        IoU above which the weaker of two proposals of a level goes.
    min_sz : float
        Smaller proposals (either side, pixels) are dropped.
    max_log_scale : float
        Clamp of the size outputs (see `decode_boxes`).
    """

    RPN_BATCH = 256  # anchors of an image that the losses are computed on
    POS_FRAC = 0.5
    POS_THR = 0.7
    NEG_THR = 0.3

    def __init__(
        self,
        head: nn.Module,
        anchor_gen: nn.Module,
        pre_nms: int | tuple[int, int] = 2000,
        post_nms: int | tuple[int, int] = 1000,
        nms_thr: float = 0.7,
        min_sz: float = 16,
        max_log_scale: float = 4.0,
    ) -> None:
        super().__init__()
        self.head, self.anchor_gen, self.max_log_scale = head, anchor_gen, max_log_scale
        self.pre_nms, self.post_nms, self.nms_thr, self.min_sz = pre_nms, post_nms, nms_thr, min_sz

    def forward(
        self,
        features: Sequence[Tensor],
        image_size: tuple[int, int],
        targets: Sequence[dict] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals ``[K_i, 4]`` of each image, best first, and in training the losses ``rpn_cls`` and ``rpn_box``.

        1. Head: a logit and four deltas for each anchor.
        2. Each level's best ``pre_nms`` anchors, decoded and clipped to the image.
        3. NMS inside each level, then the best ``post_nms`` over all levels.
        4. Training: losses on ``RPN_BATCH`` sampled anchors an image.

        Parameters
        ----------
        features : list of Tensor ``[B, C, H_l, W_l]``
            The pyramid.
        image_size : (height, width)
            Of the batch, padding included, pixels.
        targets : list of dict, optional
            ``boxes`` ``[K, 4]`` of each image; needed in training.
        image_sizes : list of (height, width), optional
            Of each image without its padding: what boxes are clipped to. Default: ``image_size`` for all.
        """
        logits, deltas = self.head(features)
        counts = [level.shape[1] for level in logits]
        logits, deltas = (
            torch.cat(logits, dim=1).float(),
            torch.cat(deltas, dim=1).float(),
        )  # [B, A], [B, A, 4]
        anchors = self.anchor_gen(features, image_size)  # [A, 4]
        sizes = torch.tensor(
            image_sizes or [image_size] * len(logits), device=logits.device
        )  # [B, 2]
        proposals = self.propose(anchors, logits.detach(), deltas.detach(), counts, sizes)
        return proposals, self.losses(anchors, logits, deltas, targets) if self.training else {}

    def propose(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, counts: Sequence[int], sizes: Tensor
    ) -> list[Tensor]:
        """Steps 2 and 3 of `forward`: ``[A, 4]``, ``[B, A]``, ``[B, A, 4]`` → list of ``[K_i, 4]``."""
        pre_nms, post_nms = (
            n if isinstance(n, int) else n[0 if self.training else 1]
            for n in (self.pre_nms, self.post_nms)
        )
        chosen, levels, start = [], [], 0
        for level, scores in enumerate(logits.split(list(counts), dim=1)):
            best = scores.topk(min(pre_nms, counts[level]), dim=1).indices + start  # [B, k]
            chosen.append(best)
            levels.append(torch.full_like(best, level))
            start += counts[level]
        chosen, levels = torch.cat(chosen, dim=1), torch.cat(levels, dim=1)  # [B, T]
        scores = logits.gather(1, chosen).sigmoid()  # [B, T]
        best_deltas = deltas.gather(1, chosen[..., None].expand(-1, -1, 4))  # [B, T, 4]
        boxes = decode_boxes(
            anchors[chosen], best_deltas, max_log_scale=self.max_log_scale
        )  # [B, T, 4]
        boxes = clip_boxes(boxes, sizes[:, None])
        big_enough = (boxes[..., 2:] - boxes[..., :2] >= self.min_sz).all(dim=-1)  # [B, T]

        images = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(levels)  # [B, T]
        boxes, scores, images = (
            boxes[big_enough],
            scores[big_enough],
            images[big_enough],
        )  # [S, 4], [S], [S]
        groups = images * len(counts) + levels[big_enough]  # [S] one NMS for all images and levels
        keep = batched_nms(boxes, scores, groups, self.nms_thr)
        return [boxes[keep[images[keep] == image]][:post_nms] for image in range(len(logits))]

    def losses(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, targets: Sequence[dict]
    ) -> dict[str, Tensor]:
        """Binary cross-entropy and smooth L1 over the sampled anchors of the batch, divided by their number."""
        sampled_logits, labels, predicted, expected = [], [], [], []
        generators = image_generators(targets, logits.device)
        for image, (target, generator) in enumerate(zip(targets, generators, strict=True)):
            label, matched = match_boxes(
                anchors, target["boxes"], self.POS_THR, self.NEG_THR, best_is_positive=True
            )
            positives, negatives = sample_boxes(label, self.RPN_BATCH, self.POS_FRAC, generator)
            sampled = torch.cat((positives, negatives))
            sampled_logits.append(logits[image, sampled])
            labels.append(label[sampled])
            predicted.append(deltas[image, positives])
            expected.append(encode_boxes(anchors[positives], target["boxes"][matched[positives]]))
        labels = torch.cat(labels).float()  # [S]
        predicted, expected = torch.cat(predicted), torch.cat(expected)  # [P, 4]
        box = F.smooth_l1_loss(predicted, expected, beta=_SMOOTH_L1_BETA, reduction="sum") / max(
            1, len(labels)
        )
        return {
            "rpn_cls": F.binary_cross_entropy_with_logits(torch.cat(sampled_logits), labels),
            "rpn_box": box,
        }


# ---------------------------------------------------------------------------------------------------------------------
# 6. ROI head
# ---------------------------------------------------------------------------------------------------------------------


class ROIAlign(nn.Module):
    """Features of a fixed size for boxes of any size, from the level that suits each box (Mask R-CNN, section 3).

    Every output cell averages ``sampling²`` bilinear samples, so it is a weighted sum of ``4 · sampling²`` feature
    vectors. With all levels of all images in one table of vectors, that is a single weighted `embedding_bag`, and its
    backward pass scatters into the table: no loop over levels or boxes, no feature map per box.

    Parameters
    ----------
    out_size : int
        Cells on a side of the output.
    k0, k_min, k_max : int
        ``level = floor(k0 + log2(sqrt(area) / 224))``, clamped (FPN, equation 1).
    sampling : int
        Samples of a bin on each axis.
    aligned : bool
        True: pixel centres lie at half-integers, so half a pixel is taken off. False: torchvision's FPN models.
    level_eps : float
        Added before the floor; torchvision uses 1e-6.
    """

    canonical_size = 224  # pixels: side of a box that belongs on level k0, ImageNet's crop

    def __init__(
        self,
        out_size: int = 7,
        k0: int = 4,
        k_min: int = 2,
        k_max: int = 5,
        sampling: int = 2,
        aligned: bool = True,
        level_eps: float = 0.0,
    ) -> None:
        super().__init__()
        self.out_size, self.k0, self.k_min, self.k_max = out_size, k0, k_min, k_max
        self.sampling, self.aligned, self.level_eps = sampling, aligned, level_eps

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Index ``[N]`` into the list of maps (0 is ``k_min``) for boxes ``[N, 4]`` in pixels."""
        level = self.k0 + torch.log2(box_area(boxes).sqrt() / self.canonical_size) + self.level_eps
        return level.floor().clamp(self.k_min, self.k_max).long() - self.k_min

    def _taps(self, boxes: Tensor, strides: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Cells and weights that each bin reads on each axis: two ``[R, 2 (x, y), out, 2 · sampling]``."""
        points = self.out_size * self.sampling
        at = (
            torch.arange(points, device=boxes.device) + 0.5
        ) / points  # [P] inside the bins, never on their edges
        boxes = boxes / strides[:, None] - (0.5 if self.aligned else 0.0)  # [R, 4] in cells
        size = boxes[:, 2:] - boxes[:, :2]  # [R, 2]
        size = size if self.aligned else size.clamp(min=1)
        position = boxes[:, :2, None] + size[..., None] * at  # [R, 2, P]
        last = grids[..., None] - 1  # [R, 2, 1] index of the last cell
        inside = (position >= -1) & (position <= last + 1)
        position = torch.minimum(position.clamp(min=0), last)
        low = position.floor()
        cells = torch.stack((low, torch.minimum(low + 1, last)), dim=-1).long()  # [R, 2, P, 2]
        high_share = position - low
        weights = (
            torch.stack((1 - high_share, high_share), dim=-1) * inside[..., None] / self.sampling
        )  # [R, 2, P, 2]
        shape = (len(boxes), 2, self.out_size, 2 * self.sampling)
        return cells.reshape(shape), weights.reshape(shape)

    def forward(
        self, fmaps: Sequence[Tensor], proposals: Sequence[Tensor], image_size: tuple[int, int]
    ) -> Tensor:
        """Pool every proposal.

        Parameters
        ----------
        fmaps : list of Tensor ``[B, C, H_l, W_l]``
            Levels ``k_min`` … ``k_max``.
        proposals : list of B Tensor ``[K_i, 4]``
            Pixels of the network input.
        image_size : (height, width)
            Of the batch, pixels.

        Returns
        -------
        Tensor ``[ΣK, C, out_size, out_size]``

        Raises
        ------
        ValueError
            A map that is not of its level's stride, ``2 ** k`` pixels.
        """
        for k, fmap in enumerate(fmaps, start=self.k_min):
            if any(
                abs(side / 2**k - cells) >= 1
                for side, cells in zip(image_size, fmap.shape[-2:], strict=True)
            ):
                raise ValueError(
                    f"a map of {tuple(fmap.shape[-2:])} cells is not level {k} of an image of {image_size}"
                )
        boxes = torch.cat(list(proposals)).float()  # [R, 4]
        device, channels = boxes.device, fmaps[0].shape[1]
        image = torch.repeat_interleave(
            torch.tensor([len(p) for p in proposals], device=device)
        )  # [R]
        level = self.assign_levels(boxes)  # [R]

        grids = torch.tensor(
            [[f.shape[3], f.shape[2]] for f in fmaps], device=device
        )  # [L, 2] columns, rows
        strides = torch.tensor(
            [2.0**k for k in range(self.k_min, self.k_min + len(fmaps))], device=device
        )  # [L]
        cells_of_level = grids.prod(dim=1)  # [L] of one image
        first_of_level = (cells_of_level * len(fmaps[0])).cumsum(0) - cells_of_level * len(
            fmaps[0]
        )  # [L]
        first = (
            first_of_level[level] + image * cells_of_level[level]
        )  # [R] row of the table where its map begins
        table = torch.cat(
            [f.permute(0, 2, 3, 1).reshape(-1, channels) for f in fmaps]
        )  # [Σ B·H·W, C]

        cells, weights = self._taps(boxes, strides[level], grids[level])
        (x, y), (wx, wy) = cells.unbind(1), weights.unbind(1)  # 4 × [R, out, 2S]
        y = first[:, None, None] + y * grids[level, 0, None, None]  # [R, out, 2S]
        index = y[:, :, None, :, None] + x[:, None, :, None, :]  # [R, out, out, 2S, 2S]
        weight = wy[:, :, None, :, None] * wx[:, None, :, None, :]  # [R, out, out, 2S, 2S]
        taps = (2 * self.sampling) ** 2
        pooled = F.embedding_bag(
            index.reshape(-1, taps),
            table.float(),
            per_sample_weights=weight.reshape(-1, taps),
            mode="sum",
        )  # [R · out · out, C]
        return pooled.view(-1, self.out_size, self.out_size, channels).permute(
            0, 3, 1, 2
        )  # [R, C, out, out]


class TwoMLPHead(nn.Module):
    """Two fully connected layers on the flattened features of a box.

    Parameters
    ----------
    in_channels, fc_dim : int
        Features of a box, flattened; width of both layers.
    """

    def __init__(self, in_channels: int = 256 * 7 * 7, fc_dim: int = 1024) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, fc_dim)
        self.fc2 = nn.Linear(fc_dim, fc_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[R, C, H, W]`` → ``[R, fc_dim]``."""
        if x.device.type == "cpu" and not self.training:
            # A convolution whose kernel covers the whole map is the same sum in half the time, but needs more memory.
            kernel = self.fc1.weight.view(-1, *x.shape[1:])  # [fc_dim, C, H, W]
            hidden = F.conv2d(x, kernel, self.fc1.bias).flatten(1)  # [R, fc_dim]
        else:
            hidden = self.fc1(x.flatten(1))  # [R, C · H · W] -> [R, fc_dim]
        return F.relu(self.fc2(F.relu(hidden, inplace=True)), inplace=True)


class FastRCNNPredictor(nn.Module):
    """Class logits, and four deltas for each class, of every box (Fast R-CNN, section 2.1).

    Parameters
    ----------
    in_channels, num_classes : int
        Features of a box; classes with background.
    """

    def __init__(self, in_channels: int = 1024, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.cls = nn.Linear(in_channels, num_classes)
        self.box = nn.Linear(in_channels, 4 * num_classes)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.001)
        nn.init.zeros_(self.cls.bias)
        nn.init.zeros_(self.box.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[R, in_channels]`` → logits ``[R, C]`` and deltas ``[R, 4 · C]``."""
        return self.cls(x), self.box(x)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Detector
# ---------------------------------------------------------------------------------------------------------------------


def check_targets(images: Tensor, targets: Sequence[dict] | None, num_classes: int) -> None:
    """Refuse targets that would train on nonsense or give NaN, naming the image, the object and its value.

    Raises
    ------
    ValueError
        Missing targets, a wrong shape, a label outside 1..``num_classes - 1``, a box that is not finite or has no area.
    """
    if targets is None or len(targets) != len(images):
        raise ValueError(
            f"training needs one target for each of the {len(images)} images, got {targets and len(targets)}"
        )
    for i, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"target {i}: boxes must be [K, 4] and labels [K], got {list(boxes.shape)} and {list(labels.shape)}"
            )
        bad = ~(boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))  # [K]
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"target {i}: box {first} needs x1 < x2 and y1 < y2, got {boxes[first].tolist()}"
            )
        bad = (labels < 1) | (labels >= num_classes)  # [K]
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"target {i}: label {first} must lie in 1..{num_classes - 1}, got {int(labels[first])}"
            )


class FasterRCNN(nn.Module):
    """Backbone → pyramid → proposals → pooled boxes → classes and refined boxes (Faster R-CNN with FPN).

    Parameters
    ----------
    num_classes : int
        With background.
    backbone, fpn, rpn, roi_align, box_head : Module, optional
        The parts. Default: the sizes of the FPN paper on a ResNet-50 with frozen batch norm whose stem and layers 1–3
        do not learn: load weights into it.
    box_weights : four numbers
        Factors on the box head's regression targets (see `encode_boxes`).
    max_log_scale : float
        Clamp of the box head's size outputs (see `decode_boxes`).
    min_detection : float
        Detections with a shorter side (pixels) are dropped.
    """

    ROI_BATCH = 512  # proposals of an image that the losses are computed on
    ROI_POS_FRAC = 0.25
    ROI_POS_THR = 0.5
    SCORE_THR = 0.05
    NMS_THR = 0.5
    MAX_DETS = 100
    name = "full"  # what a checkpoint is called by

    def __init__(
        self,
        num_classes: int = NUM_CLASSES,
        backbone: nn.Module | None = None,
        fpn: nn.Module | None = None,
        rpn: nn.Module | None = None,
        roi_align: nn.Module | None = None,
        box_head: nn.Module | None = None,
        box_weights: Sequence[float] = (10, 10, 5, 5),
        max_log_scale: float = 4.0,
        min_detection: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.box_weights = num_classes, tuple(box_weights)
        self.max_log_scale, self.min_detection = max_log_scale, min_detection
        self.backbone = backbone or ResNet50(norm=FrozenBatchNorm2d, frozen_stages=4)
        self.fpn = fpn or FPN(self.backbone.out_channels)
        channels = self.fpn.out_channels
        self.rpn = rpn or RegionProposalNetwork(RPNHead(channels), AnchorGenerator())
        self.roi_align = roi_align or ROIAlign()
        self.box_head = box_head or TwoMLPHead(channels * self.roi_align.out_size**2)
        self.predictor = FastRCNNPredictor(self.box_head.fc2.out_features, num_classes)
        self.to(
            memory_format=torch.channels_last
        )  # the faster layout for convolutions, and what ROIAlign reads

    def forward(
        self,
        images: Tensor,
        targets: Sequence[dict] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Losses in training, detections else.

        1. Backbone and pyramid.
        2. The RPN's proposals.
        3. Training: sample proposals, pool, classify, refine; four losses.
        4. Else: pool all proposals, classify, refine, drop the weak and the doubled.

        Parameters
        ----------
        images : Tensor ``[B, 3, H, W]``
            ImageNet-normalised.
        targets : list of B dict, training only
            ``boxes`` ``[K, 4]`` in pixels of ``images``, ``labels`` ``[K]`` in 1..C-1. K may be 0.
        image_sizes : list of (height, width), optional
            Of each image without padding. Default: the batch's size.

        Returns
        -------
        dict or (list of dict, list of Tensor)
            Training: ``rpn_cls``, ``rpn_box``, ``roi_cls``, ``roi_box``. Else ``(results, proposals)``, each result
            with ``boxes`` ``[D, 4]``, ``scores`` ``[D]``, ``labels`` ``[D]``, best first.
        """
        if self.training:
            check_targets(images, targets, self.num_classes)
        image_size = tuple(images.shape[-2:])
        image_sizes = image_sizes or [image_size] * len(images)
        pyramid = self.fpn(self.backbone(images.contiguous(memory_format=torch.channels_last)))
        proposals, losses = self.rpn(pyramid, image_size, targets, image_sizes)
        if self.training:
            proposals, labels, expected = self.sample_proposals(proposals, targets)
            logits, deltas = self.box_outputs(pyramid, proposals, image_size)
            return losses | self.losses(logits, deltas, labels, expected)
        logits, deltas = self.box_outputs(pyramid, proposals, image_size)
        return self.detections(logits, deltas, proposals, image_sizes), proposals

    def box_outputs(
        self, pyramid: Sequence[Tensor], proposals: Sequence[Tensor], image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[R, C]`` and deltas ``[R, C, 4]`` of all proposals, float32. P6 is for the RPN alone."""
        logits, deltas = self.predictor(
            self.box_head(self.roi_align(pyramid[:-1], proposals, image_size))
        )
        return logits.float(), deltas.float().view(-1, self.num_classes, 4)

    @torch.no_grad()
    def sample_proposals(
        self, proposals: Sequence[Tensor], targets: Sequence[dict]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Pick ``ROI_BATCH`` proposals an image for the losses; the ground truth joins them as proposals.

        Returns
        -------
        proposals : list of Tensor ``[S_i, 4]``
        labels : Tensor int64 ``[R]``
            Class of each sampled proposal, 0 for background.
        expected : Tensor ``[R, 4]``
            Regression targets; of meaning where the label is above 0.
        """
        sampled, labels, expected = [], [], []
        generators = image_generators(targets, proposals[0].device)
        for boxes, target, generator in zip(proposals, targets, generators, strict=True):
            gt_boxes = target["boxes"].to(boxes)
            boxes = torch.cat(
                (boxes, gt_boxes)
            )  # [K_i + K, 4] so that there are positives from the first step on
            is_object, matched = match_boxes(
                boxes, gt_boxes, self.ROI_POS_THR, self.ROI_POS_THR, False
            )
            chosen = torch.cat(
                sample_boxes(is_object, self.ROI_BATCH, self.ROI_POS_FRAC, generator)
            )
            is_object, matched, boxes = is_object[chosen], matched[chosen], boxes[chosen]
            sampled.append(boxes)
            if len(gt_boxes):
                labels.append(target["labels"][matched] * is_object)
                expected.append(encode_boxes(boxes, gt_boxes[matched], self.box_weights))
            else:
                labels.append(is_object)
                expected.append(torch.zeros_like(boxes))
        return sampled, torch.cat(labels), torch.cat(expected)

    def losses(
        self, logits: Tensor, deltas: Tensor, labels: Tensor, expected: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy over all sampled proposals; smooth L1 of the true class's deltas, divided by their number."""
        positives = labels.nonzero()[:, 0]  # [P]
        predicted = deltas[positives, labels[positives]]  # [P, 4]
        box = F.smooth_l1_loss(
            predicted, expected[positives], beta=_SMOOTH_L1_BETA, reduction="sum"
        )
        # An empty batch must give 0 and not the NaN of a mean over nothing.
        cls = F.cross_entropy(logits, labels, reduction="sum")
        return {"roi_cls": cls / max(1, len(labels)), "roi_box": box / max(1, len(labels))}

    def detections(
        self,
        logits: Tensor,
        deltas: Tensor,
        proposals: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Scores above ``SCORE_THR``, decoded and clipped, NMS inside each class, at most ``MAX_DETS`` an image."""
        device = logits.device
        scores = logits.softmax(dim=1)  # [R, C]
        scores[:, 0] = 0  # background is no detection
        row, label = (
            (scores > self.SCORE_THR).nonzero().unbind(1)
        )  # 2 × [S] only these are worth decoding
        image = torch.repeat_interleave(torch.tensor([len(p) for p in proposals], device=device))[
            row
        ]  # [S]
        boxes = decode_boxes(
            torch.cat(list(proposals))[row],
            deltas[row, label],
            self.box_weights,
            self.max_log_scale,
        )
        boxes = clip_boxes(boxes, torch.tensor(image_sizes, device=device)[image])  # [S, 4]
        scores = scores[row, label]  # [S]

        big_enough = ((boxes[:, 2:] - boxes[:, :2]) >= self.min_detection).all(dim=1)  # [S]
        boxes, scores, label, image = (
            boxes[big_enough],
            scores[big_enough],
            label[big_enough],
            image[big_enough],
        )
        keep = batched_nms(boxes, scores, image * self.num_classes + label, self.NMS_THR)
        results = []
        for i in range(len(proposals)):
            best = keep[image[keep] == i][: self.MAX_DETS]  # [D]
            results.append({"boxes": boxes[best], "scores": scores[best], "labels": label[best]})
        return results


def tiny_faster_rcnn(num_classes: int = NUM_CLASSES) -> FasterRCNN:
    """The same detector for a laptop's CPU: 128-px input, narrow, every layer trained from random weights."""
    width, channels, fc_dim, k0 = 16, 64, 256, 5  # k0: a 112-px box is a large one here
    backbone = ResNet50(width)
    anchors = AnchorGenerator(anchor_sizes=(16, 32, 64, 128, 256))
    rpn = RegionProposalNetwork(
        RPNHead(channels), anchors, pre_nms=300, post_nms=(200, 100), min_sz=2
    )
    roi_align = ROIAlign(
        k0=k0, sampling=1
    )  # its bins are small: a second sample costs time and gives nothing
    box_head = TwoMLPHead(channels * roi_align.out_size**2, fc_dim)
    model = FasterRCNN(
        num_classes, backbone, FPN(backbone.out_channels, channels), rpn, roi_align, box_head
    )
    model.ROI_BATCH, model.name = 96, "tiny"
    return model


def full_faster_rcnn() -> FasterRCNN:
    """The paper's size with every layer learning from random weights, and therefore with live batch norm."""
    return FasterRCNN(backbone=ResNet50())


def coco_faster_rcnn() -> FasterRCNN:
    """What torchvision's COCO weights mean something in; still random: see `load_coco_weights`.

    The differences to the defaults of this file: anchors centred on the corner of their cell, ratios counted as
    height / width, corners rounded, strides from the sizes; batch norm with eps 0; ROIAlign without the half pixel;
    other limits. Stem and layer1 are frozen, as published.
    """
    max_log_scale = math.log(1000 / 16)
    anchors = AnchorGenerator(strides=None, offset=0, inverse_ratios=True, rounded=True)
    rpn = RegionProposalNetwork(
        RPNHead(), anchors, (2000, 1000), (2000, 1000), min_sz=1e-3, max_log_scale=max_log_scale
    )
    model = FasterRCNN(
        backbone=ResNet50(norm=functools.partial(FrozenBatchNorm2d, eps=0.0), frozen_stages=2),
        rpn=rpn,
        roi_align=ROIAlign(aligned=False, level_eps=1e-6),
        max_log_scale=max_log_scale,
        min_detection=1e-2,
    )
    model.name = "coco"
    return model


MODELS: dict[str, Callable[[], FasterRCNN]] = {
    "tiny": tiny_faster_rcnn,
    "full": full_faster_rcnn,
    "coco": coco_faster_rcnn,
}


# ---------------------------------------------------------------------------------------------------------------------
# 8. Published weights
# ---------------------------------------------------------------------------------------------------------------------

# torchvision's names (its published files use older ones, without the ".0") and ours.
_TORCHVISION_NAMES = (
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.conv1\.", "backbone.stem.0."),
    (r"^backbone\.bn1\.", "backbone.stem.1."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)(\.0)?\.", r"fpn.lateral.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)(\.0)?\.", r"fpn.output.\1."),
    (r"^rpn\.head\.conv(\.0\.0)?\.", "rpn.head.conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn.head.objectness."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.head.deltas."),
    (r"^roi_heads\.box_head\.fc6\.", "box_head.fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "box_head.fc2."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "predictor.cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "predictor.box."),
)


def _our_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state_dict.items():
        for theirs, ours in _TORCHVISION_NAMES:
            name = re.sub(theirs, ours, name)
        renamed[name] = value
    return renamed


def load_weights(module: nn.Module, weights: dict[str, Tensor], origin: object) -> None:
    """Put ``weights`` into a module: all of them or none.

    Raises
    ------
    ValueError
        An entry that is missing, extra or of another shape; names the first and says how many there are.
    """
    mine = module.state_dict()
    counters = {
        key for key in mine | weights if key.endswith("num_batches_tracked")
    }  # files are with and without
    differing = [f"{key} is missing" for key in mine.keys() - weights.keys() - counters]
    differing += [
        f"{key} is unknown to the model" for key in weights.keys() - mine.keys() - counters
    ]
    differing += [
        f"{key} is {list(weights[key].shape)} and not {list(mine[key].shape)}"
        for key in mine.keys() & weights.keys()
        if weights[key].shape != mine[key].shape
    ]
    if differing:
        raise ValueError(
            f"{origin} does not fit the model in {len(differing)} entries: {sorted(differing)[0]}"
        )
    module.load_state_dict(weights, strict=False)


def published_weights(weights: WeightsEnum) -> dict[str, Tensor]:
    """A published file as a state dict: from torchvision's cache, else over the network into it.

    Raises
    ------
    ConnectionError
        Neither there; says what to download, and where to put it.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if not file.exists() and not _answers(
        lambda: urllib.request.urlopen(weights.url, timeout=NETWORK_TIMEOUT).close()
    ):
        raise ConnectionError(
            f"no network for the published weights: download {weights.url} and put it at {file}"
        )
    try:
        return weights.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # a torn file, a dropped connection, a pickle with code in it
        raise ValueError(
            f"{file} cannot be used ({_first_line(error)}): delete it and try again"
        ) from error


def load_imagenet_backbone(model: FasterRCNN, state_dict: dict[str, Tensor] | None = None) -> None:
    """Start the backbone from torchvision's ImageNet weights (``ResNet50_Weights.IMAGENET1K_V1``).

    Parameters
    ----------
    model : FasterRCNN
        With a backbone of width 64.
    state_dict : dict, optional
        Of ``torchvision.models.resnet50``. None: the published one (see `published_weights`).

    Raises
    ------
    ValueError, ConnectionError
        Entries that do not fit, named; no network and no file.
    """
    origin = ResNet50_Weights.IMAGENET1K_V1
    state_dict = published_weights(origin) if state_dict is None else state_dict
    weights = _our_names({f"backbone.{name}": value for name, value in state_dict.items()})
    for classifier in ("backbone.fc.weight", "backbone.fc.bias"):  # of ImageNet's 1000 classes
        weights.pop(classifier, None)
    load_weights(
        model.backbone,
        {name.removeprefix("backbone."): value for name, value in weights.items()},
        origin,
    )


def load_coco_weights(model: FasterRCNN, state_dict: dict[str, Tensor] | None = None) -> None:
    """Load torchvision's detector (``FasterRCNN_ResNet50_FPN_Weights.COCO_V1``): 37.0 AP on COCO val2017.

    Parameters
    ----------
    model : FasterRCNN
        `coco_faster_rcnn`: elsewhere the same weights mean something else.
    state_dict : dict, optional
        Of ``torchvision.models.detection.fasterrcnn_resnet50_fpn``. None: the published one (see `published_weights`).
        Of its 91 outputs the 81 that COCO uses are taken.

    Raises
    ------
    ValueError, ConnectionError
        Entries that do not fit, named; no network and no file.
    """
    origin = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    load_weights(
        model,
        coco_from_torchvision(published_weights(origin) if state_dict is None else state_dict),
        origin,
    )


def coco_from_torchvision(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's detector under this file's names, with the 81 outputs that COCO uses picked out of its 91."""
    weights = _our_names(state_dict)
    published = COCO_CATEGORY_IDS[-1] + 1  # outputs: one for each id up to 90, used or not
    for name in (
        "predictor.cls.weight",
        "predictor.cls.bias",
        "predictor.box.weight",
        "predictor.box.bias",
    ):
        value = weights.get(name)
        per_class = 1 if "cls" in name else 4
        if value is not None and len(value) == published * per_class:
            used = value.unflatten(0, (published, per_class))[
                list(COCO_CATEGORY_IDS)
            ]  # [81, 1 or 4, …]
            weights[name] = used.flatten(0, 1)
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# 9. Training
# ---------------------------------------------------------------------------------------------------------------------

LOSS_NAMES = ("rpn_cls", "rpn_box", "roi_cls", "roi_box")


def one_cycle(model: nn.Module, steps: int, batch: int, lr: float = 2e-3) -> tuple:
    """AdamW with one warm-up and one decay over the whole run: for short runs from random weights."""
    warm_up, weight_decay = 0.15, 1e-4
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=warm_up
    )


def step_decay(model: nn.Module, steps: int, batch: int, lr: float = 0.02) -> tuple:
    """SGD as published: ``lr`` is for 16 images and scales with the batch; warm-up, then two drops to a tenth."""
    reference_batch, momentum, weight_decay = 16, 0.9, 1e-4
    warm_up, first, drops, drop = min(1000, steps // 10 + 1), 1e-3, (16 / 26, 22 / 26), 0.1
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr * batch / reference_batch, momentum, weight_decay=weight_decay, fused=True
    )

    def factor(step: int) -> float:
        return min(1.0, first + (1 - first) * step / warm_up) * drop ** sum(
            step >= d * steps for d in drops
        )

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _batches(
    loader: DataLoader, state: dict, generators: dict | None
) -> Iterator[tuple[Tensor, list[dict]]]:
    """Batches without end, epoch after epoch from where ``state`` is, which is kept up to date with what was given."""
    while True:
        loader.dataset.set_epoch(state["epoch"])
        batches, empty = iter(loader), True
        if generators:  # only now: starting the loader has drawn a number that the interrupted run had drawn before
            _set_generator_states(generators)
            generators = None
        for images, targets in batches:
            empty = False
            for reader, rows in (target["position"] for target in targets):
                state["rows"][reader], state["last"] = rows, reader
            yield images, targets
        if empty and not state["rows"]:
            raise ValueError(
                f"{loader.dataset.source} gives not one image with a valid box to train on"
            )
        state.update(epoch=state["epoch"] + 1, rows={}, last=-1)


def _gather(value: object) -> list:
    """The values of all processes, in the order of their ranks, on each of them."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def _generator_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_generator_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _say_what_was_left_out(dataset: COCOStreamDataset) -> None:
    """One line on what the stream could not use, over all processes, where there was anything."""
    skipped, dropped = (sum(_gather(count)) for count in (dataset.skipped, dataset.dropped))
    if skipped or dropped:
        rows, boxes = (
            f"{skipped} (each named in a warning)",
            f"{dropped} (not finite or without area)",
        )
        say(f"{dataset.source}: left out so far: rows {rows}, boxes {boxes}")


def train(
    model: FasterRCNN,
    loader: DataLoader,
    steps: int,
    recipe: Callable[[nn.Module, int, int], tuple] = one_cycle,
    clip_norm: float = 10.0,
    amp: str = "off",
    checkpoint_path: str | Path | None = None,
    save_every: int = 100,
    resume: bool = False,
    run: dict | None = None,
    after_step: Callable[[int, dict], None] | None = None,
) -> dict[str, list[float]]:
    """Train for a number of steps, on the device that the model is on; under torchrun, on all processes together.

    Parameters
    ----------
    model : FasterRCNN
        Only parameters with ``requires_grad`` are trained.
    loader : DataLoader
        Over a `COCOStreamDataset`, with `frcnn_collate_fn`. Epochs follow one another as needed.
    steps : int
        Steps of the whole run, those before a resume included.
    recipe : callable
        ``(model, steps, batch) -> (optimizer, schedule)``: `one_cycle` or `step_decay`. The batch is that of all
        processes.
    clip_norm : float
        Longest gradient, over all parameters together.
    amp : {"off", "bf16", "fp16"}
        Mixed precision of convolutions and matrices; boxes and losses stay float32. fp16 scales the loss, on CUDA.
    checkpoint_path, save_every
        Where and how often (steps) to save; the end is always saved.
    resume : bool
        Continue exactly where the checkpoint ends. Where there is none yet, say so and begin.
    run : dict, optional
        What the run was started with: kept in the checkpoint, and a resume with something else is refused.
    after_step : callable, optional
        ``(step, history)`` after every step, for plots and evaluations.

    Returns
    -------
    dict
        ``step``, ``lr``, ``loss`` and the four losses, a list each, over the whole run.

    Raises
    ------
    ValueError
        Bad arguments, a checkpoint that does not fit, a stream without images.
    FloatingPointError
        A loss that is not finite; names the step, the losses and the images of the batch.
    """
    rank, world = process_rank()
    if steps < 1 or save_every < 1 or amp not in ("off", "bf16", "fp16"):
        raise ValueError(
            f"steps and save_every must be at least 1 and amp off, bf16 or fp16, got {steps}, {save_every}, {amp}"
        )
    device = next(model.parameters()).device
    if amp == "fp16" and device.type != "cuda":
        raise ValueError("amp fp16 needs CUDA; on this device there is bf16")
    run = {"steps": steps, "batch": loader.batch_size, "amp": amp, "processes": world} | (run or {})
    optimizer, schedule = recipe(model, steps, loader.batch_size * world)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    parts = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if resume and checkpoint_path and Path(checkpoint_path).exists():
        history, stream, generators = _resume(checkpoint_path, model, parts, run, loader.dataset)
    else:
        history = {name: [] for name in ("step", "lr", "loss", *LOSS_NAMES)}
        stream, generators = {"epoch": 0, "rows": {}, "last": -1}, None
        if resume:
            say(f"no checkpoint at {checkpoint_path} yet: starting at step 0")
    if resume and checkpoint_path:
        _remove_torn(Path(checkpoint_path))

    model.train()
    replica = (
        nn.parallel.DistributedDataParallel(model) if world > 1 else model
    )  # averages gradients over processes
    batches = _batches(loader, stream, generators)
    start = len(history["step"])
    bar = tqdm(
        range(start + 1, steps + 1),
        initial=start,
        total=steps,
        unit="step",
        mininterval=1.0,
        disable=rank > 0,
    )
    for step in bar:
        images, targets = next(batches)
        losses, finite = _train_step(replica, images, targets, optimizer, scaler, clip_norm, amp)
        if not finite:
            ids = [target["image_id"] for target in targets]
            raise FloatingPointError(
                f"step {step}: not finite, the losses are {losses}, from the images {ids}; try a lower rate"
            )
        for name, value in ({"step": step, "lr": schedule.get_last_lr()[0]} | losses).items():
            history[name].append(value)
        schedule.step()
        bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
        if checkpoint_path and (step % save_every == 0 or step == steps):
            state = {"step": step, "run": run, "history": history}
            state["processes"] = _gather({"stream": stream, "generators": _generator_states()})
            state |= {name: part.state_dict() for name, part in parts.items()}
            if rank == 0:
                save_checkpoint(checkpoint_path, model, **state)
        if after_step:
            with torch.random.fork_rng():  # whoever watches may draw, the run goes on as if nobody had
                after_step(step, history)
            model.train()
    _say_what_was_left_out(loader.dataset)
    return history


def _resume(
    path: str | Path, model: FasterRCNN, parts: dict, run: dict, dataset: COCOStreamDataset
) -> tuple:
    """Put the run in ``path`` back into model, parts and stream; returns its history, position and generator states."""
    _, saved = load_checkpoint(path, model)
    before = saved.get("run", {})
    differing = [
        f"{key} {before.get(key)} (now {run[key]})" for key in run if before.get(key) != run[key]
    ]
    if differing:
        raise ValueError(f"{path} belongs to another run: {', '.join(differing)}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    mine = saved["processes"][process_rank()[0]]
    dataset.resume(mine["stream"] | {"rows": dict(mine["stream"]["rows"])})
    return saved["history"], mine["stream"], mine["generators"]


def _train_step(
    model: nn.Module,
    images: Tensor,
    targets: list[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip_norm: float,
    amp: str,
) -> tuple[dict[str, float], bool]:
    """Forward, backward, one step: the losses, and whether all was finite; where not, the weights are left alone."""
    device = next(model.parameters()).device
    images = images.to(device, non_blocking=True)
    targets = [
        {k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.items()}
        for target in targets
    ]
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype=dtype, enabled=amp != "off"):
        losses = model(images, targets, **sizes_without_padding(images, targets))
        loss = sum(losses.values())
    reported = torch.stack([loss, *(losses[name] for name in LOSS_NAMES)]).detach()  # [5]
    # All processes see the same figures, and stop together.
    values = dict(zip(("loss", *LOSS_NAMES), mean_over_processes(reported).tolist(), strict=True))
    if not math.isfinite(values["loss"]):
        return values, False
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    length = nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.grad is not None], clip_norm
    )
    if (
        not scaler.is_enabled() and not length.isfinite()
    ):  # an overflow of float16 is the scaler's own business
        return values, False
    scaler.step(optimizer)
    scaler.update()
    return values, True


def save_checkpoint(path: str | Path, model: FasterRCNN, **state: object) -> None:
    """Write model and state so that ``path`` is at every moment either the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"model_name": model.name, "model": model.state_dict(), **state}, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes before the name: a rename may reach the disk first
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # Where the disk is full, or Ctrl-C comes inside `torch.save`, its writer says only that bytes are missing.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        if isinstance(cause, OSError) and cause.errno:  # one without a number prints no file
            cause.filename = cause.filename or str(path)
        raise cause from None
    finally:
        temporary.unlink(missing_ok=True)


def _remove_torn(path: Path) -> None:
    """Delete what processes that were killed while they saved have left beside the checkpoint."""
    for torn in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        torn.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, model: FasterRCNN | None = None) -> tuple[FasterRCNN, dict]:
    """Read a checkpoint, tensors and plain values only: a file from elsewhere cannot run code.

    Parameters
    ----------
    path : path
        What `save_checkpoint` wrote; or torchvision's own file of COCO weights, for `coco_faster_rcnn`.
    model : FasterRCNN, optional
        Takes the weights. None: the model that the checkpoint names is built, on `DEVICE`.

    Returns
    -------
    model, state : FasterRCNN, dict
        State is all else that was saved.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; a torn or foreign one; one of another model, naming the first weights that differ.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if model is None and "roi_heads.box_head.fc6.weight" in state:
            state = {"model_name": "coco", "model": coco_from_torchvision(state)}
        name, weights = state.pop("model_name"), dict(state.pop("model"))
    except Exception as error:  # a torn zip, a pickle with code in it, another program's file: all mean the same here
        raise ValueError(
            f"{path} is no whole checkpoint of this program ({type(error).__name__})"
        ) from error
    if model is None:
        if name not in MODELS:
            raise ValueError(f"{path} holds a model called {name!r}; known are {sorted(MODELS)}")
        model = MODELS[name]().to(DEVICE)
    load_weights(model, weights, f"{path} ({name})")
    return model, state


def tiny_detector() -> FasterRCNN:
    """A trained tiny detector in eval mode: from ``checkpoints/tiny.pt``, else trained once, about a minute.

    A lock makes two notebooks that ask at the same time train it once. Where the folder cannot be written, each trains.
    """
    path = CHECKPOINTS / "tiny.pt"
    if (
        not path.exists()
    ):  # one that is there is whole: it needs no lock, which a read-only folder would refuse
        try:
            CHECKPOINTS.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{path}.lock").acquire()
        except OSError as error:
            say(f"The tiny detector is trained and not saved: {_first_line(error)}")
            return _trained_tiny_detector(None).eval()
        with lock:
            if not path.exists():
                _trained_tiny_detector(path)
    return load_checkpoint(path)[0].eval()


def _trained_tiny_detector(path: Path | None) -> FasterRCNN:
    with (
        torch.random.fork_rng()
    ):  # the caller's random numbers do not depend on whether a file was there
        torch.manual_seed(0)
        model = tiny_faster_rcnn().to(DEVICE)
        dataset = COCOStreamDataset("train", source="glyphs", image_size=TINY_IMAGE_SIZE)
        loader = DataLoader(dataset, batch_size=TINY_BATCH, collate_fn=frcnn_collate_fn)
        train(model, loader, TINY_STEPS, checkpoint_path=path, save_every=TINY_STEPS)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# 10. Evaluation
# ---------------------------------------------------------------------------------------------------------------------

COCO_FIGURES = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)


def _annotations(images: Sequence[dict], **columns: list[list]) -> list[dict]:
    """COCO's records for the boxes of ``images``; ``columns`` hold further fields, image by image, box by box."""
    records = []
    for i, image in enumerate(images):
        for k, ((x1, y1, x2, y2), label) in enumerate(
            zip(image["boxes"].tolist(), image["labels"].tolist(), strict=True)
        ):
            record = {"image_id": image["image_id"], "category_id": COCO_CATEGORY_IDS[label]}
            record |= {
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "id": len(records) + 1,
            }  # pycocotools takes id 0 for "none"
            records.append(record | {name: column[i][k] for name, column in columns.items()})
    return records


def coco_evaluation(
    truth: Sequence[dict], results: Sequence[dict], annotations: str | Path | None = None
) -> COCOeval:
    """COCO's evaluation of detections against ground truth, both in pixels of the original images.

    Parameters
    ----------
    truth : sequence of dict
        For each image ``image_id``, ``orig_size`` (height, width), ``boxes`` ``[K, 4]``, ``labels`` and ``area``.
    results : sequence of dict
        For the same images ``boxes`` ``[D, 4]``, ``scores`` and ``labels`` ``[D]``.
    annotations : path, optional
        COCO's own file, such as ``instances_val2017.json``: its objects, crowds included, replace those in ``truth``.

    Returns
    -------
    pycocotools.cocoeval.COCOeval
        Accumulated: ``.stats`` in the order of `COCO_FIGURES`, ``.eval["precision"]`` for the curves.
    """
    images = [
        {"id": t["image_id"], "height": t["orig_size"][0], "width": t["orig_size"][1]}
        for t in truth
    ]
    twice = [
        i for i, count in collections.Counter(image["id"] for image in images).items() if count > 1
    ]
    if twice:  # pycocotools would count the objects of both for each
        raise ValueError(f"{len(twice)} images come more than once, such as image_id {twice[0]}")
    categories = [
        {"id": i, "name": n} for i, n in zip(COCO_CATEGORY_IDS[1:], COCO_NAMES[1:], strict=True)
    ]
    areas = [target["area"].tolist() for target in truth]
    objects = _annotations(truth, area=areas, iscrowd=[[0] * len(area) for area in areas])
    found = [
        result | {"image_id": target["image_id"]}
        for target, result in zip(truth, results, strict=True)
    ]
    detections = _annotations(found, score=[result["scores"].tolist() for result in results])
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every stage
        try:
            coco = COCO(None if annotations is None else str(annotations))
        except (AssertionError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{annotations} is no COCO annotation file: {error}") from error
        if annotations is None:
            coco.dataset = {
                "images": images,
                "annotations": objects,
                "categories": categories,
                "info": {},
            }
            coco.createIndex()
        unknown = [image["id"] for image in images if image["id"] not in coco.imgs]
        if unknown:
            raise ValueError(
                f"{annotations} does not hold {len(unknown)} of the images, such as image_id {unknown[0]}"
            )
        if len(images) < len(coco.imgs):
            part = f"{len(images)} of the {len(coco.imgs)} images of {annotations}"
            warnings.warn(f"evaluated on {part}: not COCO's figure of record", stacklevel=2)
        none_found = COCO()  # `loadRes` does not take an empty list
        none_found.dataset = {"images": images, "annotations": [], "categories": categories}
        none_found.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections) if detections else none_found, "bbox")
        evaluation.params.imgIds = [image["id"] for image in images]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def rescale_result(result: dict, size: tuple[int, int], new_size: tuple[int, int]) -> dict:
    """A copy of ``result`` on the CPU, its boxes carried over from an image of ``size`` (height, width) to another."""
    result = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in result.items()
    }
    scale_y, scale_x = new_size[0] / size[0], new_size[1] / size[1]
    return result | {"boxes": result["boxes"] * torch.tensor([scale_x, scale_y, scale_x, scale_y])}


@torch.no_grad()
def detect(
    model: FasterRCNN, picture: PIL.Image.Image, image_size: int | tuple[int, int]
) -> dict[str, Tensor]:
    """Detections ``boxes`` ``[D, 4]``, ``scores``, ``labels`` on one RGB picture, in its own pixels, on the CPU.

    ``image_size`` is the one that the model was trained for: see `prepare_image`.
    """
    pixels, size = prepare_image(picture, image_size)
    results, _ = model.eval()(pixels[None].to(next(model.parameters()).device), image_sizes=[size])
    return rescale_result(results[0], size, (picture.height, picture.width))


@torch.no_grad()
def detect_dataset(
    model: nn.Module, dataset: COCOStreamDataset, batch_size: int = 8
) -> tuple[list[dict], list[dict]]:
    """Run the detector over a data set: ``(truth, results)`` in pixels of the originals, as `coco_evaluation` wants."""
    parameter = next(model.parameters(), torch.zeros(0))
    was_training = model.training
    model.eval()
    truth, results = [], []
    for images, targets in DataLoader(dataset, batch_size=batch_size, collate_fn=frcnn_collate_fn):
        detections, _ = model(images.to(parameter.device), **sizes_without_padding(images, targets))
        for target, found in zip(targets, detections, strict=True):
            truth.append(rescale_result(target, target["size"], target["orig_size"]))
            results.append(rescale_result(found, target["size"], target["orig_size"]))
    model.train(was_training)
    return truth, results


def evaluate(
    model: nn.Module,
    dataset: COCOStreamDataset,
    batch_size: int = 8,
    annotations: str | Path | None = None,
) -> dict[str, float]:
    """The twelve COCO figures by name (`COCO_FIGURES`); -1 where no object is of that size. See `coco_evaluation`.

    Under torchrun each process detects on its share of the images, and all get the figures of the whole.
    """
    shares = _gather(detect_dataset(model, dataset, batch_size))
    _say_what_was_left_out(dataset)
    truth, results = (
        list(itertools.chain.from_iterable(share[i] for share in shares)) for i in (0, 1)
    )
    if not truth:
        raise ValueError(f"{dataset.source} gives not one image to evaluate on")
    return dict(
        zip(COCO_FIGURES, coco_evaluation(truth, results, annotations).stats.tolist(), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# 11. Drawing
# ---------------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours without their black: apart also for colour-blind readers.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_LIGHT = 1.4  # red + green + blue of 0..1 from which black letters read better than white ones


def to_picture(image: Tensor | np.ndarray | PIL.Image.Image) -> np.ndarray:
    """What ``imshow`` takes, ``[H, W, 3]``: undoes the normalisation of a tensor ``[3, H, W]``."""
    if isinstance(image, Tensor):
        image = (
            (image.detach().cpu().float() * IMAGENET_STD + IMAGENET_MEAN)
            .clamp(0, 1)
            .permute(1, 2, 0)
        )  # [H, W, 3]
    return np.asarray(image)


def draw_boxes(
    ax: matplotlib.axes.Axes,
    image: Tensor | np.ndarray | PIL.Image.Image | None,
    boxes: Tensor | np.ndarray | Sequence,
    labels: Sequence[int] | Tensor | None = None,
    scores: Sequence[float] | Tensor | None = None,
    color: str | None = None,
    linestyle: str = "-",
    linewidth: float = 2.0,
    fontsize: float = 9.0,
) -> None:
    """Draw an image and boxes on it, each with the name of its class and its score where they are given.

    Parameters
    ----------
    ax : Axes
        Where to draw. Its axis is switched off when an image is given.
    image : Tensor ``[3, H, W]`` normalised, array ``[H, W, 3]``, picture, or None
        None: draw onto what is there.
    boxes : ``[N, 4]``
        In pixels of the image.
    labels, scores : ``[N]``, optional
        Class numbers and scores in 0..1.
    color, linestyle, linewidth, fontsize
        One colour for all boxes instead of one for each class; matplotlib's names.
    """
    if image is not None:
        pixels = to_picture(image)
        # Continuous coordinates: 0 is the edge of the picture. Without the extent it is the middle of the first pixel.
        ax.imshow(pixels, interpolation="nearest", extent=(0, pixels.shape[1], pixels.shape[0], 0))
        ax.set_axis_off()
    (left_edge, right_edge), (bottom, top) = (
        ax.get_xlim(),
        ax.get_ylim(),
    )  # rows of an image count downwards
    boxes = boxes.detach().cpu() if isinstance(boxes, Tensor) else boxes
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4).tolist()
    labels = [None] * len(boxes) if labels is None else [int(label) for label in labels]
    scores = [None] * len(boxes) if scores is None else torch.as_tensor(scores).tolist()
    for (x1, y1, x2, y2), label, score in zip(boxes, labels, scores, strict=True):
        shade = color or PALETTE[(label or 0) % len(PALETTE)]
        box = matplotlib.patches.Rectangle(
            (x1, y1),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=shade,
            linewidth=linewidth,
            linestyle=linestyle,
        )
        # A dark rim keeps every colour visible on every background.
        box.set_path_effects(
            [matplotlib.patheffects.withStroke(linewidth=linewidth + 1.5, foreground="black")]
        )
        ax.add_patch(box)
        words = [COCO_NAMES[label]] if label is not None else []
        words += [f"{score:.2f}"] if score is not None else []
        if words:
            # Above the box, from its left corner; inside or from the right corner where that would leave the picture.
            low, right = y1 < top + (bottom - top) / 10, x1 > (left_edge + right_edge) / 2
            label_box = {"facecolor": shade, "edgecolor": "none", "pad": 1.0}
            x, ha, va = (
                x2 if right else x1,
                "right" if right else "left",
                "top" if low else "bottom",
            )
            ink = "black" if sum(matplotlib.colors.to_rgb(shade)) > _LIGHT else "white"
            ax.text(
                x, y1, " ".join(words), fontsize=fontsize, color=ink, va=va, ha=ha, bbox=label_box
            )


_BLOCKS = {  # of the detector, in the order of the data, and what leaves them
    "data": "image\n[3, H, W]",
    "backbone": "C2 … C5\nstrides 4 … 32",
    "FPN": "P2 … P6\n256 channels",
    "RPN": "proposals\n[K, 4]",
    "ROI head": "scores, deltas\n[K, 81], [K, 81, 4]",
    "detections": "boxes, labels,\nscores",
}


def draw_detector(*lit: str) -> matplotlib.figure.Figure:
    """The whole detector as a chain of blocks, those named lit up: data, backbone, FPN, RPN, ROI head, detections."""
    unknown = set(lit) - set(_BLOCKS)
    if unknown:
        raise ValueError(f"no such block: {sorted(unknown)}; there are {list(_BLOCKS)}")
    figure = matplotlib.figure.Figure(figsize=(11, 1.7))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(-0.6, len(_BLOCKS) - 0.4), ylim=(0, 1))
    ax.set_axis_off()
    style = {"ha": "center", "va": "center"}
    for i, (name, output) in enumerate(_BLOCKS.items()):
        face, ink = (PALETTE[4], "white") if name in lit else ("#e8e8e8", "#555555")
        box = {
            "boxstyle": "round,pad=0.5",
            "facecolor": face,
            "edgecolor": "black" if name in lit else "#aaaaaa",
        }
        ax.text(i, 0.72, name, fontsize=15, color=ink, bbox=box, **style)
        ax.text(i, 0.22, output, fontsize=11, color="black" if name in lit else "#555555", **style)
        if i:
            ax.annotate(
                "", (i - 0.38, 0.72), (i - 0.62, 0.72), arrowprops={"arrowstyle": "->", "lw": 2}
            )
    return figure


def picture_with_detections(
    picture: PIL.Image.Image, found: dict[str, Tensor], shortest: int = 400, longest: int = 1600
) -> matplotlib.figure.Figure:
    """A figure of the picture and its boxes alone, without a frame; its long side within the two limits, pixels."""
    dpi, least = 100, 32
    scale = min(max(max(picture.size), shortest), longest) / max(picture.size)
    size = [max(least, round(side * scale)) for side in picture.size]  # width, height
    figure = matplotlib.figure.Figure(figsize=(size[0] / dpi, size[1] / dpi), dpi=dpi)
    small = picture.resize(size, PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    found = rescale_result(found, (picture.height, picture.width), (small.height, small.width))
    draw_boxes(figure.add_axes((0, 0, 1, 1)), small, **found)
    return figure


def with_sliders(draw: Callable, **controls: object) -> None:
    """Let the reader move what ``draw`` takes (ipywidgets by name); with ``$FRCNN_STILL`` draw once at their values.

    A widget is an empty box on a page that nobody runs, so `make run` and `make test` ask for the still picture.
    """
    if os.environ.get("FRCNN_STILL"):
        draw(**{name: control.value for name, control in controls.items()})
    else:
        import ipywidgets  # of notebooks alone

        ipywidgets.interact(draw, **controls)


def save_figure(figure: matplotlib.figure.Figure, name: str) -> None:
    """Write a figure to ``figures/`` (or ``$FRCNN_FIGURES``) or say why not: .jpg for scenes, .png for plots."""
    options = (
        {"pil_kwargs": {"quality": 80}}
        if name.endswith(".jpg")
        else {"metadata": {"Software": None}}
    )
    try:
        FIGURES.mkdir(parents=True, exist_ok=True)
        figure.savefig(FIGURES / name, dpi=90, bbox_inches="tight", **options)
    except (
        OSError
    ) as error:  # a read-only checkout, a full disk: the notebook shows the figure anyway
        say(f"{name} is not saved: {_first_line(error)}")


# ---------------------------------------------------------------------------------------------------------------------
# 12. Command line
# ---------------------------------------------------------------------------------------------------------------------

COCO_TRAIN_IMAGES = 118_287

# What a run of each model takes where nothing else is said; ``images`` over the whole run, ``batch`` of one process.
TRAIN_DEFAULTS = {
    "tiny": {
        "image_size": TINY_IMAGE_SIZE,
        "images": TINY_STEPS * TINY_BATCH,
        "batch": TINY_BATCH,
        "weights": "none",
    },
    "full": {
        "image_size": IMG_SIZE,
        "images": 12 * COCO_TRAIN_IMAGES,
        "batch": 16,
        "weights": "none",
    },
    "coco": {
        "image_size": (800, 1333),
        "images": 12 * COCO_TRAIN_IMAGES,
        "batch": 2,
        "weights": "coco",
    },
}
RECIPES = {"tiny": one_cycle, "full": step_decay, "coco": step_decay}
START_WEIGHTS = {
    "none": lambda model: None,
    "imagenet": load_imagenet_backbone,
    "coco": load_coco_weights,
}
_SHUFFLE_BUFFER, _FLIP = 1000, 0.5  # rows; share of mirrored images. Of a whole data set


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line instead of the usage."""
        raise ValueError(message)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return parse


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m frcnn_common",
        description="Faster R-CNN with a feature pyramid, from scratch.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    train_parser = commands.add_parser(
        "train", help="train a detector, or continue where its checkpoint ends"
    )
    train_parser.add_argument("--model", choices=sorted(MODELS), required=True)
    train_parser.add_argument(
        "--steps", type=_at_least(1), help="of the whole run (default: by model)"
    )
    train_parser.add_argument(
        "--batch", type=_at_least(1), help="images a step and process (default: by model)"
    )
    train_parser.add_argument(
        "--image-size",
        type=_at_least(1),
        help="side of the square input; coco: short side; pixels (default: by model)",
    )
    train_parser.add_argument(
        "--weights", choices=sorted(START_WEIGHTS), help="to start from (default: by model)"
    )
    train_parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    train_parser.add_argument("--seed", type=_at_least(0), default=0)
    train_parser.add_argument(
        "--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision"
    )
    train_parser.add_argument(
        "--save-every", type=_at_least(1), default=100, help="steps between checkpoints"
    )
    train_parser.add_argument(
        "--workers", type=_at_least(0), default=0, help="processes that load data"
    )
    evaluate_parser = commands.add_parser(
        "evaluate", help="the twelve COCO figures of a checkpoint"
    )
    evaluate_parser.add_argument("--split", choices=("train", "val"), default="val")
    evaluate_parser.add_argument(
        "--annotations", type=Path, help="COCO's own instances_val2017.json"
    )
    detect_parser = commands.add_parser("detect", help="draw detections on photographs")
    detect_parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="pictures, or folders of them"
    )
    detect_parser.add_argument(
        "--out", type=Path, required=True, help="folder for pictures and detections.json"
    )
    for sub in (train_parser, evaluate_parser, detect_parser):
        sub.add_argument(
            "--checkpoint",
            type=Path,
            required=True,
            help="of train; evaluate and detect take torchvision's as well",
        )
    for sub in (train_parser, evaluate_parser):
        sub.add_argument(
            "--source",
            help=f"'glyphs', a folder of parquet shards, or {HUB_SOURCE} (default: what is there)",
        )
        sub.add_argument(
            "--max-samples",
            type=_at_least(1),
            help="use only the first so many images, in their order",
        )
    return parser.parse_args(arguments)


def _train_command(args: argparse.Namespace) -> dict:
    if args.checkpoint.is_dir():
        raise ValueError(f"--checkpoint {args.checkpoint} is a folder; name a file")
    world = process_rank()[1]
    default = TRAIN_DEFAULTS[args.model]
    batch, weights = args.batch or default["batch"], args.weights or default["weights"]
    steps = args.steps or default["images"] // (batch * world)
    image_size = args.image_size or default["image_size"]
    if args.model == "coco" and args.image_size:
        shortest, longest = default["image_size"]
        image_size = (args.image_size, args.image_size * longest // shortest)
    torch.manual_seed(args.seed)
    model = MODELS[args.model]().to(DEVICE)
    if not (args.resume and args.checkpoint.exists()):
        START_WEIGHTS[weights](model)
    dataset = COCOStreamDataset("train", args.max_samples, args.source, image_size, seed=args.seed)
    if (
        dataset.source != "glyphs" and args.max_samples is None
    ):  # scenes are independent; a chosen few keep their order
        dataset.shuffle_buffer, dataset.flip = _SHUFFLE_BUFFER, _FLIP
    loader = DataLoader(
        dataset,
        batch,
        num_workers=args.workers,
        collate_fn=frcnn_collate_fn,
        pin_memory=DEVICE.type == "cuda",
    )
    run = {name: getattr(args, name) for name in ("model", "max_samples", "seed", "workers")}
    run |= {"source": dataset.source, "image_size": image_size, "weights": weights}
    started, done = time.perf_counter(), []
    history = train(
        model,
        loader,
        steps,
        RECIPES[args.model],
        amp=args.amp,
        checkpoint_path=args.checkpoint,
        save_every=args.save_every,
        resume=args.resume,
        run=run,
        after_step=lambda step, history: done.append(step),
    )
    seconds = time.perf_counter() - started
    losses = {name: history[name][-1] for name in ("loss", *LOSS_NAMES)}
    rate = len(done) * batch * world / seconds
    return {"steps": steps, "seconds": seconds, "images_per_second": rate, "losses": losses}


def _load_for_use(path: Path) -> tuple[FasterRCNN, int | tuple[int, int]]:
    """The model in a checkpoint, and the input size that it was trained for."""
    model, state = load_checkpoint(path)
    return model, state.get("run", {}).get("image_size") or TRAIN_DEFAULTS[model.name]["image_size"]


def _evaluate_command(args: argparse.Namespace) -> dict:
    if args.annotations and not args.annotations.is_file():
        raise FileNotFoundError(f"no annotations at {args.annotations}")
    model, image_size = _load_for_use(args.checkpoint)
    dataset = COCOStreamDataset(args.split, args.max_samples, args.source, image_size)
    return evaluate(model, dataset, annotations=args.annotations)


def _find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files as they are named; of a folder those with the ending of a picture, in the order of their names."""
    endings, found = PIL.Image.registered_extensions(), []
    for path in paths:
        inside = (
            sorted(p for p in path.glob("*") if p.suffix.lower() in endings)
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise FileNotFoundError(f"{path} holds no picture")
        found += inside
    return found


def _detect_command(args: argparse.Namespace) -> dict:
    """Draw every picture into ``--out`` and write one ``detections.json``; one that cannot be read costs one line."""
    model, image_size = _load_for_use(args.checkpoint)
    paths = _find_pictures(args.images)
    args.out.mkdir(parents=True, exist_ok=True)
    records = []
    for path in tqdm(paths, unit="image", disable=len(paths) == 1):
        try:
            picture = decode_image(path.read_bytes())
        except (
            Exception
        ) as error:  # of whatever kind: decoders raise SyntaxError, struct.error and more
            tqdm.write(
                f"frcnn_common: {path} is no picture that can be read: {_first_line(error)}",
                file=sys.stderr,
            )
            continue
        found = detect(model, picture, image_size)
        name = f"{len(records):04d}_{path.stem}.jpg"  # numbered: two folders may hold files of one name
        picture_with_detections(picture, found).savefig(args.out / name)
        columns = zip(
            found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
        )
        boxes = [
            {
                "box": box,
                "score": score,
                "label": COCO_NAMES[label],
                "category_id": COCO_CATEGORY_IDS[label],
            }
            for box, score, label in columns
        ]
        size = {"width": picture.width, "height": picture.height}
        records.append({"image": str(path), "drawn": name, **size, "detections": boxes})
    (args.out / "detections.json").write_text(json.dumps(records, indent=1))
    detections = sum(len(record["detections"]) for record in records)
    return {"images": len(records), "detections": detections, "failed": len(paths) - len(records)}


@contextlib.contextmanager
def _joined_processes() -> Iterator[None]:
    """Join the processes that torchrun has started, if it has."""
    if "LOCAL_RANK" in os.environ:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: the result as one JSON object on the last line of stdout, or one line on stderr and code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a path in letters that the terminal lacks is no error
    try:
        args = _parse(arguments)
        command = {
            "train": _train_command,
            "evaluate": _evaluate_command,
            "detect": _detect_command,
        }[args.command]
        with _joined_processes():
            result = command(args)
            say(json.dumps(result))
        return 2 if result.get("failed") else 0
    except (ValueError, OSError, FloatingPointError) as error:
        # Of an error that a worker passed on only the last line is the message, the rest is its traceback.
        message = str(error).strip() or type(error).__name__
        print(f"frcnn_common: error: {message.splitlines()[-1]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("frcnn_common: stopped; the last checkpoint holds", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
