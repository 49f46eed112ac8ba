"""The command line: its JSON, its resume, `detect`, and one line for every bad input."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL

import datasets
import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow.parquet
import pytest
import torch
from conftest import GOOD, row, write
from torch.utils.data import DataLoader

import frcnn_common as frcnn
import frcnn_sources

# --- helpers --------------------------------------------------------------------------------------


NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
TINY = "--model tiny --image-size 64 --batch 2"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Sums of CUDA kernels differ in the last digits from run to run."""
    monkeypatch.setattr(frcnn, "DEVICE", torch.device("cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def call(capfd):
    """``call("train …")`` → exit code, lines of stdout, lines of stderr that are no progress."""

    def run(line):
        capfd.readouterr()
        code = frcnn.main(line.split())
        out, err = capfd.readouterr()
        return (
            code,
            out.splitlines(),
            [text for text in re.split(r"[\r\n]+", err) if text and "%|" not in text],
        )

    return run


@pytest.fixture(scope="module")
def glyph_shards(tmp_path_factory):
    """A folder of three shards for training, 70 + 10 + 10 small scenes, and one for evaluation."""
    folder = tmp_path_factory.mktemp("glyphs")
    for name, first, count in (
        ("train-00000", 0, 70),
        ("train-00001", 70, 10),
        ("train-00002", 80, 10),
        ("val-00000", 100, 4),
    ):
        rows = [frcnn_sources.render_glyph_scene(seed, 64) for seed in range(first, first + count)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of 2 steps at 64 px."""
    path = tmp_path_factory.mktemp("trained") / "c.pt"
    assert frcnn.main(f"train {TINY} --source glyphs --steps 2 --checkpoint {path}".split()) == 0
    return path


# --- train ----------------------------------------------------------------------------------------


def test_train_ends_with_one_json_line(call, tmp_path):
    code, out, err = call(f"train {TINY} --source glyphs --steps 2 --checkpoint {tmp_path}/c.pt")
    result = json.loads(out[-1])
    assert (code, err) == (0, [])
    assert list(result) == ["steps", "seconds", "images_per_second", "losses"]
    assert result["steps"] == 2
    assert result["images_per_second"] == pytest.approx(4 / result["seconds"])
    assert list(result["losses"]) == ["loss", *frcnn.LOSS_NAMES]
    assert result["losses"]["loss"] == pytest.approx(
        sum(result["losses"][name] for name in frcnn.LOSS_NAMES)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_train_reads_a_folder(workers, call, glyph_shards, tmp_path):
    line = f"train {TINY} --source {glyph_shards} --max-samples 4 --workers {workers} --steps 3"
    code, out, err = call(f"{line} --checkpoint {tmp_path}/c.pt")
    assert (code, err, json.loads(out[-1])["steps"]) == (0, [], 3)


def test_seed_decides_the_run(call, tmp_path):
    losses = []
    for seed in (1, 1, 2):
        _, out, _ = call(
            f"train {TINY} --source glyphs --steps 1 --seed {seed} --checkpoint {tmp_path}/c.pt"
        )
        losses.append(json.loads(out[-1])["losses"])
    assert losses[0] == losses[1] != losses[2]


def test_whole_data_set_is_shuffled_and_a_part_keeps_its_order(
    call, glyph_shards, monkeypatch, tmp_path
):
    seen = []

    def keep(model, loader, steps, *arguments, **options):
        seen.append((loader.dataset.shuffle_buffer, loader.dataset.flip))
        return {name: [0.0] for name in ("loss", *frcnn.LOSS_NAMES)}

    monkeypatch.setattr(frcnn, "train", keep)
    for more in ("", "--max-samples 4"):
        call(f"train {TINY} --source {glyph_shards} --checkpoint {tmp_path}/c.pt {more}")
    assert seen == [(1000, 0.5), (0, 0.0)]


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_the_count_is_shown_at_the_end(mixed, tmp_path, capsys):
    line = f"--source {mixed} --checkpoint {tmp_path}/c.pt"
    rows, boxes = "rows 3 (each named in a warning)", "boxes 3 (not finite or without area)"
    told = f"{mixed}: left out so far: {rows}, {boxes}"
    # Nine good rows: the third step of three reads to the end of the epoch.
    assert frcnn.main(f"train --model tiny --image-size 64 --batch 3 --steps 3 {line}".split()) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["steps"] == 3
    (told_in_training,) = (text for text in out if "left out" in text)
    assert told_in_training.startswith(
        f"{mixed}: left out so far: rows 3 (each named in a warning), boxes "
    )
    assert frcnn.main(f"evaluate {line}".split()) == 0
    *before, shown, result = capsys.readouterr().out.splitlines()
    assert (shown, json.loads(result)["AP"] >= 0) == (told, True)
    assert not any("left out" in text for text in before)


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate_ends_with_the_twelve_figures(call, trained):
    code, out, err = call(f"evaluate --checkpoint {trained} --source glyphs --max-samples 3")
    result = json.loads(out[-1])
    assert (code, err, list(result)) == (0, [], NAMES)
    assert 0 <= result["AP"] < 0.2


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluate_takes_annotations_and_split(split, call, trained, coco_tiny):
    annotations = coco_tiny / f"instances_{split}.json"
    line = f"evaluate --checkpoint {trained} --source {coco_tiny} --max-samples 4 --split {split}"
    code, out, err = call(f"{line} --annotations {annotations}")
    assert (code, err, list(json.loads(out[-1]))) == (0, [], NAMES)


def test_evaluate_uses_the_size_of_the_training(call, trained, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        frcnn,
        "evaluate",
        lambda model, dataset, **options: sizes.append((dataset.image_size, dataset.split)) or {},
    )
    call(f"evaluate --checkpoint {trained} --source glyphs")
    assert sizes == [(64, "val")]


# --- resume ---------------------------------------------------------------------------------------


def stopped_at(monkeypatch, step, line):
    """Run ``line`` until Ctrl-C comes inside a step."""
    count, train_step = [], frcnn._train_step

    def stop(*arguments):
        count.append(step)
        if len(count) == step:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(frcnn, "_train_step", stop)
        return frcnn.main(line.split())


@pytest.mark.parametrize(
    ("source", "workers"),
    [
        ("glyphs", 2),
        pytest.param("glyphs", 0, marks=pytest.mark.slow),
        pytest.param("coco", 0, marks=pytest.mark.slow),
        pytest.param("coco", 2, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_as_the_uninterrupted_one(
    source, workers, call, request, monkeypatch, tmp_path
):
    monkeypatch.setattr(frcnn, "_SHUFFLE_BUFFER", 8)
    # `datasets` waits 5 s whenever a shuffled pass ends.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    source = request.getfixturevalue("coco_tiny") if source == "coco" else source
    line = f"train {TINY} --source {source} --workers {workers} --steps 8 --save-every 3"
    line += f" --checkpoint {tmp_path}"
    _, out, _ = call(f"{line}/whole.pt")
    assert stopped_at(monkeypatch, 6, f"{line}/part.pt") == 130
    code, resumed, err = call(f"{line}/part.pt --resume")
    assert (code, err) == (0, [])
    assert json.loads(resumed[-1])["losses"] == json.loads(out[-1])["losses"]


def test_ctrl_c_says_one_line(capfd, monkeypatch, tmp_path):
    line = f"train {TINY} --source glyphs --steps 3 --checkpoint {tmp_path}/c.pt"
    assert stopped_at(monkeypatch, 2, line) == 130
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "frcnn_common: stopped; where there is a checkpoint, --resume goes on from it"


def test_a_run_begins_with_the_weights_of_a_checkpoint(call, monkeypatch, tmp_path):
    options = f"train {TINY} --source glyphs --steps 1 --checkpoint {tmp_path}"
    assert call(f"{options}/first.pt")[0] == 0
    first = torch.load(tmp_path / "first.pt", weights_only=True)["model"]
    started = {}

    def train(model, *arguments, **named):
        started.update(model.state_dict())
        raise ValueError("seen enough")

    monkeypatch.setattr(frcnn, "train", train)
    assert call(f"{options}/second.pt --weights {tmp_path}/first.pt")[0] == 2
    assert all(torch.equal(started[name], value) for name, value in first.items())


def test_resume_of_nothing_begins(call, tmp_path):
    code, out, err = call(
        f"train {TINY} --source glyphs --steps 1 --checkpoint {tmp_path}/c.pt --resume"
    )
    assert (code, err) == (0, [])
    assert "starting at step 0" in out[0]
    assert json.loads(out[-1])["steps"] == 1


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_end(call, tmp_path):
    line = f"train {TINY} --source glyphs --steps 30 --save-every 10 --checkpoint {tmp_path}"
    _, out, _ = call(f"{line}/whole.pt")
    path, command = tmp_path / "killed.pt", [sys.executable, "-m", "frcnn_common"]

    def last_save():
        return path.stat().st_mtime_ns if path.exists() else None

    codes = []
    for after_a_save, most in ((False, 2.0), (True, 0.1), (True, 0.1)):
        before = last_save()
        process = subprocess.Popen(
            [*command, *f"{line}/killed.pt --resume".split()], cwd=tmp_path, stderr=DEVNULL
        )
        while after_a_save and process.poll() is None and last_save() == before:
            time.sleep(0.005)
        time.sleep(random.uniform(0, most))
        process.kill()
        codes.append(process.wait())
    assert codes[:2] == [-signal.SIGKILL, -signal.SIGKILL]  # the third may have been at its end
    code, resumed, err = call(f"{line}/killed.pt --resume")
    assert (code, err) == (0, [])
    assert json.loads(resumed[-1])["losses"] == pytest.approx(
        json.loads(out[-1])["losses"], rel=1e-4
    )


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(trained, glyph_shards, tmp_path_factory):
    """A folder with one of every bad file, and with one good checkpoint.

    It is made once: every test that takes it holds that nothing in it has changed.
    """
    folder = tmp_path_factory.mktemp("files")
    whole = trained.read_bytes()
    (folder / "whole.pt").write_bytes(whole)
    (folder / "torn.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").touch()
    (folder / "text.pt").write_text("hello")
    (folder / "list.json").write_text("[]")
    (folder / "text.json").write_text("hello")
    frcnn.save_checkpoint(folder / "other.pt", frcnn.tiny_faster_rcnn(num_classes=5))
    frcnn.save_checkpoint(folder / "bare.pt", frcnn.tiny_faster_rcnn())
    for name in ("empty", "half", "only_val", "no_columns", "garbled"):
        (folder / name).mkdir()
    shard = (glyph_shards / "train-00000.parquet").read_bytes()
    (folder / "half" / "train-00000-of-00001.parquet").write_bytes(shard[: len(shard) // 2])
    (folder / "only_val" / "val-00000.parquet").write_bytes(
        (glyph_shards / "val-00000.parquet").read_bytes()
    )
    table = pyarrow.table({"image_id": [1]})
    pyarrow.parquet.write_table(table, folder / "no_columns" / "train-00000.parquet")
    # A shard whose end is whole and whose rows are not, behind the rows that are read before
    # training begins.
    for path in glyph_shards.glob("train-*"):
        (folder / "garbled" / path.name).write_bytes(path.read_bytes())
    with (folder / "garbled" / "train-00002.parquet").open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 2000)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD = {
    "no arguments": ("", "command"),
    "unknown command": ("fly", "fly"),
    "no checkpoint named": ("train --model tiny", "--checkpoint"),
    "unknown model": ("train --model huge --checkpoint {files}/whole.pt", "huge"),
    "unknown option": ("train {tiny} --colour red --checkpoint {files}/whole.pt", "--colour"),
    "negative steps": ("train {tiny} --steps -3 --checkpoint {files}/whole.pt", "--steps"),
    "no steps": ("train {tiny} --steps 0 --checkpoint {files}/whole.pt", "--steps"),
    "steps in words": ("train {tiny} --steps abc --checkpoint {files}/whole.pt", "--steps"),
    "no batch": ("train --model tiny --batch 0 --checkpoint {files}/whole.pt", "--batch"),
    "no size": ("train --model tiny --image-size 0 --checkpoint {files}/whole.pt", "--image-size"),
    "no such weights": (
        "train {tiny} --source glyphs --weights imagent --checkpoint {files}/new.pt",
        "neither none, imagenet, coco, glyphs nor a file",
    ),
    "weights of another model": (
        "train --model full --source glyphs --weights {files}/whole.pt --checkpoint {files}/new.pt",
        "does not fit the model",
    ),
    "too small for a scene": (
        "train --model tiny --source glyphs --image-size 4 --checkpoint {files}/new.pt",
        "at least 8 pixels",
    ),
    "never saved": ("train {tiny} --save-every 0 --checkpoint {files}/whole.pt", "--save-every"),
    "no samples": ("train {tiny} --max-samples 0 --checkpoint {files}/whole.pt", "--max-samples"),
    "negative workers": (
        "train {tiny} --source glyphs --workers -1 --checkpoint {files}/whole.pt",
        "workers",
    ),
    "negative seed": (
        "train {tiny} --source glyphs --max-samples 2 --seed -1 --checkpoint {files}/whole.pt",
        "seed",
    ),
    "seed in words": ("train {tiny} --seed one --checkpoint {files}/whole.pt", "--seed"),
    "unknown precision": ("train {tiny} --amp fp8 --checkpoint {files}/whole.pt", "--amp"),
    "fp16 on a CPU": (
        "train {tiny} --amp fp16 --source glyphs --checkpoint {files}/whole.pt",
        "fp16",
    ),
    "unknown split": ("evaluate --split test --checkpoint {files}/whole.pt", "--split"),
    "missing checkpoint": ("evaluate --source glyphs --checkpoint {files}/none.pt", "none.pt"),
    "torn checkpoint": ("evaluate --source glyphs --checkpoint {files}/torn.pt", "torn.pt"),
    "empty checkpoint": ("evaluate --source glyphs --checkpoint {files}/empty.pt", "empty.pt"),
    "text as checkpoint": ("evaluate --source glyphs --checkpoint {files}/text.pt", "text.pt"),
    "other model": ("evaluate --source glyphs --checkpoint {files}/other.pt", "other.pt"),
    "folder as checkpoint": ("evaluate --source glyphs --checkpoint {files}/empty", "empty"),
    "resume a torn one": (
        "train {tiny} --source glyphs --checkpoint {files}/torn.pt --resume",
        "torn.pt",
    ),
    "resume another model": (
        "train {tiny} --source glyphs --checkpoint {files}/other.pt --resume",
        "other.pt",
    ),
    "resume bare weights": (
        "train {tiny} --source glyphs --checkpoint {files}/bare.pt --resume",
        "bare.pt",
    ),
    "resume with other steps": (
        "train {tiny} --source glyphs --steps 9 --checkpoint {files}/whole.pt --resume",
        "9",
    ),
    "train into a folder": ("train {tiny} --source glyphs --checkpoint {files}/empty", "empty"),
    "train below a file": (
        "train {tiny} --source glyphs --steps 1 --checkpoint {files}/text.pt/c.pt",
        "text.pt",
    ),
    "unknown source": ("train {tiny} --source nowhere --checkpoint {files}/whole.pt", "nowhere"),
    "unknown source to evaluate": (
        "evaluate --source nowhere --checkpoint {files}/whole.pt",
        "nowhere",
    ),
    "empty folder": (
        "train {tiny} --source {files}/empty --checkpoint {files}/whole.pt",
        "no *.parquet, no COCO annotations",
    ),
    "half a shard": (
        "train {tiny} --source {files}/half --checkpoint {files}/whole.pt",
        "half/train-00000-of",
    ),
    "other columns": (
        "train {tiny} --source {files}/no_columns --checkpoint {files}/whole.pt",
        "'objects'",
    ),
    "only the other split": (
        "train {tiny} --source {files}/only_val --checkpoint {files}/whole.pt",
        "train-*",
    ),
    "only val to evaluate train": (
        "evaluate --source {files}/only_val --split train --checkpoint {files}/whole.pt",
        "train-*",
    ),
    "missing annotations": (
        "evaluate --source glyphs --checkpoint {files}/whole.pt --annotations {files}/none.json",
        "none.json",
    ),
    "text as annotations": ("{evaluate} --annotations {files}/text.json", "text.json"),
    "list as annotations": ("{evaluate} --annotations {files}/list.json", "list.json"),
    "annotations of other images": ("{evaluate} --annotations {official}", "1000000000"),
}


@pytest.mark.parametrize(("line", "named"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_line(line, named, call, files, request, recwarn):
    before = contents(files)
    evaluate = f"evaluate --source glyphs --max-samples 1 --checkpoint {files}/whole.pt"
    names = {"files": files, "tiny": TINY, "evaluate": evaluate}
    if "{official}" in line:
        names["official"] = request.getfixturevalue("coco_tiny") / "instances_val.json"
    code, _, err = call(line.format(**names))
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith("frcnn_common: error: ")
    assert named in err[0]
    assert contents(files) == before
    assert [
        str(warning.message) for warning in recwarn
    ] == []  # outside pytest they go to stderr as well


def test_folder_as_checkpoint_is_refused_before_training(call, monkeypatch, tmp_path):
    monkeypatch.setattr(frcnn, "train", None)
    code, _, err = call(f"train {TINY} --source glyphs --checkpoint {tmp_path}")
    assert (code, len(err)) == (2, 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("--seed 1", "seed 0 (now 1)"),
        ("--max-samples 3", "max_samples None (now 3)"),
        ("--image-size 32", "image_size 64 (now 32)"),
        ("--batch 3", "batch 2 (now 3)"),
        ("--workers 1", "workers 0 (now 1)"),
        ("--amp bf16", "amp off (now bf16)"),
        ("--source {shards}", "source glyphs (now /"),
    ],
)
def test_resume_with_other_settings_is_refused(changed, said, call, files, glyph_shards):
    before = contents(files)
    line = (
        f"train {TINY} --source glyphs --steps 2 --resume --checkpoint {files}/whole.pt {changed}"
    )
    code, _, err = call(line.format(shards=glyph_shards))
    assert (code, len(err)) == (2, 1)
    assert said in err[0]
    assert contents(files) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_is_torn_inside_ends_with_one_line(workers, call, files):
    before = contents(files)
    line = f"train {TINY} --source {files}/garbled --max-samples 90 --workers {workers}"
    line += " --steps 50 --image-size 32 --batch 10"
    code, _, err = call(f"{line} --checkpoint {files}/whole.pt")
    assert (code, len(err)) == (2, 1)
    assert "garbled cannot be read further" in err[0]
    assert contents(files) == before


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_rows_that_are_all_bad_end_training_and_evaluation_with_one_line(tmp_path, capsys):
    rows = [row(i, b"not a picture", boxes=[GOOD] * 20) for i in range(5)]
    source = write(tmp_path / "bad", rows, split="train")
    write(tmp_path / "bad", rows, split="val")
    frcnn.save_checkpoint(tmp_path / "c.pt", frcnn.tiny_faster_rcnn())
    for command, said in (
        ("train --model tiny --steps 2", "to train on"),
        ("evaluate", "to evaluate on"),
    ):
        assert frcnn.main(f"{command} --source {source} --checkpoint {tmp_path}/c.pt".split()) == 2
        (line,) = (
            text
            for text in re.split(r"[\r\n]+", capsys.readouterr().err)
            if text and "%|" not in text
        )
        assert line.startswith(f"frcnn_common: error: {source} gives not one image ")
        assert line.endswith(said)


def test_process_ends_with_code_and_one_line(files):
    command = [
        sys.executable,
        "-m",
        "frcnn_common",
        "evaluate",
        "--source",
        "glyphs",
        "--checkpoint",
        "torn.pt",
    ]
    process = subprocess.run(
        command, cwd=files, capture_output=True, text=True, env=dict(os.environ)
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert "torn.pt is no whole checkpoint" in process.stderr


def test_error_without_a_message_still_ends_with_one_line(call, monkeypatch, trained):
    def fail(*arguments, **options):
        raise TimeoutError

    monkeypatch.setattr(frcnn, "evaluate", fail)
    code, _, err = call(f"evaluate --source glyphs --checkpoint {trained}")
    assert (code, len(err)) == (2, 1)


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as end:
        frcnn.main(["train", "--help"])
    assert end.value.code == 0
    assert "--save-every" in capsys.readouterr().out


# --- detect: photographs in, pictures with boxes and a JSON out -----------------------------------


GRACE_HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


class Quarter(torch.nn.Module):
    """Finds one cat: the upper left quarter of the image without its padding."""

    SCORE_THR = 0.05
    name = "tiny"
    classes = frcnn.COCO_CLASSES

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
    """``detect(path, …)`` → exit code, result, records of detections.json, stderr, the folder."""
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


def test_detect_gives_boxes_in_pixels_of_the_photograph(detect):
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
        ("RGB", (2400, 1600), "large.jpg"),
        ("RGB", (1, 1), "dot.png"),
        ("CMYK", (60, 40), "cmyk.jpg"),
        ("L", (60, 40), "grey.jpg"),
        ("P", (60, 40), "palette.gif"),
        ("RGBA", (60, 40), "alpha.png"),
        ("I;16", (60, 40), "deep.png"),
        ("RGB", (3000, 1), "line.png"),
    ],
)
def test_detect_draws_every_size_and_mode(mode, size, name, detect, tmp_path):
    code, result, (record,), err, out = detect(save(tmp_path / name, mode, size))
    assert (code, err, result["detections"]) == (0, "", 1)
    assert record["detections"][0]["box"] == pytest.approx(
        [0, 0, size[0] / 2, size[1] / 2], rel=1e-5
    )
    with PIL.Image.open(out / record["drawn"]) as drawn:
        assert 400 <= max(drawn.size) <= 1600
        assert min(drawn.size) >= 32


def test_detect_turns_a_photograph_as_its_camera_says(detect, tmp_path):
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
def test_detect_says_one_line_of_what_is_no_picture(content, detect, tmp_path):
    (tmp_path / "no.jpg").write_bytes(content)
    code, result, records, err, _ = detect(tmp_path / "no.jpg")
    assert (code, result, records) == (2, {"images": 0, "detections": 0, "failed": 1}, [])
    assert err.count("\n") == 1
    assert f"{tmp_path / 'no.jpg'} is no picture" in err


def test_detect_goes_on_after_a_missing_file(detect, tmp_path):
    code, result, records, err, _ = detect(tmp_path / "none.jpg", GRACE_HOPPER)
    assert (code, result["images"], result["failed"], len(records)) == (2, 1, 1, 1)
    assert f"{tmp_path / 'none.jpg'} is no picture that can be read: [Errno 2]" in err


def test_detect_has_a_progress_bar_for_a_folder(detect, tmp_path):
    for i in range(20):
        save(tmp_path / "in" / f"{i:03d}.png", "RGB", (30, 20))
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    code, result, records, err, out = detect(tmp_path / "in")
    assert (code, result) == (0, {"images": 20, "detections": 20, "failed": 0})
    assert "20/20" in err
    assert [Path(record["image"]).name for record in records] == [f"{i:03d}.png" for i in range(20)]
    assert len(list(out.glob("*.jpg"))) == 20


def test_detect_keeps_equal_names_apart_and_overwrites_no_input(detect, tmp_path):
    paths = [save(tmp_path / folder / "photo.jpg", "RGB", (30, 20)) for folder in ("a", "b")]
    before = [path.read_bytes() for path in paths]
    code, _, records, _, _ = detect(*paths, out=tmp_path / "a")
    assert code == 0
    assert len({record["drawn"] for record in records}) == 2
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize(
    "name", ["..a.png", "a\nb.png", "-x.png", "%s$(touch no).png", "ä ö.png", "x" * 240 + ".png"]
)
def test_detect_writes_nothing_outside_out_whatever_a_file_is_called(name, detect, tmp_path):
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
def test_detect_of_no_pictures_ends_with_one_line(argument, detect, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, _, err, out = detect(*([tmp_path / argument] if argument else []))
    assert code == 2
    assert re.fullmatch(r"frcnn_common: error: [^\n]*\n", err)
    assert not out.exists()


def test_detect_takes_a_real_checkpoint(tmp_path, capfd):
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


# --- the README's troubleshooting table -----------------------------------------------------------


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
    scene = frcnn_sources.render_glyph_scene(0, 64)
    scene["objects"]["category"][0] = 80
    Path("photos").mkdir()
    datasets.Dataset.from_list([scene]).to_parquet("photos/train-00000.parquet")
    with pytest.warns(UserWarning) as warned:
        list(frcnn.COCOStreamDataset(source="photos", image_size=64, bbox_format="xyxy"))
    return str(warned[0].message)


def neither_format(said, capsys, monkeypatch):
    scenes = [frcnn_sources.render_glyph_scene(seed, 64) for seed in range(4)]
    for scene in scenes:
        scene["objects"]["bbox"] = [[500.0, 500.0, 1.0, 900.0]] * len(scene["objects"]["bbox"])
    Path("photos").mkdir()
    datasets.Dataset.from_list(scenes).to_parquet("photos/train-00000.parquet")
    return said("train --model tiny --source photos --checkpoint t.pt")


def counted_from_1(said, capsys, monkeypatch):
    scenes = [frcnn_sources.render_glyph_scene(seed, 64) for seed in range(4)]
    for scene in scenes:
        scene["objects"]["category"] = [1] * len(scene["objects"]["category"])
    Path("photos").mkdir()
    datasets.Dataset.from_list(scenes).to_parquet("photos/train-00000.parquet")
    with pytest.warns(UserWarning) as warned:
        frcnn.COCOStreamDataset(source="photos", image_size=64)
    return str(warned[0].message)


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
    monkeypatch.setattr(frcnn, "succeeds_within", lambda ask, seconds=0: False)
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
    counted_from_1,
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
    list(zip(MESSAGES, TRIGGERS, strict=False)),
    ids=lambda x: x.__name__ if callable(x) else "",
)
@pytest.mark.skipif(sys.platform == "win32", reason="paths are written with a slash")
def test_the_code_says_it_as_the_table_does(message, trigger, said, capsys, monkeypatch):
    pattern = ".+".join(re.escape(part) for part in message.split("…"))
    assert re.search(
        rf"(^|frcnn_common: error: ){pattern}$", trigger(said, capsys, monkeypatch), re.MULTILINE
    )
