"""What all tests share: no network, one place for real pictures."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported
os.environ.setdefault("FRCNN_DATA", "glyphs")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one process a core


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """A folder of real COCO images in the Hub's columns: ``$FRCNN_COCO_TINY``, else ``shared/coco-tiny`` near by."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "coco-tiny"
    folder = Path(os.environ.get("FRCNN_COCO_TINY", beside))
    if not folder.is_dir():
        pytest.skip(f"needs real COCO images: no folder {folder}; name one with FRCNN_COCO_TINY")
    return folder
