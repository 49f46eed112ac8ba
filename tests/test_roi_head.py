"""ROIAlign, against closed forms and torchvision's operator, and the two fully connected heads."""

import math

import pytest
import torch
import torchvision
from conftest import chance, hostile_boxes
from hypothesis import given
from hypothesis import strategies as st

import frcnn_common as frcnn


def pyramid(height: int, width: int, batch: int = 2, channels: int = 3) -> list[torch.Tensor]:
    """P2 … P5 of an image, odd sizes rounded up on the way."""
    sizes = [(-(-height // 4), -(-width // 4))]
    for _ in range(3):
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return [torch.randn(batch, channels, *size) for size in sizes]


def boxes_in(height: int, width: int, count: int, longest: float = 1.0) -> torch.Tensor:
    """Boxes of all sizes; some stick out of the image."""
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 1.1 - 10
    size = torch.tensor([width, height]) * longest * torch.rand(count, 2) ** 2 + 0.5
    return torch.cat((corner, corner + size), dim=1)


def levels_of(boxes: torch.Tensor, k0: int = 4) -> torch.Tensor:
    """FPN's equation 1, box by box."""
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes.tolist()]
    levels = [
        2 if area == 0 else math.floor(k0 + math.log2(math.sqrt(area) / 224)) for area in areas
    ]
    return torch.tensor([min(max(level, 2), 5) - 2 for level in levels])


def by_torchvision(
    fmaps, proposals, aligned: bool = True, out_size: int = 7, sampling: int = 2
) -> torch.Tensor:
    """torchvision's operator, level by level."""
    boxes = torch.cat(proposals)
    image = torch.repeat_interleave(torch.tensor([len(p) for p in proposals]))
    rois, level = torch.cat((image[:, None].float(), boxes), dim=1), levels_of(boxes)
    pooled = fmaps[0].new_zeros(len(boxes), fmaps[0].shape[1], out_size, out_size)
    for i, fmap in enumerate(fmaps):
        mine = (level == i).nonzero()[:, 0]
        found = torchvision.ops.roi_align(
            fmap, rois[mine], out_size, 0.25 / 2**i, sampling, aligned
        )
        pooled = pooled.index_put((mine,), found)
    return pooled


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k0", [4, 5])
def test_a_224_px_box_belongs_on_level_k0(k0):
    boxes = torch.tensor(
        [[10.0, 10, 234, 234], [0, 0, 112, 448], [0, 0, 223.9, 224]]
    )  # area counts, not shape
    assert frcnn.ROIAlign(k0=k0).assign_levels(boxes).tolist() == [k0 - 2, k0 - 2, k0 - 3]


def test_levels_double_with_the_side_and_are_clamped():
    sides = [0, 1, 50, 111, 112, 223, 224, 447, 448, 2000]
    boxes = torch.tensor([[0.0, 0, side, side] for side in sides])
    assert frcnn.ROIAlign().assign_levels(boxes).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_level_eps_lifts_a_box_just_below_the_border():
    # corners in float32: a side that should be 224 may lie a few rounding steps below
    box = torch.tensor([[0.0, 0, 224, 224 - 1.6e-4]])
    assert box[0, 3] < 224
    assert frcnn.ROIAlign(level_eps=0.0).assign_levels(box).tolist() == [1]
    assert frcnn.ROIAlign(level_eps=1e-6).assign_levels(box).tolist() == [2]


def test_published_levels_are_torchvisions():
    mapper = torchvision.ops.poolers.LevelMapper(2, 5)
    step = torch.finfo(torch.float32).eps
    sides = torch.cat([224 * 2.0**k * (1 + step * torch.arange(-30, 31)) for k in (-1, 0, 1)])
    boxes = torch.stack((torch.zeros_like(sides), torch.zeros_like(sides), sides, sides), dim=1)
    assert torch.equal(frcnn.ROIAlign(level_eps=1e-6).assign_levels(boxes), mapper([boxes]))


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size", [(256, 256), (256, 448), (800, 608), (101, 203)])
def test_pooled_equals_torchvision(size, aligned):
    fmaps, (height, width) = pyramid(*size), size
    proposals = [boxes_in(height, width, 150), boxes_in(height, width, 70)]
    pooled = frcnn.ROIAlign(aligned=aligned)(fmaps, proposals, size)
    assert pooled.shape == (220, 3, 7, 7)
    torch.testing.assert_close(pooled, by_torchvision(fmaps, proposals, aligned), atol=1e-3, rtol=0)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    "box",
    [
        [20.0, 20, 20, 20],  # nothing
        [20.3, 20.7, 20.4, 20.9],  # less than a cell
        [30.0, 10, 30, 90],  # a line
        [-40.0, -40, 30, 30],  # partly outside
        [200.0, 100, 400, 300],
        [-100.0, -100, -60, -70],  # outside
        [300.0, 300, 350, 380],
        [-500.0, -500, 900, 900],  # around all
        [0.0, 0, 256, 192],  # the image
        [252.0, 188, 256, 192],  # its last cell
    ],
)
def test_boxes_of_every_kind_equal_torchvision(box, aligned):
    fmaps, proposals = pyramid(192, 256, batch=1), [torch.tensor([box])]
    pooled = frcnn.ROIAlign(aligned=aligned)(fmaps, proposals, (192, 256))
    torch.testing.assert_close(pooled, by_torchvision(fmaps, proposals, aligned), atol=1e-3, rtol=0)


@pytest.mark.parametrize("out_size, sampling", [(7, 1), (7, 4), (3, 2), (1, 2), (14, 2)])
def test_other_bins_and_samples_equal_torchvision(out_size, sampling):
    fmaps, proposals = pyramid(192, 256, batch=1), [boxes_in(192, 256, 40)]
    pooled = frcnn.ROIAlign(out_size, sampling=sampling)(fmaps, proposals, (192, 256))
    expected = by_torchvision(fmaps, proposals, out_size=out_size, sampling=sampling)
    torch.testing.assert_close(pooled, expected, atol=1e-3, rtol=0)


def test_5000_boxes_equal_torchvision():
    fmaps, proposals = (
        pyramid(400, 400, channels=2),
        [boxes_in(400, 400, 2000), boxes_in(400, 400, 3000)],
    )
    pooled = frcnn.ROIAlign()(fmaps, proposals, (400, 400))
    torch.testing.assert_close(pooled, by_torchvision(fmaps, proposals), atol=1e-3, rtol=0)


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


def test_published_pooling_equals_torchvisions_for_many_levels():
    fmaps, size = pyramid(416, 320), (416, 320)
    proposals = [boxes_in(*size, 100), boxes_in(*size, 50)]
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = pool({str(i): m for i, m in enumerate(fmaps)}, proposals, [size, size])
    pooled = frcnn.ROIAlign(aligned=False, level_eps=1e-6)(fmaps, proposals, size)
    torch.testing.assert_close(pooled, expected, atol=1e-3, rtol=0)


def ramps(height: int, width: int) -> list[torch.Tensor]:
    """Maps whose two channels are x and y of the cell's centre, in pixels of the image."""
    fmaps = []
    for stride in (4, 8, 16, 32):
        y, x = (torch.arange(side // stride) + 0.5 for side in (height, width))
        y, x = torch.meshgrid(y * stride, x * stride, indexing="ij")
        fmaps.append(torch.stack((x, y))[None])
    return fmaps


@pytest.mark.parametrize("side", [40.0, 150.0, 230.0, 460.0])  # one for each level
def test_on_a_ramp_a_bin_holds_its_own_centre(side):
    # samples at the bin's corners, or half a pixel off, would not average to it
    x1, y1 = 100.0, 60.0
    pooled = frcnn.ROIAlign()(
        ramps(640, 960), [torch.tensor([[x1, y1, x1 + 1.5 * side, y1 + side / 1.5]])], (640, 960)
    )
    centres = (torch.arange(7) + 0.5) / 7
    torch.testing.assert_close(
        pooled[0, 0], (x1 + 1.5 * side * centres).expand(7, 7), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(
        pooled[0, 1], (y1 + side / 1.5 * centres)[:, None].expand(7, 7), atol=1e-2, rtol=0
    )


def test_unaligned_is_half_a_cell_further():
    box = [torch.tensor([[100.0, 60, 140, 100]])]
    aligned, unaligned = (
        frcnn.ROIAlign(aligned=a)(ramps(640, 960), box, (640, 960)) for a in (True, False)
    )
    torch.testing.assert_close(unaligned, aligned + 2, atol=1e-3, rtol=0)  # stride 4


def test_every_box_reads_its_own_image():
    fmaps = [
        torch.stack([torch.full((1, s, s), float(i)) for i in range(3)]) for s in (64, 32, 16, 8)
    ]
    proposals = [
        torch.tensor([[10.0, 10, 50, 50]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0, 250, 250], [5, 5, 20, 20]]),
    ]
    assert frcnn.ROIAlign()(fmaps, proposals, (256, 256)).mean((1, 2, 3)).tolist() == pytest.approx(
        [0, 2, 2]
    )


@pytest.mark.parametrize("aligned", [True, False])
def test_gradients_equal_torchvision(aligned):
    fmaps = [m.requires_grad_() for m in pyramid(101, 203)]
    proposals = [boxes_in(101, 203, 40, longest=3), boxes_in(101, 203, 20)]
    weight = torch.randn(60, 3, 7, 7)
    results = []
    for pooled in (
        frcnn.ROIAlign(aligned=aligned)(fmaps, proposals, (101, 203)),
        by_torchvision(fmaps, proposals, aligned),
    ):
        results.append(torch.autograd.grad((pooled * weight).sum(), fmaps, materialize_grads=True))
    assert sum(bool(g.abs().max() > 0) for g in results[1]) >= 3
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("images", [1, 2])
def test_no_proposals_give_an_empty_result_with_a_gradient(images):
    fmaps = [m.requires_grad_() for m in pyramid(64, 96, batch=images)]
    pooled = frcnn.ROIAlign()(fmaps, [torch.zeros(0, 4)] * images, (64, 96))
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(m.grad.abs().max() == 0 for m in fmaps)


def test_half_precision_maps_are_pooled_in_float32():
    fmaps, proposals = pyramid(192, 256), [boxes_in(192, 256, 20), boxes_in(192, 256, 5)]
    halves = [m.bfloat16() for m in fmaps]
    pooled = frcnn.ROIAlign()(halves, proposals, (192, 256))
    expected = frcnn.ROIAlign()([m.float() for m in halves], proposals, (192, 256))
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=0)


def test_channels_last_maps_give_the_same():
    fmaps, proposals = pyramid(192, 256), [boxes_in(192, 256, 20), boxes_in(192, 256, 5)]
    other = [m.contiguous(memory_format=torch.channels_last) for m in fmaps]
    results = [frcnn.ROIAlign()(maps, proposals, (192, 256)) for maps in (fmaps, other)]
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


# --- heads ----------------------------------------------------------------------------------------


def test_box_head_is_two_rectified_layers():
    head = frcnn.TwoMLPHead(2 * 7 * 7, 16)
    x = torch.randn(5, 2, 7, 7)
    hidden = (x.flatten(1) @ head.fc1.weight.T + head.fc1.bias).clamp(min=0)
    expected = (hidden @ head.fc2.weight.T + head.fc2.bias).clamp(min=0)
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=0)
    assert head(torch.zeros(0, 2, 7, 7)).shape == (0, 16)


def test_default_heads_have_the_papers_sizes():
    head, predictor = frcnn.TwoMLPHead(), frcnn.FastRCNNPredictor()
    assert (head.fc1.in_features, head.fc1.out_features, head.fc2.out_features) == (
        256 * 7 * 7,
        1024,
        1024,
    )
    assert (predictor.cls.in_features, predictor.cls.out_features) == (1024, 81)
    assert (predictor.box.in_features, predictor.box.out_features) == (1024, 4 * 81)


def test_predictor_starts_small():
    predictor = frcnn.FastRCNNPredictor()
    assert predictor.cls.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert predictor.box.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert predictor.cls.bias.abs().max() == predictor.box.bias.abs().max() == 0
    logits, deltas = predictor(torch.randn(3, 1024))
    assert (logits.shape, deltas.shape) == ((3, 81), (3, 324))
