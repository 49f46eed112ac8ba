"""`COCOStreamDataset`: its samples, each image once, order and resume, and what is left out."""

import itertools
import time
import warnings
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from conftest import encoded, image_ids, pixels, row, stream, write
from torch.utils.data import DataLoader
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import frcnn_common as frcnn
import frcnn_sources

# --- samples --------------------------------------------------------------------------------------


def test_samples_are_alike_from_all_sources(coco_tiny):
    samples = [next(iter(stream(source, image_size=64))) for source in ("glyphs", coco_tiny)]
    assert samples[0][1].keys() == samples[1][1].keys()
    for image, target in samples:
        count = len(target["boxes"])
        assert count > 0
        assert (image.dtype, image.shape) == (torch.float32, (3, 64, 64))
        assert (target["boxes"].dtype, target["boxes"].shape) == (torch.float32, (count, 4))
        assert (target["labels"].dtype, target["labels"].shape) == (torch.int64, (count,))
        assert target["area"].shape == (count,)
        assert isinstance(target["image_id"], int)
        assert len(target["orig_size"]) == 2


def test_validation_means_val(coco_tiny):
    assert image_ids(stream(coco_tiny, "validation", 32, max_samples=3)) == [397133, 37777, 252219]


def test_boxes_are_scaled_to_the_square_and_labels_start_at_1(tmp_path):
    rows = [row(1, size=(40, 20), boxes=[(10, 5, 30, 15), (0, 0, 40, 20)], categories=[0, 79])]
    image, target = next(iter(stream(write(tmp_path, rows), image_size=80)))
    assert image.shape == (3, 80, 80)
    assert target["boxes"].tolist() == [[20, 20, 60, 60], [0, 0, 80, 80]]
    assert target["labels"].tolist() == [1, 80]
    assert target["orig_size"] == (20, 40)  # height, width
    assert target["image_id"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "nowhere/coco"}, "nowhere/coco"),
        ({"source": "glyphs", "split": "test"}, "test"),
        ({"source": "glyphs", "max_samples": 0}, "max_samples"),
        ({"source": "glyphs", "image_size": 0}, "image_size"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        frcnn.COCOStreamDataset(**options)


# --- image_to_tensor and frcnn_collate_fn ---------------------------------------------------------


def test_image_to_tensor_normalises_with_imagenets_statistics(tmp_path):
    rows = [row(1, encoded(PIL.Image.new("RGB", (8, 8), (10, 100, 250))))]
    image, _ = next(iter(stream(write(tmp_path, rows))))
    expected = (
        torch.tensor([10, 100, 250]) / 255 - frcnn.IMAGENET_MEAN.flatten()
    ) / frcnn.IMAGENET_STD.flatten()
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 8, 8), atol=1e-5, rtol=0)


def test_frcnn_collate_fn_stacks_images_and_lists_targets():
    samples = list(itertools.islice(stream("glyphs", image_size=32), 3))
    images, targets = frcnn.frcnn_collate_fn(samples)
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[2], samples[2][0])
    assert targets == [target for _, target in samples]


# --- prepare_image --------------------------------------------------------------------------------


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


# --- images that keep their aspect ----------------------------------------------------------------


def test_prepare_image_keeps_the_aspect_with_boxes_and_true_sizes(tmp_path):
    folder = write(
        tmp_path / "data",
        [
            row(1, size=(40, 20), boxes=[(4, 2, 20, 10)]),
            row(2, size=(20, 30), boxes=[(5, 6, 10, 12)]),
        ],
    )
    dataset = stream(folder, image_size=(64, 100))
    images, targets = next(iter(DataLoader(dataset, 2, collate_fn=frcnn.frcnn_collate_fn)))
    assert images.shape == (2, 3, 96, 128)
    assert [target["size"] for target in targets] == [
        (50, 100),
        (96, 64),
    ]  # 100 is the limit; short side 64
    assert [target["orig_size"] for target in targets] == [(20, 40), (30, 20)]
    torch.testing.assert_close(targets[0]["boxes"], torch.tensor([[10.0, 5, 50, 25]]))
    torch.testing.assert_close(targets[1]["boxes"], torch.tensor([[16.0, 19.2, 32, 38.4]]))
    assert images[0, :, 50:].abs().sum() == images[0, :, :, 100:].abs().sum() == 0
    assert images[0, :, :50, :100].abs().min() > 0


def test_prepare_image_keeps_the_aspect_of_an_image_that_is_flipped(tmp_path):
    folder = write(tmp_path / "data", [row(1, size=(40, 20), boxes=[(4, 2, 20, 10)])])
    ((_, target),) = stream(folder, image_size=(64, 100), flip=1.0)
    torch.testing.assert_close(target["boxes"], torch.tensor([[50.0, 5, 90, 25]]))


# --- images without a box, and boxes without an area ----------------------------------------------


@pytest.mark.parametrize(
    "boxes", [[(4, 4, 4, 6)], [(4, 4, 2, 6)], [(9, 9, 12, 12)], [(1, 1, float("nan"), 5)]]
)
def test_images_without_a_valid_box_are_skipped_in_train_and_kept_in_val(tmp_path, boxes):
    rows = [row(1, boxes=boxes), row(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is wrong with the images
        warnings.filterwarnings("ignore", "image_id 1: 1 boxes left out")
        assert image_ids(stream(write(tmp_path, rows))) == [2]
        _, target = next(iter(stream(write(tmp_path, rows, split="val"), "val")))
    assert target["image_id"] == 1
    assert (target["boxes"].dtype, target["boxes"].shape) == (torch.float32, (0, 4))
    assert (target["labels"].dtype, target["labels"].shape) == (torch.int64, (0,))


def test_the_box_of_height_0_is_dropped_and_the_others_keep_their_labels(tmp_path):
    # COCO's image 200365 (cocoapi#355)
    boxes = [(10, 20, 100, 50), (296.65, 388.33, 1.03, 0.0), (200, 300, 60, 80)]
    rows = [row(200365, size=(640, 480), boxes=boxes, categories=[4, 5, 6])]
    _, target = next(iter(stream(write(tmp_path, rows), image_size=64, bbox_format="xywh")))
    assert target["labels"].tolist() == [5, 7]
    expected = torch.tensor([[10.0, 20, 110, 70], [200, 300, 260, 380]]) * torch.tensor(
        [0.1, 64 / 480] * 2
    )
    torch.testing.assert_close(target["boxes"], expected, atol=1e-4, rtol=0)
    assert target["area"].shape == (2,)


# --- flips ----------------------------------------------------------------------------------------


def test_a_flipped_box_still_fits_its_object(tmp_path):
    image = PIL.Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (5, 10, 20, 30))
    source = write(tmp_path, [row(1, encoded(image), (64, 64), [(5, 10, 20, 30)])])
    for flip, expected in [(0.0, [5, 10, 20, 30]), (1.0, [44, 10, 59, 30])]:
        sample, target = next(iter(stream(source, image_size=64, flip=flip)))
        y, x = (pixels(sample)[0] > 128).nonzero().unbind(1)
        assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == expected
        assert target["boxes"].tolist() == [expected]


# --- each image once, and resume ------------------------------------------------------------------


ROWS = 22  # divides by neither 3 nor 4

# Of all combinations so many that any two values of two parameters meet in one case.
# (workers, batches that are used before the resume, shards, shuffle buffer, max_samples)
# 14: two workers that took 7 rows each, from their own of four shards, would not take rows 0 to 13.
CASES = [
    (0, 1, 1, 0, None),
    (0, 2, 4, 8, 14),
    (0, 5, 1, 8, None),
    (1, 1, 4, 8, None),
    (1, 2, 4, 0, None),
    (1, 5, 1, 8, 14),
    (2, 1, 1, 0, 14),
    (2, 2, 1, 0, None),
    (2, 5, 4, 8, 14),
    (3, 1, 4, 8, None),
    (3, 2, 1, 0, 14),
    (3, 5, 4, 0, 14),
]
# (workers, shuffle buffer, max_samples)
SCENES = [(0, 0, None), (0, 8, 7), (2, 0, 7), (2, 8, None), (3, 0, None), (3, 8, 7)]


@pytest.mark.parametrize(
    ("cases", "values"),
    [
        (CASES, [{0, 1, 2, 3}, {1, 2, 5}, {1, 4}, {0, 8}, {None, 14}]),
        (SCENES, [{0, 2, 3}, {0, 8}, {None, 7}]),
    ],
    ids=["images", "scenes"],
)
def test_every_two_values_of_two_parameters_meet_in_one_case(cases, values):
    columns = list(zip(*cases, strict=True))
    assert [set(column) for column in columns] == values
    for one, other in itertools.combinations(columns, 2):
        assert set(zip(one, other, strict=True)) == set(itertools.product(set(one), set(other)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[int, Path]:
    """The same rows in one shard and in four."""
    folder, rows = tmp_path_factory.mktemp("shards"), [row(i) for i in range(ROWS)]
    return {
        1: write(folder / "one", rows),
        4: write(folder / "four", *(rows[i : i + 6] for i in range(0, ROWS, 6))),
    }


@pytest.mark.parametrize(("workers", "buffer", "max_samples"), SCENES)
def test_every_scene_comes_once(monkeypatch, workers, buffer, max_samples):
    monkeypatch.setattr(frcnn_sources, "GLYPH_SCENES", {"train": 11, "val": 3})
    seen = image_ids(
        stream("glyphs", image_size=32, shuffle_buffer=buffer, max_samples=max_samples), workers
    )
    assert sorted(seen) == list(range(max_samples or 11))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("buffer", [0, 8])
def test_every_worker_gets_data(shards, count, buffer):
    # datasets#8669: a shuffled stream can leave some workers without any
    dataset = stream(shards[count], shuffle_buffer=buffer)
    loader = DataLoader(dataset, 1, num_workers=2, collate_fn=frcnn.frcnn_collate_fn)
    readers = [targets[0]["position"][0] for _, targets in loader]
    assert min(readers.count(0), readers.count(1)) >= 9


def test_max_samples_above_the_number_of_rows_gives_all(shards):
    assert sorted(image_ids(stream(shards[1], max_samples=1000), workers=2)) == list(range(ROWS))


@pytest.mark.parametrize(("workers", "used", "count", "buffer", "max_samples"), CASES)
def test_every_image_comes_once_and_a_resume_gives_exactly_the_rest(
    shards, workers, used, count, buffer, max_samples
):
    """State is kept as `_batches` keeps it while it trains."""
    epoch = 2 * workers  # 0 and others

    def batches(state=None):
        dataset = stream(shards[count], shuffle_buffer=buffer, max_samples=max_samples, flip=0.5)
        if state:
            dataset.resume(state)
        dataset.set_epoch(epoch)
        return iter(DataLoader(dataset, 2, num_workers=workers, collate_fn=frcnn.frcnn_collate_fn))

    state, seen = {"epoch": epoch, "rows": {}, "last": -1}, []
    run = batches()
    for _, targets in itertools.islice(run, used):
        seen += [target["image_id"] for target in targets]
        for reader, rows in (target["position"] for target in targets):
            state["rows"][reader], state["last"] = rows, reader
    rest = [([t["image_id"] for t in targets], images) for images, targets in run]
    seen += itertools.chain.from_iterable(ids for ids, _ in rest)
    assert sorted(seen) == list(range(max_samples or ROWS))
    assert (seen == sorted(seen)) == (not buffer) or workers > 1

    resumed = [([t["image_id"] for t in targets], images) for images, targets in batches(state)]
    assert [ids for ids, _ in resumed] == [ids for ids, _ in rest]
    assert len(rest) > 1
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, resumed))


def test_resume_concerns_its_own_epoch_alone(shards):
    dataset = stream(shards[1])
    dataset.resume({"epoch": 0, "rows": {0: 20}, "last": 0})
    assert image_ids(dataset) == [20, 21]
    dataset.set_epoch(1)
    assert image_ids(dataset) == list(range(ROWS))


def test_resume_counts_rows_that_gave_no_sample(tmp_path):
    rows = [row(i, boxes=() if i % 2 else [(1, 1, 4, 4)]) for i in range(10)]
    source = write(tmp_path, rows)
    samples = iter(stream(source))
    position = [next(samples)[1]["position"] for _ in range(3)][-1]
    dataset = stream(source)
    dataset.resume({"epoch": 0, "rows": dict([position]), "last": position[0]})
    assert image_ids(dataset) == [6, 8]


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["glyphs", 1, 4])
def test_shuffle_follows_from_seed_and_epoch(monkeypatch, shards, source):
    monkeypatch.setattr(frcnn_sources, "GLYPH_SCENES", {"train": ROWS, "val": 3})

    def order(seed, epoch):
        dataset = stream(shards.get(source, source), shuffle_buffer=8, seed=seed)
        dataset.set_epoch(epoch)
        return image_ids(dataset)

    first = order(0, 0)
    assert first == order(0, 0)
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert sorted(first) == sorted(order(1, 1)) == list(range(ROWS))


@pytest.mark.parametrize("count", [1, 4])
def test_a_shuffled_pass_ends_without_a_pause(monkeypatch, shards, count):
    # `datasets` waits for 5 seconds behind a pass that it read several shards at a time for
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
    assert len(image_ids(stream(shards[count], shuffle_buffer=8))) == ROWS


def test_without_a_buffer_the_order_is_the_files(shards):
    assert image_ids(stream(shards[4])) == list(range(ROWS))


def test_flips_change_with_the_epoch_and_come_back(shards):
    dataset = stream(shards[1], flip=0.5)

    def flips(epoch):
        dataset.set_epoch(epoch)
        return [
            bool(target["boxes"][0, 0] == 3) for _, target in dataset
        ]  # x1 = 8 - 5 instead of 1

    first = flips(0)
    assert 4 < sum(first) < ROWS - 4
    assert first != flips(1)
    assert first == flips(0)


# --- what is left out is counted ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (2, None), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_what_workers_leave_out_is_counted_too(workers, context, mixed):
    dataset = stream(mixed)
    loader = DataLoader(
        dataset,
        2,
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=frcnn.frcnn_collate_fn,
    )
    ids = sorted(target["image_id"] for _, targets in loader for target in targets)
    assert ids == [0, 1, 3, 4, 6, 7, 8, 10, 11]
    assert (dataset.skipped, dataset.dropped) == (3, 3)


def test_boxes_that_are_left_out_are_named_by_their_image(tmp_path):
    rows = [row(7, boxes=[(1, 1, 5, 5), (4, 4, 4, 6), (9, 9, 9, 9)])]
    dataset = stream(write(tmp_path, rows))
    with pytest.warns(UserWarning, match=r"^image_id 7: 2 boxes left out, not finite or without"):
        assert image_ids(dataset) == [7]
    assert dataset.dropped == 2


# --- frcnn_collate_fn and sizes_without_padding ---------------------------------------------------


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


# --- workers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """12 scenes in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(2):
        rows = [frcnn_sources.render_glyph_scene(seed, 64) for seed in range(6 * i, 6 * i + 6)]
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
def test_workers_give_the_same_however_they_are_started(source, two_shards, monkeypatch):
    """Forked, from this process which has computed before, and spawned, as on Windows and Macs.

    A worker that hangs ends the test after three minutes.
    """
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    source = two_shards if source == "shards" else source
    next(iter(frcnn.COCOStreamDataset("train", 12, str(source), 64)))
    frcnn.tiny_faster_rcnn().eval()(torch.zeros(1, 3, 64, 64))
    forked, spawned = (ids(source, start, 180) for start in ("fork", "spawn"))
    assert forked == spawned
    assert sorted(itertools.chain.from_iterable(forked)) == list(range(12))
    assert forked != [[2 * i, 2 * i + 1] for i in range(6)]
