"""Hostile images, targets and boxes: losses and gradients stay finite, shapes and types are what they should be."""

import itertools
import math

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import frcnn_common as frcnn

EXAMPLES = 200  # of each property
CLASSES = 6
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def narrow_detector(norm=frcnn.FrozenBatchNorm2d) -> frcnn.FasterRCNN:
    """With outputs that differ from box to box; with constant batch norm an image does not see its neighbours."""
    torch.manual_seed(0)
    backbone = frcnn.ResNet50(8, norm)
    fpn = frcnn.FPN(backbone.out_channels, 16)
    anchors = frcnn.AnchorGenerator((16, 32, 64, 128, 256))
    rpn = frcnn.RegionProposalNetwork(frcnn.RPNHead(16), anchors, 200, 100, min_sz=4)
    detector = frcnn.FasterRCNN(CLASSES, backbone, fpn, rpn, None, frcnn.TwoMLPHead(16 * 49, 32))
    if norm is frcnn.FrozenBatchNorm2d:
        for module in backbone.modules():
            if isinstance(module, frcnn.Bottleneck):
                module.bn3.weight.fill_(0.2)  # else sixteen blocks add up to thousands
    for layer, std in [
        (rpn.head.objectness, 0.5),
        (rpn.head.deltas, 0.05),
        (detector.predictor.cls, 0.5),
    ]:
        nn.init.normal_(layer.weight, std=std)
    detector.SCORE_THR = 0.1
    return detector


def objects(count: int, height: int, width: int, classes: int = CLASSES) -> dict:
    """So many boxes of any size inside the image, and their labels."""
    first, second = (torch.rand(count, 2) * torch.tensor([width, height]) for _ in range(2))
    least = torch.tensor([width, height]) * 0.01
    low, high = torch.minimum(first, second), torch.maximum(first, second) + least
    boxes = torch.cat((low, torch.minimum(high, torch.tensor([width, height]))), dim=1)
    return {"boxes": boxes, "labels": torch.randint(1, classes, (count,))}


def assert_trains(model: frcnn.FasterRCNN, losses: dict[str, torch.Tensor]) -> None:
    """Four finite float32 losses, and finite gradients wherever there is one."""
    assert list(losses) == list(frcnn.LOSS_NAMES)
    for loss in losses.values():
        assert (loss.dtype, loss.ndim, bool(loss.isfinite() & (loss >= 0))) == (
            torch.float32,
            0,
            True,
        ), losses
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def assert_detects(
    results: list[dict], proposals: list[torch.Tensor], sizes: list[tuple[int, int]]
) -> None:
    """Types, shapes, ranges and order of what `FasterRCNN` promises outside training."""
    assert len(results) == len(proposals) == len(sizes)
    for result, boxes, (height, width) in zip(results, proposals, sizes, strict=True):
        count, limit = len(result["boxes"]), torch.tensor([width, height])
        assert {name: (value.dtype, tuple(value.shape)) for name, value in result.items()} == {
            "boxes": (torch.float32, (count, 4)),
            "scores": (torch.float32, (count,)),
            "labels": (torch.int64, (count,)),
        }
        assert (boxes.dtype, tuple(boxes.shape)) == (torch.float32, (len(boxes), 4))
        for corners in (result["boxes"], boxes):
            assert corners.isfinite().all()
            assert (corners >= 0).all()
            assert (corners[:, 2:] <= limit).all()
            assert (corners[:, 2:] >= corners[:, :2]).all()
        assert (result["scores"].diff() <= 0).all()
        assert ((result["scores"] > 0) & (result["scores"] <= 1)).all()
        assert (result["labels"] >= 1).all()


# --- sizes -----------------------------------------------------------------------------------------------------------

SIZES = [(33, 33), (33, 1333), (1333, 33), (35, 901), (97, 641), (255, 333)]
LARGE = [(799, 1333), (1333, 1333)]


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size", [*SIZES, *(pytest.param(size, marks=pytest.mark.slow) for size in LARGE)]
)
def test_every_size_from_33_to_1333_trains_and_detects(size, amp):
    model, images = frcnn.tiny_faster_rcnn(), torch.randn(2, 3, *size)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model.train()(images, [objects(3, *size, 81), objects(0, *size)])
        model.SCORE_THR = 0.0
        with torch.no_grad():
            results, proposals = model.eval()(images)
    assert_trains(model, losses)
    assert_detects(results, proposals, [size] * 2)
    assert all(len(result["boxes"]) > 0 for result in results)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1, 1)])
@pytest.mark.parametrize("image_size", [33, 128, (40, 67)])
def test_lines_and_dots_train_and_are_detected_on(size, image_size):
    picture = PIL.Image.fromarray(torch.rand(size[1], size[0], 3).mul(255).byte().numpy())
    pixels, (height, width) = frcnn.prepare_image(picture, image_size)
    model = frcnn.tiny_faster_rcnn().train()
    target = {"boxes": torch.tensor([[0.0, 0, width, height]]), "labels": torch.tensor([80])}
    images = torch.stack((pixels, pixels))
    assert_trains(model, model(images, [target] * 2, [(height, width)] * 2))
    model.SCORE_THR, model.rpn.min_sz = 0.0, 0.5
    found = frcnn.detect(model, picture, image_size)
    assert len(found["boxes"]) > 0
    assert found["boxes"].isfinite().all()
    assert (found["boxes"][:, 2:] <= torch.tensor(size) + 1e-2).all()


# --- nothing there ---------------------------------------------------------------------------------------------------

SIDE = 96
KINDS = {  # objects, true size: of one pixel no proposal is large enough
    "objects and proposals": (3, (SIDE, SIDE)),
    "no objects": (0, (SIDE, SIDE)),
    "no proposals": (3, (1, 1)),
    "neither": (0, (1, 1)),
}


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kinds", list(itertools.combinations_with_replacement(KINDS, 2)), ids=" + ".join
)
def test_batches_of_every_mixture_train_and_detect(kinds, amp):
    counts, sizes = zip(*(KINDS[kind] for kind in kinds), strict=True)
    model, images = narrow_detector(frcnn.SyncedBatchNorm2d), torch.randn(2, 3, SIDE, SIDE)
    targets = [objects(count, SIDE, SIDE) for count in counts]
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model.train()(images, targets, sizes)
        with torch.no_grad():
            results, proposals = model.eval()(images, image_sizes=sizes)
    assert_trains(model, losses)
    assert_detects(results, proposals, sizes)
    assert [len(boxes) > 0 for boxes in proposals] == [size != (1, 1) for size in sizes]
    assert [len(result["boxes"]) > 0 for result in results] == [size != (1, 1) for size in sizes]
    assert (losses["rpn_box"] > 0) == (losses["roi_box"] > 0) == any(counts)
    assert (losses["roi_cls"] > 0) == (set(kinds) != {"neither"})


def test_an_image_without_detections_between_others_stays_empty():
    model, box = narrow_detector(), torch.tensor([[10.0, 10, 60, 60], [70, 10, 90, 60]])
    sure, unsure = torch.tensor([0.0, 9, 0, 0, 0, 0]), torch.tensor([9.0, 0, 0, 0, 0, 0])
    logits = torch.stack((sure, sure, unsure, unsure, sure))
    proposals = [box, box, box[:0], box[:1]]
    results = model.detections(logits, torch.zeros(5, CLASSES, 4), proposals, [(SIDE, SIDE)] * 4)
    assert [len(result["boxes"]) for result in results] == [2, 0, 0, 1]
    assert_detects(results, proposals, [(SIDE, SIDE)] * 4)


# --- more objects than anchors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_more_objects_than_anchors_train(count):
    model = frcnn.tiny_faster_rcnn().train()
    losses = model(torch.randn(2, 3, 33, 33), [objects(count, 33, 33, 81), objects(1, 33, 33, 81)])
    assert count > 2 * len(model.rpn.anchor_gen._last[1])
    assert_trains(model, losses)


def test_thousands_of_objects_are_matched_in_pieces_that_fit_into_memory(monkeypatch):
    assert 4 * frcnn._MATCH_PAIRS <= 2**27  # bytes of one matrix of float32
    pairs, box_iou = [], frcnn.box_iou

    def counted(boxes_a, boxes_b):
        pairs.append(len(boxes_a) * len(boxes_b))
        return box_iou(boxes_a, boxes_b)

    monkeypatch.setattr(frcnn, "box_iou", counted)
    anchors = frcnn.AnchorGenerator()(
        [torch.zeros(1, 1, 50 >> i, 50 >> i) for i in range(5)], (200, 200)
    )
    gt_boxes = objects(2000, 200, 200)["boxes"]
    labels, matched = frcnn.match_boxes(anchors, gt_boxes, 0.7, 0.3, True)
    assert sum(pairs) == len(gt_boxes) * len(anchors) > frcnn._MATCH_PAIRS
    assert max(pairs) <= frcnn._MATCH_PAIRS
    assert matched.max() > 1900
    assert (labels == 1).sum() > 1000


# --- alone and in a batch --------------------------------------------------------------------------------------------


def everything_is_sampled(model: frcnn.FasterRCNN) -> frcnn.FasterRCNN:
    """No chance remains: all anchors and all proposals count."""
    model.rpn.RPN_BATCH = model.ROI_BATCH = 10**6
    model.rpn.POS_FRAC = model.ROI_POS_FRAC = 0.5
    return model


@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 0, 4), (1, 40, 2)])
def test_losses_of_a_batch_are_those_of_its_images_weighted_by_their_samples(counts):
    model = everything_is_sampled(narrow_detector()).train()
    images = torch.randn(3, 3, SIDE, SIDE) * torch.tensor([1.0, 3.0, 0.3]).view(3, 1, 1, 1)
    targets = [objects(count, SIDE, SIDE) for count in counts]
    sampled = {}
    model.rpn.register_forward_hook(
        lambda module, arguments, result: sampled.update(proposals=result[0])
    )
    expected, anchors_sampled, proposals_sampled = dict.fromkeys(frcnn.LOSS_NAMES, 0.0), 0, 0
    for i, target in enumerate(targets):
        alone = model(images[i : i + 1], [target])
        anchors = model.rpn.anchor_gen._last[1]
        labels, _ = frcnn.match_boxes(anchors, target["boxes"], 0.7, 0.3, best_is_positive=True)
        weights = {
            "rpn": int((labels >= 0).sum()),
            "roi": len(sampled["proposals"][0]) + len(target["boxes"]),
        }
        for name, loss in alone.items():
            expected[name] += loss.item() * weights[name[:3]]
        anchors_sampled, proposals_sampled = (
            anchors_sampled + weights["rpn"],
            proposals_sampled + weights["roi"],
        )
    together = model(images, targets)
    for name, loss in together.items():
        mean = expected[name] / (anchors_sampled if name.startswith("rpn") else proposals_sampled)
        assert loss.item() == pytest.approx(mean, rel=1e-4), name
    assert all(loss > 0 for loss in together.values())


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_an_image_of_no_numbers_leaves_its_neighbours_alone(value):
    model = narrow_detector().eval()
    images = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        expected, _ = model(images[[0, 2]])
        images[1, 0, 40:50, 40:50] = value
        results, proposals = model(images)
    assert_detects(results, proposals, [(SIDE, SIDE)] * 3)
    for result, other in zip([results[0], results[2]], expected, strict=True):
        assert len(other["boxes"]) > 3
        assert torch.equal(result["labels"], other["labels"])
        torch.testing.assert_close(result["boxes"], other["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(result["scores"], other["scores"], atol=1e-5, rtol=0)


# --- boxes of chance -------------------------------------------------------------------------------------------------

# float32 holds areas up to 1e38 and differences down to a part in 1e7; sides from nothing to 1e15 are tried.
side = st.one_of(
    st.just(0.0), st.floats(0, 400, width=32), st.sampled_from([1e-30, 1e-7, 1e-3, 1e6, 1e15])
)
corner = st.one_of(
    st.floats(-50, 450, width=32), st.sampled_from([0.0, 1e-30, -1e6, 1e6, 1e15, -1e15])
)
any_box = st.tuples(corner, corner, side, side).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
few_values = st.integers(0, 12)
small_box = st.tuples(few_values, few_values, few_values, few_values).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
hostile_boxes = st.lists(any_box | small_box, max_size=30).map(
    lambda b: torch.tensor(b).reshape(-1, 4).float()
)
chance = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)


@chance
@given(hostile_boxes, hostile_boxes)
def test_iou_of_hostile_boxes_lies_in_0_to_1_and_equals_torchvision(a, b):
    iou = frcnn.box_iou(a, b)
    assert (iou.dtype, tuple(iou.shape)) == (torch.float32, (len(a), len(b)))
    assert ((iou >= 0) & (iou <= 1)).all()  # NaN would be neither
    assert torch.equal(iou, frcnn.box_iou(b, a).T)
    expected = torchvision.ops.box_iou(a, b)
    torch.testing.assert_close(
        iou, expected.nan_to_num(0), atol=1e-6, rtol=1e-5
    )  # there 0/0 is NaN
    own = frcnn.box_iou(a, a).diagonal()
    assert torch.equal(own, (frcnn.box_area(a) > 0).float())


@chance
@given(hostile_boxes, st.integers(1, 1333), st.integers(1, 1333))
def test_clipped_boxes_lie_inside_and_stay_there(boxes, height, width):
    size = torch.tensor([height, width])
    clipped = frcnn.clip_boxes(boxes, size)
    assert (clipped >= 0).all()
    assert (clipped <= torch.tensor([width, height, width, height])).all()
    assert (clipped[:, 2:] >= clipped[:, :2]).all()
    assert torch.equal(frcnn.clip_boxes(clipped, size), clipped)
    assert torch.equal(clipped, torchvision.ops.clip_boxes_to_image(boxes, (height, width)))


solid_box = st.tuples(
    *[st.floats(-1e3, 1e3, width=32)] * 2, *[st.floats(0.125, 1e3, width=32)] * 2
).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
coder_weights = st.sampled_from([(1, 1, 1, 1), (10, 10, 5, 5)])


@chance
@given(st.lists(st.tuples(solid_box, solid_box), min_size=1, max_size=20), coder_weights)
def test_decode_undoes_encode_for_boxes_of_chance(pairs, weights):
    proposals, targets = torch.tensor(pairs).float().unbind(1)
    deltas = frcnn.encode_boxes(proposals, targets, weights)
    assert deltas.isfinite().all()
    decoded = frcnn.decode_boxes(proposals, deltas, weights, max_log_scale=20)
    torch.testing.assert_close(decoded, targets, atol=0.02, rtol=1e-4)


any_delta = st.one_of(
    st.floats(-5, 5, width=32), st.floats(width=32), st.sampled_from([3e38, -3e38, NAN, INF, -INF])
)


@chance
@given(
    st.lists(
        st.tuples(solid_box, st.lists(any_delta, min_size=4, max_size=4)), min_size=1, max_size=20
    ),
    coder_weights,
)
def test_whatever_the_network_says_a_proposal_lies_inside_its_image(pairs, weights):
    """Outputs of a network that has gone wild: boxes that are NaN fail the comparison of sizes, others are clipped."""
    anchors, deltas = (torch.tensor(values).float() for values in zip(*pairs, strict=True))
    decoded = frcnn.decode_boxes(anchors, deltas, weights)
    assert decoded[deltas.isfinite().all(1)].isnan().sum() == 0
    rpn = frcnn.RegionProposalNetwork(frcnn.RPNHead(4), frcnn.AnchorGenerator(), min_sz=1).eval()
    logits, size = torch.linspace(-1, 1, len(anchors)), torch.tensor([[90, 70]])
    (proposals,) = rpn.propose(anchors, logits[None], deltas[None], [len(anchors)], size)
    assert proposals.isfinite().all()
    assert (proposals >= 0).all()
    assert (proposals[:, 2:] <= torch.tensor([70, 90])).all()
    assert (proposals[:, 2:] - proposals[:, :2] >= 1).all()


any_score = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0, INF, -INF, 1e-45])
scored = st.lists(
    st.tuples(any_box | small_box, any_score, st.sampled_from([0, 1, 7, 80, 10**6])), max_size=40
)


def as_tensors(rows: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    boxes, scores, groups = ([row[i] for row in rows] for i in range(3))
    return (
        torch.tensor(boxes).reshape(-1, 4).float(),
        torch.tensor(scores).float(),
        torch.tensor(groups).long(),
    )


@chance
@given(scored, st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
def test_nms_of_hostile_boxes_equals_torchvision(rows, threshold):
    boxes, scores, groups = as_tensors(rows)
    assert torch.equal(
        frcnn.nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold)
    )
    kept = []
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        kept += members[torchvision.ops.nms(boxes[members], scores[members], threshold)].tolist()
    expected = sorted(kept, key=lambda i: (-scores[i].item(), i))
    assert frcnn.batched_nms(boxes, scores, groups, threshold).tolist() == expected


@chance
@given(scored)
def test_nms_keeps_a_box_that_is_not_a_number_and_suppresses_nothing_with_it(rows):
    boxes, scores, _ = as_tensors(rows)
    strange = torch.tensor([[NAN] * 4, [NAN, 0, 10, 10]])
    with_strange = torch.cat((boxes, strange)), torch.cat((scores, torch.tensor([0.9, 0.1])))
    kept = frcnn.nms(*with_strange, 0.5)
    assert set(kept.tolist()) == {
        *frcnn.nms(boxes, scores, 0.5).tolist(),
        len(boxes),
        len(boxes) + 1,
    }


def naive_match(boxes, gt_boxes, pos_thr, neg_thr, best_is_positive) -> tuple[list[int], list[int]]:
    """The sentences of the paper, box by box and object by object."""
    iou = frcnn.box_iou(gt_boxes, boxes).numpy()  # [K, N]
    labels, matched = [], []
    for n in range(len(boxes)):
        best = iou[:, n].max() if len(iou) else np.float32(-1)
        label = 1 if best >= np.float32(pos_thr) else -1 if best >= np.float32(neg_thr) else 0
        if best_is_positive and any(row[n] > 0 and row[n] == row.max() for row in iou):
            label = 1
        labels.append(label)
        matched.append(int(np.argmax(iou[:, n])) if len(iou) else 0)  # the first of equals
    return labels, matched


@chance
@given(
    hostile_boxes.filter(len),  # there is always an anchor
    hostile_boxes,
    st.sampled_from([(0.7, 0.3), (0.5, 0.5), (1.0, 0.1)]),
    st.booleans(),
    st.sampled_from([1, 40, 2**24]),
)
def test_matching_of_hostile_boxes_equals_the_naive_loops(
    boxes, gt_boxes, thresholds, best_is_positive, pairs
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frcnn, "_MATCH_PAIRS", pairs)  # of 1: object by object
        labels, matched = frcnn.match_boxes(boxes, gt_boxes, *thresholds, best_is_positive)
    assert labels.dtype == matched.dtype == torch.int64
    assert (labels.tolist(), matched.tolist()) == naive_match(
        boxes, gt_boxes, *thresholds, best_is_positive
    )


MAPS = [
    torch.randn(1, 2, 64 >> i, 80 >> i, generator=torch.Generator().manual_seed(i))
    for i in range(4)
]
SIZE = (256, 320)


def pooled_by_torchvision(boxes: torch.Tensor, aligned: bool) -> torch.Tensor:
    pooled = torch.zeros(len(boxes), 2, 7, 7)
    for i, level in enumerate(frcnn.ROIAlign().assign_levels(boxes).tolist()):
        rois = torch.cat((torch.zeros(1, 1), boxes[i : i + 1]), dim=1)
        pooled[i] = torchvision.ops.roi_align(MAPS[level], rois, 7, 0.25 / 2**level, 2, aligned)[0]
    return pooled


near_box = st.tuples(*[st.floats(-600, 900, width=16)] * 2, *[st.floats(0, 900, width=16)] * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@chance
@given(
    st.lists(near_box, max_size=12).map(lambda b: torch.tensor(b).reshape(-1, 4).float()),
    st.booleans(),
)
def test_pooling_of_boxes_of_chance_equals_torchvision(boxes, aligned):
    pooled = frcnn.ROIAlign(aligned=aligned)(MAPS, [boxes], SIZE)
    torch.testing.assert_close(pooled, pooled_by_torchvision(boxes, aligned), atol=1e-3, rtol=0)


@chance
@given(hostile_boxes, st.booleans())
def test_pooling_of_hostile_boxes_is_finite(boxes, aligned):
    pooled = frcnn.ROIAlign(aligned=aligned)(MAPS, [boxes], SIZE)
    assert (pooled.dtype, tuple(pooled.shape)) == (torch.float32, (len(boxes), 2, 7, 7))
    assert pooled.isfinite().all()
    assert pooled.abs().max() <= max(m.abs().max() for m in MAPS) + 1e-5 if len(boxes) else True


@chance
@given(
    st.lists(small_box.filter(lambda b: b[0] < b[2] and b[1] < b[3]), min_size=1, max_size=20),
    st.data(),
)
def test_a_sliver_of_an_object_trains_with_finite_losses(good, data):
    """The thinnest boxes that `check_targets` lets through: the log of their size must not overflow."""
    thin = data.draw(st.sampled_from([1e-45, 1e-42, 1e-40, 1e-38, 1e-30, 1e-7]))
    boxes = torch.tensor([*good, [0, 0, thin, 12], [0, 3, 12, 3 + 1e-6]]).float()
    frcnn.check_targets(
        torch.zeros(1, 3, 8, 8), [{"boxes": boxes, "labels": torch.ones(len(boxes)).long()}], 81
    )
    anchors = frcnn.AnchorGenerator()(
        [torch.zeros(1, 1, 16 >> i or 1, 16 >> i or 1) for i in range(5)], (64, 64)
    )
    rpn = frcnn.RegionProposalNetwork(frcnn.RPNHead(4), frcnn.AnchorGenerator())
    logits, deltas = (
        torch.zeros(1, len(anchors)).requires_grad_(),
        torch.zeros(1, len(anchors), 4).requires_grad_(),
    )
    losses = rpn.losses(anchors, logits, deltas, [{"boxes": boxes}])
    sum(losses.values()).backward()
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    assert logits.grad.isfinite().all()
    assert deltas.grad.isfinite().all()
