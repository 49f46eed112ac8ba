"""What all tests share: no network, one seed, one place for real pictures, rows, shards, boxes."""

import io
import os
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported
os.environ.setdefault("FRCNN_DATA", "glyphs")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one process a core

import torch  # it reads the number of threads
from hypothesis import settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import frcnn_common as frcnn

NAN, INF = float("nan"), float("inf")
GOOD = [3.0, 4.0, 7.0, 8.0]  # as corner and size it would leave an image of 8 × 8

# --- seeds and boxes of chance --------------------------------------------------------

EXAMPLES = 200  # of each property; README's table quotes it
chance = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_boxes(
    count: int, seed: int = 0, side: float = 200.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping boxes ``[N, 4]`` and scores ``[N]``."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side
    size = torch.rand(count, 2, generator=generator) * side / 2 + 1
    return torch.cat((corner, corner + size), dim=1), torch.rand(count, generator=generator)


def objects(count: int, height: int, width: int, classes: int) -> dict:
    """So many boxes of any size inside the image, and their labels."""
    first, second = (torch.rand(count, 2) * torch.tensor([width, height]) for _ in range(2))
    least = torch.tensor([width, height]) * 0.01
    low, high = torch.minimum(first, second), torch.maximum(first, second) + least
    boxes = torch.cat((low, torch.minimum(high, torch.tensor([width, height]))), dim=1)
    return {"boxes": boxes, "labels": torch.randint(1, classes, (count,))}


# float32 holds areas up to 1e38 and differences down to a part in 1e7;
# sides from nothing to 1e15 are tried.
_side = st.one_of(
    st.just(0.0), st.floats(0, 400, width=32), st.sampled_from([1e-30, 1e-7, 1e-3, 1e6, 1e15])
)
_corner = st.one_of(
    st.floats(-50, 450, width=32), st.sampled_from([0.0, 1e-30, -1e6, 1e6, 1e15, -1e15])
)
any_box = st.tuples(_corner, _corner, _side, _side).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
_few_values = st.integers(0, 12)
small_box = st.tuples(_few_values, _few_values, _few_values, _few_values).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
hostile_boxes = st.lists(any_box | small_box, max_size=30).map(
    lambda b: torch.tensor(b).reshape(-1, 4).float()
)
solid_box = st.tuples(
    *[st.floats(-1e3, 1e3, width=32)] * 2, *[st.floats(0.125, 1e3, width=32)] * 2
).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
coder_weights = st.sampled_from([(1, 1, 1, 1), (10, 10, 5, 5)])


# --- networks -------------------------------------------------------------------------


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


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """Real COCO images in the Hub's columns: ``$FRCNN_COCO_TINY``, else ``shared/coco-tiny``."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "coco-tiny"
    folder = Path(os.environ.get("FRCNN_COCO_TINY", beside))
    if not folder.is_dir():
        pytest.skip(f"needs real COCO images: no folder {folder}; name one with FRCNN_COCO_TINY")
    return folder


# --- rows, shards and samples ---------------------------------------------------------------------


SCHEMA = pyarrow.schema(
    {
        "image_id": pyarrow.int64(),
        "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
        "width": pyarrow.int64(),
        "height": pyarrow.int64(),
        "objects": pyarrow.struct(
            {
                "bbox_id": pyarrow.list_(pyarrow.int64()),
                "category": pyarrow.list_(pyarrow.int64()),
                "bbox": pyarrow.list_(pyarrow.list_(pyarrow.float64())),
                "area": pyarrow.list_(pyarrow.float64()),
            }
        ),
    }
)


def encoded(image: PIL.Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def row(
    image_id: int, image: bytes | None = None, size=(8, 8), boxes=((1, 2, 5, 7),), categories=None
) -> dict:
    """A row of the Hub's columns; a small plain picture unless told otherwise."""
    return {
        "image_id": image_id,
        "image": {
            "bytes": encoded(PIL.Image.new("RGB", size)) if image is None else image,
            "path": None,
        },
        "width": size[0],
        "height": size[1],
        "objects": {
            "bbox_id": list(range(len(boxes))),
            "category": list(categories or [0] * len(boxes)),
            "bbox": [[float(v) for v in box] for box in boxes],
            "area": [1.0] * len(boxes),
        },
    }


def write(folder: Path, *shards: list[dict], split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(shards):
        table = pyarrow.Table.from_pylist(rows, schema=SCHEMA)
        pyarrow.parquet.write_table(table, folder / f"{split}-{i:05d}-of-{len(shards):05d}.parquet")
    return folder


def stream(
    source, split="train", image_size=8, bbox_format="xyxy", **options
) -> frcnn.COCOStreamDataset:
    return frcnn.COCOStreamDataset(
        split, source=source, image_size=image_size, bbox_format=bbox_format, **options
    )


def image_ids(dataset, workers: int = 0, batch: int = 2) -> list[int]:
    loader = DataLoader(dataset, batch, num_workers=workers, collate_fn=frcnn.frcnn_collate_fn)
    return [target["image_id"] for _, targets in loader for target in targets]


def pixels(sample: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: ``[3, S, S]`` in 0..255."""
    return (sample * frcnn.IMAGENET_STD + frcnn.IMAGENET_MEAN) * 255


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Twelve rows in two shards of each split.

    Two corrupt pictures, one bad category, and three boxes of no use.
    """
    rows = [row(i, boxes=[GOOD] * 20) for i in range(12)]
    for i in (2, 9):
        rows[i]["image"]["bytes"] = b"not a picture"
    rows[5]["objects"]["category"][0] = 80
    rows[7]["objects"]["bbox"][:2] = [[NAN] * 4, [4.0, 4, 4, 4]]
    rows[11]["objects"]["bbox"][3] = [5.0, 2, 1, 7]
    write(tmp_path / "mixed", rows[:6], rows[6:], split="train")
    return write(tmp_path / "mixed", rows[:6], rows[6:], split="val")
