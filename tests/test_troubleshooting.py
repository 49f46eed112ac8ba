"""The README's table of messages: each is provoked here and must read as the table says, `…` standing for anything."""

import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

import frcnn_common as frcnn

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
TABLE = README.partition("## Troubleshooting")[2].partition("\n## ")[0]
MESSAGES = re.findall(r"^\| `(.+?)` \|", TABLE, re.MULTILINE)


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """``said("train …")`` → what the command prints, in a folder of its own, on a CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frcnn, "DEVICE", torch.device("cpu"))

    def call(line: str) -> str:
        assert frcnn.main(line.split()) != 0
        return capsys.readouterr().err

    return call


def no_hub(said, capsys, monkeypatch):
    monkeypatch.delenv("FRCNN_DATA", raising=False)
    monkeypatch.setattr(frcnn, "_hub_answers", lambda: False)
    frcnn.COCOStreamDataset("val")
    return capsys.readouterr().out


def unknown_source(said, capsys, monkeypatch):
    return said("train --model tiny --source photos --checkpoint t.pt")


def empty_folder(said, capsys, monkeypatch):
    Path("photos").mkdir()
    return said("train --model tiny --source photos --checkpoint t.pt")


def torn_shard(said, capsys, monkeypatch):
    Path("photos").mkdir()
    Path("photos/train-00000.parquet").write_bytes(b"PAR1 and then nothing")
    return said("train --model tiny --source photos --checkpoint t.pt")


def box_without_a_class(said, capsys, monkeypatch):
    scene = frcnn.render_glyph_scene(0, 64)
    scene["objects"]["category"][0] = 80
    Path("photos").mkdir()
    datasets.Dataset.from_list([scene]).to_parquet("photos/train-00000.parquet")
    with pytest.warns(UserWarning) as warned:
        list(frcnn.COCOStreamDataset(source="photos", image_size=64, bbox_format="xyxy"))
    return str(warned[0].message)


def neither_format(said, capsys, monkeypatch):
    scenes = [frcnn.render_glyph_scene(seed, 64) for seed in range(4)]
    for scene in scenes:
        scene["objects"]["bbox"] = [[500.0, 500.0, 1.0, 900.0]] * len(scene["objects"]["bbox"])
    Path("photos").mkdir()
    datasets.Dataset.from_list(scenes).to_parquet("photos/train-00000.parquet")
    return said("train --model tiny --source photos --checkpoint t.pt")


def no_checkpoint(said, capsys, monkeypatch):
    return said("evaluate --checkpoint t.pt --source glyphs")


def torn_checkpoint(said, capsys, monkeypatch):
    Path("t.pt").write_bytes(b"PK and then nothing")
    return said("evaluate --checkpoint t.pt --source glyphs")


def other_run(said, capsys, monkeypatch):
    options = "--model tiny --source glyphs --image-size 64 --steps 1 --checkpoint t.pt"
    assert frcnn.main(f"train {options} --batch 1".split()) == 0
    return said(f"train {options} --batch 2 --resume")


def no_weights(said, capsys, monkeypatch):
    monkeypatch.setattr(frcnn, "_answers", lambda ask, seconds=0: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "downloads")
    return said("train --model coco --weights coco --source glyphs --checkpoint t.pt")


def loss_not_finite(said, capsys, monkeypatch):
    model = frcnn.tiny_faster_rcnn()
    torch.nn.init.constant_(next(model.predictor.parameters()), torch.inf)
    loader = DataLoader(
        frcnn.COCOStreamDataset(source="glyphs", image_size=64),
        2,
        collate_fn=frcnn.frcnn_collate_fn,
    )
    with pytest.raises(FloatingPointError) as stopped:
        frcnn.train(model, loader, 1)
    return str(stopped.value)


def frozen_random_layers(said, capsys, monkeypatch):
    with pytest.warns(UserWarning) as warned:
        frcnn.ResNet50(8, frozen_stages=2).train()(torch.zeros(1, 3, 64, 64))
    return str(warned[0].message)


TRIGGERS = [
    no_hub,
    unknown_source,
    empty_folder,
    torn_shard,
    box_without_a_class,
    neither_format,
    no_checkpoint,
    torn_checkpoint,
    other_run,
    no_weights,
    loss_not_finite,
    frozen_random_layers,
]


def test_every_message_of_the_table_is_provoked():
    assert len(MESSAGES) == len(TRIGGERS) >= 10


@pytest.mark.parametrize(
    ("message", "trigger"),
    zip(MESSAGES, TRIGGERS, strict=False),
    ids=lambda x: x.__name__ if callable(x) else "",
)
@pytest.mark.skipif(sys.platform == "win32", reason="paths are written with a slash")
def test_the_code_says_it_as_the_table_does(message, trigger, said, capsys, monkeypatch):
    pattern = ".+".join(re.escape(part) for part in message.split("…"))
    assert re.search(
        rf"(^|frcnn_common: error: ){pattern}$", trigger(said, capsys, monkeypatch), re.MULTILINE
    )
