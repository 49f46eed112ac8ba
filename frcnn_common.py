"""Faster R-CNN with a feature pyramid, from scratch, in one file.

The first ten parts read in the order in which data flows: constants, boxes, data set, backbone,
proposals, ROI head, detector, training, evaluation, drawing. Parts A to D are what they stand on:
where rows come from, several processes, published weights, the command line. The notebooks build
the same by hand.

Conventions, everywhere in this file:

* a box is ``(x1, y1, x2, y2)`` in pixels of the network input, continuous, no "+1" in widths;
* a size is (height, width); label 0 is background, 1.. are the categories of the data, COCO's 80
  where nothing else is said;
* in shapes, B is images, N and M boxes, K objects of one image, A anchors of one image, R boxes of
  the whole batch, C channels or classes.

Papers: Fast R-CNN (Girshick, 2015), Faster R-CNN (Ren et al., 2015), FPN (Lin et al., 2017),
ResNet (He et al., 2016), Mask R-CNN (He et al., 2017; for ROIAlign).
"""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import json
import math
import os
import re
import sys
import threading
import time
import urllib.request
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets.distributed import split_dataset_by_node
from matplotlib import colors, patches, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pyarrow import ArrowException, parquet
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

import frcnn_sources as sources
from frcnn_sources import first_line

# --------------------------------------------------------------------------------------------------
# 1. Constants
# --------------------------------------------------------------------------------------------------

IMG_SIZE = 400  # pixels, side of the input
NUM_CLASSES = 81  # background, 80 categories
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TINY_IMAGE_SIZE = 128  # pixels, on a laptop
TINY_BATCH = 8
TINY_STEPS = 380

# Statistics of ImageNet's RGB channels, scaled to 0..1: published backbones were trained with them.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # [3, 1, 1]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # [3, 1, 1]

COCO_NAMES = (
    "__background__", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck",
    "boat", "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat",
    "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

# COCO numbered 91 categories and published 80 of them; these ids were never used.
_COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS = tuple(i for i in range(91) if i not in _COCO_UNUSED_IDS)  # label -> official id


class Classes(NamedTuple):
    """What labels mean: ``names[label]``, and ``ids[label]`` as the data itself counts them."""

    names: tuple[str, ...]  # label 0 is the background
    ids: tuple[int, ...]


COCO_CLASSES = Classes(COCO_NAMES, COCO_CATEGORY_IDS)

_HERE = Path(__file__).resolve().parent
TINY_DETECTOR = _HERE / "tiny_detector.pt"  # trained on the glyph scenes: `make detector`
CHECKPOINTS = Path(os.environ.get("FRCNN_CHECKPOINTS", _HERE / "checkpoints"))

# What signatures speak of.
Size = tuple[int, int]  # height, width; pixels
ImageSize = int | tuple[int, int]  # side of a square; or (shortest, longest), the aspect kept
Sizes = Sequence[Size]
Tensors = Sequence[Tensor]
Picture = Tensor | np.ndarray | Image.Image
Targets = Sequence[dict]
Losses = dict[str, Tensor]
Norm = Callable[[int], nn.Module]  # of channels


# --------------------------------------------------------------------------------------------------
# 2. Boxes
# --------------------------------------------------------------------------------------------------


def box_area(boxes: Tensor) -> Tensor:
    """Areas ``[...]`` in square pixels of boxes ``[..., 4]``."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_sizes(boxes: Tensor) -> Tensor:
    """Width and height ``[..., 2]`` in pixels of boxes ``[..., 4]``."""
    return boxes[..., 2:] - boxes[..., :2]


def box_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Intersection over union of every box of one set with every box of another.

    Parameters
    ----------
    boxes_a, boxes_b : Tensor ``[N, 4]``, ``[M, 4]``
        Corners in the same pixels. Half precision is computed in float32: an area of 256 × 256
        overflows float16.

    Returns
    -------
    Tensor ``[N, M]``
        Values in 0..1. A pair without any area gives 0, never NaN.

    Built by hand in notebook 01.
    """
    a = boxes_a.float()[:, None]  # [N, 1, 4]
    b = boxes_b.float()  # [M, 4]
    ax1, ay1, ax2, ay2 = a.unbind(-1)  # [N, 1]
    bx1, by1, bx2, by2 = b.unbind(-1)  # [M]
    width = torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)  # [N, M]
    height = torch.minimum(ay2, by2) - torch.maximum(ay1, by1)  # [N, M]
    shared = width.clamp_(min=0).mul_(height.clamp_(min=0))  # [N, M]
    union = box_area(a) + box_area(b) - shared
    return torch.where(union > 0, shared / union, 0.0)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Move the corners of boxes ``[..., 4]`` into images of ``sizes`` ``[..., 2]`` (broadcast)."""
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

    Built by hand in notebooks 01 and 03.
    """
    proposals = proposals.float()
    gt_boxes = gt_boxes.float()
    size = box_sizes(proposals)  # [N, 2]
    gt_size = box_sizes(gt_boxes)  # [N, 2]
    centre = proposals[..., :2] + size / 2
    gt_centre = gt_boxes[..., :2] + gt_size / 2
    shift = (gt_centre - centre) / size
    deltas = torch.cat((shift, torch.log(gt_size / size)), dim=-1)  # [N, 4]
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
        ``tw`` and ``th`` are clamped from above only: a wild output must not overflow ``exp``, a
        small box may shrink.

    Returns
    -------
    Tensor ``[..., 4]``
        Boxes in pixels, not clipped to the image.

    Built by hand in notebooks 01 and 03.
    """
    anchors = anchors.float()
    deltas = deltas.float()
    deltas = deltas / deltas.new_tensor(weights)
    size = box_sizes(anchors)  # [..., 2]
    centre = anchors[..., :2] + size / 2 + deltas[..., :2] * size  # [..., 2]
    half = size * torch.exp(deltas[..., 2:].clamp(max=max_log_scale)) / 2  # [..., 2]
    return torch.cat((centre - half, centre + half), dim=-1)  # [..., 4]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: indices ``[D]`` of the kept boxes, best first.

    See `batched_nms`. Built by hand in notebook 03.
    """
    groups = torch.zeros_like(scores, dtype=torch.int64)
    return batched_nms(boxes, scores, groups, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression in which a box suppresses only boxes of its own group.

    Exact and pure PyTorch. Boxes are sorted by group, then score, and settled block by block. A
    block meets only boxes that were already kept, so no N × N matrix is built.

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

    # Sort by group, then score; number the groups 0, 1, 2, …, which are exact as floats.
    by_score = scores.argsort(descending=True, stable=True)  # [N]
    order = by_score[groups[by_score].argsort(stable=True)]  # [N]
    boxes = boxes.float()[order]  # [N, 4]
    groups = groups[order]  # [N]
    is_new = groups[1:] != groups[:-1]
    number = torch.cat((groups[:1] * 0, is_new.cumsum(0)))  # [N]
    several = len(number) > 0 and bool(number[-1] > 0)
    rows = (*boxes.unbind(1), box_area(boxes), number.float())
    rows = torch.stack(rows if several else rows[:5])  # [5 or 6, N] x1, y1, x2, y2, area, group

    kept, positions = rows[:, :0], [order[:0]]
    for start in range(0, len(order), _NMS_BLOCK):
        block = rows[:, start : start + _NMS_BLOCK]  # [6, Q]
        position = torch.arange(start, start + block.shape[1], device=order.device)  # [Q]
        # Of all boxes kept so far only those of the block's first group can matter: it is sorted.
        rivals = kept[:, kept[5] == block[5, 0]] if several else kept  # [6, P]
        for winners in rivals.split(_NMS_RIVALS, dim=1):
            free = ~_suppresses(winners, block, threshold).any(0)  # [Q]
            block = block[:, free]  # Q shrinks
            position = position[free]
        over = _suppresses(block, block, threshold)
        alive = _settled(over.triu(1))  # [Q, Q] -> [Q]
        kept = torch.cat((kept, block[:, alive]), 1)
        positions.append(position[alive])

    # Back to the order of the scores.
    is_kept = torch.zeros_like(order, dtype=torch.bool)
    is_kept[order[torch.cat(positions)]] = True
    return by_score[is_kept[by_score]]


# What fits into the cache: boxes settled together, kept ones that they meet at a time.
_NMS_BLOCK, _NMS_RIVALS = 256, 512


def _suppresses(winners: Tensor, losers: Tensor, threshold: float) -> Tensor:
    """``[P, Q]``: who overlaps whom too much; the sixth row, where there is one, is the group."""
    winners = winners[:, :, None]  # [6, P, 1]
    losers = losers[:, None]  # [6, 1, Q]
    low = winners[:2].maximum(losers[:2])  # [2, P, Q]
    sides = torch.minimum(winners[2:4], losers[2:4]).sub_(low).clamp_(min=0)  # [2, P, Q]
    shared = sides[0].mul_(sides[1])  # [P, Q]
    over = shared / (winners[4] + losers[4] - shared) > threshold  # 0/0 is NaN: not above
    return over & (winners[5] == losers[5]) if len(winners) == 6 else over


def _settled(over: Tensor) -> Tensor:
    """Who stays, ``[Q]``, where ``over[i, j]`` says that i, the better one, would suppress j.

    "Stays" means "not suppressed by one before me that stays". That sentence is applied until
    nothing changes, which gives the same answer as going box by box.
    """
    alive = ~over.any(0)  # [Q] a first guess: nobody here suppresses me
    while True:
        settled = ~(over & alive[:, None]).any(0)  # [Q]
        if torch.equal(settled, alive):
            return settled
        alive = settled


def _float32_below(threshold: float) -> float:
    """The largest float32 not above ``threshold``: ``iou > it`` decides as exact numbers do."""
    rounded = np.float32(threshold)
    below = np.nextafter(rounded, np.float32(-np.inf))
    return float(rounded if float(rounded) <= threshold else below)


# --------------------------------------------------------------------------------------------------
# 3. Data set
# --------------------------------------------------------------------------------------------------


class COCOStreamDataset(IterableDataset):
    """Stream of ``(image, target)`` from the Hub, a folder of one's own, or glyph scenes.

    Parameters
    ----------
    split : {"train", "val"}
        "validation" is taken as "val". Images without one valid box are skipped in "train" and kept
        in "val".
    max_samples : int, optional
        Use only the first so many rows, counted over all workers and ranks together.
    source : str, optional
        A data set of the Hub ("detection-datasets/coco"), a folder (see `open_source`), or
        "glyphs". None: ``$FRCNN_DATA``, else the Hub's COCO, else, where the Hub does not answer,
        the glyph scenes, said in one line.
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
    val_share : float
        Share of a folder with one annotation file only that is "val" and not "train", 0..1.

    Attributes
    ----------
    classes : Classes
        Names and ids of the labels.
    images : int or None
        Rows of the split, where that is known beforehand.

    Yields
    ------
    image : Tensor float32 ``[3, H, W]``
        ImageNet-normalised.
    target : dict
        ``boxes`` float32 ``[K, 4]`` in pixels of the output, ``labels`` int64 ``[K]`` from 1 on,
        ``area`` float32 ``[K]`` in square pixels of the original (COCO's, of the segmentation),
        ``iscrowd`` bool ``[K]`` (never true in "train"), ``image_id`` int, ``size`` and
        ``orig_size`` (height, width) of output and original, ``position`` (worker, rows that it has
        read of this epoch): where to resume.
    """

    def __init__(
        self,
        split: str = "train",
        max_samples: int | None = None,
        source: str | None = None,
        image_size: ImageSize = IMG_SIZE,
        shuffle_buffer: int = 0,
        seed: int = 0,
        flip: float = 0.0,
        bbox_format: str | None = None,
        val_share: float = 0.2,
    ) -> None:
        super().__init__()
        self.split = {"validation": "val"}.get(split, split)
        if self.split not in ("train", "val"):
            raise ValueError(f"split is {split!r}; there are 'train' and 'val'")
        if np.min(image_size) < 1 or (max_samples is not None and max_samples < 1):
            wanted = "max_samples and image_size must be at least 1"
            raise ValueError(f"{wanted}, got {max_samples} and {image_size}")
        self.max_samples = max_samples
        self.image_size = image_size
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.flip = flip
        self.epoch = 0
        self._resume = {}
        self.rank, self.world = process_rank()
        # Rows and boxes that were left out: each worker counts in its own cell of shared memory.
        self._left_out = torch.zeros(2, _MOST_WORKERS, dtype=torch.int64).share_memory_()
        self.source = str(source or os.environ.get("FRCNN_DATA") or hub_or_glyphs())
        opened = open_source(self.source, self.split, val_share)
        self.rows, self.classes, self.images = opened
        self.bbox_format = bbox_format or find_bbox_format(self.rows, self.source, self.classes)

    def __iter__(self) -> Iterator[tuple[Tensor, dict]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        done, state = 0, self._resume
        if state and state["epoch"] == self.epoch:
            worker = (worker + state["last"] + 1) % workers
            done = state["rows"].get(worker, 0)
        # In this order n processes take, step by step, what one takes with n times the batch.
        rows = self._rows(self.rank * workers + worker, self.world * workers)
        for count, row in enumerate(rows, 1):
            if count <= done:
                continue
            row = self.rendered(row)
            try:
                image, target, bad_boxes = self._sample(row)
            except Exception as error:  # of whatever kind: decoders raise SyntaxError and more
                self._left_out[0, worker % _MOST_WORKERS] += 1
                file = f" ({row['image']})" if isinstance(row.get("image"), str) else ""
                what = f"image_id {row.get('image_id')}{file} skipped"
                warnings.warn(f"{what}: {first_line(error)}", stacklevel=2)
                continue
            if bad_boxes:
                self._left_out[1, worker % _MOST_WORKERS] += bad_boxes
                what = f"image_id {target['image_id']}: {bad_boxes} boxes left out"
                warnings.warn(f"{what}, not finite or without area", stacklevel=2)
            if len(target["boxes"]) or self.split == "val":
                yield image, target | {"position": (worker, count)}

    def _sample(self, row: dict) -> tuple[Tensor, dict, int]:
        """Image and target of one row, and how many of its boxes were left out."""
        image, found = read_row(row, self.bbox_format, len(self.classes.names))
        image_id = found["image_id"]
        boxes = found["boxes"]  # [K, 4] in pixels of the original

        # Mirror: continuous coordinates, so x' = W - x and no "- 1".
        rng = np.random.default_rng((self.seed, self.epoch, abs(image_id)))
        if rng.random() < self.flip:
            image = ImageOps.mirror(image)
            boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]

        # Resize both.
        pixels, (height, width) = prepare_image(image, self.image_size)  # [3, H, W]
        boxes *= np.array([width, height] * 2)
        boxes /= np.array(image.size * 2)
        boxes = boxes.astype(np.float32)

        # Leave out boxes without width or height, whose logarithm is asked for, and NaN; crowds,
        # which are no objects to learn from.
        valid = (box_sizes(boxes) > 0).all(1)  # [K]
        bad = int((~valid).sum())
        if self.split == "train":
            valid &= ~found["iscrowd"]
        columns = found | {"boxes": boxes}
        names = ("boxes", "labels", "area", "iscrowd")
        target = {name: torch.from_numpy(columns[name][valid]) for name in names}
        target["image_id"] = image_id
        target["size"] = (height, width)
        target["orig_size"] = (image.height, image.width)
        return pixels, target, bad

    def rendered(self, row: dict) -> dict:
        """The row; of the glyph scenes, whose rows hold a number alone, the scene drawn now."""
        if self.source == "glyphs":
            return sources.render_glyph_scene(row["image_id"], int(np.min(self.image_size)))
        return row

    def _rows(self, reader: int, readers: int) -> Iterator[dict]:
        """This reader's share of the epoch's rows: each row goes to exactly one reader."""
        stream = self.rows
        if self.max_samples is not None:
            stream = stream.take(self.max_samples)
        if self.shuffle_buffer:
            # One shard at a time: several are read in threads, whose end `datasets` awaits for 5 s.
            stream = stream.shuffle(
                seed=self.seed, buffer_size=self.shuffle_buffer, max_buffer_input_shards=1
            )
        # Whole shards for each where they divide evenly; else all read the same and take turns.
        by_shard = self.max_samples is None and stream.num_shards % readers == 0
        strategy = "shards" if by_shard else "examples"
        stream = split_dataset_by_node(stream, reader, readers, strategy=strategy)
        if self.shuffle_buffer:
            stream.set_epoch(self.epoch)  # last: all methods above return a stream at epoch 0 again
        yield from rows_of(stream, self.source)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass. Epochs count from 0; call it before iterating."""
        self.epoch = epoch

    def resume(self, state: dict) -> None:
        """Continue inside an epoch behind the samples that were used.

        ``state`` holds ``epoch``, ``rows`` {worker: rows that it has read} and ``last``, the worker
        of the last batch. A `DataLoader` starts with worker 0, so on this one epoch worker 0 takes
        the part of the worker that was next. Rows before the position are read again and thrown
        away without decoding them: the shuffle buffer is what it was, no sample is lost or doubled.
        """
        self.epoch = state["epoch"]
        self._resume = state

    @property
    def skipped(self) -> int:
        """Rows that could not be used, so far, in this process and its workers."""
        return int(self._left_out[0].sum())

    @property
    def dropped(self) -> int:
        """Boxes left out, not finite or without area, so far, in this process and its workers."""
        return int(self._left_out[1].sum())


_MOST_WORKERS = 256  # that count apart


def prepare_image(
    image: Image.Image, image_size: ImageSize, multiple: int = 32
) -> tuple[Tensor, Size]:
    """An RGB picture as normalised network input ``[3, H, W]``, and its size without padding.

    Parameters
    ----------
    image : PIL image
        RGB.
    image_size : int, or (shortest, longest)
        A number: a square of that side, as the lessons use it. A pair: the aspect is kept, the
        short side becomes ``shortest`` unless the long one would exceed ``longest``; resized as the
        published weights expect it, bilinear without antialiasing, sizes rounded down.
    multiple : int
        What keeps its aspect is padded, right and below, to a multiple of this: the coarsest stride
        of the backbone.
    """
    if isinstance(image_size, int):
        size = (image_size, image_size)
        return image_to_tensor(image, size), size
    shortest, longest = image_size
    scale = min(shortest / min(image.size), longest / max(image.size))
    width, height = (max(1, math.floor(side * scale)) for side in image.size)
    pixels = image_to_tensor(image)[None]  # [1, 3, H, W]
    pixels = F.interpolate(pixels, (height, width), mode="bilinear")[0]
    padding = (0, -width % multiple, 0, -height % multiple)
    return F.pad(pixels, padding), (height, width)  # with 0, the mean


def image_to_tensor(image: Image.Image, size: Size | None = None) -> Tensor:
    """An RGB picture as float32 ``[3, H, W]``, normalised with ImageNet's statistics.

    With ``size`` it is resized first, as Pillow's bilinear filter does, in a quarter of the time.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]
    if size not in (None, tuple(pixels.shape[1:])):
        pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    return pixels.float().mul_(1 / (255 * IMAGENET_STD)).sub_(IMAGENET_MEAN / IMAGENET_STD)


def frcnn_collate_fn(batch: list[tuple[Tensor, dict]]) -> tuple[Tensor, list[dict]]:
    """Stack the images to ``[B, 3, H, W]``, smaller ones padded with 0, the mean, right and below.

    The targets stay a list, since each image has its own number of objects.
    """
    images, targets = zip(*batch, strict=True)
    if len({image.shape for image in images}) > 1:
        height = max(image.shape[1] for image in images)
        width = max(image.shape[2] for image in images)
        images = [F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
    return torch.stack(images), list(targets)


def sizes_without_padding(images: Tensor, targets: Targets) -> dict[str, list]:
    """``{"image_sizes": …}`` for `FasterRCNN.forward` where an image is padded, else ``{}``."""
    sizes = [t["size"] for t in targets]
    return {} if all(s == tuple(images.shape[-2:]) for s in sizes) else {"image_sizes": sizes}


# --------------------------------------------------------------------------------------------------
# 4. Backbone
# --------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Residual block 1×1 → 3×3 → 1×1 (ResNet, section 4.1), with the stride on the 3×3 convolution.

    Parameters
    ----------
    in_ch, out_ch : int
        Channels that come in; channels of the 3×3 convolution. ``expansion · out_ch`` go out.
    stride : int
        Of the 3×3 convolution, as torchvision's weights want it (the original: on the first 1×1).
    downsample : Module, optional
        Brings the shortcut to the output's shape.
    norm : callable
        Channels → normalisation layer.

    Built by hand in notebook 02.
    """

    expansion = 4

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm: Norm = nn.BatchNorm2d,
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


class ResNet50(nn.Module):
    """The backbone: stem and four stages of 3, 4, 6 and 3 bottlenecks (ResNet, table 1).

    Parameters
    ----------
    width : int
        Channels of the stem, 64 in the paper. All other channel counts scale with it.
    norm : callable
        Channels → normalisation layer: `FrozenBatchNorm2d` for published weights, live batch norm
        from scratch.
    frozen_stages : int
        How many of stem, layer1, … layer4 do not learn: 1 freezes the stem. Their batch statistics
        stand still as well.
    checkpointing : bool
        In training, keep only the input of each learning stage and compute its inside again on the
        way back.

    Built by hand in notebook 02.
    """

    def __init__(
        self,
        width: int = 64,
        norm: Norm = nn.BatchNorm2d,
        frozen_stages: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.layer1 = _stage(width, width, depth=3, stride=1, norm=norm)
        self.layer2 = _stage(4 * width, 2 * width, depth=4, stride=2, norm=norm)
        self.layer3 = _stage(8 * width, 4 * width, depth=6, stride=2, norm=norm)
        self.layer4 = _stage(16 * width, 8 * width, depth=3, stride=2, norm=norm)
        self.out_channels = [4 * width, 8 * width, 16 * width, 32 * width]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # Every block begins as its shortcut (Goyal et al., 2017, section 5.1).
            if isinstance(module, Bottleneck) and isinstance(module.bn3, nn.BatchNorm2d):
                nn.init.zeros_(module.bn3.weight)

        self.checkpointing = checkpointing
        self.freeze(frozen_stages)
        self.has_weights = False
        self.register_load_state_dict_post_hook(lambda net, _: setattr(net, "has_weights", True))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, 3, H, W]`` → ``(C2, C3, C4, C5)`` at strides 4, 8, 16, 32."""
        self._warn_of_frozen_noise()
        maps = []
        for stage in self.stages():
            learns = stage.training and torch.is_grad_enabled() and stage is not self.stem
            x = _computed_again(stage, x) if self.checkpointing and learns else stage(x)
            maps.append(x)
        return tuple(maps[1:])

    def stages(self) -> tuple[nn.Module, ...]:
        """Stem and the four layers, in order."""
        return (self.stem, self.layer1, self.layer2, self.layer3, self.layer4)

    def freeze(self, stages: int) -> None:
        """From now on the first so many of `stages` do not learn, and the others do."""
        self.frozen = self.stages()[:stages]
        for stage in self.stages():
            stage.requires_grad_(stage not in self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> ResNet50:
        """As in `nn.Module`, but frozen stages stay in eval mode: their statistics stand still."""
        super().train(mode)
        for stage in self.frozen:
            stage.eval()
        return self

    def _warn_of_frozen_noise(self) -> None:
        if self.training and self.frozen and not self.has_weights:
            what = "training with frozen stages of random weights"
            warnings.warn(f"{what}: load weights or freeze nothing", stacklevel=3)
            self.has_weights = True  # once


def _stage(in_ch: int, inner: int, depth: int, stride: int, norm: Norm) -> nn.Sequential:
    """``depth`` bottlenecks; the first one has the stride and a convolution in its shortcut."""
    outer = inner * Bottleneck.expansion
    shortcut = nn.Sequential(nn.Conv2d(in_ch, outer, 1, stride, bias=False), norm(outer))
    blocks = [Bottleneck(in_ch, inner, stride, shortcut, norm)]
    for _ in range(depth - 1):
        blocks.append(Bottleneck(outer, inner, norm=norm))
    return nn.Sequential(*blocks)


def _computed_again(stage: nn.Module, x: Tensor) -> Tensor:
    """The stage's output, its inside not kept. The second pass does not move running statistics."""

    def contexts() -> tuple:
        return contextlib.nullcontext(), _running_statistics_held(stage)

    return checkpoint(stage, x, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Batch norm inside uses its batch but does not learn from it."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine part are constants: a scale and a shift a channel.

    Detection batches are too small for batch statistics, so published detectors keep ImageNet's.
    The COCO weights of torchvision want ``eps=0``. Built by hand in notebook 02.
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
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


class FPN(nn.Module):
    """Feature pyramid (FPN, section 3): every level gets strong features at its own resolution.

    Parameters
    ----------
    in_channels : four ints
        Channels of C2 … C5.
    out_channels : int
        Channels of every level of the pyramid.

    Built by hand in notebook 02.
    """

    def __init__(
        self, in_channels: Sequence[int] = (256, 512, 1024, 2048), out_channels: int = 256
    ) -> None:
        super().__init__()
        self.out_channels = out = out_channels
        self.lateral = nn.ModuleList(nn.Conv2d(c, out, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(out, out, 3, padding=1) for _ in in_channels)
        for conv in [*self.lateral, *self.output]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Tensors) -> list[Tensor]:
        """``(C2, C3, C4, C5)`` → ``[P2, P3, P4, P5, P6]``, all with ``out_channels`` channels."""
        laterals = [conv(feature) for conv, feature in zip(self.lateral, features, strict=True)]
        merged = [laterals[-1]]
        for lateral in laterals[-2::-1]:
            # To the very size of the finer map: with odd sizes a factor of 2 does not add up.
            above = F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest")
            merged.insert(0, lateral + above)
        pyramid = [conv(level) for conv, level in zip(self.output, merged, strict=True)]
        p6 = F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)  # every second cell of P5
        return [*pyramid, p6]


# --------------------------------------------------------------------------------------------------
# 5. Proposals
# --------------------------------------------------------------------------------------------------


class AnchorGenerator(nn.Module):
    """The boxes that the RPN starts from: a size a level, every ratio at every cell (FPN, 4.1).

    Parameters
    ----------
    anchor_sizes : ints
        Square root of the area, pixels, one for each level.
    aspect_ratios : floats
        Width / height. (Published detectors mean height / width: see ``inverse_ratios``.)
    strides : ints, optional
        Pixels from cell to cell, one for each level. None: image size // grid size, as torchvision
        does it; for P6 that is not 64 unless the image's sides divide by 64.
    offset : float
        Where the centre sits in its cell: 0.5 the middle, 0 the top left corner, as published
        weights want it.
    inverse_ratios : bool
        Read ``aspect_ratios`` as height / width.
    rounded : bool
        Round the corners of the anchor at the origin, as torchvision does.

    Built by hand in notebook 03 and, in NumPy, in the anchor walkthrough.
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
        self.anchor_sizes = anchor_sizes
        self.aspect_ratios = aspect_ratios
        self.strides = strides
        self.offset = offset
        self.inverse_ratios, self.rounded = inverse_ratios, rounded

    def forward(self, feature_maps: Tensors, image_size: Size) -> Tensor:
        """Anchors ``[A, 4]`` in pixels: level after level, row after row, ratio fastest."""
        anchors = []
        levels = zip(feature_maps, self.anchor_sizes, strict=True)
        for level, (feature, size) in enumerate(levels):
            rows, columns = feature.shape[-2:]
            if self.strides is None:
                height, width = image_size
                stride_y, stride_x = height // rows, width // columns
            else:
                stride_y = stride_x = self.strides[level]
            y = (torch.arange(rows) + self.offset) * stride_y  # [rows]
            x = (torch.arange(columns) + self.offset) * stride_x  # [columns]
            y, x = torch.meshgrid(y, x, indexing="ij")  # 2 × [rows, columns]
            shifts = torch.stack((x, y, x, y), dim=-1)[:, :, None]  # [rows, columns, 1, 4]
            boxes = shifts + self.base_anchors(size)  # [rows, columns, R, 4]
            anchors.append(boxes.reshape(-1, 4))  # [rows · columns · R, 4]
        return torch.cat(anchors).to(feature_maps[0].device)

    def base_anchors(self, size: float) -> Tensor:
        """``[R, 4]``: one box for each ratio, area ``size²``, centred at the origin."""
        ratio = torch.tensor(self.aspect_ratios, dtype=torch.float32)  # [R]
        if self.inverse_ratios:
            ratio = 1 / ratio
        root = ratio.sqrt()
        sides = torch.stack((root, 1 / root), 1)  # [R, 2]
        half = size / 2 * sides  # [R, 2]
        boxes = torch.cat((-half, half), 1)  # [R, 4]
        return boxes.round() if self.rounded else boxes


class RPNHead(nn.Module):
    """A shared 3×3 convolution and two 1×1 siblings: objectness and box deltas of every anchor.

    Parameters
    ----------
    in_ch, k : int
        Channels of the pyramid; anchors of a cell.

    Built by hand in notebook 03.
    """

    def __init__(self, in_ch: int = 256, k: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_ch, in_ch, 3, padding=1)
        self.objectness = nn.Conv2d(in_ch, k, 1)
        self.deltas = nn.Conv2d(in_ch, 4 * k, 1)
        for conv in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of the pyramid → logits ``[B, H · W · k]``, deltas ``[B, H · W · k, 4]`` of each."""
        logits, deltas = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature), inplace=True)  # [B, C, H, W]
            # Channels last, then flat: the order of the anchors, row after row, ratio fastest.
            score = self.objectness(hidden).permute(0, 2, 3, 1)  # [B, H, W, k]
            shift = self.deltas(hidden).permute(0, 2, 3, 1)  # [B, H, W, 4 · k]
            logits.append(score.flatten(1))  # [B, HW · k]
            deltas.append(shift.reshape(len(feature), -1, 4))  # [B, HW · k, 4]
        return logits, deltas


class RegionProposalNetwork(nn.Module):
    """Where could an object be? Scores and shifts all anchors, keeps the best (Faster R-CNN, 3.1).

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

    Built by hand in notebook 03.
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
        self.head = head
        self.anchor_gen = anchor_gen
        self.pre_nms, self.post_nms = pre_nms, post_nms
        self.nms_thr = nms_thr
        self.min_sz = min_sz
        self.max_log_scale = max_log_scale

    def forward(
        self,
        features: Tensors,
        image_size: Size,
        targets: Targets | None = None,
        image_sizes: Sizes | None = None,
    ) -> tuple[list[Tensor], Losses]:
        """Proposals ``[K_i, 4]`` of each image, best first; in training ``rpn_cls``, ``rpn_box``.

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
            Of each image without its padding: what boxes are clipped to. Default: ``image_size``.
        """
        logits, deltas = self.head(features)
        counts = [x.shape[1] for x in logits]
        logits = torch.cat(logits, 1).float()  # [B, A]
        deltas = torch.cat(deltas, 1).float()  # [B, A, 4]
        anchors = self.anchor_gen(features, image_size)  # [A, 4]
        sizes = image_sizes or [image_size] * len(logits)
        sizes = torch.tensor(sizes, device=logits.device)  # [B, 2]
        proposals = self.propose(anchors, logits.detach(), deltas.detach(), counts, sizes)
        losses = self.losses(anchors, logits, deltas, targets) if self.training else {}
        return proposals, losses

    def propose(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, counts: Sequence[int], sizes: Tensor
    ) -> list[Tensor]:
        """Steps 2 and 3 of `forward`: ``[A, 4]``, ``[B, A]``, ``[B, A, 4]`` → ``[K_i, 4]`` each."""
        limits = (self.pre_nms, self.post_nms)
        mode = 0 if self.training else 1
        pre_nms, post_nms = (n if isinstance(n, int) else n[mode] for n in limits)

        # The best anchors of each level.
        chosen, levels, start = [], [], 0
        for level, scores in enumerate(logits.split(list(counts), dim=1)):
            best = scores.topk(min(pre_nms, counts[level]), dim=1).indices + start  # [B, k]
            chosen.append(best)
            levels.append(torch.full_like(best, level))
            start += counts[level]
        chosen = torch.cat(chosen, 1)  # [B, T]
        levels = torch.cat(levels, 1)  # [B, T]

        # Their boxes.
        scores = logits.gather(1, chosen).sigmoid()
        best_deltas = deltas.gather(1, chosen[..., None].expand(-1, -1, 4))  # [B, T, 4]
        boxes = decode_boxes(anchors[chosen], best_deltas, max_log_scale=self.max_log_scale)
        boxes = clip_boxes(boxes, sizes[:, None])
        big_enough = (box_sizes(boxes) >= self.min_sz).all(dim=-1)  # [B, T]

        # One NMS for all images and levels.
        images = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(levels)
        images, levels = images[big_enough], levels[big_enough]  # 2 × [S]
        boxes, scores = boxes[big_enough], scores[big_enough]  # [S, 4], [S]
        groups = images * len(counts) + levels
        keep = batched_nms(boxes, scores, groups, self.nms_thr)
        best = [keep[images[keep] == i][:post_nms] for i in range(len(logits))]
        return [boxes[i] for i in best]

    def losses(self, anchors: Tensor, logits: Tensor, deltas: Tensor, targets: Targets) -> Losses:
        """Binary cross-entropy and smooth L1 over the sampled anchors, divided by their number."""
        sampled, labels, predicted, expected = [], [], [], []
        generators = sampling_generators(targets, logits.device)
        for image, (target, generator) in enumerate(zip(targets, generators, strict=True)):
            gt_boxes = target["boxes"]
            label, matched = match_boxes(anchors, gt_boxes, self.POS_THR, self.NEG_THR, True)
            positives, negatives = sample_boxes(label, self.RPN_BATCH, self.POS_FRAC, generator)
            both = torch.cat((positives, negatives))  # [s]
            sampled.append(logits[image, both])
            labels.append(label[both])
            predicted.append(deltas[image, positives])
            expected.append(encode_boxes(anchors[positives], gt_boxes[matched[positives]]))
        logits, labels = torch.cat(sampled), torch.cat(labels).float()  # 2 × [S]
        cls = F.binary_cross_entropy_with_logits(logits, labels)
        box = smooth_l1(torch.cat(predicted), torch.cat(expected))
        return {"rpn_cls": cls, "rpn_box": box / max(1, len(labels))}


def smooth_l1(predicted: Tensor, expected: Tensor) -> Tensor:
    """Sum over regression targets ``[P, 4]`` (Fast R-CNN, equation 3), quadratic below 1/9."""
    return F.smooth_l1_loss(predicted, expected, beta=1 / 9, reduction="sum")


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, pos_thr: float, neg_thr: float, best_is_positive: bool
) -> tuple[Tensor, Tensor]:
    """Give each box the object that it overlaps most, and a label (Faster R-CNN, section 3.1.2).

    Parameters
    ----------
    boxes, gt_boxes : Tensor ``[N, 4]``, ``[K, 4]``
        Pixels. K may be 0: then every box is background.
    pos_thr, neg_thr : float
        IoU from which a box is positive, and below which it is negative; between, it is ignored.
    best_is_positive : bool
        Also take every box that ties for some object's best IoU, however low that is.

    Returns
    -------
    labels : Tensor int64 ``[N]``
        1 positive, 0 negative, -1 ignored.
    matched : Tensor int64 ``[N]``
        Index of the object in ``gt_boxes``; of meaning for positives.

    Built by hand in notebook 01.
    """
    if not len(gt_boxes):  # nothing has no maximum
        background = torch.zeros_like(boxes[:, 0], dtype=torch.int64)  # [N]
        return background, background.clone()
    iou = box_iou(gt_boxes, boxes)  # [K, N]
    best, matched = iou.max(dim=0)  # [N], [N]
    labels = torch.full_like(matched, -1)  # [N]
    labels[best < neg_thr] = 0
    labels[best >= pos_thr] = 1
    if best_is_positive:
        best_of_object = iou.amax(dim=1, keepdim=True)  # [K, 1]
        # An object that nothing touches would tie with every box, at 0.
        ties = (iou == best_of_object) & (best_of_object > 0)  # [K, N]
        labels[ties.any(dim=0)] = 1
    return labels, matched


def sample_boxes(
    labels: Tensor, size: int, pos_frac: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw at random at most ``size · pos_frac`` positives, and negatives to fill up to ``size``.

    Returns
    -------
    positives, negatives : Tensor int64
        Indices into ``labels`` ``[N]`` (1 or more: positive, 0: negative, -1: never drawn).

    Built by hand in notebook 01.
    """
    positives = (labels > 0).nonzero()[:, 0]
    negatives = (labels == 0).nonzero()[:, 0]
    num_positives = min(len(positives), int(size * pos_frac))
    num_negatives = min(len(negatives), size - num_positives)
    draw = functools.partial(torch.randperm, device=labels.device, generator=generator)
    positives = positives[draw(len(positives))[:num_positives]]
    negatives = negatives[draw(len(negatives))[:num_negatives]]
    return positives, negatives


def sampling_generators(targets: Targets, device: torch.device) -> list[torch.Generator]:
    """A source of random numbers for each image, which does not depend on the rest of the batch.

    Several processes with a part of the batch each then draw what one draws with all of it.
    """
    drawn = int(torch.randint(2**32, ()))  # another number in each step
    spread, seeds = 2_654_435_761, 2**32  # a CPU generator reads 32 bits
    ids = [int(target.get("image_id", i)) for i, target in enumerate(targets)]
    numbers = [(drawn + spread * image_id) % seeds for image_id in ids]
    return [torch.Generator(device).manual_seed(number) for number in numbers]


# --------------------------------------------------------------------------------------------------
# 6. ROI head
# --------------------------------------------------------------------------------------------------


class ROIAlign(nn.Module):
    """Features of one size for boxes of any size, from the level that suits (Mask R-CNN, 3).

    Every output cell averages ``sampling²`` bilinear samples, so it is a weighted sum of ``4 ·
    sampling²`` feature vectors. With all levels of all images in one table of vectors, that is a
    single weighted `embedding_bag`, and its backward pass scatters into the table: no loop over
    levels or boxes, no feature map per box.

    Parameters
    ----------
    out_size : int
        Cells on a side of the output.
    k0, k_min, k_max : int
        ``level = floor(k0 + log2(sqrt(area) / 224))``, clamped (FPN, equation 1).
    sampling : int
        Samples of a bin on each axis.
    aligned : bool
        True: pixel centres lie at half-integers, so half a pixel is taken off. False: torchvision's
        FPN models.
    level_eps : float
        Added before the floor; torchvision uses 1e-6.

    Built by hand in notebook 04, as a loop and as one sum.
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
        self.out_size = out_size
        self.k0, self.k_min, self.k_max = k0, k_min, k_max
        self.sampling = sampling
        self.aligned = aligned
        self.level_eps = level_eps

    def forward(self, fmaps: Tensors, proposals: Tensors, image_size: Size) -> Tensor:
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
        self._check_maps(fmaps, image_size)
        boxes = torch.cat([*proposals]).float()  # [R, 4]
        level = self.assign_levels(boxes)  # [R]
        device, channels = boxes.device, fmaps[0].shape[1]

        # One table of feature vectors, and the row of it where the map of each box begins.
        table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in fmaps])  # [ΣBHW, C]
        grids = torch.tensor([[f.shape[3], f.shape[2]] for f in fmaps], device=device)  # [L, 2]
        cells = grids.prod(1)  # [L] an image
        first_of_level = (cells * len(fmaps[0])).cumsum(0) - cells * len(fmaps[0])  # [L]
        first = first_of_level[level] + image_of_box(proposals) * cells[level]  # [R]

        # What each bin reads: along x and along y, then every pair of the two.
        strides = 2.0 ** torch.arange(self.k_min, self.k_min + len(fmaps), device=device)  # [L]
        at, weights = self.cells_and_weights(boxes, strides[level], grids[level])
        (x, y), (wx, wy) = at.unbind(1), weights.unbind(1)  # 4 × [R, out, 2S]
        y = first[:, None, None] + y * grids[level, 0, None, None]  # [R, out, 2S]
        index = y[:, :, None, :, None] + x[:, None, :, None, :]  # [R, out, out, 2S, 2S]
        weight = wy[:, :, None, :, None] * wx[:, None, :, None, :]  # [R, out, out, 2S, 2S]

        taps = (2 * self.sampling) ** 2
        index = index.reshape(-1, taps)  # [R · out · out, taps]
        weight = weight.reshape(-1, taps)
        pooled = F.embedding_bag(index, table.float(), per_sample_weights=weight, mode="sum")
        pooled = pooled.view(-1, self.out_size, self.out_size, channels)
        return pooled.permute(0, 3, 1, 2)  # [R, out, out, C] -> [R, C, out, out]

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Index ``[N]`` into the list of maps (0 is ``k_min``) for boxes ``[N, 4]`` in pixels."""
        size = box_area(boxes).sqrt() / self.canonical_size  # [N]
        level = self.k0 + torch.log2(size) + self.level_eps
        return level.floor().clamp(self.k_min, self.k_max).long() - self.k_min

    def cells_and_weights(
        self, boxes: Tensor, strides: Tensor, grids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cells that each bin reads, and weights, by axis: ``[R, 2 (x, y), out, 2 · sampling]``."""
        # Where to sample: inside the bins, never on their edges.
        points = self.out_size * self.sampling
        at = (torch.arange(points, device=boxes.device) + 0.5) / points  # [P]
        boxes = boxes / strides[:, None] - (0.5 if self.aligned else 0.0)  # [R, 4] in cells
        size = box_sizes(boxes)  # [R, 2]
        size = size if self.aligned else size.clamp(min=1)
        position = boxes[:, :2, None] + size[..., None] * at  # [R, 2, P]

        # The two cells on either side of it, the nearer one with more weight; outside 0.
        last = grids[..., None] - 1  # [R, 2, 1]
        inside = (position >= -1) & (position <= last + 1)
        position = position.clamp(min=0).minimum(last)
        low = position.floor()
        high_share = position - low
        cells = torch.stack((low, torch.minimum(low + 1, last)), dim=-1).long()  # [R, 2, P, 2]
        weights = torch.stack((1 - high_share, high_share), dim=-1)  # [R, 2, P, 2]
        weights = weights * inside[..., None] / self.sampling
        shape = (len(boxes), 2, self.out_size, 2 * self.sampling)
        return cells.reshape(shape), weights.reshape(shape)

    def _check_maps(self, fmaps: Tensors, image_size: Size) -> None:
        for k, fmap in enumerate(fmaps, start=self.k_min):
            grid = tuple(fmap.shape[-2:])
            if any(abs(side / 2**k - n) >= 1 for side, n in zip(image_size, grid, strict=True)):
                of_level = f"level {k} of an image of {image_size}"
                raise ValueError(f"a map of {grid} cells is not {of_level}")


def image_of_box(boxes: Tensors) -> Tensor:
    """``[R]``: which image each box comes from, for a list of ``[K_i, 4]`` over the images."""
    counts = torch.tensor([len(b) for b in boxes], device=boxes[0].device)
    return torch.repeat_interleave(counts)


class TwoMLPHead(nn.Module):
    """Two fully connected layers on the flattened features of a box.

    Parameters
    ----------
    in_channels, fc_dim : int
        Features of a box, flattened; width of both layers.

    Built by hand in notebook 04.
    """

    def __init__(self, in_channels: int = 256 * 7 * 7, fc_dim: int = 1024) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, fc_dim)
        self.fc2 = nn.Linear(fc_dim, fc_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[R, C, H, W]`` → ``[R, fc_dim]``."""
        if x.device.type == "cpu" and not self.training:
            # The same sum as a convolution whose kernel covers the whole map: quicker for the
            # thousand boxes of an image, though not for a hundred. It needs more memory.
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

    Built by hand in notebook 04.
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


# --------------------------------------------------------------------------------------------------
# 7. Detector
# --------------------------------------------------------------------------------------------------


class FasterRCNN(nn.Module):
    """Backbone → pyramid → proposals → pooled boxes → classes and refined boxes.

    Parameters
    ----------
    num_classes : int
        With background. What they are called, ``classes``, `train` takes from the data.
    backbone, fpn, rpn, roi_align, box_head : Module, optional
        The parts. Default: the sizes of the FPN paper on a ResNet-50 with frozen batch norm whose
        stem and layers 1–3 do not learn: load weights into it.
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
    name = "full"  # in checkpoints

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
        self.num_classes = num_classes
        self.classes = COCO_CLASSES if num_classes == NUM_CLASSES else None
        self.box_weights = tuple(box_weights)
        self.max_log_scale = max_log_scale
        self.min_detection = min_detection
        self.backbone = backbone or ResNet50(norm=FrozenBatchNorm2d, frozen_stages=4)
        self.fpn = fpn or FPN(self.backbone.out_channels)
        channels = self.fpn.out_channels
        self.rpn = rpn or RegionProposalNetwork(RPNHead(channels), AnchorGenerator())
        self.roi_align = roi_align or ROIAlign()
        self.box_head = box_head or TwoMLPHead(channels * self.roi_align.out_size**2)
        self.predictor = FastRCNNPredictor(self.box_head.fc2.out_features, num_classes)
        # The faster layout for convolutions, and what ROIAlign reads.
        self.to(memory_format=torch.channels_last)

    def forward(
        self, images: Tensor, targets: Targets | None = None, image_sizes: Sizes | None = None
    ) -> Losses | tuple[list[dict], list[Tensor]]:
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
            Training: ``rpn_cls``, ``rpn_box``, ``roi_cls``, ``roi_box``. Else ``(results,
            proposals)``, each result with ``boxes`` ``[D, 4]``, ``scores`` ``[D]``, ``labels``
            ``[D]``, best first.
        """
        if self.training:
            check_targets(images, targets, self.num_classes)
        image_size = tuple(images.shape[-2:])
        image_sizes = image_sizes or [image_size] * len(images)
        images = images.contiguous(memory_format=torch.channels_last)
        features = self.backbone(images)
        pyramid = self.fpn(features)
        proposals, losses = self.rpn(pyramid, image_size, targets, image_sizes)
        if self.training:
            proposals, labels, expected = self.sample_proposals(proposals, targets)
            logits, deltas = self.box_outputs(pyramid, proposals, image_size)
            return losses | self.losses(logits, deltas, labels, expected)
        logits, deltas = self.box_outputs(pyramid, proposals, image_size)
        return self.detections(logits, deltas, proposals, image_sizes), proposals

    def box_outputs(
        self, pyramid: Tensors, proposals: Tensors, image_size: Size
    ) -> tuple[Tensor, Tensor]:
        """Logits ``[R, C]`` and deltas ``[R, C, 4]`` of all proposals, float32."""
        pooled = self.roi_align(pyramid[:-1], proposals, image_size)  # P6 is for the RPN alone
        logits, deltas = self.predictor(self.box_head(pooled))  # [R, C], [R, 4 · C]
        return logits.float(), deltas.float().view(-1, self.num_classes, 4)

    @torch.no_grad()
    def sample_proposals(
        self, proposals: Tensors, targets: Targets
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Pick ``ROI_BATCH`` proposals an image for the losses; the ground truth joins them.

        Returns
        -------
        proposals : list of Tensor ``[S_i, 4]``
        labels : Tensor int64 ``[R]``
            Class of each sampled proposal, 0 for background.
        expected : Tensor ``[R, 4]``
            Regression targets; of meaning where the label is above 0.
        """
        sampled, labels, expected = [], [], []
        generators = sampling_generators(targets, proposals[0].device)
        for boxes, target, generator in zip(proposals, targets, generators, strict=True):
            gt_boxes = target["boxes"].to(boxes)
            # With the objects among the proposals there are positives from the first step on.
            boxes = torch.cat((boxes, gt_boxes))  # [K_i + K, 4]
            label, matched = match_boxes(
                boxes, gt_boxes, self.ROI_POS_THR, self.ROI_POS_THR, best_is_positive=False
            )
            chosen = sample_boxes(label, self.ROI_BATCH, self.ROI_POS_FRAC, generator)
            chosen = torch.cat(chosen)  # [S_i]
            label = label[chosen]
            matched = matched[chosen]
            boxes = boxes[chosen]
            sampled.append(boxes)
            if len(gt_boxes):
                labels.append(target["labels"][matched] * label)
                expected.append(encode_boxes(boxes, gt_boxes[matched], self.box_weights))
            else:
                labels.append(label)
                expected.append(torch.zeros_like(boxes))
        return sampled, torch.cat(labels), torch.cat(expected)

    def losses(self, logits: Tensor, deltas: Tensor, labels: Tensor, expected: Tensor) -> Losses:
        """Cross-entropy over all sampled proposals; smooth L1 of the true class's deltas.

        Both are divided by the number of samples; an empty batch gives 0, not the NaN of a mean.
        """
        positive = labels.nonzero()[:, 0]  # [P]
        predicted = deltas[positive, labels[positive]]  # [P, 4]
        box = smooth_l1(predicted, expected[positive])
        cls = F.cross_entropy(logits, labels, reduction="sum")
        count = max(1, len(labels))
        return {"roi_cls": cls / count, "roi_box": box / count}

    def detections(
        self, logits: Tensor, deltas: Tensor, proposals: Tensors, image_sizes: Sizes
    ) -> list[dict]:
        """Scores above ``SCORE_THR``, boxes decoded, clipped, NMS by class, best ``MAX_DETS``."""
        # Every proposal may be several things; background is none of them.
        scores = logits.softmax(dim=1)  # [R, C]
        scores[:, 0] = 0
        row, label = (scores > self.SCORE_THR).nonzero().unbind(1)  # 2 × [S]
        scores = scores[row, label]  # [S]
        image = image_of_box(proposals)[row]

        # Only these are worth decoding.
        boxes = torch.cat([*proposals])[row]  # [S, 4]
        boxes = decode_boxes(boxes, deltas[row, label], self.box_weights, self.max_log_scale)
        sizes = torch.tensor(image_sizes, device=boxes.device)  # [B, 2]
        boxes = clip_boxes(boxes, sizes[image])
        big_enough = (box_sizes(boxes) >= self.min_detection).all(dim=1)  # [S]
        boxes = boxes[big_enough]
        scores = scores[big_enough]
        label = label[big_enough]
        image = image[big_enough]

        # One NMS for all images and classes.
        group = image * self.num_classes + label
        keep = batched_nms(boxes, scores, group, self.NMS_THR)
        best = [keep[image[keep] == i][: self.MAX_DETS] for i in range(len(proposals))]
        return [{"boxes": boxes[i], "scores": scores[i], "labels": label[i]} for i in best]


def tiny_faster_rcnn(num_classes: int = NUM_CLASSES) -> FasterRCNN:
    """The same detector for a laptop: 128-px input, narrow, all of it trained from nothing."""
    width, channels, fc_dim = 16, 64, 256
    backbone = ResNet50(width)
    anchors = AnchorGenerator(anchor_sizes=(16, 32, 64, 128, 256))
    limits = {"pre_nms": 300, "post_nms": (200, 100), "min_sz": 2}
    rpn = RegionProposalNetwork(RPNHead(channels), anchors, **limits)
    # A 112-px box is a large one here: k0 is 5. Its bins are small: a second sample gives nothing.
    roi_align = ROIAlign(k0=5, sampling=1)
    box_head = TwoMLPHead(channels * roi_align.out_size**2, fc_dim)
    fpn = FPN(backbone.out_channels, channels)
    model = FasterRCNN(num_classes, backbone, fpn, rpn, roi_align, box_head)
    model.ROI_BATCH, model.name = 96, "tiny"
    return model


def full_faster_rcnn(num_classes: int = NUM_CLASSES) -> FasterRCNN:
    """The paper's size, all of it learning from random weights, so with live batch norm."""
    return FasterRCNN(num_classes, ResNet50())


def coco_faster_rcnn(num_classes: int = NUM_CLASSES) -> FasterRCNN:
    """What torchvision's COCO weights mean something in; still random: see `load_coco_weights`.

    The differences to the defaults of this file: anchors centred on the corner of their cell,
    ratios counted as height / width, corners rounded, strides from the sizes; batch norm with eps
    0; ROIAlign without the half pixel; other limits. Stem and layer1 are frozen, as published.
    """
    max_log_scale = math.log(1000 / 16)
    anchors = AnchorGenerator(strides=None, offset=0, inverse_ratios=True, rounded=True)
    limits = {"pre_nms": (2000, 1000), "post_nms": (2000, 1000), "min_sz": 1e-3}
    rpn = RegionProposalNetwork(RPNHead(), anchors, **limits, max_log_scale=max_log_scale)
    norm = functools.partial(FrozenBatchNorm2d, eps=0.0)
    model = FasterRCNN(
        num_classes,
        backbone=ResNet50(norm=norm, frozen_stages=2),
        rpn=rpn,
        roi_align=ROIAlign(aligned=False, level_eps=1e-6),
        max_log_scale=max_log_scale,
        min_detection=1e-2,
    )
    model.name = "coco"
    return model


MODELS = {"tiny": tiny_faster_rcnn, "full": full_faster_rcnn, "coco": coco_faster_rcnn}


# --------------------------------------------------------------------------------------------------
# 8. Training
# --------------------------------------------------------------------------------------------------

LOSS_NAMES = ("rpn_cls", "rpn_box", "roi_cls", "roi_box")
AMP = ("off", "bf16", "fp16")


def one_cycle(model: nn.Module, steps: int, batch: int, lr: float = 2e-3) -> tuple:
    """AdamW with one warm-up and one decay over the run: for short runs from random weights."""
    warm_up, weight_decay = 0.15, 1e-4
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR
    return optimizer, cycle(optimizer, lr, total_steps=steps, pct_start=warm_up)


def step_decay(model: nn.Module, steps: int, batch: int, lr: float = 0.02) -> tuple:
    """SGD as published: ``lr`` is for 16 images and scales with the batch; warm-up, two drops."""
    momentum, weight_decay, reference_batch = 0.9, 1e-4, 16
    first, warm_up = 1e-3, min(1000, steps // 10 + 1)
    drops, drop = (16 / 26, 22 / 26), 0.1
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = lr * batch / reference_batch
    optimizer = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=True)

    def factor(step: int) -> float:
        warmth = min(1.0, first + (1 - first) * step / warm_up)
        return warmth * drop ** sum(step >= d * steps for d in drops)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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
    """Train for a number of steps, on the model's device; under torchrun, on all processes.

    Parameters
    ----------
    model : FasterRCNN
        Only parameters with ``requires_grad`` are trained.
    loader : DataLoader
        Over a `COCOStreamDataset`, with `frcnn_collate_fn`. Epochs follow one another as needed.
        The model takes over what its classes are called.
    steps : int
        Steps of the whole run, those before a resume included.
    recipe : callable
        ``(model, steps, batch) -> (optimizer, schedule)``: `one_cycle` or `step_decay`. The batch
        is that of all processes.
    clip_norm : float
        Longest gradient, over all parameters together.
    amp : {"off", "bf16", "fp16"}
        Mixed precision of convolutions and matrices; boxes and losses stay float32. fp16 scales the
        loss, on CUDA.
    checkpoint_path, save_every
        Where and how often (steps) to save; the end is always saved.
    resume : bool
        Continue exactly where the checkpoint ends. Where there is none yet, say so and begin.
    run : dict, optional
        What the run was started with: kept in the checkpoint, and a resume with something else is
        refused.
    after_step : callable, optional
        ``(step, history)`` after every step, for plots and evaluations. The random numbers that it
        draws do not change the run.

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
    _check_run(steps, save_every, amp, model, loader.dataset)
    path, batch, (rank, world) = checkpoint_path, loader.batch_size, process_rank()
    optimizer, schedule = recipe(model, steps, batch * world)
    scaler = torch.amp.GradScaler(_device(model).type, enabled=amp == "fp16")
    parts = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    run = {"steps": steps, "batch": batch, "amp": amp, "processes": world} | (run or {})
    history, stream, rng = _begin(path, resume, model, parts, run, loader.dataset)

    replica = over_processes(model.train())
    batches = _batches(loader, stream, rng)
    done = len(history["step"])
    options = {"unit": "step", "mininterval": 1.0, "disable": rank > 0}
    bar = tqdm(range(done + 1, steps + 1), initial=done, total=steps, **options)
    for step in bar:
        figures = {"step": step, "lr": schedule.get_last_lr()[0]}
        figures |= _train_step(replica, next(batches), optimizer, scaler, clip_norm, amp, step)
        schedule.step()
        for name, value in figures.items():
            history[name].append(value)
        bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
        if path and (step % save_every == 0 or step == steps):
            _save_run(path, model, parts, run, history, stream)
        if after_step:
            with _forked_rng(_device(model)):  # whoever watches may draw, and changes nothing
                after_step(step, history)
            model.train()
    report_left_out(loader.dataset)
    return history


def check_targets(images: Tensor, targets: Targets | None, num_classes: int) -> None:
    """Refuse targets that would train on nonsense or give NaN, naming image, object and value.

    Raises
    ------
    ValueError
        Missing targets, a wrong shape, a label outside 1..``num_classes - 1``, a box that is not
        finite or has no area.
    """
    if targets is None or len(targets) != len(images):
        counts = f"{len(images)} images, got {targets and len(targets)}"
        raise ValueError(f"training needs one target for each of the {counts}")
    for i, target in enumerate(targets):
        boxes = target["boxes"]
        labels = target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            shapes = f"{list(boxes.shape)} and {list(labels.shape)}"
            raise ValueError(f"target {i}: boxes must be [K, 4] and labels [K], got {shapes}")
        good = boxes.isfinite().all(1) & (box_sizes(boxes) > 0).all(1)  # [K]
        if not good.all():
            k = int(good.int().argmin())
            needs = f"needs x1 < x2 and y1 < y2, got {boxes[k].tolist()}"
            raise ValueError(f"target {i}: box {k} {needs}")
        good = (labels >= 1) & (labels < num_classes)
        if not good.all():
            k = int(good.int().argmin())
            needs = f"must lie in 1..{num_classes - 1}, got {int(labels[k])}"
            raise ValueError(f"target {i}: label {k} {needs}")


def _train_step(model, batch, optimizer, scaler, clip_norm, amp, step) -> dict[str, float]:
    """Forward, backward, one step; where a figure is not finite it raises and no weight moves."""
    device = _device(model)
    images = batch[0].to(device, non_blocking=True)
    targets = [_on_device(target, device) for target in batch[1]]

    # Forward, the matrices in half precision where that is asked for.
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype=dtype, enabled=amp != "off"):
        losses = model(images, targets, **sizes_without_padding(images, targets))
        loss = sum(losses.values())

    # All processes see the same figures, and stop together.
    figures = torch.stack([loss, *(losses[name] for name in LOSS_NAMES)])  # [5]
    figures = mean_over_processes(figures.detach()).tolist()
    values = dict(zip(("loss", *LOSS_NAMES), figures, strict=True))
    _check_finite(values["loss"], values, targets, step)

    # Backward, and a gradient of bounded length.
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    learning = [p for p in model.parameters() if p.grad is not None]
    length = nn.utils.clip_grad_norm_(learning, clip_norm)
    if not scaler.is_enabled():  # of float16 the scaler takes care
        _check_finite(float(length), values, targets, step)
    scaler.step(optimizer)
    scaler.update()
    return values


def _check_finite(figure: float, losses: dict, targets: list[dict], step: int) -> None:
    if not math.isfinite(figure):
        ids = [t["image_id"] for t in targets]
        found = f"not finite, the losses are {losses}, from the images {ids}"
        raise FloatingPointError(f"step {step}: {found}; try a lower rate")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.zeros(0)).device


def _forked_rng(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, random numbers may be drawn; outside, nobody notices."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _on_device(target: dict, device: torch.device) -> dict:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.items()}


def _check_run(steps, save_every, amp, model, dataset) -> None:
    if steps < 1 or save_every < 1 or amp not in AMP:
        wanted = "steps and save_every must be at least 1 and amp off, bf16 or fp16"
        raise ValueError(f"{wanted}, got {steps}, {save_every}, {amp}")
    if amp == "fp16" and _device(model).type != "cuda":
        raise ValueError("amp fp16 needs CUDA; on this device there is bf16")
    count = len(dataset.classes.names)
    if count != model.num_classes:
        theirs = f"{dataset.source} has {count} classes, background included"
        raise ValueError(f"{theirs}: build the model with num_classes={count}")
    model.classes = dataset.classes


def _begin(path, resume, model, parts, run, dataset) -> tuple[dict, dict, dict | None]:
    """History, stream position and generator states: of a new run or of the resumed one."""
    history = {name: [] for name in ("step", "lr", "loss", *LOSS_NAMES)}
    stream = {"epoch": 0, "rows": {}, "last": -1}
    dataset.resume(stream | {"rows": {}})  # an earlier run may have left a position
    begun = history, stream, None
    if resume and path and Path(path).exists():
        begun = _resume(path, model, parts, run, dataset)
    elif resume:
        print_once(f"no checkpoint at {path} yet: starting at step 0")
    if resume and path:
        _remove_torn(Path(path))
    return begun


def _resume(path, model, parts, run, dataset) -> tuple[dict, dict, dict]:
    """Put the run in ``path`` back: weights, optimizer, schedule, scaler, place in the stream.

    The random numbers follow in `_batches`; `COCOStreamDataset.__iter__` skips the used rows.
    """
    _, saved = load_checkpoint(path, model)
    before = saved.get("run", {})
    differing = [f"{k} {before.get(k)} (now {run[k]})" for k in run if before.get(k) != run[k]]
    if differing:
        hint = f"; to go on from its weights start a new run: --weights {path}"
        raise ValueError(f"{path} belongs to another run: {', '.join(differing)}{hint}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    mine = saved["processes"][process_rank()[0]]
    dataset.resume(mine["stream"] | {"rows": dict(mine["stream"]["rows"])})
    return saved["history"], mine["stream"], mine["generators"]


def _batches(loader, stream, generators) -> Iterator[tuple[Tensor, list[dict]]]:
    """Batches without end, epoch after epoch; ``stream`` always holds the position reached."""
    dataset = loader.dataset
    while True:
        dataset.set_epoch(stream["epoch"])
        batches, empty = iter(loader), True
        if generators:  # only now: starting the loader draws a number that had been drawn before
            _set_generator_states(generators)
            generators = None
        for images, targets in batches:
            empty = False
            for reader, rows in (target["position"] for target in targets):
                stream["rows"][reader], stream["last"] = rows, reader
            yield images, targets
        if empty and not stream["rows"]:
            what = "not one image with a valid box to train on"
            raise ValueError(f"{dataset.source} gives {what}")
        stream.update(epoch=stream["epoch"] + 1, rows={}, last=-1)


def _generator_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_generator_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _save_run(path, model, parts, run, history, stream) -> None:
    """All that `_resume` needs, with the position of every process in its part of the stream."""
    processes = gather({"stream": stream, "generators": _generator_states()})
    state = {"step": history["step"][-1], "run": run, "history": history, "processes": processes}
    state |= {name: part.state_dict() for name, part in parts.items()}
    if process_rank()[0] == 0:
        save_checkpoint(path, model, **state)


def save_checkpoint(path: str | Path, model: FasterRCNN, **state: object) -> None:
    """Write model and state so that ``path`` is always either the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            weights = {"model": model.state_dict(), "classes": model.classes and [*model.classes]}
            torch.save({"model_name": model.name, **weights, **state}, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes before the name: a rename may reach the disk first
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # Where the disk is full, or Ctrl-C comes inside `torch.save`, its writer says only that
        # bytes are missing.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        if isinstance(cause, OSError) and cause.errno:  # one without a number prints no file
            cause.filename = cause.filename or f"{path}"
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
        What `save_checkpoint` wrote; or torchvision's own file of COCO weights.
    model : FasterRCNN, optional
        Takes the weights. None: the model that the checkpoint names is built, on `DEVICE`.

    Returns
    -------
    model, state : FasterRCNN, dict
        State is all else that was saved.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; a torn or foreign one; one of another model, naming the first weights that
        differ, or of other classes, naming these.
    """
    name, weights, classes, state = _read_checkpoint(path)
    if model is None:
        if name not in MODELS:
            known = sorted(MODELS)
            raise ValueError(f"{path} holds a model called {name!r}; known are {known}")
        model = MODELS[name](len(weights.get("predictor.cls.bias", ()))).to(DEVICE)
        model.classes = classes
    check_classes(model.classes, classes, "the model", f"{path}")
    load_weights(model, weights, f"{path} ({name})")
    model.classes = classes or model.classes
    return model, state


def _read_checkpoint(path: str | Path) -> tuple[str, dict, Classes | None, dict]:
    """Name and weights of the model in a file, its classes, and all else that was saved."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "roi_heads.box_head.fc6.weight" in state:
            state = {"model_name": "coco", "model": coco_from_torchvision(state)}
        name, weights = state.pop("model_name"), dict(state.pop("model"))
        classes = state.pop("classes", None)
        classes = Classes(*map(tuple, classes)) if classes else None
    except Exception as error:  # a torn zip, a pickle with code, another program's file
        kind = type(error).__name__
        raise ValueError(f"{path} is no whole checkpoint of this program ({kind})") from error
    if classes is None and len(weights.get("predictor.cls.bias", ())) == NUM_CLASSES:
        classes = COCO_CLASSES
    return name, weights, classes, state


def check_classes(mine: Classes | None, theirs: Classes | None, whose: str, others: str) -> None:
    """Refuse the classes of two sides where both are known and differ.

    Raises
    ------
    ValueError
        Names the first ones, with their ids, that only one of the two has.
    """
    if None in (mine, theirs) or mine == theirs:
        return
    kinds = [list(zip(*classes, strict=True))[1:] for classes in (mine, theirs)]
    only = []
    for side, these, those in ((whose, *kinds), (others, *kinds[::-1])):
        extra = [f"{name} ({i})" for name, i in these if (name, i) not in those]
        only.append(f"only in {side}: {', '.join(extra[:5]) or 'none'}")
    raise ValueError(f"the classes differ, {'; '.join(only)}")


def tiny_detector() -> FasterRCNN:
    """A trained tiny detector in eval mode: from ``checkpoints/tiny.pt``, else the shipped one.

    Notebook 05 writes the first; `make detector` made the second, in half precision.
    """
    path = CHECKPOINTS / "tiny.pt"
    return load_checkpoint(path if path.exists() else TINY_DETECTOR)[0].eval()


# --------------------------------------------------------------------------------------------------
# 9. Evaluation
# --------------------------------------------------------------------------------------------------

COCO_FIGURES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip


@torch.no_grad()
def detect(model: FasterRCNN, picture: Image.Image, image_size: ImageSize) -> dict[str, Tensor]:
    """Detections ``boxes`` ``[D, 4]``, ``scores``, ``labels`` on an RGB picture, in its own pixels.

    ``image_size`` is the one that the model was trained for: see `prepare_image`. The result lies
    on the CPU.
    """
    pixels, size = prepare_image(picture, image_size)
    pixels = pixels[None].to(_device(model))  # [1, 3, H, W]
    results, _ = model.eval()(pixels, image_sizes=[size])
    return rescale_result(results[0], size, (picture.height, picture.width))


@torch.no_grad()
def detect_dataset(
    model: nn.Module, dataset: COCOStreamDataset, batch_size: int = 8
) -> tuple[list[dict], list[dict]]:
    """``(truth, results)`` of a data set in pixels of the originals, for `coco_evaluation`."""
    device = _device(model)
    was_training = model.training
    model.eval()
    truth, results = [], []
    try:
        for images, targets in DataLoader(dataset, batch_size, collate_fn=frcnn_collate_fn):
            sizes = sizes_without_padding(images, targets)
            detections, _ = model(images.to(device), **sizes)
            for target, found in zip(targets, detections, strict=True):
                change = target["size"], target["orig_size"]
                truth.append(rescale_result(target, *change))
                results.append(rescale_result(found, *change))
    finally:
        model.train(was_training)
    return truth, results


def rescale_result(result: dict, size: Size, new_size: Size) -> dict:
    """A copy on the CPU, boxes carried over from an image of ``size`` to one of ``new_size``."""
    result = _on_device(result, torch.device("cpu"))
    y, x = new_size[0] / size[0], new_size[1] / size[1]
    scale = torch.tensor([x, y, x, y])
    return result | {"boxes": result["boxes"] * scale}


def evaluate(
    model: nn.Module,
    dataset: COCOStreamDataset,
    batch_size: int = 8,
    annotations: str | Path | None = None,
) -> dict[str, float]:
    """The twelve COCO figures by name (`COCO_FIGURES`); -1 where no object is of that size.

    See `coco_evaluation`. Under torchrun each process detects on its share of the images, and all
    get the figures of the whole.
    """
    check_classes(getattr(model, "classes", None), dataset.classes, "the model", dataset.source)
    shares = gather(detect_dataset(model, dataset, batch_size))
    report_left_out(dataset)
    truth, results = ([x for share in shares for x in share[i]] for i in (0, 1))
    if not truth:
        raise ValueError(f"{dataset.source} gives not one image to evaluate on")
    figures = coco_evaluation(truth, results, annotations, dataset.classes).stats.tolist()
    return dict(zip(COCO_FIGURES, figures, strict=True))


def coco_evaluation(
    truth: Targets,
    results: Targets,
    annotations: str | Path | None = None,
    classes: Classes = COCO_CLASSES,
) -> COCOeval:
    """COCO's evaluation of detections against ground truth, both in pixels of the original images.

    Parameters
    ----------
    truth : sequence of dict
        For each image ``image_id``, ``orig_size``, ``boxes`` ``[K, 4]``, ``labels`` and ``area``;
        ``iscrowd`` where there are crowds: what is found in one counts neither way.
    results : sequence of dict
        For the same images ``boxes`` ``[D, 4]``, ``scores`` and ``labels`` ``[D]``.
    annotations : path, optional
        COCO's own file, such as ``instances_val2017.json``: its objects, crowds included, replace
        those in ``truth``.
    classes : Classes
        What the labels are called, and their ids in the evaluation.

    Returns
    -------
    pycocotools.cocoeval.COCOeval
        Accumulated: ``.stats`` in the order of `COCO_FIGURES`, ``.eval["precision"]`` for the
        curves.
    """
    ids = [t["image_id"] for t in truth]
    twice = sources.doubled(ids)
    if twice:  # pycocotools would count the objects of both for each
        raise ValueError(f"{len(twice)} images come more than once, such as image_id {twice[0]}")
    found = [r | {"image_id": i} for i, r in zip(ids, results, strict=True)]
    scores = [r["scores"].tolist() for r in results]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports every stage
        if annotations is None:
            coco = _own_annotations(truth, classes)
        else:
            coco = sources.read_annotations(annotations, fill=True)
        _check_images(ids, coco, annotations)
        records = _annotations(found, classes, score=scores)
        # `loadRes` does not take an empty list.
        nothing = sources.indexed(coco.dataset | {"annotations": []})
        evaluation = COCOeval(coco, coco.loadRes(records) if records else nothing, "bbox")
        evaluation.params.imgIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _own_annotations(truth: Targets, classes: Classes) -> COCO:
    """What `COCOStreamDataset` knows about the images, as pycocotools wants it."""
    images = [
        {"id": t["image_id"], "height": t["orig_size"][0], "width": t["orig_size"][1]}
        for t in truth
    ]
    kinds = zip(classes.names[1:], classes.ids[1:], strict=True)
    categories = [{"id": i, "name": name} for name, i in kinds]
    areas = [t["area"].tolist() for t in truth]
    crowds = [t.get("iscrowd", torch.zeros(len(t["boxes"]))).int().tolist() for t in truth]
    objects = _annotations(truth, classes, area=areas, iscrowd=crowds)
    dataset = {"images": images, "annotations": objects, "categories": categories, "info": {}}
    return sources.indexed(dataset)


def _annotations(images: Targets, classes: Classes, **columns: list[list]) -> list[dict]:
    """COCO's records for the boxes of ``images``; ``columns`` hold further fields, box by box."""
    records = []
    for i, image in enumerate(images):
        boxes, labels = image["boxes"].tolist(), image["labels"].tolist()
        for k, ((x1, y1, x2, y2), label) in enumerate(zip(boxes, labels, strict=True)):
            record = {"image_id": image["image_id"], "category_id": classes.ids[label]}
            record["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            record["id"] = len(records) + 1  # pycocotools takes id 0 for "none"
            records.append(record | {name: column[i][k] for name, column in columns.items()})
    return records


def _check_images(ids: Sequence[int], coco: COCO, annotations: str | Path | None) -> None:
    """All of the images must be in the annotation file; one line where they are not all of it."""
    unknown = [i for i in ids if i not in coco.imgs]
    if unknown:
        such_as = f"{len(unknown)} of the images, such as image_id {unknown[0]}"
        raise ValueError(f"{annotations} does not hold {such_as}")
    if len(ids) < len(coco.imgs):
        part = f"{len(ids)} of the {len(coco.imgs)} images of {annotations}"
        warnings.warn(f"evaluated on {part}: not COCO's figure of record", stacklevel=3)


# --------------------------------------------------------------------------------------------------
# 10. Drawing
# --------------------------------------------------------------------------------------------------

# Okabe and Ito's colours without their black, apart also for colour-blind readers; then others, so
# that the eight glyphs have eight colours.
PALETTE = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#00FFFF",
    "#88FF88", "#882255", "#999933", "#DDDDDD", "#FF00FF", "#6633FF", "#CCBB88",
)  # fmt: skip


def draw_boxes(
    ax: Axes,
    image: Picture | None,
    boxes: Tensor | np.ndarray | Sequence,
    labels: Tensor | Sequence | None = None,
    scores: Tensor | Sequence | None = None,
    color: str | None = None,
    linestyle: str = "-",
    linewidth: float = 2.0,
    fontsize: float = 9.0,
    names: Sequence[str] = COCO_NAMES,
) -> None:
    """Draw an image and boxes on it, each with its class name and score where they are given.

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
    names : sequence of str
        What the class numbers are called.
    color, linestyle, linewidth, fontsize
        One colour for all boxes instead of one for each class; matplotlib's names.
    """
    if image is not None:
        pixels = to_picture(image)
        # Continuous coordinates: 0 is the edge of the picture. By default matplotlib puts the
        # middle of the first pixel there.
        height, width = pixels.shape[:2]
        extent = (0, width, height, 0)
        ax.imshow(pixels, interpolation="nearest", extent=extent)
        ax.set_axis_off()
    boxes = boxes.detach().cpu() if isinstance(boxes, Tensor) else boxes
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4).tolist()
    labels = [None] * len(boxes) if labels is None else [int(label) for label in labels]
    scores = [None] * len(boxes) if scores is None else torch.as_tensor(scores).tolist()
    shades = class_colors(labels)
    style = {"fill": False, "linewidth": linewidth, "linestyle": linestyle}
    # A dark rim keeps every colour visible on every background.
    rim = patheffects.withStroke(linewidth=linewidth + 1.5, foreground="black")
    for (x1, y1, x2, y2), label, score in zip(boxes, labels, scores, strict=True):
        shade = color or shades[label]
        box = patches.Rectangle((x1, y1), x2 - x1, y2 - y1, edgecolor=shade, **style)
        box.set_path_effects([rim])
        ax.add_patch(box)
        words = [names[label]] if label is not None else []
        words += [f"{score:.2f}"] if score is not None else []
        if words:
            _write(ax, " ".join(words), (x1, y1, x2), shade, fontsize)


def class_colors(labels: Sequence[int | None]) -> dict[int | None, str]:
    """A colour for each class of a picture: its own, or the next one that is free."""
    colours = {}
    for label in sorted({label for label in labels if label is not None}):
        own = label % len(PALETTE)
        ring = PALETTE[own:] + PALETTE[:own]
        free = [colour for colour in ring if colour not in colours.values()]
        colours[label] = (free or ring)[0]
    return colours | {None: PALETTE[0]}


def _write(ax: Axes, text: str, edges: tuple, shade: str, fontsize: float) -> None:
    """Above the box from its left corner; inside, or from the right one, where that would leave."""
    x1, y1, x2 = edges
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()  # rows of an image count downwards
    low = y1 < top + (bottom - top) / 10
    far_right = x1 > (left + right) / 2
    place = {"va": "top" if low else "bottom", "ha": "right" if far_right else "left"}
    light = np.dot(np.power(colors.to_rgb(shade), 2.2), (0.2126, 0.7152, 0.0722))  # WCAG 2.1
    ink = "black" if light > 0.18 else "white"  # whichever stands out more, at least 4.5 : 1
    ground = {"facecolor": shade, "edgecolor": "none", "pad": 1.0}
    x = x2 if far_right else x1
    ax.text(x, y1, text, fontsize=fontsize, color=ink, bbox=ground, **place)


def to_picture(image: Picture) -> np.ndarray:
    """What ``imshow`` takes, ``[H, W, 3]``: undoes the normalisation of a tensor ``[3, H, W]``."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().float() * IMAGENET_STD + IMAGENET_MEAN
        image = pixels.clamp(0, 1).permute(1, 2, 0)  # [3, H, W] -> [H, W, 3]
    return np.asarray(image)


def picture_with_detections(
    picture: Image.Image,
    found: dict[str, Tensor],
    min_score: float = 0.0,
    names: Sequence[str] = COCO_NAMES,
    truth: Tensor | None = None,
) -> Figure:
    """A figure of the picture and its boxes alone, those of ``truth`` ``[K, 4]`` dashed.

    Detections below ``min_score`` are left out.
    """
    shortest = 400  # pixels of the long side
    longest = 1600
    dpi, least = 100, 32
    scale = min(max(max(picture.size), shortest), longest) / max(picture.size)
    width, height = (max(least, round(side * scale)) for side in picture.size)
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    small = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    ax = figure.add_axes((0, 0, 1, 1))
    found = {name: column[found["scores"] >= min_score] for name, column in found.items()}
    change = (picture.height, picture.width), (height, width)
    draw_boxes(ax, small, **rescale_result(found, *change), names=names)
    if truth is not None:
        truth = rescale_result({"boxes": truth}, *change)["boxes"]
        draw_boxes(ax, None, truth, color="white", linestyle="--")
    return figure


# --------------------------------------------------------------------------------------------------
# A. Where rows come from
# --------------------------------------------------------------------------------------------------

# A row has the Hub's columns: ``image_id``, ``image`` (encoded bytes), ``width``, ``height`` and
# ``objects`` with ``category`` from 0 on, ``bbox``, ``area`` (0: that of the box), ``iscrowd``.
HUB_SOURCE = "detection-datasets/coco"
_COLUMNS = {"image_id", "image", "width", "height", "objects"}
_OBJECT_FIELDS = {"category", "bbox", "area"}
NETWORK_TIMEOUT = 5.0  # seconds until a server counts as out of reach


def open_source(source: str, split: str, val_share: float = 0.2) -> tuple:
    """The rows of a source, its classes, its size. A new kind of source is a branch here.

    =========================  ===================================================================
    source                     what it is
    =========================  ===================================================================
    ``"glyphs"``               embedded scenes; a row holds the number: `rendered` draws it
    folder with ``*.parquet``  shards ``train-*.parquet``, ``val-*.parquet`` with the Hub's columns
    any other folder           pictures and COCO annotations, or the Hub's ImageFolder: `own_rows`
    ``"owner/name"``           a data set of the Hub with these columns, streamed
    =========================  ===================================================================

    Returns
    -------
    rows : datasets.IterableDataset
        Their images still encoded.
    classes : Classes
    images : int or None
        How many rows, where that is known beforehand.

    Raises
    ------
    ValueError, OSError
        No such source, or one that cannot be used; says why.
    """
    folder = Path(source)
    if source == "glyphs":
        first = sources.GLYPH_FIRST_SEED[split]
        seeds = range(first, first + sources.GLYPH_SCENES[split])
        scenes = datasets.Dataset.from_dict({"image_id": list(seeds)})
        return scenes.to_iterable_dataset(), COCO_CLASSES, len(seeds)
    if folder.is_dir() and not any(folder.glob("*-*.parquet")):
        rows, *classes = sources.own_rows(folder, split, val_share)
        stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
        return stream, Classes(*classes), len(rows)
    if folder.is_dir():
        stream, images = _open_shards(folder, split)
    elif source.count("/") == 1:
        stream, images = _open_hub(source, split), None
    else:
        known = f"neither 'glyphs', a folder, nor like '{HUB_SOURCE}'"
        raise ValueError(f"unknown source {source!r}: {known}")
    kinds = _classes_of(stream.features, source)
    stream = stream.cast_column("image", datasets.Image(decode=False))
    return stream, kinds, images


def _open_hub(source: str, split: str) -> datasets.IterableDataset:
    if source == HUB_SOURCE:
        return datasets.load_dataset(source, split=split, streaming=True)
    if not _hub_answers(source):
        raise ValueError(f"unknown source {source!r}: no folder, and the Hub does not answer to it")
    names = datasets.get_dataset_split_names(source)
    name = next((name for name in sources.SPLITS[split] if name in names), None)
    if name is None:
        raise ValueError(f"{source} has no split for {split!r}; it has {names}")
    return datasets.load_dataset(source, split=name, streaming=True)


def _open_shards(folder: Path, split: str) -> tuple[datasets.IterableDataset, int]:
    """Stream ``split-*.parquet``, after a look at the end of every shard: torn ones are named."""
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{folder} holds no {split}-*.parquet")
    images = 0
    for shard in shards:
        try:
            rows = parquet.read_metadata(shard).num_rows
        except (ArrowException, OSError) as error:
            raise ValueError(f"{shard} is no whole parquet file: {first_line(error)}") from error
        if not rows:
            raise ValueError(f"{shard} holds no rows")
        images += rows
    files = [glob.escape(str(shard.absolute())) for shard in shards]  # a folder may be called "a*"
    files = {split: files}
    stream = datasets.load_dataset("parquet", data_files=files, split=split, streaming=True)
    return stream, images


def _classes_of(features: datasets.Features | None, source: str) -> Classes:
    """The names in a stream's columns; without names, of COCO's own columns, COCO's."""
    objects = (features or {}).get("objects")
    fields = objects if isinstance(objects, dict) else {}
    missing = sorted(_COLUMNS - set(features or ()))
    missing = missing or [f"objects.{name}" for name in sorted(_OBJECT_FIELDS - fields.keys())]
    if missing:
        raise ValueError(f"{source} lacks the columns {missing}; it has {sorted(features or ())}")
    category = fields["category"]
    names = getattr(getattr(category, "feature", category), "names", COCO_NAMES[1:])
    if tuple(names) == COCO_NAMES[1:]:
        return COCO_CLASSES
    return Classes(("__background__", *names), (0, *range(len(names))))


def hub_or_glyphs() -> str:
    """The Hub's COCO where it answers; else the embedded scenes, said in one line."""
    if _hub_answers():
        return HUB_SOURCE
    instead = f"using the embedded glyph scenes instead of {HUB_SOURCE}"
    print_once(f"The Hugging Face Hub does not answer: {instead}.")
    return "glyphs"


def _hub_answers(source: str = HUB_SOURCE) -> bool:
    """Whether the Hub tells about a data set; the library alone would retry for 24 s, noisily."""
    if datasets.config.HF_HUB_OFFLINE:
        return False
    ask = huggingface_hub.HfApi().dataset_info
    return succeeds_within(lambda: ask(source, timeout=NETWORK_TIMEOUT))


def succeeds_within(call: Callable[[], object], seconds: float = NETWORK_TIMEOUT) -> bool:
    """Whether a call ends well within so many seconds: looking up a host ignores its own limit."""
    succeeded = threading.Event()

    def work() -> None:
        with contextlib.suppress(Exception):  # any failure means the same: no network today
            call()
            succeeded.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return succeeded.is_set()


def rows_of(stream: datasets.IterableDataset, source: str) -> Iterator[dict]:
    """Row by row, though taken 16 at a time: one at a time costs four times as much.

    `iter` and not `__iter__`, which inside a DataLoader worker would divide the shards once more.
    Where the Hub breaks off, `datasets` tries again by itself, twenty times.
    """
    try:
        for batch in stream.iter(16):
            for row in zip(*batch.values(), strict=True):
                yield dict(zip(batch, row, strict=True))
    except Exception as error:
        raise ValueError(f"{source} cannot be read further: {first_line(error)}") from error


# What a row means


def read_row(
    row: dict, bbox_format: str, num_classes: int = NUM_CLASSES
) -> tuple[Image.Image, dict]:
    """The RGB picture of a row and what is on it: here every bad row is refused.

    Returns
    -------
    image : PIL image
    found : dict
        ``boxes`` float64 ``[K, 4]``, corners inside the picture, NaN where they are not finite;
        ``labels`` int64 ``[K]`` from 1 on; ``area`` float32 ``[K]``; ``iscrowd`` bool ``[K]``;
        ``image_id`` int.

    Raises
    ------
    ValueError, OSError
        Says what is wrong with it.
    """
    size, picture = (row["width"], row["height"]), row["image"]
    # Of a folder of one's own the path.
    encoded = (
        Path(picture).read_bytes() if isinstance(picture, str) else picture and picture["bytes"]
    )
    if not encoded:
        raise ValueError("its row holds no bytes of an image")
    image = decode_image(encoded, None if size == (None, None) else size)
    raw, category, area = objects_of(row, "category", "area")
    crowd = row["objects"].get("iscrowd") or [0] * len(raw)
    if len(raw) > MAX_OBJECTS:
        raise ValueError(f"{len(raw):,} objects are too many: at most {MAX_OBJECTS:,}")
    known = (category >= 0) & (category < num_classes - 1) & (category == np.floor(category))
    if not known.all():
        bad = ", ".join(f"{c:g}" for c in category[~known][:5])
        raise ValueError(f"categories must lie in 0..{num_classes - 2}, got {bad}")
    if not ((area >= 0) & (area <= np.finfo(np.float32).max)).all():
        raise ValueError("objects.area must be finite and not below 0")
    image_id = int(row["image_id"])
    if image_id != row["image_id"] and isinstance(row["image_id"], float):
        raise ValueError("image_id must be a whole number")
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = to_corners(raw, bbox_format).clip(0, image.size * 2)
    boxes[~np.isfinite(raw).all(1)] = np.nan
    area = np.where(area > 0, area, box_area(boxes)).astype(np.float32)
    found = {"boxes": boxes, "image_id": image_id, "area": area, "iscrowd": np.array(crowd) > 0}
    return image, found | {"labels": category.astype(np.int64) + 1}  # 0 becomes background


MAX_OBJECTS = 5_000  # of a picture: matching compares each with every anchor
MAX_PIXELS = 89_478_485  # of a picture: where Pillow, too, begins to fear for the memory


def decode_image(encoded: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture from JPEG, PNG, … bytes of any mode, turned as its boxes expect it.

    Parameters
    ----------
    encoded : bytes
        The file's content.
    size : (width, height), optional
        What the annotation says. A camera may store a picture lying on its side with a note (EXIF)
        to turn it; the boxes were drawn on the one whose size the annotation gives. None: turned as
        the note says.

    Raises
    ------
    ValueError, OSError
        Where the bytes are no picture, a program (EPS), one of another size or of more than
        `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:  # its own message holds an address in memory and no more
        raise ValueError("not an image in any format that Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if image.format == "EPS":  # a program: Pillow would let Ghostscript run it
        raise ValueError("an EPS file is a program and not an image")
    if image.width * image.height > MAX_PIXELS:
        pixels = f"{image.width} × {image.height} pixels"
        raise ValueError(f"an image of {pixels} is too large: at most {MAX_PIXELS:,}")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        upright = ImageOps.exif_transpose(image)
        image = upright if size in (None, upright.size) else image
    if size not in (None, image.size):
        has, says = (f"{width!r} × {height!r}" for width, height in (image.size, size))
        raise ValueError(f"the image has {has} pixels, its row says {says}")
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip, not scale
        high_byte = np.asarray(image, dtype=np.int64) >> 8
        image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    image.load()  # a torn file fails here
    image.info.pop("transparency", None)  # colours alone count; Pillow would warn of some palettes
    return image if image.mode == "RGB" else image.convert("RGB")


def objects_of(row: dict, *fields: str) -> list[np.ndarray]:
    """The boxes ``[K, 4]`` of a row, as they are written, and further fields ``[K]``, as numbers.

    Raises
    ------
    ValueError
        Where they are no numbers, or not as many of each.
    """
    names = ("bbox", *fields)
    try:
        columns = [np.array(row["objects"][name], dtype=np.float64) for name in names]
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"objects must hold numbers in {names}: {first_line(error)}") from error
    if columns[0].shape == (0,):
        columns[0] = columns[0].reshape(0, 4)
    shapes, count = [list(column.shape) for column in columns], list(columns[0].shape[:1])
    if shapes != [[*count, 4]] + [count] * len(fields):
        wanted = f"K times 4 numbers in bbox and K in {fields}"
        raise ValueError(f"objects must hold {wanted}, got the shapes {shapes}")
    return columns


def to_corners(boxes: np.ndarray, bbox_format: str) -> np.ndarray:
    """Boxes ``[K, 4]`` as corners, whichever way the source wrote them ("xyxy" or "xywh")."""
    if bbox_format == "xyxy":
        return boxes
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def find_bbox_format(stream: datasets.IterableDataset, source: str, classes: Classes) -> str:
    """`detect_bbox_format` on the first rows of a source, printed; a look at the categories."""
    if source == "glyphs":
        return "xyxy"
    rows = list(rows_of(stream.take(64), source))  # the decision rests on so many
    usual = "xywh" if any(isinstance(row["image"], str) for row in rows) else None  # COCO's files
    bbox_format = detect_bbox_format(rows, usual)
    if bbox_format != usual:
        print_once(f"{source}: objects.bbox is {bbox_format}, decided from the first rows")
    categories = set()
    for row in rows:
        with contextlib.suppress(ValueError):
            categories.update(objects_of(row, "category")[1].tolist())
    if classes is COCO_CLASSES and 1 in categories and 0 not in categories:
        meaning = f"0 is {COCO_NAMES[1]}, 1 is {COCO_NAMES[2]}"
        warnings.warn(f"{source}: categories seem to count from 1; here {meaning}", stacklevel=3)
    return bbox_format


def detect_bbox_format(rows: Targets, usual: str | None = None) -> str:
    """Decide whether ``objects.bbox`` holds corners ("xyxy") or corner and size ("xywh").

    Corners never have x2 < x1 or y2 < y1, no reading leaves the image, and ``area`` never exceeds
    the box. The reading that breaks these rules least is taken, and it may break them for one box
    of ten: data sets have bad boxes. The ``usual`` one, where there is one, is taken as soon as it
    fits so well. Rows that cannot be read are left to the stream, which names them.

    Raises
    ------
    ValueError
        Where neither reading fits.
    """
    tolerated, slack = 0.1, 1.0  # share of boxes; pixels that an annotation may leave the image by
    broken, count = {"xyxy": 0, "xywh": 0}, 0
    for row in rows:
        with contextlib.suppress(OverflowError, TypeError, ValueError), np.errstate(all="ignore"):
            raw, area = objects_of(row, "area")
            size = np.array([row["width"], row["height"]], dtype=np.float64)
            count += len(raw)
            for name in broken:
                boxes = to_corners(raw, name)
                reversed_ = (boxes[:, 2:] < boxes[:, :2]).any(1)  # [K]
                outside = (boxes[:, 2:] > size + slack).any(1)  # [K]
                too_small = area > box_area(boxes) + slack  # [K]
                broken[name] += int((reversed_ | outside | too_small).sum())
    if usual and broken[usual] <= tolerated * count:
        return usual
    best = min(broken, key=broken.get)  # corners where both fit, as on the Hub
    if broken[best] > tolerated * count:
        raise ValueError(
            "objects.bbox is neither corners nor corner and size:"
            f" of {count} boxes {broken['xyxy']} contradict (x1, y1, x2, y2)"
            f" and {broken['xywh']} contradict (x, y, width, height); choose with bbox_format"
        )
    return best


# --------------------------------------------------------------------------------------------------
# B. Several processes
# --------------------------------------------------------------------------------------------------


def process_rank() -> tuple[int, int]:
    """This process's number among those that train together, and how many: ``(0, 1)`` if alone."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
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


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on each of them."""
    x = x.contiguous().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class _MeanOverProcesses(torch.autograd.Function):
    """`mean_over_processes` with a way back, which is the same: PyTorch deprecates its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return mean_over_processes(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return mean_over_processes(grad)


def gather(value: object) -> list:
    """The values of all processes, in the order of their ranks, on each of them."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def print_once(text: str) -> None:
    """Print once, however many processes there are."""
    if process_rank()[0] == 0:
        print(text)


def report_left_out(dataset: COCOStreamDataset) -> None:
    """One line on what the stream could not use, over all processes, where there was anything."""
    skipped, dropped = (sum(gather(count)) for count in (dataset.skipped, dataset.dropped))
    if skipped or dropped:
        rows = f"rows {skipped} (each named in a warning)"
        boxes = f"boxes {dropped} (not finite or without area)"
        print_once(f"{dataset.source}: left out so far: {rows}, {boxes}")


def over_processes(model: nn.Module) -> nn.Module:
    """A model whose gradients and batch norms are means over all processes; alone, itself."""
    if process_rank()[1] == 1:
        return model
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d  # the same weights under the same names
    return nn.parallel.DistributedDataParallel(model)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose batch is that of all processes. (`nn.SyncBatchNorm`: on CUDA alone.)"""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` → the same shape."""
        world = process_rank()[1]
        if world == 1 or not self.training:
            return super().forward(x)
        values = x.float()
        mean = values.mean((0, 2, 3))  # [C]
        square = values.square().mean((0, 2, 3))  # [C]
        mean, square = _MeanOverProcesses.apply(torch.stack((mean, square)))
        var = square - mean.square()
        count = values[:, 0].numel() * world
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale  # [C]
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


# --------------------------------------------------------------------------------------------------
# C. Published weights
# --------------------------------------------------------------------------------------------------


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
    from torchvision.models import ResNet50_Weights  # takes a second or two: only where it is used

    origin = ResNet50_Weights.IMAGENET1K_V1
    state_dict = published_weights(origin) if state_dict is None else state_dict
    # Its classifier of ImageNet's 1000 classes has no place here.
    theirs = {k: v for k, v in state_dict.items() if not k.startswith("fc.")}
    weights = _our_names({f"backbone.{name}": value for name, value in theirs.items()})
    weights = {name.removeprefix("backbone."): value for name, value in weights.items()}
    load_weights(model.backbone, weights, origin)


def load_coco_weights(model: FasterRCNN, state_dict: dict[str, Tensor] | None = None) -> None:
    """Load torchvision's detector (``FasterRCNN_ResNet50_FPN_Weights.COCO_V1``), 37.0 AP on COCO.

    Parameters
    ----------
    model : FasterRCNN
        `coco_faster_rcnn`: elsewhere the same weights mean something else. With other classes it
        keeps its own predictor: see `start_from`.
    state_dict : dict, optional
        Of ``torchvision.models.detection.fasterrcnn_resnet50_fpn``. None: the published one (see
        `published_weights`). Of its 91 outputs the 81 that COCO uses are taken.

    Raises
    ------
    ValueError, ConnectionError
        Entries that do not fit, named; no network and no file.
    """
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    origin = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    state_dict = published_weights(origin) if state_dict is None else state_dict
    start_from(model, coco_from_torchvision(state_dict), COCO_CLASSES, origin)


def start_from(
    model: FasterRCNN, weights: dict[str, Tensor], classes: Classes | None, origin: object
) -> None:
    """Put a trained detector's weights into a model; where its classes differ, all but the last.

    The predictor alone knows of classes: the model then keeps its own, which is to be trained. One
    line says so.
    """
    if classes != model.classes:
        own = model.predictor.state_dict()
        weights = weights | {f"predictor.{name}": value for name, value in own.items()}
        print_once(f"{origin}: kept all but the predictor, new for {model.num_classes - 1} classes")
    load_weights(model, weights, origin)


def published_weights(weights: object) -> dict[str, Tensor]:
    """The file of a member of torchvision's weights: from its cache, else over the network into it.

    Raises
    ------
    ConnectionError
        Neither there; says what to download, and where to put it.
    """
    url = weights.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    request = functools.partial(urllib.request.urlopen, url, timeout=NETWORK_TIMEOUT)
    if not file.exists() and not succeeds_within(lambda: request().close()):
        cure = f"download {url} and put it at {file}"
        raise ConnectionError(f"no network for the published weights: {cure}")
    try:
        return weights.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # a torn file, a dropped connection, a pickle with code in it
        reason = first_line(error)
        raise ValueError(f"{file} cannot be used ({reason}): delete it and try again") from error


def load_weights(module: nn.Module, weights: dict[str, Tensor], origin: object) -> None:
    """Put ``weights`` into a module: all of them or none.

    Raises
    ------
    ValueError
        An entry that is missing, extra or of another shape; names the first and says how many.
    """
    mine = module.state_dict()
    counters = {k for k in mine | weights if k.endswith("num_batches_tracked")}  # not in all files
    differing = [f"{k} is missing" for k in mine.keys() - weights.keys() - counters]
    differing += [f"{k} is unknown to the model" for k in weights.keys() - mine.keys() - counters]
    for k in mine.keys() & weights.keys():
        theirs, ours = list(weights[k].shape), list(mine[k].shape)
        differing += [f"{k} is {theirs} and not {ours}"] if theirs != ours else []
    if differing:
        first = sorted(differing)[0]
        raise ValueError(f"{origin} does not fit the model in {len(differing)} entries: {first}")
    module.load_state_dict(weights, strict=False)


def coco_from_torchvision(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's detector under our names, with the 81 outputs that COCO uses out of its 91."""
    weights = _our_names(state_dict)
    published = COCO_CATEGORY_IDS[-1] + 1  # outputs: one for each id up to 90, used or not
    for layer, per_class in (("predictor.cls", 1), ("predictor.box", 4)):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            value = weights.get(name)
            if value is not None and len(value) == published * per_class:
                used = value.unflatten(0, (published, per_class))[list(COCO_CATEGORY_IDS)]
                weights[name] = used.flatten(0, 1)  # [81, 1 or 4, …] -> [81 or 324, …]
    return weights


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


# --------------------------------------------------------------------------------------------------
# D. Command line
# --------------------------------------------------------------------------------------------------

COCO_TRAIN_IMAGES = 118_287

# What a run of each model takes where nothing else is said: ``batch`` images a step and process,
# ``images`` in all; of a folder, whose size is known, so many ``epochs``, but never fewer images
# than the tiny detector learns from.
_RUN = TINY_STEPS * TINY_BATCH
TRAIN_DEFAULTS = {
    "tiny": {"image_size": TINY_IMAGE_SIZE, "batch": TINY_BATCH, "images": _RUN, "epochs": 30},
    "full": {"image_size": IMG_SIZE, "batch": 16, "images": 12 * COCO_TRAIN_IMAGES, "epochs": 12},
    "coco": {"image_size": (800, 1333), "batch": 2, "images": 12 * COCO_TRAIN_IMAGES, "epochs": 12},
}
RECIPES = {"tiny": one_cycle, "full": step_decay, "coco": step_decay}
_SHUFFLE_BUFFER, _FLIP = 1000, 0.5  # rows; share of mirrored images
_DRAWN = 6  # validation pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: a JSON object as last line of stdout, or one line on stderr and code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold any letter
    try:
        args = _parse(arguments)
        with joined_processes(), warnings.catch_warnings():
            # What is too large is refused in one line, so Pillow need not warn of it.
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            result = args.command(args)
            print_once(json.dumps(result))
        return 2 if result.get("failed") else 0
    except (ValueError, OSError, FloatingPointError) as error:
        # Of an error that a worker passed on only the last line is the message.
        message = str(error).strip() or type(error).__name__
        print(f"frcnn_common: error: {message.splitlines()[-1]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = "where there is a checkpoint, --resume goes on from it"
        print(f"frcnn_common: stopped; {where}", file=sys.stderr)
        return 130


def _train_command(args: Namespace) -> dict:
    if args.checkpoint.is_dir():
        raise ValueError(f"--checkpoint {args.checkpoint} is a folder; name a file")
    world = process_rank()[1]
    default = TRAIN_DEFAULTS[args.model]
    batch = args.batch or default["batch"]
    size = args.image_size or default["image_size"]
    if args.model == "coco" and args.image_size:
        short, longest = default["image_size"]
        size = (size, size * longest // short)
    options = {"source": args.source, "image_size": size, "val_share": args.val_share}
    dataset = COCOStreamDataset("train", args.max_samples, seed=args.seed, **options)
    options["source"] = dataset.source
    # Scenes are independent of each other, and a chosen few keep their order.
    if dataset.source != "glyphs" and args.max_samples is None:
        dataset.shuffle_buffer, dataset.flip = _SHUFFLE_BUFFER, _FLIP
    model, weights = _model_to_train(args, dataset.classes)
    steps = _planned_steps(args, dataset, batch * world)
    workers = {"num_workers": args.workers, "pin_memory": DEVICE.type == "cuda"}
    loader = DataLoader(dataset, batch, collate_fn=frcnn_collate_fn, **workers)
    run = {name: getattr(args, name) for name in ("model", "max_samples", "seed", "workers")}
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
        run=run | options | {"weights": weights},
        after_step=lambda step, history: done.append(step),
    )
    seconds = time.perf_counter() - started
    if process_rank()[0] == 0:
        _draw_validation(model, args.checkpoint, options | {"bbox_format": dataset.bbox_format})
    losses = {name: history[name][-1] for name in ("loss", *LOSS_NAMES)}
    rate = len(done) * batch * world / seconds
    return {"steps": steps, "seconds": seconds, "images_per_second": rate, "losses": losses}


def _model_to_train(args: Namespace, classes: Classes) -> tuple[FasterRCNN, str]:
    """The model, and what it starts from: random, published, or a checkpoint's weights.

    One's own pictures are few: there the tiny detector begins as it came out of the glyph scenes.
    """
    own = classes != COCO_CLASSES
    usual = {"coco": "coco", "tiny": "glyphs" if own else "none"}
    weights = args.weights or usual.get(args.model, "none")
    path = TINY_DETECTOR if weights == "glyphs" else Path(weights)
    torch.manual_seed(args.seed)
    model = MODELS[args.model](len(classes.names)).to(DEVICE)
    model.classes = classes
    if own and weights != "none":
        model.backbone.freeze(2)  # as published: what sees edges and spots stays as it is
    if weights == "none" or (args.resume and args.checkpoint.exists()):
        return model, weights
    if weights == "imagenet":
        load_imagenet_backbone(model)
    elif weights == "coco":
        load_coco_weights(model)
    elif path.is_file():
        _, state, theirs, _ = _read_checkpoint(path)
        start_from(model, state, theirs, path)
    else:
        raise ValueError(f"--weights {weights}: neither none, imagenet, coco, glyphs nor a file")
    return model, weights


def _planned_steps(args: Namespace, dataset: COCOStreamDataset, batch: int) -> int:
    """``--steps``, else from ``--epochs``, else from the defaults; of one's own data said.

    ``batch`` is that of all processes.
    """
    default = TRAIN_DEFAULTS[args.model]
    known = dataset.images and min(dataset.images, args.max_samples or dataset.images)
    total = default["images"]
    if args.epochs and (args.steps or not known):
        raise ValueError("--epochs needs a source whose size is known, and no --steps")
    if args.epochs:
        total = args.epochs * known
    elif known and dataset.source != "glyphs":
        total = max(_RUN, default["epochs"] * known)
    steps = args.steps or max(1, total // batch)
    if dataset.classes != COCO_CLASSES:
        size = dataset.image_size
        names = ", ".join(dataset.classes.names[1:])
        told = f"{steps} steps of {batch}, {size} px"
        print_once(f"{dataset.source}: {known or 'many'} images; {told}; classes {names}")
    return steps


def _draw_validation(model: FasterRCNN, checkpoint: Path, options: dict) -> None:
    """A few pictures that were not trained on, with truth and detections, beside the checkpoint."""
    folder = checkpoint.with_name(f"{checkpoint.stem}_val")
    try:
        dataset = COCOStreamDataset("val", _DRAWN, **options)
        folder.mkdir(exist_ok=True)
        for row in rows_of(dataset.rows.take(_DRAWN), dataset.source):
            picture, truth = read_row(dataset.rendered(row), dataset.bbox_format, model.num_classes)
            found = detect(model, picture, dataset.image_size)
            boxes = torch.from_numpy(truth["boxes"])
            figure = picture_with_detections(picture, found, 0.5, model.classes.names, boxes)
            figure.savefig(folder / f"{truth['image_id']}.jpg")
        print(f"{folder}: validation pictures, truth in white, detections above 0.5")
    except Exception as error:  # of whatever kind: the run is done and saved
        print(f"{folder}: validation pictures end here: {first_line(error)}")


def _evaluate_command(args: Namespace) -> dict:
    if args.annotations and not args.annotations.is_file():
        raise FileNotFoundError(f"no annotations at {args.annotations}")
    model, size, run = _load_for_use(args.checkpoint)
    share = args.val_share if args.val_share is not None else run.get("val_share", 0.2)
    dataset = COCOStreamDataset(args.split, args.max_samples, args.source, size, val_share=share)
    return evaluate(model, dataset, annotations=args.annotations)


def _detect_command(args: Namespace) -> dict:
    """Draw every picture into ``--out``, write ``detections.json``; a bad one costs one line."""
    model, size, _ = _load_for_use(args.checkpoint)
    names, ids = model.classes
    paths = _find_pictures(args.images)
    args.out.mkdir(parents=True, exist_ok=True)
    records, count = [], 0
    for path in tqdm(paths, unit="image", disable=len(paths) == 1):
        try:
            picture = decode_image(path.read_bytes())
        except Exception as error:  # of whatever kind: decoders raise SyntaxError and more
            reason = f"{path} is no picture that can be read: {first_line(error)}"
            tqdm.write(f"frcnn_common: {reason}", file=sys.stderr)
            continue
        found = detect(model, picture, size)
        # Numbered: two folders may hold files of one name.
        drawn = f"{len(records):04d}_{path.stem}.jpg"
        picture_with_detections(picture, found, args.min_score, names).savefig(args.out / drawn)
        columns = (found[name].tolist() for name in ("boxes", "scores", "labels"))
        detections = [
            {"box": box, "score": score, "label": names[label], "category_id": ids[label]}
            for box, score, label in zip(*columns, strict=True)
        ]
        limits = {"min_score": model.SCORE_THR, "min_score_drawn": args.min_score}
        record = {"image": str(path), "drawn": drawn, "width": picture.width}
        record |= {"height": picture.height, **limits, "detections": detections}
        records.append(record)
        count += len(detections)
    (args.out / "detections.json").write_text(json.dumps(records, indent=1))
    return {"images": len(records), "detections": count, "failed": len(paths) - len(records)}


def _load_for_use(path: Path) -> tuple[FasterRCNN, ImageSize, dict]:
    """The model in a checkpoint, the input size that it was trained for, and its run."""
    model, state = load_checkpoint(path)
    if model.classes is None:
        raise ValueError(f"{path} does not say what its classes are called: it was never trained")
    run = state.get("run", {})
    return model, run.get("image_size") or TRAIN_DEFAULTS[model.name]["image_size"], run


def _find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files as they are named; of a folder those with the ending of a picture, by name."""
    found = []
    endings = Image.registered_extensions()
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.glob("*") if p.suffix.lower() in endings)
        if not inside:
            raise FileNotFoundError(f"{path} holds no picture")
        found += inside
    return found


class _Parser(ArgumentParser):
    def error(self, message: str) -> None:
        """One line instead of the usage."""
        raise ValueError(message)


def _at_least(least: int) -> Callable:
    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            wanted = f"must be a whole number of at least {least}"
            raise ArgumentTypeError(f"{wanted}, got {text!r}")
        return int(text)

    return parse


_COMMANDS = {  # name: function, what it does
    "train": (_train_command, "train a detector, or continue where its checkpoint ends"),
    "evaluate": (_evaluate_command, "the twelve COCO figures of a checkpoint"),
    "detect": (_detect_command, "draw detections on photographs"),
}
_COUNT, _FROM_0 = {"type": _at_least(1)}, {"type": _at_least(0), "default": 0}
_SHARE, _FILE, _MUST = {"type": float}, {"type": Path}, {"required": True}
_OPTIONS = (  # the commands that take it, its name, its help, and what else argparse should know
    ("train", "--model", "laptop: tiny; GPU: full, coco", {"choices": sorted(MODELS)} | _MUST),
    ("train", "--steps", "of the whole run (tiny: 380, or 30 epochs of a folder)", _COUNT),
    ("train", "--epochs", "in place of --steps, where the number of images is known", _COUNT),
    ("train", "--batch", "images a step and process (tiny: 8)", _COUNT),
    ("train", "--image-size", "pixels: side of the square (tiny: 128), coco: short side", _COUNT),
    ("train", "--weights", "start: none, imagenet, coco, glyphs, or a checkpoint's file", {}),
    ("train", "--resume", "continue from --checkpoint", {"action": "store_true"}),
    ("train", "--seed", "of order and weights", _FROM_0),
    ("train", "--amp", "mixed precision", {"choices": AMP, "default": "off"}),
    ("train", "--save-every", "steps between checkpoints", _COUNT | {"default": 100}),
    ("train", "--workers", "processes that load", _FROM_0),
    ("evaluate", "--split", "part", {"choices": ("train", "val"), "default": "val"}),
    ("evaluate", "--annotations", "COCO's own instances_val2017.json", _FILE),
    ("detect", "images", "pictures, or folders of them", _FILE | {"nargs": "+"}),
    ("detect", "--out", "folder for pictures and detections.json", _FILE | _MUST),
    ("detect", "--min-score", "drawn from it (0.5); JSON: from 0.05", _SHARE | {"default": 0.5}),
    ("train evaluate detect", "--checkpoint", "what train writes; or torchvision's", _FILE | _MUST),
    ("train evaluate", "--source", "'glyphs', a folder (see the README), Hub's owner/name", {}),
    ("train evaluate", "--max-samples", "only the first so many images, in their order", _COUNT),
    ("train", "--val-share", "held out of one annotation file (0.2)", _SHARE | {"default": 0.2}),
    ("evaluate", "--val-share", "held out of one annotation file (as trained)", _SHARE),
)


def _parse(arguments: Sequence[str] | None) -> Namespace:
    about = "Faster R-CNN with a feature pyramid, from scratch."
    parser = _Parser(prog="python -m frcnn_common", description=about)
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    for command, (run, about) in _COMMANDS.items():
        sub = commands.add_parser(command, help=about)
        sub.set_defaults(command=run)
        for takers, name, text, options in _OPTIONS:
            if command in takers.split():
                sub.add_argument(name, help=text, **options)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
