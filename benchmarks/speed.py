"""Speed against torchvision: operators, the whole detector, its stages, its input, its growth.

Both sides have the same weights, inputs and proposals, and take turns in one process; every figure
is a median. ``python benchmarks/speed.py`` prints a table, and writes ``results.json`` beside this
file and ``figures/benchmark.png``.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import matplotlib
import matplotlib.pyplot as plt
import PIL.Image
import torch
import torchvision
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList

import frcnn_common as frcnn
import frcnn_lesson

RESULTS = Path(__file__).parent / "results.json"
SIDE = 416  # pixels: divides by 32, so that both sides pad alike


def medians(runs: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function; they take turns, so that what disturbs one disturbs all."""
    seconds = [[] for _ in functions]
    for _ in range(runs + 1):  # the first round warms up
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]


def random_boxes(count: int, side: float = 800) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes in swarms of about 20 around objects, as proposals are, and their scores."""
    generator = torch.Generator().manual_seed(count)
    objects = torch.rand(max(1, count // 20), 4, generator=generator)
    centre, size = objects[:, :2] * side, objects[:, 2:] * side / 6 + side / 50
    which = torch.randint(len(objects), (count,), generator=generator)
    jitter = torch.randn(count, 4, generator=generator) * 0.15
    centre, size = centre[which] + jitter[:, :2] * size[which], size[which] * jitter[:, 2:].exp()
    boxes = torch.cat((centre - size / 2, centre + size / 2), dim=1).clamp(0, side)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    return boxes, torch.rand(count, generator=generator)


# The pair of detectors


@functools.cache
def detectors() -> tuple[torch.nn.Module, torch.nn.Module]:
    """torchvision's detector with seeded weights and ours with the same; stem to layer3 frozen."""
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d) and name.endswith("bn3"):
                module.weight.fill_(0.2)
        theirs.rpn.head.cls_logits.weight.mul_(30)
        theirs.roi_heads.box_predictor.cls_score.weight.mul_(50)
        unused = sorted(set(range(91)) - set(frcnn.COCO_CATEGORY_IDS))
        theirs.roi_heads.box_predictor.cls_score.bias[unused] = -100
    state = {
        name: value for name, value in theirs.state_dict().items() if "num_batches" not in name
    }
    norm = functools.partial(torchvision.ops.FrozenBatchNorm2d, eps=0.0)
    theirs.backbone = _resnet_fpn_extractor(
        torchvision.models.resnet50(norm_layer=norm), trainable_layers=1
    )
    theirs.load_state_dict(state)
    ours = frcnn.coco_faster_rcnn()
    norm = functools.partial(frcnn.FrozenBatchNorm2d, eps=0.0)
    ours.backbone = frcnn.ResNet50(norm=norm, frozen_stages=4).to(memory_format=torch.channels_last)
    frcnn.load_coco_weights(ours, state)
    return theirs, ours


def torchvision_forward(
    theirs: torch.nn.Module, images: torch.Tensor, targets: list[dict] | None = None
) -> object:
    """Their detector without its resizing: the images are what they are for both."""
    sizes = [tuple(images.shape[-2:])] * len(images)
    maps = theirs.backbone(images)
    proposals, rpn = theirs.rpn(ImageList(images, sizes), maps, targets)
    results, roi = theirs.roi_heads(maps, proposals, sizes, targets)
    return rpn | roi if targets else results


def targets_for(batch: int, objects: int = 8, side: int = SIDE) -> list[dict]:
    boxes, _ = random_boxes(objects, side)
    return [{"boxes": boxes, "labels": torch.arange(objects) % 80 + 1} for _ in range(batch)]


def training_step(forward: Callable[[], dict], parameters: list) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], 1e-6, 0.9)

    def step() -> None:
        optimizer.zero_grad()
        sum(forward().values()).backward()
        optimizer.step()

    return step


# 1. Operators


def operators(runs: int) -> dict[str, list[float]]:
    """Seconds of torchvision and of ours, each operator alone."""
    rows = {}
    for count in (500, 2000, 5000):
        boxes, scores = random_boxes(count)
        both = (functools.partial(f, boxes, scores, 0.7) for f in (torchvision.ops.nms, frcnn.nms))
        rows[f"nms, {count:,} boxes"] = medians(runs, *both)
    boxes, scores = random_boxes(4000)
    for groups in (5, 80):
        group = torch.arange(4000) % groups
        both = (
            functools.partial(f, boxes, scores, group, 0.7)
            for f in (torchvision.ops.batched_nms, frcnn.batched_nms)
        )
        rows[f"batched nms, 4,000 boxes, {groups} groups"] = medians(runs, *both)

    maps = [
        torch.randn(1, 256, 800 // s, 800 // s).contiguous(memory_format=torch.channels_last)
        for s in (4, 8, 16, 32)
    ]
    boxes, _ = random_boxes(1000)
    theirs = torchvision.ops.MultiScaleRoIAlign(list("0123"), 7, 2)
    ours = frcnn.ROIAlign(aligned=False, level_eps=1e-6)
    pools = (
        lambda maps: theirs(dict(zip("0123", maps, strict=True)), [boxes], [(800, 800)]),
        lambda maps: ours(maps, [boxes], (800, 800)),
    )
    rows["ROIAlign forward, 1,000 regions"] = medians(
        runs, *(functools.partial(pool, maps) for pool in pools)
    )
    learning = [level.clone(memory_format=torch.preserve_format).requires_grad_() for level in maps]
    both = (functools.partial(lambda pool: pool(learning).sum().backward(), pool) for pool in pools)
    rows["ROIAlign forward and backward"] = medians(max(3, runs // 3), *both)

    anchors, image = (
        AnchorGenerator(((32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 4),
        ImageList(maps[0], [(800, 800)]),
    )
    mine = frcnn.coco_faster_rcnn().rpn.anchor_gen
    mine.anchor_sizes = mine.anchor_sizes[:4]

    rows["anchors of a new size"] = medians(
        runs, lambda: anchors(image, maps), lambda: mine(maps, (800, 800))
    )
    many, gt = random_boxes(60_000)[0], random_boxes(20)[0]
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    rows["matching 60,000 anchors, 20 objects"] = medians(
        runs,
        lambda: matcher(torchvision.ops.box_iou(gt, many)),
        lambda: frcnn.match_boxes(many, gt, 0.7, 0.3, best_is_positive=True),
    )
    theirs, ours = detectors()
    logits, deltas = torch.randn(1000, 91) * 2, torch.randn(1000, 91, 4) * 0.1
    used = list(frcnn.COCO_CATEGORY_IDS)
    logits[:, sorted(set(range(91)) - set(used))] = -100
    rows["post-processing, 1,000 × 81"] = medians(
        runs,
        lambda: theirs.roi_heads.postprocess_detections(
            logits, deltas.flatten(1), [boxes], [(800, 800)]
        ),
        lambda: ours.detections(logits[:, used], deltas[:, used], [boxes], [(800, 800)]),
    )
    return rows


# 2. The whole detector


def whole_detector(runs: int) -> dict[str, list[float]]:
    """Seconds of torchvision in float32 and of ours, in bfloat16 against the same float32."""
    theirs, ours = detectors()
    rows = {}
    for batch in (1, 2, 8):
        images, targets = torch.randn(batch, 3, SIDE, SIDE), targets_for(batch)
        repeats = max(3, runs // (2 * batch))
        theirs.eval(), ours.eval()

        def bf16(model: torch.nn.Module = ours, images: torch.Tensor = images) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                model(images)

        with torch.no_grad():
            base, full, half = medians(
                repeats,
                functools.partial(torchvision_forward, theirs, images),
                functools.partial(ours, images),
                bf16,
            )
        rows[f"inference, batch {batch}"] = [base, full]
        rows[f"inference in bfloat16, batch {batch}"] = [base, half]
        theirs.train(), ours.train()
        steps = (
            training_step(
                functools.partial(torchvision_forward, theirs, images, targets),
                list(theirs.parameters()),
            ),
            training_step(functools.partial(ours, images, targets), list(ours.parameters())),
        )
        rows[f"training step, batch {batch}"] = medians(repeats, *steps)
    return rows


def peak_megabytes(side: str) -> float:
    """Highest memory of this process in two training steps of batch 2, the model included.

    Linux alone can tell.
    """
    theirs, ours = (model.train() for model in detectors())
    images, targets = torch.randn(2, 3, SIDE, SIDE), targets_for(2)
    forward, model = {
        "theirs": (functools.partial(torchvision_forward, theirs, images, targets), theirs),
        "ours": (functools.partial(ours, images, targets), ours),
    }[side]
    # Forget the highest so far, which building both models took.
    Path("/proc/self/clear_refs").write_text("5")
    step = training_step(forward, list(model.parameters()))
    step(), step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def stages(runs: int) -> dict[str, dict[str, float]]:
    """Seconds of each stage of our inference, batch 2, and its share of the best rate there is."""
    _, ours = detectors()
    ours.eval()
    images = torch.randn(2, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    sizes = [(SIDE, SIDE)] * 2
    with torch.no_grad():
        maps = ours.backbone(images)
        pyramid = ours.fpn(maps)
        proposals, _ = ours.rpn(pyramid, (SIDE, SIDE))
        outputs = ours.box_outputs(pyramid, proposals, (SIDE, SIDE))
        calls = {
            "backbone": lambda: ours.backbone(images),
            "FPN": lambda: ours.fpn(maps),
            "RPN": lambda: ours.rpn(pyramid, (SIDE, SIDE)),
            "ROI head": lambda: ours.box_outputs(pyramid, proposals, (SIDE, SIDE)),
            "post-processing": lambda: ours.detections(*outputs, proposals, sizes),
        }
        seconds = dict(zip(calls, medians(runs, *calls.values()), strict=True))
        conv = torch.nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
        block = torch.randn(8, 256, 56, 56).contiguous(memory_format=torch.channels_last)
        rate = 2 * 9 * 256 * 256 * 8 * 56 * 56 / medians(runs, lambda: conv(block))[0]
        table = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            flops = counter.get_total_flops()
            table[name] = {
                "seconds": seconds[name],
                "gflops": flops / 1e9,
                "of_best": flops / seconds[name] / rate,
            }
    return table


# 4. Input


def input_rate(photographs: int = 300) -> dict[str, float]:
    """Images a second and core from encoded JPEG to batch, and of PIL's decode and resize alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    encoded = io.BytesIO()
    PIL.Image.open(path).convert("RGB").resize((640, 480)).save(encoded, "jpeg", quality=92)
    image = {"bytes": encoded.getvalue(), "path": None}
    objects = {
        "bbox_id": [0],
        "category": [0],
        "bbox": [[10.0, 20.0, 200.0, 300.0]],
        "area": [900.0],
    }
    rows = [
        {"image_id": i, "image": image, "width": 640, "height": 480, "objects": objects}
        for i in range(photographs)
    ]

    def bare() -> None:
        for row in rows:
            picture = PIL.Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            picture.resize((frcnn.IMG_SIZE, frcnn.IMG_SIZE), PIL.Image.Resampling.BILINEAR)

    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_list(rows).to_parquet(Path(folder) / "train-00000.parquet")
        dataset = frcnn.COCOStreamDataset("train", source=folder, bbox_format="xyxy")
        loader = DataLoader(dataset, 8, collate_fn=frcnn.frcnn_collate_fn)
        alone, ours = medians(5, bare, lambda: [None for _ in loader])
    torch.set_num_threads(threads)
    return {"ours": photographs / ours, "PIL alone": photographs / alone, "ratio": alone / ours}


# 5. How cost grows


def growth(runs: int) -> dict[str, dict[int, float]]:
    """Seconds as one thing grows: side and proposals at inference, objects in training."""
    _, ours = detectors()
    ours.eval()
    table = {"image side": {}, "proposals": {}, "objects": {}}
    with torch.no_grad():
        for side in (256, 512, 768, 1024):
            images = torch.randn(1, 3, side, side)
            (table["image side"][side],) = medians(runs, functools.partial(ours, images))
        images, before = torch.randn(1, 3, SIDE, SIDE), ours.rpn.post_nms
        for count in (100, 500, 1000, 2000):
            ours.rpn.pre_nms = ours.rpn.post_nms = count
            (table["proposals"][count],) = medians(runs, functools.partial(ours, images))
        ours.rpn.pre_nms = ours.rpn.post_nms = before
    ours.train()
    for count in (1, 10, 100, 500):
        forward = functools.partial(ours, images, targets_for(1, count))
        (table["objects"][count],) = medians(runs, training_step(forward, list(ours.parameters())))
    return table


def keep(results: dict) -> None:
    """Put results into the file, beside those of the other script, with machine and versions."""
    versions = {
        name: module.__version__
        for name, module in (("torch", torch), ("torchvision", torchvision))
    }
    python = f"Python {platform.python_version()}"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {python}"
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(
        json.dumps(old | {"machine": machine, "versions": versions} | results, indent=1) + "\n"
    )


def draw(rows: dict[str, list[float]]) -> None:
    ratios = {name: ours / theirs for name, (theirs, ours) in rows.items()}
    figure, ax = plt.subplots(figsize=(9, 0.36 * len(ratios) + 1), layout="constrained")
    colors = [frcnn.PALETTE[2] if ratio <= 1 else frcnn.PALETTE[5] for ratio in ratios.values()]
    bars = ax.barh(list(ratios), list(ratios.values()), color=colors, edgecolor="black")
    ax.bar_label(bars, fmt="%.2f", padding=4)
    ax.axvline(1, color="black", linestyle="--")
    ax.invert_yaxis()
    ax.set(
        xlabel="time of frcnn_common / time of torchvision",
        xlim=(0, max(1.2, 1.15 * max(ratios.values()))),
    )
    frcnn_lesson.save_figure(figure, "benchmark.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument(
        "--peak",
        choices=("ours", "theirs"),
        help="print the peak memory of one side, and nothing else",
    )
    args = parser.parse_args()
    if args.peak:
        print(peak_megabytes(args.peak))
        return
    rows = operators(args.runs) | whole_detector(args.runs)
    for name, (theirs, ours) in rows.items():
        print(f"{name:40} {1e3 * theirs:9.2f} ms {1e3 * ours:9.2f} ms   {ours / theirs:.2f}")
    draw(rows)
    command = [sys.executable, __file__, "--peak"]
    memory = {
        s: float(subprocess.run([*command, s], capture_output=True, check=True).stdout)
        for s in ("theirs", "ours")
    }
    print("peak memory of a training step, batch 2, MB:", memory)
    results = {
        "seconds of torchvision and ours": rows,
        "peak memory in MB": memory,
        "stages": stages(args.runs),
        "growth": growth(max(2, args.runs // 5)),
        "input": input_rate(),
    }
    for name in ("stages", "growth", "input"):
        print(name, json.dumps(results[name], indent=1))
    keep(results)


if __name__ == "__main__":
    main()
