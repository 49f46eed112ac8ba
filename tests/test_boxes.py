"""Constants, IoU, clipping, encode and decode, NMS.

Held against closed forms, torchvision's operators and naive loops, also for boxes of chance.
"""

import importlib.util
import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    INF,
    NAN,
    any_box,
    chance,
    coder_weights,
    hostile_boxes,
    random_boxes,
    small_box,
    solid_box,
)
from hypothesis import given
from hypothesis import strategies as st

import frcnn_common as frcnn

# --- constants ------------------------------------------------------------------------------------


def test_names_are_background_and_80_categories_in_coco_order():
    assert frcnn.NUM_CLASSES == len(frcnn.COCO_NAMES) == len(set(frcnn.COCO_NAMES)) == 81
    assert frcnn.COCO_NAMES[0] == "__background__"
    assert frcnn.COCO_NAMES[1] == "person"
    assert frcnn.COCO_NAMES[46] == "bowl"  # category 45 on the Hub, see image 9
    assert frcnn.COCO_NAMES[80] == "toothbrush"


def test_category_ids_have_cocos_gaps():
    ids = frcnn.COCO_CATEGORY_IDS
    assert len(ids) == 81
    assert list(ids) == sorted(set(ids))
    assert (ids[0], ids[80]) == (0, 90)
    assert set(range(91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_category_ids_agree_with_torchvisions_names():
    # torchvision names all 91 ids, "N/A" where COCO published nothing
    published = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta[
        "categories"
    ]
    assert [published[i] for i in frcnn.COCO_CATEGORY_IDS] == list(frcnn.COCO_NAMES)
    label_of = {category: label for label, category in enumerate(frcnn.COCO_CATEGORY_IDS)}
    assert [label_of[category] for category in frcnn.COCO_CATEGORY_IDS] == list(range(81))


def test_imagenet_statistics_broadcast_over_an_image():
    assert frcnn.IMG_SIZE == 400
    assert frcnn.IMAGENET_MEAN.shape == frcnn.IMAGENET_STD.shape == (3, 1, 1)
    assert frcnn.IMAGENET_MEAN.dtype == frcnn.IMAGENET_STD.dtype == torch.float32
    assert frcnn.IMAGENET_MEAN.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert frcnn.IMAGENET_STD.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert isinstance(frcnn.DEVICE, torch.device)


@pytest.mark.parametrize(("cuda", "expected"), [(False, "cpu"), (True, "cuda")])
def test_device_of_a_mac_is_its_cpu(cuda, expected, monkeypatch):
    """CUDA where there is one, else the CPU: MPS is never taken unasked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *arguments, **options: True)
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda *arguments, **options: torch.device("cuda" if cuda else "mps"),
    )
    spec = importlib.util.spec_from_file_location("frcnn_on_a_mac", frcnn.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.DEVICE.type == expected


# --- IoU ------------------------------------------------------------------------------------------


def test_iou_of_hand_made_boxes():
    a = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    b = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [5, 5, 15, 15], [10, 0, 20, 10]])
    expected = torch.tensor(
        [[1, 0.5, 25 / 175, 0], [0, 0, 0, 0]]
    )  # touching edges share nothing: no "+ 1" in widths
    torch.testing.assert_close(frcnn.box_iou(a, b), expected, atol=1e-7, rtol=0)


def test_iou_equals_torchvision():
    a, b = random_boxes(60, seed=1)[0], random_boxes(90, seed=2)[0]
    torch.testing.assert_close(
        frcnn.box_iou(a, b), torchvision.ops.box_iou(a, b), atol=1e-6, rtol=0
    )


def test_iou_of_boxes_without_area_is_0():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 0, 5, 10], [0, 5, 10, 5], [0, 0, 10, 10]])
    expected = torch.zeros(4, 4)
    expected[3, 3] = 1
    assert torch.equal(frcnn.box_iou(boxes, boxes), expected)


def test_iou_of_no_boxes_is_empty():
    assert frcnn.box_iou(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert frcnn.box_iou(torch.zeros(3, 4), torch.zeros(0, 4)).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_iou_survives_half_precision(dtype):
    # 256 × 256 is infinite in float16
    boxes = torch.tensor([[0, 0, 256, 256], [0, 0, 256, 128]], dtype=dtype)
    iou = frcnn.box_iou(boxes, boxes)
    assert iou.dtype == torch.float32
    assert iou.tolist() == [[1.0, 0.5], [0.5, 1.0]]


def test_iou_leaves_its_inputs_alone():
    a, b = random_boxes(5, seed=3)[0], random_boxes(5, seed=4)[0]
    before = a.clone(), b.clone()
    frcnn.box_iou(a, b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


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


# --- clip -----------------------------------------------------------------------------------------


def test_clip_uses_height_and_width_in_their_places():
    boxes = torch.tensor([[-5.0, -6, 500, 600]])
    assert frcnn.clip_boxes(boxes, torch.tensor([100, 200])).tolist() == [[0, 0, 200, 100]]


@chance
@given(hostile_boxes, st.integers(1, 1333), st.integers(1, 1333))
def test_clip_of_hostile_boxes_lies_inside_and_stays_there(boxes, height, width):
    size = torch.tensor([height, width])
    clipped = frcnn.clip_boxes(boxes, size)
    assert (clipped >= 0).all()
    assert (clipped <= torch.tensor([width, height, width, height])).all()
    assert (clipped[:, 2:] >= clipped[:, :2]).all()
    assert torch.equal(frcnn.clip_boxes(clipped, size), clipped)
    assert torch.equal(clipped, torchvision.ops.clip_boxes_to_image(boxes, (height, width)))


# --- encode and decode ----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5)])
def test_encode_is_shift_in_sizes_and_log_of_size_ratio(weights):
    proposal, gt = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 10, 25, 70]])
    # centre (5, 10) -> (15, 40); size (10, 20) -> (20, 60)
    expected = torch.tensor([[1.0, 1.5, math.log(2), math.log(3)]]) * torch.tensor(weights)
    torch.testing.assert_close(
        frcnn.encode_boxes(proposal, gt, weights), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5), (1, 2, 3, 4)])
def test_decode_undoes_encode(weights):
    proposals, gt = random_boxes(300, seed=5)[0], random_boxes(300, seed=6)[0]
    decoded = frcnn.decode_boxes(
        proposals, frcnn.encode_boxes(proposals, gt, weights), weights, max_log_scale=6.0
    )
    torch.testing.assert_close(decoded, gt, atol=1e-3, rtol=0)


@chance
@given(st.lists(st.tuples(solid_box, solid_box), min_size=1, max_size=20), coder_weights)
def test_decode_undoes_encode_for_boxes_of_chance(pairs, weights):
    proposals, targets = torch.tensor(pairs).float().unbind(1)
    deltas = frcnn.encode_boxes(proposals, targets, weights)
    assert deltas.isfinite().all()
    decoded = frcnn.decode_boxes(proposals, deltas, weights, max_log_scale=20)
    torch.testing.assert_close(decoded, targets, atol=0.02, rtol=1e-4)


def test_encode_and_decode_equal_torchvisions_coder():
    coder = torchvision.models.detection._utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    proposals, gt = random_boxes(300, seed=7)[0], random_boxes(300, seed=8)[0]
    deltas = torch.randn(300, 4, generator=torch.Generator().manual_seed(9)) * 8
    weights = (10, 10, 5, 5)
    torch.testing.assert_close(
        frcnn.encode_boxes(proposals, gt, weights),
        coder.encode_single(gt, proposals),
        atol=1e-4,
        rtol=1e-5,
    )
    decoded = frcnn.decode_boxes(proposals, deltas, weights, max_log_scale=math.log(1000 / 16))
    torch.testing.assert_close(
        decoded, coder.decode_single(deltas, proposals), atol=1e-3, rtol=1e-5
    )


def test_decode_of_zeros_is_the_anchor():
    anchors = random_boxes(50, seed=10)[0]
    torch.testing.assert_close(
        frcnn.decode_boxes(anchors, torch.zeros(50, 4)), anchors, atol=1e-4, rtol=0
    )


def test_decode_clamps_growth():
    anchor = torch.tensor([[0.0, 0, 10, 10]])
    wild = torch.tensor([[0.0, 0, 1000, 1000]])
    half = 5 * math.exp(4.0)
    expected = torch.tensor([[5 - half, 5 - half, 5 + half, 5 + half]])
    torch.testing.assert_close(frcnn.decode_boxes(anchor, wild), expected, atol=1e-3, rtol=0)
    half = 5 * math.exp(2.0)
    expected = torch.tensor([[5 - half, 5 - half, 5 + half, 5 + half]])
    torch.testing.assert_close(
        frcnn.decode_boxes(anchor, wild, max_log_scale=2.0), expected, atol=1e-3, rtol=0
    )


def test_decode_does_not_clamp_shrinking():
    shrunk = frcnn.decode_boxes(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, -7, -7]]))
    assert (shrunk[0, 2] - shrunk[0, 0]).item() == pytest.approx(10 * math.exp(-7), rel=1e-3)


def test_decode_clamps_after_the_weights():
    # 15 / 5 = 3 stays below the clamp of 4
    decoded = frcnn.decode_boxes(
        torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 15, 15]]), (10, 10, 5, 5)
    )
    assert (decoded[0, 2] - decoded[0, 0]).item() == pytest.approx(10 * math.exp(3), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_keeps_float32_where_the_network_is_half(dtype):
    # float16 has steps of 1 px above 1024, bfloat16 of 8
    anchors = torch.tensor([[1000.25, 1000.25, 1333.5, 1333.5]])
    decoded = frcnn.decode_boxes(anchors, torch.zeros(1, 4, dtype=dtype))
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, anchors)


def test_encode_and_decode_are_float32_under_autocast():
    anchors, gt = random_boxes(20, seed=11)[0] + 1000, random_boxes(20, seed=12)[0] + 1000
    deltas = frcnn.encode_boxes(anchors, gt)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frcnn.encode_boxes(anchors, gt), deltas)
        torch.testing.assert_close(frcnn.decode_boxes(anchors, deltas), gt, atol=1e-3, rtol=0)


def test_decode_broadcasts_one_anchor_over_classes():
    anchors, deltas = random_boxes(3, seed=13)[0], torch.randn(3, 5, 4) / 3
    decoded = frcnn.decode_boxes(anchors[:, None], deltas)
    assert decoded.shape == (3, 5, 4)
    torch.testing.assert_close(decoded[1, 2], frcnn.decode_boxes(anchors[1], deltas[1, 2]))


# --- NMS ------------------------------------------------------------------------------------------


def overlaps(a, b) -> np.float32:
    """IoU of two boxes in float32, as the C++ operator computes it."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    width, height = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), np.float32(0))
    shared, area_a, area_b = width * height, np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])
    union = area_a + area_b - shared
    return shared / union if union > 0 else np.float32(0)


def greedy(boxes: list, scores: list, groups: list, threshold: float) -> list[int]:
    """Best first, keep a box unless a kept one of its group overlaps it by more."""
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):  # Python's sort is stable
        if all(
            groups[i] != groups[j] or float(overlaps(boxes[i], boxes[j])) <= threshold for j in kept
        ):
            kept.append(i)
    return kept


def by_groups(boxes, scores, groups, threshold) -> torch.Tensor:
    """torchvision's operator group by group, then best first."""
    kept = []
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        kept.append(members[torchvision.ops.nms(boxes[members], scores[members], threshold)])
    kept = torch.cat(kept).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("count", [0, 1, 500, 5000])
def test_nms_equals_torchvision_in_indices_and_order(count, threshold):
    boxes, scores = random_boxes(count, seed=count)
    kept = frcnn.nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7, 0.75])
def test_nms_decides_exact_ties_as_torchvision_does(threshold):
    # Few integers: many pairs whose IoU is exactly the threshold.
    # float32(0.3) > 0.3, float32(0.7) < 0.7.
    generator = torch.Generator().manual_seed(14)
    corner = torch.randint(0, 12, (600, 2), generator=generator)
    size = torch.randint(1, 11, (600, 2), generator=generator)
    boxes = torch.cat((corner, corner + size), dim=1).float()
    scores = torch.rand(600, generator=generator)
    assert (frcnn.box_iou(boxes, boxes) == torch.tensor(threshold)).any()
    assert torch.equal(
        frcnn.nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold)
    )


@pytest.mark.parametrize("threshold, kept", [(0.3, [0]), (0.7, [0, 1])])
def test_nms_compares_float32_with_the_exact_threshold(threshold, kept):
    # IoU 3/10 and 7/10: as float32 the first lies above 0.3, the second below 0.7
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10 * threshold]]).round()
    assert frcnn.nms(boxes, torch.tensor([0.9, 0.8]), threshold).tolist() == kept


def test_nms_keeps_an_overlap_that_equals_the_threshold():
    # with "+ 1" in widths the IoU would be 66 / 121
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    assert frcnn.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]


def test_nms_takes_tied_scores_in_input_order():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    assert frcnn.nms(boxes, torch.full((4,), 0.5), 0.5).tolist() == [0, 2]
    boxes, scores = random_boxes(2000, seed=15)
    scores = (scores * 4).round() / 4  # five values
    assert torch.equal(frcnn.nms(boxes, scores, 0.5), torchvision.ops.nms(boxes, scores, 0.5))


def test_nms_follows_chains():
    # Each overlaps only its neighbour: 0 removes 1, so 2 lives and removes 3,
    # and so on across block borders.
    count = 3 * frcnn._NMS_BLOCK + 5
    left = torch.arange(count) * 4.0
    boxes = torch.stack((left, torch.zeros(count), left + 10, torch.full((count,), 10.0)), dim=1)
    scores = torch.linspace(1, 0.1, count)
    assert frcnn.nms(boxes, scores, 0.4).tolist() == list(range(0, count, 2))


def test_nms_keeps_boxes_without_area():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10]])
    assert frcnn.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1, 2]


def test_nms_in_half_precision_does_not_overflow():
    boxes = torch.tensor([[0, 0, 300, 300], [0, 0, 300, 299], [0, 0, 300, 60]], dtype=torch.float16)
    assert frcnn.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]


# --- batched NMS ----------------------------------------------------------------------------------


def test_batched_nms_suppresses_only_inside_a_group():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 4)
    kept = frcnn.batched_nms(
        boxes, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([7, 0, 7, 0]), 0.5
    )
    assert kept.tolist() == [3, 2]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_batched_nms_equals_torchvision_group_by_group(threshold):
    block = frcnn._NMS_BLOCK
    sizes = {
        0: 1,
        1: 3 * block + 17,
        3: block,
        4: block + 1,
        9: 2,
        80: 5 * block,
    }  # more than one block, and less
    groups = torch.cat([torch.full((size,), group) for group, size in sizes.items()])
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(16))]
    boxes, scores = random_boxes(len(groups), seed=17, side=100)
    kept = frcnn.batched_nms(boxes, scores, groups, threshold)
    assert torch.equal(kept, by_groups(boxes, scores, groups, threshold))


def test_batched_nms_with_many_small_groups_and_ties():
    boxes, scores = random_boxes(1500, seed=18, side=60)
    scores, groups = (scores * 10).round() / 10, torch.arange(1500) % 200
    assert torch.equal(
        frcnn.batched_nms(boxes, scores, groups, 0.5), by_groups(boxes, scores, groups, 0.5)
    )


def test_batched_nms_of_nothing():
    kept = frcnn.batched_nms(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5
    )
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


# --- NMS of boxes of chance, alone and in groups --------------------------------------------------

boxes_of_few_values = st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(0, 6)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
rows = st.lists(st.tuples(boxes_of_few_values, st.integers(0, 5), st.integers(0, 2)), max_size=40)


@chance
@given(rows, st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.7, 1.0]), st.sampled_from([2, 7, 128]))
def test_nms_equals_the_naive_loop(rows, threshold, block):
    boxes, scores, groups = map(list, zip(*rows)) if rows else ([], [], [])
    tensors = torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores).float() / 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frcnn, "_NMS_BLOCK", block)  # small blocks: many borders
        assert frcnn.nms(*tensors, threshold).tolist() == greedy(
            boxes, scores, [0] * len(boxes), threshold
        )
        kept = frcnn.batched_nms(*tensors, torch.tensor(groups, dtype=torch.int64), threshold)
    assert kept.tolist() == greedy(boxes, scores, groups, threshold)


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
