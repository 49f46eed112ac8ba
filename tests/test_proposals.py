"""Anchors, matching, sampling, the RPN's losses, its head, and its choice of proposals.

Held against naive loops and torchvision's parts, also for boxes and outputs of chance.
"""

import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import INF, NAN, chance, coder_weights, hostile_boxes, small_box, solid_box
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import frcnn_common as frcnn


def grids(*sizes) -> list[torch.Tensor]:
    """Feature maps ``[1, 1, H, W]`` of the given sizes."""
    return [torch.zeros(1, 1, *size) for size in sizes]


def pyramid_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Grids P2 … P6 of an image, every stride-2 layer rounding up."""
    sizes = [(-(-height // 4), -(-width // 4))]
    for _ in range(4):
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return sizes


def make_rpn(head=None, anchor_gen=None, training=True, **options) -> frcnn.RegionProposalNetwork:
    options = {"min_sz": 0} | options
    return frcnn.RegionProposalNetwork(head, anchor_gen, **options).train(training)


def tiles(count: int, side: float = 20.0, top: float = 0.0) -> torch.Tensor:
    """A row of boxes that do not touch."""
    left = torch.arange(count) * side * 2
    return torch.stack(
        (left, torch.full((count,), top), left + side, torch.full((count,), top + side)), dim=1
    )


# --- anchors --------------------------------------------------------------------------------------


def test_anchors_go_level_after_level_row_after_row_ratio_fastest():
    sizes, strides, ratios = (32, 64), (4, 8), (0.5, 1.0, 2.0)
    anchors = frcnn.AnchorGenerator(sizes, ratios, strides)(grids((3, 5), (2, 3)), (12, 20))
    expected = []
    for size, stride, (rows, columns) in zip(sizes, strides, ((3, 5), (2, 3)), strict=True):
        for row in range(rows):
            for column in range(columns):
                for ratio in ratios:
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    width, height = (
                        size * math.sqrt(ratio),
                        size / math.sqrt(ratio),
                    )  # ratio is width / height
                    expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    assert anchors.dtype == torch.float32
    torch.testing.assert_close(anchors, torch.tensor(expected), atol=1e-4, rtol=0)


def test_default_ratio_is_width_over_height():
    tall, square, wide = frcnn.AnchorGenerator().base_anchors(64)
    for box, ratio in ((tall, 0.5), (square, 1.0), (wide, 2.0)):
        width, height = (box[2:] - box[:2]).tolist()
        assert width / height == pytest.approx(ratio)
        assert width * height == pytest.approx(64**2)


def test_inverse_ratios_are_height_over_width():
    tall, _, wide = frcnn.AnchorGenerator(
        aspect_ratios=(2.0, 1.0, 0.5), inverse_ratios=True
    ).base_anchors(64)
    assert ((tall[3] - tall[1]) / (tall[2] - tall[0])).item() == pytest.approx(2.0)
    assert ((wide[3] - wide[1]) / (wide[2] - wide[0])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.5])
def test_offset_places_the_centre_in_its_cell(offset):
    anchors = frcnn.AnchorGenerator((32,), (1.0,), (8,), offset=offset)(grids((2, 3)), (16, 24))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    expected = [
        [(column + offset) * 8, (row + offset) * 8] for row in range(2) for column in range(3)
    ]
    assert centres.tolist() == expected


def test_rounded_anchors_have_whole_corners():
    gen = frcnn.AnchorGenerator(rounded=True, inverse_ratios=True)
    assert gen.base_anchors(32).tolist() == [
        [-23, -11, 23, 11],
        [-16, -16, 16, 16],
        [-11, -23, 11, 23],
    ]
    assert frcnn.AnchorGenerator().base_anchors(32)[2, 2].item() == pytest.approx(22.627, abs=1e-3)


@pytest.mark.parametrize(
    "size, p6_stride", [((416, 416), (59, 59)), ((800, 1088), (61, 64)), ((400, 400), (57, 57))]
)
def test_published_settings_give_torchvisions_anchors(size, p6_stride):
    maps = grids(*pyramid_sizes(*size))
    assert (size[0] // maps[4].shape[2], size[1] // maps[4].shape[3]) == p6_stride  # not 64
    mine = frcnn.AnchorGenerator(strides=None, offset=0, inverse_ratios=True, rounded=True)
    reference = torchvision.models.detection.rpn.AnchorGenerator(
        tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5
    )
    images = torchvision.models.detection.image_list.ImageList(torch.zeros(1, 3, *size), [size])
    assert torch.equal(mine(maps, size), reference(images, maps)[0])


def test_anchors_follow_a_change_of_size():
    gen = frcnn.AnchorGenerator((32,), (1.0,), None)
    assert len(gen(grids((2, 3)), (16, 24))) == 6
    assert len(gen(grids((4, 3)), (32, 24))) == 12
    assert gen(grids((2, 3)), (32, 48))[0].tolist() == [
        -8,
        -8,
        24,
        24,
    ]  # the same grid, another image


def test_an_anchor_generator_for_another_number_of_levels_is_refused():
    with pytest.raises(ValueError):
        frcnn.AnchorGenerator()(grids((2, 3)), (16, 24))


# --- matching -------------------------------------------------------------------------------------

GT = torch.tensor([[0.0, 0, 100, 100]])


def strip(iou: float) -> list[float]:
    """A box inside `GT` with that IoU."""
    return [0, 0, 100, 100 * iou]


def test_match_thresholds():
    boxes = torch.tensor(
        [strip(v) for v in (1.0, 0.75, 0.69, 0.5, 0.31, 0.29, 0.05)] + [[200.0, 200, 300, 300]]
    )
    labels, matched = frcnn.match_boxes(boxes, GT, 0.7, 0.3, best_is_positive=True)
    assert labels.tolist() == [1, 1, -1, -1, -1, 0, 0, 0]
    assert labels.dtype == matched.dtype == torch.int64
    assert matched[:2].tolist() == [0, 0]


@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_an_overlap_that_equals_the_threshold_is_above_it(threshold):
    labels, _ = frcnn.match_boxes(torch.tensor([strip(threshold)]), GT, threshold, threshold, False)
    assert labels.tolist() == [1]
    labels, _ = frcnn.match_boxes(torch.tensor([strip(threshold)]), GT, 0.7, threshold, False)
    assert labels.tolist() == [-1]


def test_all_ties_for_the_best_overlap_are_positive():
    # four anchors around a small object share it alike; a fifth overlaps less
    boxes = torch.tensor(
        [[0.0, 0, 20, 20], [10, 0, 30, 20], [0, 10, 20, 30], [10, 10, 30, 30], [18, 18, 38, 38]]
    )
    gt = torch.tensor([[10.0, 10, 20, 20]])
    assert len(set(frcnn.box_iou(gt, boxes)[0, :4].tolist())) == 1
    labels, _ = frcnn.match_boxes(boxes, gt, 0.7, 0.3, best_is_positive=True)
    assert labels.tolist() == [1, 1, 1, 1, 0]
    labels, _ = frcnn.match_boxes(boxes, gt, 0.7, 0.3, best_is_positive=False)
    assert labels.tolist() == [0, 0, 0, 0, 0]


def test_a_tie_keeps_the_object_that_it_overlaps_most():
    # the anchor is the best that object 1 has, yet it overlaps object 0 more;
    # torchvision decides it so
    boxes, gt = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 3]])
    labels, matched = frcnn.match_boxes(boxes, gt, 0.9, 0.3, best_is_positive=True)
    assert (labels.tolist(), matched.tolist()) == ([1], [0])


def test_an_object_that_no_anchor_touches_makes_no_positives():
    boxes = tiles(6)
    gt = torch.tensor([[500.0, 500, 520, 520], [0, 0, 20, 20]])
    labels, _ = frcnn.match_boxes(boxes, gt, 0.7, 0.3, best_is_positive=True)
    assert labels.tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("best_is_positive", [True, False])
def test_without_objects_every_box_is_background(best_is_positive):
    labels, matched = frcnn.match_boxes(tiles(4), torch.zeros(0, 4), 0.7, 0.3, best_is_positive)
    assert labels.tolist() == matched.tolist() == [0, 0, 0, 0]


def test_matching_equals_torchvisions_matcher():
    matcher = torchvision.models.detection._utils.Matcher(0.7, 0.3, allow_low_quality_matches=True)
    anchors = frcnn.AnchorGenerator()(grids(*pyramid_sizes(128, 160)), (128, 160))
    corner = torch.rand(6, 2) * 80
    gt = torch.cat((corner, corner + 8 + torch.rand(6, 2) * 60), dim=1)
    expected = matcher(frcnn.box_iou(gt, anchors))
    labels, matched = frcnn.match_boxes(anchors, gt, 0.7, 0.3, best_is_positive=True)
    assert torch.equal(labels, torch.where(expected >= 0, 1, torch.where(expected == -1, 0, -1)))
    assert torch.equal(matched[expected >= 0], expected[expected >= 0])


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
)
def test_matching_of_hostile_boxes_equals_the_naive_loops(
    boxes, gt_boxes, thresholds, best_is_positive
):
    labels, matched = frcnn.match_boxes(boxes, gt_boxes, *thresholds, best_is_positive)
    assert labels.dtype == matched.dtype == torch.int64
    assert (labels.tolist(), matched.tolist()) == naive_match(
        boxes, gt_boxes, *thresholds, best_is_positive
    )


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positives, negatives, drawn",
    [
        (300, 1000, (128, 128)),
        (10, 1000, (10, 246)),
        (0, 1000, (0, 256)),
        (300, 50, (128, 50)),
        (5, 5, (5, 5)),
    ],
)
def test_negatives_fill_the_batch(positives, negatives, drawn):
    labels = torch.cat((torch.ones(positives), torch.zeros(negatives), -torch.ones(100))).long()
    labels = labels[torch.randperm(len(labels))]
    pos, neg = frcnn.sample_boxes(labels, 256, 0.5)
    assert (len(pos), len(neg)) == drawn
    assert (labels[pos] == 1).all()
    assert (labels[neg] == 0).all()
    assert len(torch.cat((pos, neg)).unique()) == sum(drawn)


def test_samples_are_drawn_at_random():
    labels = torch.arange(2000) % 2
    draws = [tuple(frcnn.sample_boxes(labels, 64, 0.5)[0].tolist()) for _ in range(2)]
    assert draws[0] != draws[1]
    assert max(draws[0]) > 1000


def test_every_step_draws_anew_for_every_image():
    targets = [{"image_id": i} for i in (3, 4)]

    def draw(targets):
        generators = frcnn.sampling_generators(targets, torch.device("cpu"))
        return [torch.randperm(1000, generator=generator)[:50].tolist() for generator in generators]

    torch.manual_seed(0)
    first, second = draw(targets), draw(targets)
    assert len({tuple(drawn) for drawn in first + second}) == 4
    torch.manual_seed(0)
    assert draw(targets[1:]) == first[1:]  # whatever else is in the batch


# --- losses ---------------------------------------------------------------------------------------


def test_loss_settings_are_the_papers():
    rpn = frcnn.RegionProposalNetwork
    assert (rpn.RPN_BATCH, rpn.POS_FRAC, rpn.POS_THR, rpn.NEG_THR) == (256, 0.5, 0.7, 0.3)


def test_losses_are_divided_by_the_number_of_sampled_anchors():
    anchors = torch.cat((GT, tiles(9, top=500)))  # one positive, nine negatives
    gt = torch.tensor([[-5.0, 0, 115, 100]])  # tx 0.05, tw log 1.2; IoU 0.83
    logits = torch.tensor([[2.0] + [-1.0] * 9])
    losses = make_rpn().losses(anchors, logits, torch.zeros(1, 10, 4), [{"boxes": gt}])
    beta = 1 / 9
    quadratic, linear = 0.5 * 0.05**2 / beta, math.log(1.2) - beta / 2
    assert losses["rpn_box"].item() == pytest.approx((quadratic + linear) / 10, rel=1e-5)
    cross_entropy = (math.log1p(math.exp(-2)) + 9 * math.log1p(math.exp(-1))) / 10
    assert losses["rpn_cls"].item() == pytest.approx(cross_entropy, rel=1e-5)


def test_losses_of_a_batch_are_divided_by_all_its_samples():
    anchors = torch.cat((GT, tiles(9, top=500)))
    gt = torch.tensor([[-5.0, 0, 115, 100]])
    alone = make_rpn().losses(anchors, torch.zeros(1, 10), torch.zeros(1, 10, 4), [{"boxes": gt}])
    targets = [{"boxes": gt}, {"boxes": torch.zeros(0, 4)}]
    both = make_rpn().losses(anchors, torch.zeros(2, 10), torch.zeros(2, 10, 4), targets)
    assert both["rpn_box"].item() == pytest.approx(alone["rpn_box"].item() / 2, rel=1e-5)
    assert both["rpn_cls"].item() == pytest.approx(math.log(2), rel=1e-5)


def test_ignored_anchors_do_not_count():
    anchors = torch.cat((GT, torch.tensor([strip(0.5)]), tiles(4, top=500)))
    logits = torch.tensor([[0.0, 50, 0, 0, 0, 0]])
    losses = make_rpn().losses(anchors, logits, torch.zeros(1, 6, 4), [{"boxes": GT}])
    assert losses["rpn_cls"].item() == pytest.approx(math.log(2), rel=1e-5)


def test_an_image_without_objects_trains_all_its_anchors_as_background():
    logits = torch.full((1, 400), 2.0, requires_grad=True)
    deltas = torch.ones(1, 400, 4, requires_grad=True)
    losses = make_rpn().losses(tiles(400), logits, deltas, [{"boxes": torch.zeros(0, 4)}])
    assert losses["rpn_cls"].item() == pytest.approx(math.log1p(math.exp(2)), rel=1e-5)
    assert losses["rpn_box"].item() == 0
    sum(losses.values()).backward()
    assert (logits.grad > 0).sum() == 256  # pushed down, as many as a batch holds
    assert deltas.grad is None or deltas.grad.abs().max() == 0


def test_perfect_outputs_have_no_loss():
    anchors, gt = torch.cat((GT, tiles(9, top=500))), torch.tensor([[-5.0, 0, 115, 100]])
    logits, deltas = torch.tensor([[99.0] + [-99.0] * 9]), torch.zeros(1, 10, 4)
    deltas[0, 0] = frcnn.encode_boxes(GT, gt)[0]
    losses = make_rpn().losses(anchors, logits, deltas, [{"boxes": gt}])
    assert losses["rpn_cls"].item() == pytest.approx(0, abs=1e-6)
    assert losses["rpn_box"].item() == pytest.approx(0, abs=1e-6)


@chance
@given(
    st.lists(small_box.filter(lambda b: b[0] < b[2] and b[1] < b[3]), min_size=1, max_size=20),
    st.data(),
)
def test_a_sliver_of_an_object_trains_with_finite_losses(good, data):
    """The thinnest boxes that `check_targets` passes: the log of their size must not overflow."""
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


# --- head -----------------------------------------------------------------------------------------


def test_head_starts_small_and_gives_one_output_for_each_anchor():
    head = frcnn.RPNHead()
    assert (head.conv.kernel_size, head.objectness.kernel_size, head.deltas.kernel_size) == (
        (3, 3),
        (1, 1),
        (1, 1),
    )
    for conv in (head.conv, head.objectness, head.deltas):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert conv.bias.abs().max() == 0
    head = frcnn.RPNHead(8, 5)
    logits, deltas = head([torch.randn(2, 8, 6, 7), torch.randn(2, 8, 3, 4)])
    assert [level.shape for level in logits] == [(2, 210), (2, 60)]
    assert [level.shape for level in deltas] == [(2, 210, 4), (2, 60, 4)]


def transparent_head(channel_of: dict[str, int]) -> frcnn.RPNHead:
    """A head that hands channel 0 of the map on to one channel of each of the named outputs."""
    head = frcnn.RPNHead(2, 3)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    head.conv.weight.data[0, 0, 1, 1] = 1
    for name, channel in channel_of.items():
        getattr(head, name).weight.data[channel, 0] = 1
    return head


@pytest.mark.parametrize(
    "level, row, column, ratio",
    [(0, 0, 0, 0), (0, 2, 4, 1), (0, 1, 3, 2), (1, 0, 2, 0), (1, 1, 1, 2)],
)
def test_outputs_lie_in_the_order_of_the_anchors(level, row, column, ratio):
    maps = [torch.zeros(2, 2, 3, 5), torch.zeros(2, 2, 2, 3)]
    maps[level][1, 0, row, column] = 1  # of image 1
    strides, sizes, ratios, coordinate = (4, 8), (32, 64), (0.5, 1.0, 2.0), 2
    anchors = frcnn.AnchorGenerator(sizes, ratios, strides)(maps, (12, 20))
    head = transparent_head({"objectness": ratio, "deltas": 4 * ratio + coordinate})
    logits, deltas = (torch.cat(outputs, dim=1).detach() for outputs in head(maps))

    found = logits.nonzero()
    assert found[:, 0].tolist() == [1]
    anchor = anchors[found[0, 1]]
    centre, size = ((anchor[:2] + anchor[2:]) / 2).tolist(), anchor[2:] - anchor[:2]
    assert centre == pytest.approx([(column + 0.5) * strides[level], (row + 0.5) * strides[level]])
    assert (size[0] / size[1]).item() == pytest.approx(ratios[ratio])
    assert size.prod().sqrt().item() == pytest.approx(sizes[level])
    assert deltas.nonzero().tolist() == [[1, found[0, 1].item(), coordinate]]


# --- proposals ------------------------------------------------------------------------------------


def propose(rpn, anchors, logits, counts, size=(10_000, 10_000), deltas=None):
    """One image: anchors ``[A, 4]``, logits ``[A]`` → proposals ``[K, 4]``."""
    deltas = torch.zeros(1, len(anchors), 4) if deltas is None else deltas
    return rpn.propose(anchors, logits[None], deltas, counts, torch.tensor([size]))[0]


def test_top_k_is_taken_level_by_level():
    # all of level 0 scores higher than all of level 1:
    # one top-k over both would leave level 1 without proposals
    anchors, logits = tiles(23), torch.cat((torch.arange(20) + 10.0, torch.tensor([1.0, 2.0, 3.0])))
    proposals = propose(make_rpn(pre_nms=5), anchors, logits / 30, [20, 3])
    assert torch.equal(proposals, anchors[[19, 18, 17, 16, 15, 22, 21, 20]])


def test_nms_is_done_level_by_level():
    anchors = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 95], [0, 0, 100, 99]])
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert torch.equal(
        propose(make_rpn(), anchors, logits, [2, 1]), anchors[[0, 2]]
    )  # 2 is on a level of its own
    assert torch.equal(propose(make_rpn(), anchors, logits, [1, 2]), anchors[[0, 1]])
    assert torch.equal(propose(make_rpn(), anchors, logits, [3]), anchors[[0]])


def test_nms_keeps_images_apart():
    anchors, logits = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[1.0], [2.0]])
    sizes = torch.tensor([[500, 500]] * 2)
    assert [
        len(p) for p in make_rpn().propose(anchors, logits, torch.zeros(2, 1, 4), [1], sizes)
    ] == [1, 1]


def test_nms_threshold_is_the_one_given():
    anchors, logits = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 75]]), torch.tensor([2.0, 1.0])
    assert len(propose(make_rpn(), anchors, logits, [2])) == 1
    assert len(propose(make_rpn(nms_thr=0.8), anchors, logits, [2])) == 2


def test_post_nms_takes_the_best_of_all_levels():
    anchors, logits = tiles(6), torch.tensor([0.1, 0.5, 0.3, 0.4, 0.6, 0.2])
    proposals = propose(make_rpn(post_nms=4), anchors, logits, [3, 3])
    assert torch.equal(proposals, anchors[[4, 1, 3, 2]])


@pytest.mark.parametrize("training, pre, post", [(True, 6, 5), (False, 4, 3)])
def test_two_limits_are_for_training_and_test(training, pre, post):
    anchors, logits = tiles(20), torch.linspace(1, -1, 20)
    assert len(propose(make_rpn(training=training, pre_nms=(6, 4)), anchors, logits, [20])) == pre
    assert len(propose(make_rpn(training=training, post_nms=(5, 3)), anchors, logits, [20])) == post


def test_proposals_are_decoded_anchors():
    deltas = torch.tensor([[[0.5, 0, 0, math.log(2)]]])
    proposals = propose(
        make_rpn(), torch.tensor([[10.0, 10, 30, 30]]), torch.zeros(1), [1], deltas=deltas
    )
    torch.testing.assert_close(proposals, torch.tensor([[20.0, 0, 40, 40]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "box, kept", [([0, 0, 16, 16], 1), ([0, 0, 15.9, 40], 0), ([0, 0, 40, 15.9], 0)]
)
def test_small_proposals_are_dropped(box, kept):
    assert (
        len(propose(make_rpn(min_sz=16), torch.tensor([box]).float(), torch.zeros(1), [1])) == kept
    )


def test_smallness_is_judged_inside_the_image():
    box = torch.tensor([[-10.0, 0, 10, 20]])
    assert len(propose(make_rpn(min_sz=16), box, torch.zeros(1), [1])) == 0
    assert len(propose(make_rpn(min_sz=10), box, torch.zeros(1), [1])) == 1


def test_proposals_are_clipped_to_the_true_size_of_each_image():
    anchors = torch.tensor([[-50.0, -50, 500, 500]])
    sizes = torch.tensor([[100, 200], [300, 150]])  # height, width
    proposals = make_rpn().propose(anchors, torch.zeros(2, 1), torch.zeros(2, 1, 4), [1], sizes)
    assert [p.tolist() for p in proposals] == [[[0, 0, 200, 100]], [[0, 0, 150, 300]]]


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
    """Of a network that has gone wild: NaN fails the comparison of sizes, others are clipped."""
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


def whole_rpn(training: bool, **options) -> tuple[frcnn.RegionProposalNetwork, list[torch.Tensor]]:
    rpn = make_rpn(frcnn.RPNHead(8), frcnn.AnchorGenerator(), training, **options)
    nn.init.normal_(rpn.head.objectness.weight)  # scores and shifts that differ
    nn.init.normal_(rpn.head.deltas.weight, std=0.3)
    return rpn, [torch.randn(2, 8, *size, requires_grad=True) for size in pyramid_sizes(128, 160)]


def test_forward_uses_the_padded_size_where_no_true_sizes_are_given():
    rpn, maps = whole_rpn(False)
    proposals, losses = rpn(maps, (128, 160))
    assert losses == {}
    for boxes in proposals:
        assert 0 < len(boxes) <= 1000
        assert boxes.amin(0)[:2].tolist() == [0, 0]
        assert boxes.amax(0)[2:].tolist() == [160, 128]


def test_forward_clips_to_the_true_sizes():
    rpn, maps = whole_rpn(False)
    proposals, _ = rpn(maps, (128, 160), image_sizes=[(128, 160), (100, 90)])
    assert [boxes.amax(0)[2:].tolist() for boxes in proposals] == [[160, 128], [90, 100]]


def test_proposals_carry_no_gradient_and_losses_do():
    rpn, maps = whole_rpn(True)
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 60]])}, {"boxes": torch.zeros(0, 4)}]
    proposals, losses = rpn(maps, (128, 160), targets)
    assert not any(boxes.requires_grad for boxes in proposals)
    assert losses.keys() == {"rpn_cls", "rpn_box"}
    sum(losses.values()).backward()
    for parameter in rpn.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def test_forward_equals_torchvisions_rpn():
    """Published anchors, images of different true size: the same proposals in the same order."""
    gen = frcnn.AnchorGenerator(strides=None, offset=0, inverse_ratios=True, rounded=True)
    rpn, maps = whole_rpn(False, pre_nms=300, post_nms=100, min_sz=1e-3)
    rpn.anchor_gen = gen
    tv = torchvision.models.detection.rpn
    head = tv.RPNHead(8, 3)
    head.conv[0][0].load_state_dict(rpn.head.conv.state_dict())
    head.cls_logits.load_state_dict(rpn.head.objectness.state_dict())
    head.bbox_pred.load_state_dict(rpn.head.deltas.state_dict())
    its_anchors = tv.AnchorGenerator(
        tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5
    )
    limits = [{"training": n, "testing": n} for n in (300, 100)]
    reference = tv.RegionProposalNetwork(its_anchors, head, 0.7, 0.3, 256, 0.5, *limits, 0.7).eval()
    sizes = [(128, 160), (100, 90)]
    images = torchvision.models.detection.image_list.ImageList(torch.zeros(2, 3, 128, 160), sizes)
    with torch.no_grad():
        expected, _ = reference(images, {str(i): m for i, m in enumerate(maps)})
        proposals, _ = rpn(maps, (128, 160), image_sizes=sizes)
    for boxes, its_boxes in zip(proposals, expected, strict=True):
        torch.testing.assert_close(boxes, its_boxes, atol=1e-3, rtol=0)


def test_losses_equal_torchvisions():
    """All anchors sampled, so that chance plays no part."""
    rpn, maps = whole_rpn(True)
    rpn.RPN_BATCH, rpn.POS_FRAC = 10**6, 1.0
    targets = [
        {"boxes": torch.tensor([[10.0, 10, 60, 60], [30, 20, 120, 100]])},
        {"boxes": torch.zeros(0, 4)},
    ]
    anchors = rpn.anchor_gen(maps, (128, 160))
    logits, deltas = (torch.cat(outputs, dim=1) for outputs in rpn.head(maps))
    tv = torchvision.models.detection.rpn
    reference = tv.RegionProposalNetwork(
        rpn.anchor_gen, rpn.head, 0.7, 0.3, 10**6, 1.0, {}, {}, 0.7
    )
    labels, matched = reference.assign_targets_to_anchors([anchors, anchors], targets)
    expected = [
        frcnn.encode_boxes(anchors, m) if len(t["boxes"]) else torch.zeros_like(anchors)
        for m, t in zip(matched, targets)
    ]
    cls, box = reference.compute_loss(
        logits.reshape(-1, 1), deltas.reshape(-1, 4), labels, expected
    )
    mine = rpn.losses(anchors, logits, deltas, targets)
    torch.testing.assert_close(mine["rpn_cls"], cls, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine["rpn_box"], box, atol=1e-6, rtol=1e-5)


def test_half_precision_outputs_are_decoded_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        rpn, maps = whole_rpn(False)
        proposals, _ = rpn(maps, (128, 160))
    assert all(boxes.dtype == torch.float32 and boxes.isfinite().all() for boxes in proposals)
