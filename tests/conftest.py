"""What all tests share: no network, one place for real pictures, rows and shards of them."""

import io
import os
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported
os.environ.setdefault("FRCNN_DATA", "glyphs")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one process a core

import frcnn_common as frcnn

NAN = float("nan")
GOOD = [3.0, 4.0, 7.0, 8.0]  # as corner and size it would leave an image of 8 × 8


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """A folder of real COCO images in the Hub's columns: ``$FRCNN_COCO_TINY``, else one near by."""
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
