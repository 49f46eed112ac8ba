"""Published weights: torchvision's detector inside these classes, and how its files are read.

Same weights and input give the same features, boxes and losses.
"""

import functools

import PIL.Image
import pytest
import torch
import torchvision
from torchvision.models import ResNet50_Weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

import frcnn_common as frcnn

UNUSED = sorted(set(range(91)) - set(frcnn.COCO_CATEGORY_IDS))
USED = list(frcnn.COCO_CATEGORY_IDS)
# P6's stride is the padded size // its cells: 64 only where both sides divide by 64.
SIZES = [(256, 320), (416, 416), pytest.param((800, 1088), marks=pytest.mark.slow)]
EVERYTHING = 1_000_000  # sampled boxes: no random choice is left


# --- torchvision's detector and ours --------------------------------------------------------------


def random_torchvision_detector() -> torch.nn.Module:
    """Seeded weights, batch norm that matters, and heads that give real scores to many classes."""
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, box_detections_per_img=100, min_size=800, max_size=1333
    )
    generator = torch.Generator().manual_seed(1)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(uniform(value, 0.5, 2.0))
        elif name.endswith("running_mean"):
            value.copy_(uniform(value, -0.2, 0.2))
        elif ".bn3." in name and name.endswith("weight"):
            value.copy_(uniform(value, 0.1, 0.4))  # activations neither vanish nor explode
        elif name.endswith("rpn.head.cls_logits.weight") or name.endswith("cls_score.weight"):
            value.mul_(30 if "cls_logits" in name else 100)
        elif name.endswith("bbox_pred.weight"):
            value.mul_(5)
    # Their softmax runs over 91 outputs.
    # Published weights give next to nothing to the ten that COCO never used.
    with torch.no_grad():
        theirs.roi_heads.box_predictor.cls_score.bias[UNUSED] = -100
    frozen = functools.partial(torchvision.ops.FrozenBatchNorm2d, eps=0.0)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    backbone = torchvision.models.resnet50(norm_layer=frozen)
    extract = torchvision.models.detection.backbone_utils._resnet_fpn_extractor
    theirs.backbone = extract(backbone, trainable_layers=3)
    theirs.load_state_dict(state)
    return theirs


@pytest.fixture(scope="module")
def pair():
    """torchvision's detector and ours with its weights."""
    theirs = random_torchvision_detector().eval()
    ours = frcnn.coco_faster_rcnn().eval()
    frcnn.load_coco_weights(ours, theirs.state_dict())
    return theirs, ours


def image_batch(size: tuple[int, int]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Two images, the second smaller and padded; of the large size the second alone."""
    torch.manual_seed(2)
    height, width = size
    small = (height - 32, width - 48)
    coarse = torch.randn(2, 3, height // 16, width // 16)
    images = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic") + 0.2 * torch.randn(
        2, 3, *size
    )
    images[1, :, small[0] :] = 0
    images[1, :, :, small[1] :] = 0
    return (images, [size, small]) if height < 800 else (images[1:], [small])


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def outputs(request, pair):
    """What every stage of both gives for one batch."""
    theirs, ours = pair
    images, sizes = image_batch(request.param)
    with torch.no_grad():
        their_maps = theirs.backbone(images)
        their_proposals, _ = theirs.rpn(ImageList(images, sizes), their_maps)
        their_anchors = theirs.rpn.anchor_generator(
            ImageList(images, sizes), list(their_maps.values())
        )[0]
        their_results, _ = theirs.roi_heads(their_maps, their_proposals, sizes)
        our_maps = ours.fpn(ours.backbone(images))
        our_anchors = ours.rpn.anchor_gen(our_maps, request.param)
        our_results, our_proposals = ours(images, image_sizes=sizes)
    return {
        "maps": (list(their_maps.values()), our_maps),
        "anchors": (their_anchors, our_anchors),
        "proposals": (their_proposals, our_proposals),
        "results": (their_results, our_results),
    }


def test_features_are_torchvisions(outputs):
    theirs, ours = outputs["maps"]
    assert len(ours) == 5
    for their_map, our_map in zip(theirs, ours, strict=True):
        scale = their_map.abs().max()
        assert scale > 0.1
        torch.testing.assert_close(our_map / scale, their_map / scale, rtol=0, atol=1e-5)


def test_anchors_are_torchvisions(outputs):
    theirs, ours = outputs["anchors"]
    assert torch.equal(ours, theirs)


def test_stride_of_p6_follows_the_padded_size():
    maps = [torch.zeros(1, 1, rows, rows) for rows in (104, 52, 26, 13, 7)]
    level = frcnn.coco_faster_rcnn().rpn.anchor_gen(maps, (416, 416))[-7 * 7 * 3 :: 3]
    assert (level[1] - level[0]).tolist() == [59, 0, 59, 0]


def counterparts(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """For each of their boxes the nearest of ours, at most 0.05 px away.

    Equal scores may stand in another order.
    """
    assert len(theirs) == len(ours)
    distance, index = (theirs[:, None] - ours).abs().amax(dim=-1).min(dim=1)
    assert distance.max() < 0.05
    assert len(index.unique()) == len(ours)
    assert (index != torch.arange(len(index))).float().mean() < 0.02  # and hardly any does
    return index


def test_proposals_are_torchvisions(outputs):
    for theirs, ours in zip(*outputs["proposals"], strict=True):
        assert len(theirs) > 300
        counterparts(theirs, ours)


def test_detections_are_torchvisions(outputs):
    for theirs, ours in zip(*outputs["results"], strict=True):
        assert len(theirs["labels"]) == 100
        assert len(theirs["labels"].unique()) >= 3
        index = counterparts(theirs["boxes"], ours["boxes"])
        assert [USED[label] for label in ours["labels"][index]] == theirs["labels"].tolist()
        torch.testing.assert_close(ours["scores"][index], theirs["scores"], rtol=1e-3, atol=1e-4)


@pytest.fixture
def everything_sampled(pair):
    """Both in training mode, with samplers that take every labelled box."""
    theirs, ours = pair
    theirs.train()
    ours.train()
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = EVERYTHING
    ours.rpn.RPN_BATCH = ours.ROI_BATCH = EVERYTHING
    yield theirs, ours
    theirs.eval()
    ours.eval()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_losses_are_torchvisions(size, everything_sampled):
    theirs, ours = everything_sampled
    images, sizes = image_batch(size)
    height, width = sizes[-1]
    boxes = torch.tensor(
        [[10.0, 20, 90, 120], [60, 40, width - 20, height - 30], [100, 100, 118, 121]]
    )
    labels = torch.tensor([1, 17, 80])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets = [{"boxes": boxes, "labels": labels}, nothing][: len(images)]
    in_their_ids = [t | {"labels": torch.tensor(USED)[t["labels"]]} for t in targets]
    with torch.no_grad():
        maps = theirs.backbone(images)
        proposals, rpn = theirs.rpn(ImageList(images, sizes), maps, in_their_ids)
        _, roi = theirs.roi_heads(maps, proposals, sizes, in_their_ids)
        losses = ours(images, targets, sizes)
    expected = {
        "rpn_cls": rpn["loss_objectness"],
        "rpn_box": rpn["loss_rpn_box_reg"],
        "roi_cls": roi["loss_classifier"],
        "roi_box": roi["loss_box_reg"],
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss > 1e-5, name
        torch.testing.assert_close(loss, expected[name], rtol=1e-3, atol=0)


def test_detect_finds_in_a_photograph_what_torchvision_finds(pair):
    """From pixels to boxes in the same pixels."""
    theirs, ours = pair
    picture = torch.randint(0, 256, (427, 713, 3), dtype=torch.uint8)
    theirs.transform.image_mean = frcnn.IMAGENET_MEAN.flatten().tolist()
    theirs.transform.min_size, theirs.transform.max_size = (256,), 420
    with torch.no_grad():
        (expected,) = theirs([picture.permute(2, 0, 1) / 255])
    found = frcnn.detect(ours, PIL.Image.fromarray(picture.numpy()), (256, 420))
    assert len(found["boxes"]) > 10
    counterparts(expected["boxes"], found["boxes"])


# --- the files ------------------------------------------------------------------------------------


def test_old_names_of_the_published_file_are_known(pair):
    theirs, ours = pair
    old = {
        k.replace("_blocks.0.0", "_blocks.0").replace("conv.0.0", "conv"): v
        for k, v in theirs.state_dict().items()
    }
    assert "rpn.head.conv.weight" in old
    assert "backbone.fpn.inner_blocks.0.weight" in old
    other = frcnn.coco_faster_rcnn()
    frcnn.load_coco_weights(other, old)
    for key, value in ours.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.fixture(scope="module")
def imagenet() -> dict[str, torch.Tensor]:
    """A file of ImageNet's weights."""
    return torchvision.models.resnet50().state_dict()


@pytest.fixture(scope="module")
def untouched() -> tuple[frcnn.FasterRCNN, dict[str, torch.Tensor]]:
    """A model into which nothing shall be loaded, and its weights."""
    model = frcnn.coco_faster_rcnn()
    return model, {k: v.clone() for k, v in model.state_dict().items()}


def broken(state: dict, how: str) -> tuple[dict, str]:
    if how == "missing":
        return {
            k: v for k, v in state.items() if k != "layer3.2.bn1.running_var"
        }, "layer3.2.bn1.running_var is missing"
    if how == "extra":
        return state | {"layer5.weight": torch.zeros(1)}, "layer5.weight is unknown"
    return state | {
        "layer1.0.conv1.weight": torch.zeros(2, 2)
    }, r"layer1.0.conv1.weight is \[2, 2\] and not \[64, 64"


@pytest.mark.parametrize("how", ["missing", "extra", "mis-shaped"])
@pytest.mark.parametrize("file", ["imagenet", "coco"])
def test_an_entry_that_does_not_fit_is_named(file, how, pair, imagenet, untouched):
    model, before = untouched
    if file == "imagenet":
        state, said = broken({k: v for k, v in imagenet.items() if not k.startswith("fc.")}, how)
        with pytest.raises(ValueError, match=said):
            frcnn.load_imagenet_backbone(model, state)
    else:
        body = {
            k.removeprefix("backbone.body."): v
            for k, v in pair[0].state_dict().items()
            if "backbone.body" in k
        }
        rest = {k: v for k, v in pair[0].state_dict().items() if "backbone.body" not in k}
        body, said = broken(body, how)
        with pytest.raises(ValueError, match=said):
            frcnn.load_coco_weights(
                model, rest | {f"backbone.body.{k}": v for k, v in body.items()}
            )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key  # all or nothing


def test_imagenet_weights_give_torchvisions_features():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    ours = frcnn.FasterRCNN().eval()
    frcnn.load_imagenet_backbone(ours, theirs.state_dict())
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for stage, found in zip(
            (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4),
            ours.backbone(x),
            strict=True,
        ):
            expected = stage(expected)
            torch.testing.assert_close(
                found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )


def test_loaded_weights_end_the_warning_of_random_frozen_layers(imagenet, recwarn):
    model = frcnn.FasterRCNN().train()
    frcnn.load_imagenet_backbone(model, imagenet)
    model.backbone(torch.zeros(1, 3, 64, 64))
    assert not [w for w in recwarn if "frozen stages" in str(w.message)]


@pytest.mark.parametrize(
    ("load", "weights"),
    [
        (frcnn.load_imagenet_backbone, ResNet50_Weights.IMAGENET1K_V1),
        (frcnn.load_coco_weights, FasterRCNN_ResNet50_FPN_Weights.COCO_V1),
    ],
    ids=["imagenet", "coco"],
)
def test_without_a_network_the_message_says_what_to_download_and_where_to_put_it(
    load, weights, untouched, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(frcnn, "succeeds_within", lambda ask: False)
    model, before = untouched
    with pytest.raises(ConnectionError) as caught:
        load(model)
    assert weights.url in str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints" / weights.url.split("/")[-1]) in str(caught.value)
    assert torch.equal(model.predictor.cls.weight, before["predictor.cls.weight"])


def test_a_file_in_the_folder_is_taken_without_a_network(monkeypatch, tmp_path, pair):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(frcnn, "succeeds_within", lambda ask: pytest.fail("the network was asked"))
    file = (
        tmp_path
        / "hub"
        / "checkpoints"
        / FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url.split("/")[-1]
    )
    file.parent.mkdir(parents=True)
    torch.save(pair[0].state_dict(), file)
    model = frcnn.coco_faster_rcnn()
    frcnn.load_coco_weights(model)
    assert torch.equal(model.predictor.cls.weight, pair[1].predictor.cls.weight)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="delete it and try again"):
        frcnn.load_coco_weights(model)


def test_a_torchvision_file_serves_as_a_checkpoint(tmp_path, pair):
    torch.save(pair[0].state_dict(), tmp_path / "theirs.pth")
    model, _ = frcnn.load_checkpoint(tmp_path / "theirs.pth")
    assert model.name == "coco"
    for key, value in pair[1].state_dict().items():
        assert torch.equal(model.state_dict()[key].cpu(), value), key


def test_the_81_outputs_are_those_of_coco(pair):
    theirs, ours = pair
    cat = 17  # in both: label 16 is "cat" here, id 17 there
    assert frcnn.COCO_NAMES[frcnn.COCO_CATEGORY_IDS.index(cat)] == "cat"
    assert FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][cat] == "cat"
    label = frcnn.COCO_CATEGORY_IDS.index(cat)
    assert torch.equal(
        ours.predictor.cls.weight[label], theirs.roi_heads.box_predictor.cls_score.weight[cat]
    )
    rows = slice(4 * cat, 4 * cat + 4)
    assert torch.equal(
        ours.predictor.box.weight[4 * label : 4 * label + 4],
        theirs.roi_heads.box_predictor.bbox_pred.weight[rows],
    )
