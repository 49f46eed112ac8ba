"""ResNet-50, frozen batch norm, checkpointing and the pyramid."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

import frcnn_common as frcnn


def awake(backbone: frcnn.ResNet50) -> frcnn.ResNet50:
    """Residual branches begin at 0: give weights and statistics, so that every layer matters."""
    for module in backbone.modules():
        if isinstance(module, (nn.BatchNorm2d, frcnn.FrozenBatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1)
    return backbone


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name}


# --- ResNet ---------------------------------------------------------------------------------------


def test_bottleneck_has_its_stride_on_the_3x3():
    shortcut = nn.Conv2d(16, 32, 1, 2)
    block = frcnn.Bottleneck(16, 8, stride=2, downsample=shortcut)
    assert frcnn.Bottleneck.expansion == 4
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [
        (1, 1),
        (2, 2),
        (1, 1),
    ]
    assert [conv.kernel_size for conv in (block.conv1, block.conv2, block.conv3)] == [
        (1, 1),
        (3, 3),
        (1, 1),
    ]
    assert block(torch.randn(1, 16, 10, 10)).shape == (1, 32, 5, 5)


def test_stages_have_3_4_6_3_blocks():
    backbone = frcnn.ResNet50(width=8)
    assert [len(stage) for stage in backbone.stages()[1:]] == [3, 4, 6, 3]
    assert [len(getattr(backbone, f"layer{i}")) for i in (1, 2, 3, 4)] == [3, 4, 6, 3]


def test_maps_of_a_400_px_image():
    with torch.device("meta"):  # shapes without values
        maps = frcnn.ResNet50().eval()(torch.empty(1, 3, 400, 400))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (256, 100, 100),
        (512, 50, 50),
        (1024, 25, 25),
        (2048, 13, 13),
    ]


def test_narrow_widths_scale_all_channels():
    backbone = frcnn.ResNet50(width=8)
    assert backbone.out_channels == [32, 64, 128, 256]
    assert [m.shape[1] for m in backbone(torch.randn(2, 3, 64, 64))] == [32, 64, 128, 256]


def test_default_width_has_torchvisions_parameters():
    with torch.device("meta"):
        reference, backbone = torchvision.models.resnet50(), frcnn.ResNet50()
    count = sum(p.numel() for name, p in reference.named_parameters() if not name.startswith("fc"))
    assert count == 23_508_032
    assert sum(p.numel() for p in backbone.parameters()) == count
    assert backbone.out_channels == [256, 512, 1024, 2048]


def test_with_torchvisions_weights_the_maps_are_torchvisions():
    # also shows the stride on the 3×3, the padding and the order of layers
    reference, mine = torchvision.models.resnet50().eval(), frcnn.ResNet50().eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.running_var, 0.5, 1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    weights = [value for name, value in reference.state_dict().items() if not name.startswith("fc")]
    mine.load_state_dict(
        dict(zip(mine.state_dict(), weights, strict=True))
    )  # both list their layers in order
    image = torch.randn(1, 3, 75, 107)
    with torch.no_grad():
        stem = reference.maxpool(reference.relu(reference.bn1(reference.conv1(image))))
        expected = [
            stem := layer(stem) for layer in (getattr(reference, f"layer{i}") for i in (1, 2, 3, 4))
        ]
        for mine_map, its_map in zip(mine(image), expected, strict=True):
            torch.testing.assert_close(mine_map, its_map, atol=1e-4, rtol=1e-4)


# --- frozen stages --------------------------------------------------------------------------------


def test_frozen_stages_get_no_gradient():
    backbone = frcnn.ResNet50(width=8, frozen_stages=3)
    backbone.has_weights = True
    sum(m.sum() for m in backbone.train()(torch.randn(2, 3, 64, 64))).backward()
    frozen = [stage for stage in backbone.stages()[:3] for stage in stage.parameters()]
    learning = [stage for stage in backbone.stages()[3:] for stage in stage.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(p.grad is not None for p in learning)


def test_frozen_stages_keep_their_statistics_in_train_mode():
    backbone = awake(frcnn.ResNet50(width=8, norm=nn.BatchNorm2d, frozen_stages=2))
    backbone.has_weights = True
    before = [statistics(stage) for stage in backbone.stages()]
    outer = nn.Sequential(backbone)
    outer.eval()
    outer.train()  # as a detector does it, from outside
    backbone(torch.randn(2, 3, 64, 64))
    for i, stage in enumerate(backbone.stages()):
        same = [torch.equal(before[i][name], value) for name, value in statistics(stage).items()]
        assert all(same) if i < 2 else not any(same)


def test_frozen_stages_normalise_with_their_statistics_in_train_mode():
    backbone = awake(frcnn.ResNet50(width=8, frozen_stages=2))
    backbone.has_weights = True
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.train()(image)[0], backbone.eval()(image)[0], atol=0, rtol=0
        )


def test_frozen_random_stages_warn_once_in_training():
    backbone = frcnn.ResNet50(width=8, frozen_stages=4)
    image = torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.eval()(image)
    with pytest.warns(UserWarning, match="frozen stages of random weights"):
        backbone.train()(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(image)


@pytest.mark.parametrize("inside_another", [False, True])
def test_loaded_weights_and_live_stages_do_not_warn(inside_another):
    image = torch.randn(2, 3, 64, 64)
    weights = frcnn.ResNet50(width=8).state_dict()
    loaded = frcnn.ResNet50(width=8, frozen_stages=4)
    if inside_another:
        nn.ModuleDict({"backbone": loaded}).load_state_dict(
            {f"backbone.{k}": v for k, v in weights.items()}
        )
    else:
        loaded.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.train()(image)
        frcnn.ResNet50(width=8).train()(image)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_frozen_batch_norm_equals_torchvisions(eps):
    mine, reference = (
        frcnn.FrozenBatchNorm2d(6, eps=eps),
        torchvision.ops.FrozenBatchNorm2d(6, eps=eps),
    )
    for name, value in mine.named_buffers():
        values = (
            torch.rand(6) * 1e-4 + 1e-5 if name == "running_var" else torch.randn(6)
        )  # so small that eps counts
        value.copy_(values)
    reference.load_state_dict(mine.state_dict())
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(mine(x), reference(x), atol=1e-4, rtol=1e-5)
    assert list(mine.parameters()) == []


def test_frozen_batch_norm_is_batch_norm_in_eval_mode():
    live, frozen = nn.BatchNorm2d(6), frcnn.FrozenBatchNorm2d(6)
    for _ in range(3):
        live(torch.randn(4, 6, 3, 3) * 2 + 1)
    state = {
        name: value for name, value in live.state_dict().items() if name != "num_batches_tracked"
    }
    frozen.load_state_dict(state)
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(frozen.train()(x), live.eval()(x), atol=1e-5, rtol=0)


# --- checkpointing --------------------------------------------------------------------------------


def count_calls(stage: nn.Module) -> list:
    """Forward calls of a stage's first convolution; a stage that is computed again counts twice."""
    calls = []
    stage[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_checkpointing_changes_no_output_gradient_or_statistic():
    plain = awake(frcnn.ResNet50(width=8))
    thrifty = frcnn.ResNet50(width=8, checkpointing=True)
    thrifty.load_state_dict(plain.state_dict())
    image, results = torch.randn(2, 3, 64, 64), []
    for backbone in (plain, thrifty):
        calls = count_calls(backbone.layer2)
        maps = backbone.train()(image)
        sum(m.square().mean() for m in maps).backward()
        gradients = [p.grad for p in backbone.parameters()]
        results.append((maps, gradients, statistics(backbone).values(), len(calls)))
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
    assert [calls for *_, calls in results] == [1, 2]


def test_checkpointing_leaves_the_momentum_as_it_was():
    backbone = frcnn.ResNet50(width=8, checkpointing=True)
    sum(m.mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert {m.momentum for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_checkpointing_is_off_in_eval():
    backbone = frcnn.ResNet50(width=8, checkpointing=True).eval()
    calls = count_calls(backbone.layer3)
    sum(m.mean() for m in backbone(torch.randn(1, 3, 64, 64))).backward()
    assert len(calls) == 1


def test_checkpointing_leaves_frozen_stages_out(monkeypatch):
    backbone = frcnn.ResNet50(width=8, frozen_stages=3, checkpointing=True)
    backbone.has_weights = True
    stages, checkpoint = [], frcnn.checkpoint
    monkeypatch.setattr(
        frcnn,
        "checkpoint",
        lambda stage, *a, **k: stages.append(stage) or checkpoint(stage, *a, **k),
    )
    backbone.train()(torch.randn(2, 3, 64, 64))
    assert stages == [backbone.layer3, backbone.layer4]
    with torch.no_grad():
        backbone(torch.randn(2, 3, 64, 64))
    assert len(stages) == 2


# --- pyramid --------------------------------------------------------------------------------------


def test_pyramid_of_a_400_px_image():
    sizes = zip((256, 512, 1024, 2048), (100, 50, 25, 13), strict=True)
    with torch.device("meta"):
        pyramid = frcnn.FPN()(tuple(torch.empty(2, c, s, s) for c, s in sizes))
    assert [tuple(p.shape) for p in pyramid] == [(2, 256, s, s) for s in (100, 50, 25, 13, 7)]


@pytest.mark.parametrize("size", [(101, 203), (64, 65), (33, 97), (127, 350)])
def test_odd_sizes_add_up(size):
    backbone = frcnn.ResNet50(width=8)
    maps = backbone(torch.randn(2, 3, *size))
    pyramid = frcnn.FPN(backbone.out_channels, 16)(maps)
    assert [p.shape[-2:] for p in pyramid[:4]] == [m.shape[-2:] for m in maps]
    assert pyramid[4].shape[-2:] == tuple((s + 1) // 2 for s in maps[3].shape[-2:])


def test_pyramid_equals_torchvisions():
    channels, sizes = (8, 16, 32, 64), [(26, 51), (13, 26), (7, 13), (4, 7)]
    mine = frcnn.FPN(channels, 12)
    reference = torchvision.ops.FeaturePyramidNetwork(
        channels, 12, extra_blocks=torchvision.ops.feature_pyramid_network.LastLevelMaxPool()
    )
    for conv in (*mine.lateral, *mine.output):
        nn.init.normal_(conv.bias)
    for i in range(4):
        reference.inner_blocks[i][0].load_state_dict(mine.lateral[i].state_dict())
        reference.layer_blocks[i][0].load_state_dict(mine.output[i].state_dict())
    maps = [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    expected = reference({str(i): m for i, m in enumerate(maps)})
    for level, its_level in zip(mine(maps), expected.values(), strict=True):
        torch.testing.assert_close(level, its_level, atol=1e-5, rtol=0)


def test_p6_is_every_second_cell_of_p5():
    maps = [torch.randn(1, 4, s, s) for s in (40, 20, 10, 5)]
    *_, p5, p6 = frcnn.FPN((4, 4, 4, 4), 8)(maps)
    assert torch.equal(p6, p5[..., ::2, ::2])


def test_every_level_sees_the_coarsest_map():
    maps = [torch.zeros(1, 4, s, s) for s in (16, 8, 4, 2)]
    fpn = frcnn.FPN((4, 4, 4, 4), 8)
    before = fpn(maps)
    maps[3] = maps[3] + 1
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(fpn(maps), before, strict=True))
