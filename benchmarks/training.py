"""Training of the tiny detector against one assembled from torchvision's parts, on the same scenes.

Both have the same widths, anchors, proposal and sampling counts, input, batch and recipe. Run it
with ``python benchmarks/training.py``; the ratio of the two times carries over to other machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torchvision
from speed import keep
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import (
    AnchorGenerator,
    FastRCNNPredictor,
    RPNHead,
    TwoMLPHead,
)
from torchvision.models.resnet import Bottleneck
from torchvision.ops import MultiScaleRoIAlign

import frcnn_common as frcnn


class NarrowBackbone(nn.Module):
    """torchvision's bottlenecks and pyramid in the widths of `frcnn_common.tiny_faster_rcnn`."""

    def __init__(self, width: int = 16, out_channels: int = 64) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.MaxPool2d(3, 2, 1),
        )
        stages, channels = [], width
        for i, depth in enumerate((3, 4, 6, 3)):
            planes, stride = width * 2**i, 1 if i == 0 else 2
            outer = planes * Bottleneck.expansion
            shortcut = nn.Sequential(
                nn.Conv2d(channels, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )
            blocks = [Bottleneck(channels, planes, stride, shortcut)]
            stages.append(
                nn.Sequential(*blocks, *(Bottleneck(outer, planes) for _ in range(depth - 1)))
            )
            channels = outer
        self.stages = nn.ModuleList(stages)
        self.fpn = torchvision.ops.FeaturePyramidNetwork(
            [width * 2**i * 4 for i in range(4)],
            out_channels,
            torchvision.ops.feature_pyramid_network.LastLevelMaxPool(),
        )
        for module in self.stages.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x, maps = self.stem(x), {}
        for i, stage in enumerate(self.stages):
            maps[str(i)] = x = stage(x)
        return self.fpn(maps)


def torchvision_twin() -> FasterRCNN:
    """torchvision's detector with every number of `tiny_faster_rcnn`."""
    ours = frcnn.tiny_faster_rcnn()
    rpn, gen, channels = ours.rpn, ours.rpn.anchor_gen, ours.fpn.out_channels
    anchors = AnchorGenerator(
        tuple((s,) for s in gen.anchor_sizes), (gen.aspect_ratios,) * len(gen.anchor_sizes)
    )
    pre, post = (n if isinstance(n, tuple) else (n, n) for n in (rpn.pre_nms, rpn.post_nms))
    fc_dim = ours.box_head.fc2.out_features
    pool = MultiScaleRoIAlign(
        list("0123"),
        ours.roi_align.out_size,
        ours.roi_align.sampling,
        canonical_level=ours.roi_align.k0,
    )
    return FasterRCNN(
        NarrowBackbone(),
        min_size=frcnn.TINY_IMAGE_SIZE,
        max_size=frcnn.TINY_IMAGE_SIZE,
        image_mean=[0.0] * 3,  # the stream has normalised already
        image_std=[1.0] * 3,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(channels, len(gen.aspect_ratios)),
        rpn_pre_nms_top_n_train=pre[0],
        rpn_pre_nms_top_n_test=pre[1],
        rpn_post_nms_top_n_train=post[0],
        rpn_post_nms_top_n_test=post[1],
        box_roi_pool=pool,
        box_batch_size_per_image=ours.ROI_BATCH,
        box_positive_fraction=ours.ROI_POS_FRAC,
        box_head=TwoMLPHead(channels * 49, fc_dim),
        box_predictor=FastRCNNPredictor(fc_dim, frcnn.NUM_CLASSES),
    )


NAMES = {
    "loss_objectness": "rpn_cls",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "roi_cls",
    "loss_box_reg": "roi_box",
}


class TorchvisionInOurShape(nn.Module):
    """Lets `frcnn_common.train` and `evaluate` drive the twin: same loop, same names of losses."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = torchvision_twin()

    def forward(self, images: torch.Tensor, targets: list[dict] | None = None):
        out = self.detector(list(images), targets)
        return {NAMES[k]: v for k, v in out.items()} if self.training else (out, None)


def timed_run(model: nn.Module, steps: int, val_scenes: int) -> dict[str, float]:
    size = frcnn.TINY_IMAGE_SIZE
    loader = DataLoader(
        frcnn.COCOStreamDataset("train", source="glyphs", image_size=size),
        frcnn.TINY_BATCH,
        collate_fn=frcnn.frcnn_collate_fn,
    )
    started = time.perf_counter()
    frcnn.train(model, loader, steps)
    seconds = time.perf_counter() - started
    figures = frcnn.evaluate(model, frcnn.COCOStreamDataset("val", val_scenes, "glyphs", size))
    return {"steps": steps, "seconds": seconds, "AP": figures["AP"], "AP50": figures["AP50"]}


def spread(values: list[float], places: int) -> str:
    """Median, lowest and highest."""
    middle, low, high = (f"{f(values):.{places}f}" for f in (statistics.median, min, max))
    return f"median {middle}, {low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=frcnn.TINY_STEPS, help="of our detector")
    parser.add_argument(
        "--torchvision-steps", type=int, default=800, help="0 leaves torchvision out"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--val-scenes", type=int, default=200)
    args = parser.parse_args()
    ours, theirs = [], []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        ours.append(timed_run(frcnn.tiny_faster_rcnn(), args.steps, args.val_scenes))
        print(f"seed {seed} ours        {json.dumps(ours[-1])}", flush=True)
        if args.torchvision_steps:
            torch.manual_seed(seed)
            theirs.append(
                timed_run(TorchvisionInOurShape(), args.torchvision_steps, args.val_scenes)
            )
            print(f"seed {seed} torchvision {json.dumps(theirs[-1])}", flush=True)
    for name, runs in (("ours", ours), ("torchvision", theirs)):
        for key in ("seconds", "AP", "AP50") if runs else ():
            values = [run[key] for run in runs]
            print(f"{name}: {key} {spread(values, 3)}")
    if theirs:
        keep({"training": {"ours": ours, "torchvision": theirs}})
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
        print(f"time, ours / torchvision: {spread(ratios, 2)}")


if __name__ == "__main__":
    main()
