"""The command line: its JSON, its resume, and one line for every bad input."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from subprocess import DEVNULL

import datasets
import pyarrow.parquet
import pytest
import torch

import frcnn_common as frcnn

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
TINY = "--model tiny --image-size 64 --batch 2"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Sums of CUDA kernels differ in the last digits from run to run."""
    monkeypatch.setattr(frcnn, "DEVICE", torch.device("cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def call(capfd):
    """``call("train …")`` gives the exit code, the lines of stdout, and those of stderr that are no progress."""

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
        rows = [frcnn.render_glyph_scene(seed, 64) for seed in range(first, first + count)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


# What the commands print


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of 2 steps at 64 px."""
    path = tmp_path_factory.mktemp("trained") / "c.pt"
    assert frcnn.main(f"train {TINY} --source glyphs --steps 2 --checkpoint {path}".split()) == 0
    return path


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


# Resume


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["glyphs", "coco"])
def test_resumed_run_ends_as_the_uninterrupted_one(
    source, workers, call, coco_tiny, monkeypatch, tmp_path
):
    monkeypatch.setattr(frcnn, "_SHUFFLE_BUFFER", 8)
    # `datasets` waits 5 s whenever a shuffled pass ends.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    source = coco_tiny if source == "coco" else source
    line = f"train {TINY} --source {source} --workers {workers} --steps 8 --save-every 3 --checkpoint {tmp_path}"
    _, out, _ = call(f"{line}/whole.pt")
    assert stopped_at(monkeypatch, 6, f"{line}/part.pt") == 130
    code, resumed, err = call(f"{line}/part.pt --resume")
    assert (code, err) == (0, [])
    assert json.loads(resumed[-1])["losses"] == json.loads(out[-1])["losses"]


def test_ctrl_c_says_one_line(capfd, monkeypatch, tmp_path):
    line = f"train {TINY} --source glyphs --steps 3 --checkpoint {tmp_path}/c.pt"
    assert stopped_at(monkeypatch, 2, line) == 130
    assert (
        capfd.readouterr().err.splitlines()[-1]
        == "frcnn_common: stopped; the last checkpoint holds"
    )


def test_resume_of_nothing_begins(call, tmp_path):
    code, out, err = call(
        f"train {TINY} --source glyphs --steps 1 --checkpoint {tmp_path}/c.pt --resume"
    )
    assert (code, err) == (0, [])
    assert "starting at step 0" in out[0]
    assert json.loads(out[-1])["steps"] == 1


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


# Bad input


@pytest.fixture
def files(trained, coco_tiny, glyph_shards, tmp_path):
    """A folder with one of every bad file, and with one good checkpoint."""
    whole = trained.read_bytes()
    (tmp_path / "whole.pt").write_bytes(whole)
    (tmp_path / "torn.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("hello")
    frcnn.save_checkpoint(tmp_path / "other.pt", frcnn.tiny_faster_rcnn(num_classes=5))
    frcnn.save_checkpoint(tmp_path / "bare.pt", frcnn.tiny_faster_rcnn())
    for name in ("empty", "half", "only_val", "no_columns", "garbled"):
        (tmp_path / name).mkdir()
    shard = (coco_tiny / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "half" / "train-00000-of-00001.parquet").write_bytes(shard[: len(shard) // 2])
    (tmp_path / "only_val" / "val-00000.parquet").write_bytes(
        (glyph_shards / "val-00000.parquet").read_bytes()
    )
    table = pyarrow.table({"image_id": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "no_columns" / "train-00000.parquet")
    # A shard whose end is whole and whose rows are not, behind the rows that are read before training begins.
    for path in glyph_shards.glob("train-*"):
        (tmp_path / "garbled" / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "garbled" / "train-00002.parquet").open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 2000)
    return tmp_path


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
        "train-*.parquet",
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
    "text as annotations": (
        "evaluate --source glyphs --max-samples 1 --checkpoint {files}/whole.pt --annotations {files}/text.json",
        "text.json",
    ),
    "list as annotations": (
        "evaluate --source glyphs --max-samples 1 --checkpoint {files}/whole.pt --annotations {files}/list.json",
        "list.json",
    ),
    "annotations of other images": (
        "evaluate --source glyphs --max-samples 1 --checkpoint {files}/whole.pt --annotations {official}",
        "1000000000",
    ),
}


@pytest.mark.parametrize(("line", "named"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_line(line, named, call, files, coco_tiny, recwarn):
    before = contents(files)
    code, _, err = call(
        line.format(files=files, tiny=TINY, official=coco_tiny / "instances_val.json")
    )
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
    line = f"train {TINY} --source {files}/garbled --max-samples 90 --workers {workers} --steps 50 --image-size 32"
    code, _, err = call(f"{line} --checkpoint {files}/whole.pt")
    assert (code, len(err)) == (2, 1)
    assert "garbled cannot be read further" in err[0]
    assert contents(files) == before


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
