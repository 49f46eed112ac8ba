"""To be merged into test_evaluation.py."""

import pytest
from conftest import GOOD, row, stream, write

import frcnn_common as frcnn


def test_two_images_of_one_image_id_are_not_scored_as_one(tmp_path):
    source = write(
        tmp_path / "data", [row(i, boxes=[GOOD] * 20) for i in (1, 2, 1, 3)], split="val"
    )
    with pytest.raises(ValueError, match=r"1 images come more than once, such as image_id 1$"):
        frcnn.evaluate(frcnn.tiny_faster_rcnn(), stream(source, "val", 64))
