"""``detect``: photographs of any size and mode in, pictures with boxes and a JSON out."""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

import frcnn_common as frcnn

GRACE_HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


class Quarter(torch.nn.Module):
    """Finds one cat: the upper left quarter of the image without its padding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images, image_sizes):
        results = []
        for height, width in image_sizes:
            box = torch.tensor([[0.0, 0.0, width / 2, height / 2]])
            results.append(
                {"boxes": box, "scores": torch.tensor([0.75]), "labels": torch.tensor([16])}
            )
        return results, []


@pytest.fixture
def detect(monkeypatch, tmp_path, capfd):
    """``detect(path, …)`` → exit code, result, records of detections.json, lines of stderr, folder of the output."""
    monkeypatch.setattr(
        frcnn, "load_checkpoint", lambda path: (Quarter(), {"run": {"image_size": (80, 133)}})
    )

    def run(*paths, out=tmp_path / "out"):
        code = frcnn.main(["detect", "--checkpoint", "any.pt", "--out", str(out), *map(str, paths)])
        printed = capfd.readouterr()
        records = (
            json.loads((out / "detections.json").read_text())
            if (out / "detections.json").exists()
            else None
        )
        result = json.loads(printed.out.splitlines()[-1]) if printed.out else None
        return code, result, records, printed.err, out

    return run


def save(path: Path, mode: str, size: tuple[int, int], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.effect_noise(size, 60).convert(mode).save(path, **options)
    return path


def test_boxes_come_in_pixels_of_the_photograph(detect):
    code, result, (record,), err, out = detect(GRACE_HOPPER)
    assert (code, err) == (0, "")
    assert result == {"images": 1, "detections": 1, "failed": 0}
    assert (record["image"], record["width"], record["height"]) == (str(GRACE_HOPPER), 512, 600)
    (found,) = record["detections"]
    assert found["box"] == pytest.approx([0, 0, 256, 300], abs=0.01)
    assert (found["label"], found["category_id"], found["score"]) == ("cat", 17, 0.75)
    with PIL.Image.open(out / record["drawn"]) as drawn:
        assert drawn.size == (512, 600)
        pixels = np.asarray(drawn.convert("RGB"), dtype=int)
    with PIL.Image.open(GRACE_HOPPER) as photograph:
        change = np.abs(pixels - np.asarray(photograph.convert("RGB"), dtype=int)).sum(-1)
    assert change[100:200, 250:262].max() > 200  # the right edge of the box
    assert change[400:, 300:].mean() < 10  # nothing where there is no box


@pytest.mark.parametrize(
    ("mode", "size", "name"),
    [
        ("RGB", (6000, 4000), "large.jpg"),
        ("RGB", (1, 1), "dot.png"),
        ("CMYK", (60, 40), "cmyk.jpg"),
        ("L", (60, 40), "grey.jpg"),
        ("P", (60, 40), "palette.gif"),
        ("RGBA", (60, 40), "alpha.png"),
        ("I;16", (60, 40), "deep.png"),
        ("RGB", (3000, 1), "line.png"),
    ],
)
def test_every_size_and_mode_gives_a_picture(mode, size, name, detect, tmp_path):
    code, result, (record,), err, out = detect(save(tmp_path / name, mode, size))
    assert (code, err, result["detections"]) == (0, "", 1)
    assert record["detections"][0]["box"] == pytest.approx(
        [0, 0, size[0] / 2, size[1] / 2], rel=1e-5
    )
    with PIL.Image.open(out / record["drawn"]) as drawn:
        assert 400 <= max(drawn.size) <= 1600
        assert min(drawn.size) >= 32


def test_a_photograph_is_turned_as_its_camera_says(detect, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    code, _, (record,), _, out = detect(save(tmp_path / "turned.jpg", "RGB", (600, 400), exif=exif))
    assert (code, record["width"], record["height"]) == (0, 400, 600)
    with PIL.Image.open(out / record["drawn"]) as drawn:
        assert drawn.size == (400, 600)


@pytest.mark.parametrize(
    "content",
    [b"a line of text", b"", b"\xff\xd8\xff\xe0 the first bytes of a JPEG"],
    ids=["text", "empty", "torn"],
)
def test_what_is_no_picture_costs_one_line(content, detect, tmp_path):
    (tmp_path / "no.jpg").write_bytes(content)
    code, result, records, err, _ = detect(tmp_path / "no.jpg")
    assert (code, result, records) == (2, {"images": 0, "detections": 0, "failed": 1}, [])
    assert err.count("\n") == 1
    assert f"{tmp_path / 'no.jpg'} is no picture" in err


def test_a_missing_file_does_not_stop_the_others(detect, tmp_path):
    code, result, records, err, _ = detect(tmp_path / "none.jpg", GRACE_HOPPER)
    assert (code, result["images"], result["failed"], len(records)) == (2, 1, 1, 1)
    assert f"{tmp_path / 'none.jpg'} is no picture that can be read: [Errno 2]" in err


def test_a_folder_of_100_has_a_progress_bar(detect, tmp_path):
    for i in range(100):
        save(tmp_path / "in" / f"{i:03d}.png", "RGB", (30, 20))
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    code, result, records, err, out = detect(tmp_path / "in")
    assert (code, result) == (0, {"images": 100, "detections": 100, "failed": 0})
    assert "100/100" in err
    assert [Path(record["image"]).name for record in records] == [
        f"{i:03d}.png" for i in range(100)
    ]
    assert len(list(out.glob("*.jpg"))) == 100


def test_equal_names_keep_apart_and_no_input_is_overwritten(detect, tmp_path):
    paths = [save(tmp_path / folder / "photo.jpg", "RGB", (30, 20)) for folder in ("a", "b")]
    before = [path.read_bytes() for path in paths]
    code, _, records, _, _ = detect(*paths, out=tmp_path / "a")
    assert code == 0
    assert len({record["drawn"] for record in records}) == 2
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    "name", ["..a.png", "a\nb.png", "-x.png", "%s$(touch no).png", "ä ö.png", "x" * 240 + ".png"]
)
def test_nothing_is_written_outside_out_whatever_a_file_is_called(name, detect, tmp_path):
    save(tmp_path / "in" / name, "RGB", (30, 20))
    code, _, records, _, out = detect(tmp_path / "in" / name)
    assert code == 0
    assert sorted(p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*") if p.is_file()) == [
        "in",
        "out",
        "out",
    ]
    assert (out / records[0]["drawn"]).resolve().parent == out.resolve()


@pytest.mark.parametrize("argument", ["empty", ""])
def test_no_pictures_end_with_one_line(argument, detect, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, _, err, out = detect(*([tmp_path / argument] if argument else []))
    assert code == 2
    assert re.fullmatch(r"frcnn_common: error: [^\n]*\n", err)
    assert not out.exists()


def test_a_real_checkpoint_works(tmp_path, capfd):
    frcnn.save_checkpoint(tmp_path / "c.pt", frcnn.tiny_faster_rcnn())
    line = [
        "detect",
        "--checkpoint",
        str(tmp_path / "c.pt"),
        str(GRACE_HOPPER),
        "--out",
        str(tmp_path / "out"),
    ]
    assert frcnn.main(line) == 0
    assert json.loads(capfd.readouterr().out)["images"] == 1
