"""The whole detector: what it promises, its detections, its losses, and bad targets.

For images of every size and for batches in which objects or proposals are missing.
"""

import ast
import itertools
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import INF, NAN, assert_trains, objects
from torch import nn

import frcnn_common as frcnn

CLASSES = 6
SIDE = 96


def make_detector(classes: int = CLASSES, norm=None, **options) -> frcnn.FasterRCNN:
    """Narrow, for 128-px images, and with outputs that differ from box to box."""
    torch.manual_seed(0)
    backbone = frcnn.ResNet50(8, norm) if norm else frcnn.ResNet50(8)
    fpn = frcnn.FPN(backbone.out_channels, 16)
    anchors = frcnn.AnchorGenerator((16, 32, 64, 128, 256))
    rpn = frcnn.RegionProposalNetwork(frcnn.RPNHead(16), anchors, 200, 100, min_sz=4)
    detector = frcnn.FasterRCNN(
        classes, backbone, fpn, rpn, None, frcnn.TwoMLPHead(16 * 49, 32), **options
    )
    for layer, std in [
        (rpn.head.objectness, 0.5),
        (rpn.head.deltas, 0.05),
        (detector.predictor.cls, 0.5),
    ]:
        nn.init.normal_(layer.weight, std=std)
    return detector


def constant_detector() -> frcnn.FasterRCNN:
    """With constant batch norm: an image does not see its neighbours."""
    detector = make_detector(norm=frcnn.FrozenBatchNorm2d)
    for module in detector.backbone.modules():
        if isinstance(module, frcnn.Bottleneck):
            module.bn3.weight.fill_(0.2)  # else sixteen blocks add up to thousands
    detector.SCORE_THR = 0.1
    return detector


def targets_of(*counts: int) -> list[dict]:
    """A target for each count, with so many boxes."""
    targets = []
    for count in counts:
        corner = torch.rand(count, 2) * 60
        boxes = torch.cat((corner, corner + 10 + torch.rand(count, 2) * 50), dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(1, CLASSES, (count,))})
    return targets


def detections(logits, deltas, proposals, size=(500, 500), **options) -> dict[str, torch.Tensor]:
    """Detections of one image from planted outputs."""
    detector = make_detector(logits.shape[1], **options)
    return detector.detections(logits.clone(), deltas, [proposals], [size])[0]


def planted(rows: list[dict[int, float]], classes: int = CLASSES) -> torch.Tensor:
    """Logits ``[R, C]`` whose softmax has the given probabilities; background takes the rest."""
    p = torch.full((len(rows), classes), 1e-9)
    for i, row in enumerate(rows):
        p[i, 0] = 1 - sum(row.values())
        for label, probability in row.items():
            p[i, label] = probability
    return p.log()


def no_deltas(count: int, classes: int = CLASSES) -> torch.Tensor:
    return torch.zeros(count, classes, 4)


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


# --- contract -------------------------------------------------------------------------------------


def test_module_takes_published_weights_and_nothing_else_from_torchvision():
    tree = ast.parse(Path(frcnn.__file__).read_text(encoding="utf-8"))
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert "torch" in imported
    assert {n for n in imported if n.startswith("torchvision")} == {
        "torchvision.models",
        "torchvision.models.detection",
    }
    names = {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
    }
    assert {"ResNet50_Weights", "FasterRCNN_ResNet50_FPN_Weights"} <= names
    assert not {n for n in names if n.endswith(("rcnn", "rpn", "nms", "ops"))}


def test_settings_are_the_papers():
    kind = frcnn.FasterRCNN
    assert (kind.ROI_BATCH, kind.ROI_POS_FRAC, kind.ROI_POS_THR) == (512, 0.25, 0.5)
    assert (kind.SCORE_THR, kind.NMS_THR, kind.MAX_DETS) == (0.05, 0.5, 100)


def test_default_detector_freezes_the_stem_and_layers_1_to_3():
    with torch.device("meta"):
        detector = frcnn.FasterRCNN()
    assert {"backbone", "fpn", "rpn", "roi_align", "box_head", "predictor"} <= dict(
        detector.named_children()
    ).keys()
    frozen = {name.split(".")[1] for name, p in detector.named_parameters() if not p.requires_grad}
    learning = {name.split(".")[0] for name, p in detector.named_parameters() if p.requires_grad}
    assert frozen == {"stem", "layer1", "layer2", "layer3"}
    assert learning == {"backbone", "fpn", "rpn", "box_head", "predictor"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in detector.modules())
    assert detector.predictor.cls.out_features == 81
    assert (
        detector.rpn.pre_nms,
        detector.rpn.post_nms,
        detector.rpn.nms_thr,
        detector.rpn.min_sz,
    ) == (2000, 1000, 0.7, 16)
    assert detector.box_weights == (10, 10, 5, 5)


def test_training_gives_four_finite_losses_and_gradients():
    detector = make_detector().train()
    losses = detector(torch.randn(2, 3, 128, 128), targets_of(3, 1))
    assert losses.keys() == {"rpn_cls", "rpn_box", "roi_cls", "roi_box"}
    assert all(loss.ndim == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_results_have_the_contracts_shapes_and_types():
    detector = make_detector().eval()
    detector.SCORE_THR = 0.0
    with torch.no_grad():
        results, proposals = detector(torch.randn(2, 3, 128, 160))
    assert len(results) == len(proposals) == 2
    for result, boxes in zip(results, proposals, strict=True):
        assert boxes.shape[1] == 4
        assert 0 < len(boxes) <= 100
        count = len(result["boxes"])
        assert result.keys() == {"boxes", "scores", "labels"}
        assert 0 < count <= 100
        assert (result["boxes"].dtype, result["boxes"].shape) == (torch.float32, (count, 4))
        assert (result["scores"].dtype, result["scores"].shape) == (torch.float32, (count,))
        assert (result["labels"].dtype, result["labels"].shape) == (torch.int64, (count,))
        assert (result["scores"].diff() <= 0).all()
        assert result["labels"].min() >= 1
        assert result["labels"].max() < CLASSES
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"][:, 2:] <= torch.tensor([160, 128])).all()


def test_tiny_detector_has_all_classes_and_learns_everywhere():
    tiny = frcnn.tiny_faster_rcnn()
    assert tiny.num_classes == tiny.predictor.cls.out_features == 81
    assert tiny.backbone.stem[0].out_channels == 16
    assert tiny.fpn.out_channels == 64
    assert tiny.box_head.fc2.out_features == 256
    assert all(p.requires_grad for p in tiny.parameters())
    assert any(isinstance(m, nn.BatchNorm2d) for m in tiny.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = tiny.train()(torch.randn(2, 3, 128, 128), targets_of(2, 1))
    assert all(loss.isfinite() for loss in losses.values())


def test_an_image_alone_and_in_a_batch_is_seen_alike():
    detector = make_detector().eval()
    detector.SCORE_THR = 0.1
    images = torch.randn(3, 3, 128, 128) * torch.tensor([1.0, 3.0, 0.3]).view(3, 1, 1, 1)
    with torch.no_grad():
        together, proposals = detector(images)
        for i in range(3):
            (alone,), (boxes,) = detector(images[i : i + 1])
            torch.testing.assert_close(boxes, proposals[i], atol=1e-3, rtol=0)
            assert torch.equal(alone["labels"], together[i]["labels"])
            torch.testing.assert_close(alone["boxes"], together[i]["boxes"], atol=1e-3, rtol=0)
            torch.testing.assert_close(alone["scores"], together[i]["scores"], atol=1e-5, rtol=0)
    assert all(len(result["boxes"]) > 5 for result in together)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_an_image_of_no_numbers_leaves_its_neighbours_alone(value):
    model = constant_detector().eval()
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


@pytest.mark.parametrize("size", [(101, 203), (64, 64), (33, 150)])
def test_odd_sizes_work(size):
    detector = make_detector()
    losses = detector.train()(
        torch.randn(2, 3, *size),
        [{"boxes": torch.tensor([[2.0, 2, 30, 30]]), "labels": torch.tensor([1])}] * 2,
    )
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        results, _ = detector.eval()(torch.randn(1, 3, *size))
    assert results[0]["boxes"].isfinite().all()


SIZES = [(33, 33), (33, 1333), (1333, 33), (35, 901), (97, 641), (255, 333)]
LARGE = [(799, 1333), (1333, 1333)]


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size", [*SIZES, *(pytest.param(size, marks=pytest.mark.slow) for size in LARGE)]
)
def test_every_size_from_33_to_1333_trains_and_detects(size, amp):
    model, images = frcnn.tiny_faster_rcnn(), torch.randn(2, 3, *size)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model.train()(images, [objects(3, *size, 81), objects(0, *size, 81)])
        model.SCORE_THR = 0.0
        with torch.no_grad():
            results, proposals = model.eval()(images)
    assert_trains(model, losses)
    assert_detects(results, proposals, [size] * 2)
    assert all(len(result["boxes"]) > 0 for result in results)


def test_bfloat16_autocast_gives_finite_float32_results():
    detector = make_detector()
    images = torch.randn(2, 3, 128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(images, targets_of(2, 0))
        detector.eval()
        detector.SCORE_THR = 0.1
        with torch.no_grad():
            results, proposals = detector(images)
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    for result, boxes in zip(results, proposals, strict=True):
        assert len(result["boxes"]) > 0
        assert result["boxes"].dtype == result["scores"].dtype == boxes.dtype == torch.float32
        assert result["boxes"].isfinite().all()
        assert result["scores"].isfinite().all()


# --- detections -----------------------------------------------------------------------------------

SQUARES = torch.tensor([[10.0, 10, 60, 60], [100, 100, 180, 180], [200, 20, 260, 80]])


def test_best_detection_comes_first():
    found = detections(planted([{1: 0.5}, {2: 0.9}, {3: 0.7}]), no_deltas(3), SQUARES)
    assert found["labels"].tolist() == [2, 3, 1]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.5], abs=1e-4)
    torch.testing.assert_close(found["boxes"], SQUARES[[1, 2, 0]], atol=1e-4, rtol=0)


def test_background_is_no_detection():
    found = detections(planted([{1: 0.01}, {2: 0.3}, {}]), no_deltas(3), SQUARES)
    assert found["labels"].tolist() == [2]


def test_one_proposal_may_be_two_things():
    found = detections(planted([{1: 0.5, 4: 0.4}]), no_deltas(1), SQUARES[:1])
    assert found["labels"].tolist() == [1, 4]


@pytest.mark.parametrize("score, kept", [(0.06, 1), (0.04, 0)])
def test_scores_below_the_threshold_are_dropped(score, kept):
    assert len(detections(planted([{1: score}]), no_deltas(1), SQUARES[:1])["labels"]) == kept


def test_nms_is_done_class_by_class():
    twins = torch.tensor([[10.0, 10, 60, 60], [11, 10, 61, 60]])
    assert detections(planted([{1: 0.9}, {1: 0.8}]), no_deltas(2), twins)["labels"].tolist() == [1]
    assert detections(planted([{1: 0.9}, {2: 0.8}]), no_deltas(2), twins)["labels"].tolist() == [
        1,
        2,
    ]


def test_nms_keeps_images_apart():
    detector, box = make_detector(), SQUARES[:1]
    found = detector.detections(
        planted([{1: 0.9}, {1: 0.8}]), no_deltas(2), [box, box], [(500, 500)] * 2
    )
    assert [len(result["labels"]) for result in found] == [1, 1]
    assert [result["scores"].item() for result in found] == pytest.approx([0.9, 0.8], abs=1e-4)


def test_an_image_without_detections_between_others_stays_empty():
    model, box = constant_detector(), torch.tensor([[10.0, 10, 60, 60], [70, 10, 90, 60]])
    sure, unsure = torch.tensor([0.0, 9, 0, 0, 0, 0]), torch.tensor([9.0, 0, 0, 0, 0, 0])
    logits = torch.stack((sure, sure, unsure, unsure, sure))
    proposals = [box, box, box[:0], box[:1]]
    results = model.detections(logits, torch.zeros(5, CLASSES, 4), proposals, [(SIDE, SIDE)] * 4)
    assert [len(result["boxes"]) for result in results] == [2, 0, 0, 1]
    assert_detects(results, proposals, [(SIDE, SIDE)] * 4)


def test_every_class_moves_the_box_by_its_own_deltas():
    deltas = no_deltas(1)
    deltas[0, 0] = torch.tensor([50.0, 50, 5, 5])  # of background: read by nobody
    deltas[0, 2] = torch.tensor([10.0, 0, 0, 0])  # one width to the right, weight 10
    deltas[0, 5] = torch.tensor([0.0, 20, 0, 0])  # two heights down
    found = detections(planted([{2: 0.5, 5: 0.3}]), deltas, torch.tensor([[10.0, 10, 60, 60]]))
    assert found["labels"].tolist() == [2, 5]
    torch.testing.assert_close(
        found["boxes"], torch.tensor([[60.0, 10, 110, 60], [10, 110, 60, 160]]), atol=1e-3, rtol=0
    )


def test_detections_are_clipped_to_the_true_size_of_their_image():
    detector, box = make_detector(), torch.tensor([[-20.0, -20, 300, 300]])
    sizes = [(100, 200), (150, 120)]  # height, width
    found = detector.detections(planted([{1: 0.9}, {1: 0.8}]), no_deltas(2), [box, box], sizes)
    assert [result["boxes"].tolist() for result in found] == [
        [[0, 0, 200, 100]],
        [[0, 0, 120, 150]],
    ]


def test_forward_clips_to_the_true_sizes():
    detector = make_detector().eval()
    detector.SCORE_THR = 0.0
    with torch.no_grad():
        results, proposals = detector(
            torch.randn(2, 3, 128, 128), image_sizes=[(128, 128), (90, 70)]
        )
    assert proposals[1].amax(0)[2:].tolist() == [70, 90]
    assert results[1]["boxes"].amax(0)[2:].tolist() == [70, 90]
    assert results[0]["boxes"].amax(0)[2:].tolist() == [128, 128]


def test_at_most_max_dets_the_best_of_all_classes():
    boxes = torch.arange(150)[:, None] * torch.tensor([3.0, 0, 3, 0]) + torch.tensor([0.0, 0, 2, 2])
    rows = [{1 + i % 5: 0.2 + 0.005 * i} for i in range(150)]
    found = detections(planted(rows), no_deltas(150), boxes)
    assert len(found["boxes"]) == 100
    assert found["scores"].min().item() == pytest.approx(0.2 + 0.005 * 50, abs=1e-4)


def test_detections_outside_the_image_can_be_dropped_by_size():
    deltas = no_deltas(1)
    deltas[0, 1] = torch.tensor([200.0, 0, 0, 0])
    outside = torch.tensor([[10.0, 10, 60, 60]])
    assert len(detections(planted([{1: 0.9}]), deltas, outside, min_detection=1e-2)["boxes"]) == 0


def test_size_outputs_are_clamped():
    deltas = no_deltas(1)
    deltas[0, 1] = torch.tensor([0.0, 0, 5e4, 5e4])
    found = detections(planted([{1: 0.9}]), deltas, SQUARES[1:2])
    assert found["boxes"].tolist() == [[0, 0, 500, 500]]
    limited = detections(planted([{1: 0.9}]), deltas, SQUARES[1:2], max_log_scale=0.0)
    torch.testing.assert_close(limited["boxes"], SQUARES[1:2], atol=1e-4, rtol=0)


def test_detections_equal_torchvisions():
    reference = torchvision.models.detection.roi_heads.RoIHeads(
        None, None, None, 0.5, 0.5, 512, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100
    )
    corner = torch.rand(200, 2) * 300
    proposals = torch.cat((corner, corner + 10 + torch.rand(200, 2) * 100), dim=1)
    logits, deltas, sizes = (
        torch.randn(200, CLASSES) * 2,
        torch.randn(200, CLASSES, 4) * 3,
        [(350, 400), (300, 280)],
    )
    split = [proposals[:120], proposals[120:]]
    expected = reference.postprocess_detections(logits, deltas.flatten(1), split, sizes)
    detector = make_detector(
        min_detection=1e-2, max_log_scale=torch.log(torch.tensor(1000 / 16)).item()
    )
    for i, found in enumerate(detector.detections(logits, deltas, split, sizes)):
        torch.testing.assert_close(found["boxes"], expected[0][i], atol=1e-3, rtol=0)
        torch.testing.assert_close(found["scores"], expected[1][i], atol=1e-6, rtol=0)
        assert torch.equal(found["labels"], expected[2][i])


def assert_empty(result: dict[str, torch.Tensor]):
    assert {name: (value.dtype, tuple(value.shape)) for name, value in result.items()} == {
        "boxes": (torch.float32, (0, 4)),
        "scores": (torch.float32, (0,)),
        "labels": (torch.int64, (0,)),
    }


def test_no_proposals_give_empty_results():
    detector = make_detector().eval()
    detector.rpn.min_sz = 1000
    with torch.no_grad():
        results, proposals = detector(torch.randn(2, 3, 128, 128))
    assert [tuple(boxes.shape) for boxes in proposals] == [(0, 4), (0, 4)]
    for result in results:
        assert_empty(result)


def test_no_detections_give_empty_results():
    detector = make_detector().eval()
    detector.SCORE_THR = 1.0
    with torch.no_grad():
        results, proposals = detector(torch.randn(2, 3, 128, 128))
    assert all(len(boxes) > 0 for boxes in proposals)
    for result in results:
        assert_empty(result)


# --- sampling and losses of the second stage ------------------------------------------------------


def crowd(positives: int, negatives: int) -> tuple[list[torch.Tensor], list[dict]]:
    """So many proposals on the one object, and so many far from it."""
    gt = torch.tensor([[50.0, 50, 100, 100]])
    near = gt + torch.rand(positives, 4)
    far = torch.tensor([[200.0, 200, 250, 250]]) + torch.rand(negatives, 4) * 10
    return [torch.cat((near, far))], [{"boxes": gt, "labels": torch.tensor([3])}]


@pytest.mark.parametrize(
    "positives, negatives, drawn",
    [
        (400, 2000, (128, 384)),
        (9, 2000, (10, 502)),
        (400, 100, (128, 100)),
        (0, 2000, (1, 511)),
        (0, 0, (1, 0)),
    ],
)
def test_a_quarter_of_the_sample_is_positive_and_the_object_is_among_the_proposals(
    positives, negatives, drawn
):
    proposals, labels, expected = make_detector().sample_proposals(*crowd(positives, negatives))
    assert ((labels == 3).sum().item(), (labels == 0).sum().item()) == drawn
    assert len(proposals[0]) == len(labels) == len(expected) == sum(drawn)


def test_the_object_itself_is_a_perfect_proposal():
    proposals, labels, expected = make_detector().sample_proposals(
        [torch.zeros(0, 4)], crowd(0, 0)[1]
    )
    assert proposals[0].tolist() == [[50, 50, 100, 100]]
    assert labels.tolist() == [3]
    assert expected.tolist() == [[0, 0, 0, 0]]


def test_every_positive_gets_the_class_and_the_targets_of_its_own_object():
    gt = torch.tensor([[0.0, 0, 50, 50], [100, 100, 200, 200]])
    boxes = torch.tensor([[105.0, 100, 205, 200], [0, 0, 50, 45], [60, 60, 90, 90]])
    targets = [{"boxes": gt, "labels": torch.tensor([4, 2])}]
    (sampled,), labels, expected = make_detector().sample_proposals([boxes], targets)
    of = {tuple(box): i for i, box in enumerate(sampled.tolist())}
    assert [labels[of[tuple(box)]].item() for box in boxes.tolist()] == [2, 4, 0]
    torch.testing.assert_close(
        expected[of[105, 100, 205, 200]], torch.tensor([-0.5, 0, 0, 0]), atol=1e-4, rtol=0
    )


def test_proposals_from_half_an_overlap_are_positive():
    gt = torch.tensor([[0.0, 0, 100, 100]])
    boxes = torch.tensor([[0.0, 0, 100, 50], [0, 0, 100, 49]])
    (sampled,), labels, _ = make_detector().sample_proposals(
        [boxes], [{"boxes": gt, "labels": torch.tensor([1])}]
    )
    of = dict(zip(sampled[:, 3].tolist(), labels.tolist(), strict=True))
    assert of == {100: 1, 50: 1, 49: 0}


def test_only_the_deltas_of_the_true_class_are_trained():
    expected = torch.tensor([[0.1, -0.2, 0.3, 0.05], [1.0, 1, 1, 1]])
    deltas = torch.full((2, CLASSES, 4), 7.0, requires_grad=True)
    with torch.no_grad():
        deltas[0, 3] = expected[0]
    losses = make_detector().losses(torch.zeros(2, CLASSES), deltas, torch.tensor([3, 0]), expected)
    assert losses["roi_box"].item() == 0
    with torch.no_grad():
        deltas[0, 3] += 0.5
    losses = make_detector().losses(torch.zeros(2, CLASSES), deltas, torch.tensor([3, 0]), expected)
    losses["roi_box"].backward()
    assert deltas.grad.abs().sum(2).nonzero().tolist() == [[0, 3]]


def test_box_loss_has_beta_a_ninth_and_is_divided_by_all_sampled():
    deltas = torch.zeros(4, CLASSES, 4)
    expected = torch.tensor([[0.05, 0.5, 0, 0]] * 4)
    logits, labels = torch.zeros(4, CLASSES), torch.tensor([2, 0, 0, 0])
    losses = make_detector().losses(logits, deltas, labels, expected)
    assert losses["roi_box"].item() == pytest.approx(
        (0.5 * 0.05**2 * 9 + 0.5 - 1 / 18) / 4, rel=1e-5
    )
    assert losses["roi_cls"].item() == pytest.approx(
        torch.log(torch.tensor(CLASSES)).item(), rel=1e-5
    )


def test_losses_equal_torchvisions():
    logits, deltas = torch.randn(50, CLASSES), torch.randn(50, CLASSES, 4)
    labels, expected = torch.randint(0, CLASSES, (50,)), torch.randn(50, 4)
    cls, box = torchvision.models.detection.roi_heads.fastrcnn_loss(
        logits, deltas.flatten(1), [labels], [expected]
    )
    losses = make_detector().losses(logits, deltas, labels, expected)
    torch.testing.assert_close(losses["roi_cls"], cls)
    torch.testing.assert_close(losses["roi_box"], box)


def everything_is_sampled(model: frcnn.FasterRCNN) -> frcnn.FasterRCNN:
    """No chance remains: all anchors and all proposals count."""
    model.rpn.RPN_BATCH = model.ROI_BATCH = 10**6
    model.rpn.POS_FRAC = model.ROI_POS_FRAC = 0.5
    return model


@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 0, 4), (1, 40, 2)])
def test_losses_of_a_batch_are_those_of_its_images_weighted_by_their_samples(counts):
    model = everything_is_sampled(constant_detector()).train()
    images = torch.randn(3, 3, SIDE, SIDE) * torch.tensor([1.0, 3.0, 0.3]).view(3, 1, 1, 1)
    targets = [objects(count, SIDE, SIDE, CLASSES) for count in counts]
    seen = {}
    model.rpn.register_forward_hook(lambda module, maps, result: seen.update(proposals=result[0]))
    model.rpn.anchor_gen.register_forward_hook(
        lambda module, maps, result: seen.update(anchors=result)
    )
    expected, anchors_sampled, proposals_sampled = dict.fromkeys(frcnn.LOSS_NAMES, 0.0), 0, 0
    for i, target in enumerate(targets):
        alone = model(images[i : i + 1], [target])
        labels, _ = frcnn.match_boxes(seen["anchors"], target["boxes"], 0.7, 0.3, True)
        weights = {
            "rpn": int((labels >= 0).sum()),
            "roi": len(seen["proposals"][0]) + len(target["boxes"]),
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


def test_sampled_proposals_carry_no_gradient():
    boxes = torch.rand(5, 4).cumsum(1).requires_grad_()
    sampled, _, expected = make_detector().sample_proposals([boxes], targets_of(2))
    assert not sampled[0].requires_grad
    assert not expected.requires_grad


# --- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(0, 2), (2, 0), (0, 0)])
def test_images_without_objects_train(counts):
    detector = make_detector().train()
    losses = detector(torch.randn(2, 3, 128, 128), targets_of(*counts))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
    assert detector.rpn.head.objectness.weight.grad.abs().max() > 0
    assert detector.predictor.cls.weight.grad.abs().max() > 0
    if not any(counts):
        assert losses["rpn_box"] == losses["roi_box"] == 0


def test_neither_objects_nor_proposals_train():
    detector = make_detector().train()
    detector.rpn.min_sz = 1000
    losses = detector(torch.randn(2, 3, 128, 128), targets_of(0, 0))
    assert losses["roi_cls"] == losses["roi_box"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


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
    model, images = make_detector(), torch.randn(2, 3, SIDE, SIDE)
    model.SCORE_THR = 0.1
    targets = [objects(count, SIDE, SIDE, CLASSES) for count in counts]
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


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_more_objects_than_anchors_train(count):
    model = frcnn.tiny_faster_rcnn().train()
    anchors = []
    model.rpn.anchor_gen.register_forward_hook(lambda module, maps, result: anchors.append(result))
    losses = model(torch.randn(2, 3, 33, 33), [objects(count, 33, 33, 81), objects(1, 33, 33, 81)])
    assert count > 2 * len(anchors[0])
    assert_trains(model, losses)


GOOD = [[10.0, 10, 50, 50]]


@pytest.mark.parametrize(
    "boxes, labels, message",
    [
        (
            [*GOOD, [30.0, 20, 30, 40]],
            [1, 1],
            r"target 1: box 1 .*x1 < x2.* \[30.0, 20.0, 30.0, 40.0\]",
        ),
        (
            [*GOOD, [30.0, 50, 60, 40]],
            [1, 1],
            r"target 1: box 1 .*y1 < y2.* \[30.0, 50.0, 60.0, 40.0\]",
        ),
        ([[30.0, NAN, 60, 40]], [1], r"target 1: box 0 .*nan"),
        ([[30.0, 10, INF, 40]], [1], r"target 1: box 0 .*inf"),
        (GOOD * 2, [1, 0], r"target 1: label 1 .*1\.\.5.* 0"),
        (GOOD * 2, [6, 1], r"target 1: label 0 .*1\.\.5.* 6"),
        (GOOD, [-1], r"target 1: label 0 .*1\.\.5.* -1"),
        (GOOD, [1, 2], r"target 1: .*\[K, 4\].* \[1, 4\] and \[2\]"),
        ([10.0, 10, 50, 50], [1], r"target 1: .*\[K, 4\].* \[4\] and \[1\]"),
        ([[10.0, 10, 50]], [1], r"target 1: .*\[K, 4\].* \[1, 3\] and \[1\]"),
    ],
)
def test_bad_targets_are_named_by_image_and_box(boxes, labels, message):
    targets = [
        {"boxes": torch.tensor(GOOD), "labels": torch.tensor([1])},
        {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)},
    ]
    with pytest.raises(ValueError, match=message):
        make_detector().train()(torch.zeros(2, 3, 64, 64), targets)


@pytest.mark.parametrize("targets, told", [(None, "None"), (targets_of(1), "1")])
def test_missing_targets_are_said(targets, told):
    with pytest.raises(ValueError, match=f"2 images, got {told}"):
        make_detector().train()(torch.zeros(2, 3, 64, 64), targets)


def test_good_targets_pass():
    frcnn.check_targets(torch.zeros(3, 3, 8, 8), targets_of(0, 1, 4), CLASSES)
