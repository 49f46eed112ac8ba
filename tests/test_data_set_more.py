"""More of the data set: `prepare_image`, collating, and how workers are started."""

import itertools

import datasets
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import frcnn_common as frcnn

# --- prepare_image --------------------------------------------------------------------


def test_prepare_image_equals_torchvisions_transform():
    """From a photograph's pixels to the padded batch."""
    picture = torch.randint(0, 256, (427, 713, 3), dtype=torch.uint8)
    statistics = (frcnn.IMAGENET_MEAN.flatten().tolist(), frcnn.IMAGENET_STD.flatten().tolist())
    expected, _ = GeneralizedRCNNTransform(256, 420, *statistics)([picture.permute(2, 0, 1) / 255])
    pixels, size = frcnn.prepare_image(PIL.Image.fromarray(picture.numpy()), (256, 420))
    assert size == expected.image_sizes[0] == (251, 420)  # 420 is the limit that counts
    assert pixels.shape == (3, 256, 448)
    torch.testing.assert_close(pixels[None], expected.tensors, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((640, 480), (800, 1066)[::-1]),
        ((480, 640), (1066, 800)[::-1]),
        ((20000, 1), (1333, 1)),
        ((1, 1), (800, 800)),
    ],
)
def test_prepare_image_has_short_side_800_and_long_side_at_most_1333(picture, size):
    pixels, (height, width) = frcnn.prepare_image(PIL.Image.new("RGB", picture), (800, 1333))
    assert (width, height) == size
    assert pixels.shape[1] % 32 == pixels.shape[2] % 32 == 0
    assert 0 <= pixels.shape[1] - height < 32
    assert 0 <= pixels.shape[2] - width < 32


# --- frcnn_collate_fn and sizes_without_padding ---------------------------------------


def test_collate_lets_images_of_different_sizes_share_a_batch():
    samples = [
        (torch.ones(3, 64, 96), {"size": (60, 90)}),
        (torch.ones(3, 96, 32), {"size": (96, 32)}),
    ]
    images, targets = frcnn.frcnn_collate_fn(samples)
    assert images.shape == (2, 3, 96, 96)
    assert images[0, 0].sum() == 64 * 96
    assert images[1, 0, :, 32:].abs().sum() == 0
    assert frcnn.sizes_without_padding(images, targets) == {"image_sizes": [(60, 90), (96, 32)]}


# --- workers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """12 scenes in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(2):
        rows = [frcnn.render_glyph_scene(seed, 64) for seed in range(6 * i, 6 * i + 6)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"train-0000{i}-of-00002.parquet")
    return folder


def ids(source: object, start: str, seconds: float) -> list[list[int]]:
    """Ids of 12 scenes, batch by batch, from two workers that were started in this way."""
    dataset = frcnn.COCOStreamDataset(
        "train", 12, str(source), 64, shuffle_buffer=4, bbox_format="xyxy"
    )
    loader = DataLoader(
        dataset,
        2,
        num_workers=2,
        collate_fn=frcnn.frcnn_collate_fn,
        multiprocessing_context=start,
        timeout=seconds,
    )
    return [[target["image_id"] for target in targets] for _, targets in loader]


@pytest.mark.skipif(
    "fork" not in torch.multiprocessing.get_all_start_methods(), reason="Windows only spawns"
)
@pytest.mark.parametrize("source", [pytest.param("glyphs", marks=pytest.mark.slow), "shards"])
def test_workers_give_the_same_however_they_are_started(source, shards, monkeypatch):
    """Forked, from this process which has computed before, and spawned, as on Windows and Macs.

    A worker that hangs ends the test after three minutes.
    """
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    source = shards if source == "shards" else source
    next(iter(frcnn.COCOStreamDataset("train", 12, str(source), 64)))
    frcnn.tiny_faster_rcnn().eval()(torch.zeros(1, 3, 64, 64))
    forked, spawned = (ids(source, start, 180) for start in ("fork", "spawn"))
    assert forked == spawned
    assert sorted(itertools.chain.from_iterable(forked)) == list(range(12))
    assert forked != [[2 * i, 2 * i + 1] for i in range(6)]
