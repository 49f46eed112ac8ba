"""Training, checkpoints, exact resume and `tiny_detector`, on two images of 64 px a step."""

import functools
import io
import itertools
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

import frcnn_common as frcnn

SIZE, BATCH = 64, 2


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    return frcnn.tiny_faster_rcnn(**options)


def make_loader(source="glyphs", max_samples=None, workers=0, **options):
    dataset = frcnn.COCOStreamDataset(
        "train", max_samples, str(source), SIZE, bbox_format="xyxy", **options
    )
    return DataLoader(dataset, BATCH, num_workers=workers, collate_fn=frcnn.frcnn_collate_fn)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# Learning


def test_loss_falls_on_two_images():
    history = frcnn.train(make_model(), make_loader(max_samples=2), 40)
    assert 3 < history["loss"][0] < 8
    assert 0 < sum(history["loss"][-10:]) / 10 < 0.35 * history["loss"][0]


def test_history_has_every_step():
    history = frcnn.train(make_model(), make_loader(), 3)
    assert list(history) == ["step", "lr", "loss", "rpn_cls", "rpn_box", "roi_cls", "roi_box"]
    assert history["step"] == [1, 2, 3]
    assert all(len(values) == 3 for values in history.values())
    parts = zip(*(history[name] for name in frcnn.LOSS_NAMES), strict=True)
    assert history["loss"] == pytest.approx([sum(part) for part in parts], rel=1e-5)


def test_history_has_the_rate_each_step_was_made_with():
    history = frcnn.train(make_model(), make_loader(), 3, recipe=frcnn.step_decay)
    assert history["lr"] == pytest.approx(
        [0.02 * BATCH / 16 * factor for factor in (0.001, 1.0, 0.1)]
    )


def test_same_seed_gives_the_same_weights():
    runs = []
    for seed in (0, 0, 1):
        model = make_model(seed)
        runs.append((frcnn.train(model, make_loader(), 3), weights(model)))
    assert runs[0][0] == runs[1][0]
    assert_same_weights(runs[0][1], runs[1][1])
    assert runs[0][0]["loss"] != runs[2][0]["loss"]


def test_training_goes_on_in_train_mode_after_an_evaluation():
    model, modes = make_model(), []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    frcnn.train(model, make_loader(), 3, after_step=lambda step, history: model.eval())
    assert modes == [True, True, True]


def test_who_watches_does_not_change_the_run():
    scenes = frcnn.COCOStreamDataset("val", 2, "glyphs", SIZE)

    def watch(step, history):
        frcnn.evaluate(model, scenes)  # its loader draws a seed for its workers
        torch.rand(step)

    model = make_model()
    alone, end = frcnn.train(model, make_loader(), 3), weights(model)
    model = make_model()
    assert frcnn.train(model, make_loader(), 3, after_step=watch) == alone
    assert_same_weights(weights(model), end)


@pytest.mark.parametrize("recipe", [frcnn.one_cycle, frcnn.step_decay])
def test_optimizer_has_only_learning_parameters(recipe):
    model = make_model()
    model.backbone.requires_grad_(False)
    optimizer, _ = recipe(model, 10, BATCH)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_frozen_parameters_stand_still():
    model = make_model()
    model.backbone.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    frcnn.train(model, make_loader(), 2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("backbone.")}


@pytest.mark.parametrize("clip_norm", [0.01, 0.1])
def test_gradient_is_clipped(clip_norm):
    def plain(model, steps, batch):  # rate 1: a step is as long as its gradient
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    frcnn.train(model, make_loader(), 1, recipe=plain, clip_norm=clip_norm)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(clip_norm, rel=1e-2)


# Schedules


def rates(recipe, steps, batch):
    optimizer, schedule = recipe(torch.nn.Linear(1, 1), steps, batch)
    values = []
    for _ in range(steps):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values


def test_one_cycle_warms_up_and_decays():
    values = rates(frcnn.one_cycle, 100, 8)
    peak = values.index(max(values))
    assert max(values) == pytest.approx(2e-3)
    assert peak == 14
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[0] < 1e-4
    assert values[-1] < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_one_cycle_takes_any_number_of_steps(steps):
    assert all(0 < rate <= 2e-3 for rate in rates(frcnn.one_cycle, steps, 8))


@pytest.mark.parametrize(("batch", "top"), [(1, 0.00125), (8, 0.01), (16, 0.02), (32, 0.04)])
def test_step_decay_scales_with_the_batch(batch, top):
    assert max(rates(frcnn.step_decay, 100, batch)) == pytest.approx(top)


def test_step_decay_warms_up_and_drops_twice():
    values = rates(frcnn.step_decay, 2600, 16)
    warm_up = values[:262]
    assert warm_up[0] == pytest.approx(0.02 * 1e-3)
    assert warm_up[-1] == pytest.approx(0.02)
    assert [b - a for a, b in itertools.pairwise(warm_up)] == pytest.approx(
        [0.02 * 0.999 / 261] * 261
    )
    assert values[261:1600] == pytest.approx([0.02] * 1339)
    assert values[1600:2200] == pytest.approx([0.002] * 600)
    assert values[2200:] == pytest.approx([0.0002] * 400)


def test_step_decay_warms_up_for_at_most_1000_steps():
    values = rates(frcnn.step_decay, 15_000, 16)
    assert values[999] < 0.02
    assert values[1000] == pytest.approx(0.02)


# Refusals


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"steps": -3}, {"save_every": 0}, {"amp": "fp8"}, {"amp": "fp16"}],
    ids=str,
)
def test_bad_argument_is_refused(bad):
    name = "CUDA" if bad.get("amp") == "fp16" else next(iter(bad))
    with pytest.raises(ValueError, match=name):
        frcnn.train(make_model(), make_loader(), **{"steps": 1} | bad)


def test_bf16_gives_finite_losses():
    plain = frcnn.train(make_model(), make_loader(), 3)
    mixed = frcnn.train(make_model(), make_loader(), 3, amp="bf16")
    assert all(math.isfinite(value) for values in mixed.values() for value in values)
    assert mixed["loss"] != plain["loss"]
    assert mixed["loss"][0] == pytest.approx(plain["loss"][0], rel=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_and_leaves_the_weights(value, tmp_path):
    model, seen = make_model(), []

    def spoil_second(module, arguments, losses):
        seen.append(losses)
        return losses | {"roi_cls": losses["roi_cls"] * value} if len(seen) == 2 else losses

    model.register_forward_hook(spoil_second)
    after_first = {}

    def keep(step, history):
        after_first.update({name: p.detach().clone() for name, p in model.named_parameters()})

    path = tmp_path / "c.pt"
    with pytest.raises(
        FloatingPointError, match=r"step 2\b.*roi_cls.*\[2, 3\]"
    ):  # glyph scenes are called by seed
        frcnn.train(model, make_loader(), 5, checkpoint_path=path, save_every=1, after_step=keep)
    assert_same_weights(dict(model.named_parameters()), after_first)
    assert frcnn.load_checkpoint(path, make_model())[1]["step"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_without_a_usable_image_is_refused(workers, coco_tiny, tmp_path):
    table = pyarrow.parquet.read_table(coco_tiny / "train-00000-of-00001.parquet").slice(0, 3)
    rows = table.to_pylist()
    for row in rows:
        row["objects"]["bbox"] = [[5.0, 5.0, 5.0, 9.0] for _ in row["objects"]["bbox"]]  # no width
    table = pyarrow.Table.from_pylist(rows, table.schema)
    pyarrow.parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="not one image with a valid box"):
        frcnn.train(make_model(), make_loader(tmp_path, workers=workers), 1)


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of two steps, and the weights in it."""
    path = tmp_path_factory.mktemp("trained") / "c.pt"
    model = make_model()
    frcnn.train(model, make_loader(), 2, checkpoint_path=path, run={"seed": 0})
    return path, weights(model)


def test_checkpoint_gives_back_the_weights(trained):
    model, state = frcnn.load_checkpoint(trained[0])
    assert_same_weights(
        {name: value.cpu() for name, value in model.state_dict().items()}, trained[1]
    )
    assert model.name == "tiny"
    assert state["step"] == 2
    assert state["run"] == {"steps": 2, "batch": BATCH, "amp": "off", "processes": 1, "seed": 0}


def test_checkpoint_needs_no_code_to_load(trained):
    assert torch.load(trained[0], weights_only=True)["model_name"] == "tiny"


@pytest.mark.parametrize(("save_every", "saved"), [(2, [2, 4, 5]), (5, [5]), (100, [5])])
def test_checkpoint_every_so_often_and_at_the_end(save_every, saved, monkeypatch, tmp_path):
    steps = []
    monkeypatch.setattr(
        frcnn, "save_checkpoint", lambda path, model, **state: steps.append(state["step"])
    )
    frcnn.train(
        make_model(), make_loader(), 5, checkpoint_path=tmp_path / "c.pt", save_every=save_every
    )
    assert steps == saved


def test_failed_save_leaves_the_old_file_whole(monkeypatch, tmp_path):
    path = tmp_path / "c.pt"
    model = make_model()
    frcnn.save_checkpoint(path, model)
    before = path.read_bytes()

    def fail_midway(state, file):
        half = before[: len(before) // 2]
        file.write(half) if hasattr(file, "write") else Path(file).write_bytes(half)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail_midway)
    with pytest.raises(OSError, match="disk full"):
        frcnn.save_checkpoint(path, model)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_makes_the_folder_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "b" / "c.pt"
    frcnn.save_checkpoint(path, make_model())
    assert list(path.parent.iterdir()) == [path]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_code_in_a_checkpoint_does_not_run(form, tmp_path):
    path, canary = tmp_path / "c.pt", tmp_path / "canary"
    content = {"model_name": "tiny", "model": Malicious(canary)}
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"c\.pt is no whole checkpoint"):
        frcnn.load_checkpoint(path)
    assert not canary.exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_checkpoint_is_refused(share, trained, tmp_path):
    path, whole = tmp_path / "c.pt", trained[0].read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"c\.pt is no whole checkpoint"):
        frcnn.load_checkpoint(path)


def zip_file():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"hello", zip_file()], ids=["text", "zip"])
def test_foreign_file_is_refused(content, tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.pt is no whole checkpoint"):
        frcnn.load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [[1], {}, {"model": {}}, {"model_name": "tiny", "model": 3}], ids=str
)
def test_foreign_content_is_refused(content, tmp_path):
    path = tmp_path / "c.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"c\.pt"):
        frcnn.load_checkpoint(path)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        frcnn.load_checkpoint(tmp_path / "none.pt")


def test_unknown_model_name_is_refused(tmp_path):
    model = make_model()
    model.name = "giant"
    frcnn.save_checkpoint(tmp_path / "c.pt", model)
    with pytest.raises(ValueError, match="'giant'"):
        frcnn.load_checkpoint(tmp_path / "c.pt")


def test_checkpoint_of_another_shape_says_what_differs(tmp_path):
    frcnn.save_checkpoint(tmp_path / "c.pt", make_model(num_classes=5))
    with pytest.raises(
        ValueError, match=r"in 4 entries: predictor\.box\.bias is \[20\] and not \[324\]"
    ):
        frcnn.load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(("mine", "said"), [("extra", "missing"), ("file", "unknown to the model")])
def test_checkpoint_with_other_names_says_which(mine, said, tmp_path):
    plain, larger = make_model(), make_model()
    larger.extra = torch.nn.Linear(1, 1, bias=False)
    saved, loaded = (plain, larger) if mine == "extra" else (larger, plain)
    frcnn.save_checkpoint(tmp_path / "c.pt", saved)
    with pytest.raises(ValueError, match=rf"in 1 entries: extra\.weight is {said}"):
        frcnn.load_checkpoint(tmp_path / "c.pt", loaded)


# Resume


@pytest.fixture(scope="module")
def two_shards(coco_tiny, tmp_path_factory):
    """Six COCO images in two shards: with two workers each reads its own."""
    folder = tmp_path_factory.mktemp("two_shards")
    table = pyarrow.parquet.read_table(coco_tiny / "train-00000-of-00001.parquet")
    for i in range(2):
        pyarrow.parquet.write_table(
            table.slice(3 * i, 3), folder / f"train-0000{i}-of-00002.parquet"
        )
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # `datasets` waits 5 s at the end of a shuffled pass over shards
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield folder


@pytest.fixture(scope="module")
def run(coco_tiny, two_shards):
    """``run(source, workers, path, stop)``: 12 steps over epochs of 6 images, or as many as come before the stop."""
    shuffled = {"shuffle_buffer": 4, "flip": 0.5}
    sources = {
        "glyphs": {"source": "glyphs", "max_samples": 6},
        "coco": {"source": coco_tiny, "max_samples": 6, **shuffled},
        "shards": {"source": two_shards, **shuffled},
    }

    def go(source, workers, path=None, stop=None, seed=0):
        model, loader = make_model(seed), make_loader(workers=workers, **sources[source])

        def after_step(step, history):
            if step == stop:
                raise KeyboardInterrupt

        resuming = {"checkpoint_path": path, "save_every": stop or 100, "resume": path is not None}
        history = frcnn.train(model, loader, 12, after_step=after_step, **resuming)
        return history, weights(model), torch.get_rng_state()

    return go


@pytest.fixture(scope="module")
def uninterrupted(run):
    return functools.cache(run)


# An epoch of 6 images ends after step 3, and with two workers, whose last batches are of one image, after step 4.
@pytest.mark.parametrize("stops", [(3,), (4,), (1, 2, 5)], ids=str)
@pytest.mark.parametrize(
    ("source", "workers"), [("glyphs", 0), ("glyphs", 2), ("coco", 0), ("coco", 2), ("shards", 2)]
)
def test_resume_is_exact(source, workers, stops, run, uninterrupted, tmp_path):
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run(source, workers, tmp_path / "c.pt", stop)
    history, model, generator = run(
        source, workers, tmp_path / "c.pt", seed=99
    )  # all comes from the file
    expected_history, expected_model, expected_generator = uninterrupted(source, workers)
    assert history == expected_history
    assert_same_weights(model, expected_model)
    assert torch.equal(generator, expected_generator)


def test_resume_without_a_checkpoint_starts_at_0_and_says_so(tmp_path, capsys):
    path = tmp_path / "c.pt"
    history = frcnn.train(make_model(), make_loader(), 2, checkpoint_path=path, resume=True)
    assert f"no checkpoint at {path} yet: starting at step 0" in capsys.readouterr().out
    assert history == frcnn.train(make_model(), make_loader(), 2)


def test_resume_of_a_finished_run_changes_nothing(trained, tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(trained[0].read_bytes())
    model = make_model(99)
    history = frcnn.train(
        model, make_loader(), 2, checkpoint_path=path, resume=True, run={"seed": 0}
    )
    assert history["step"] == [1, 2]
    assert_same_weights(weights(model), trained[1])
    assert path.read_bytes() == trained[0].read_bytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 3}, r"steps 2 \(now 3\)"),
        ({"amp": "bf16"}, r"amp off \(now bf16\)"),
        ({"run": {"seed": 1}}, r"seed 0 \(now 1\)"),
        ({"run": {"seed": 0, "workers": 4}}, r"workers None \(now 4\)"),
    ],
    ids=str,
)
def test_resume_with_other_settings_is_refused(changed, said, trained, tmp_path):
    path = tmp_path / "c.pt"
    path.write_bytes(trained[0].read_bytes())
    settings = {"steps": 2, "run": {"seed": 0}} | changed
    with pytest.raises(ValueError, match=said):
        frcnn.train(make_model(), make_loader(), checkpoint_path=path, resume=True, **settings)
    assert path.read_bytes() == trained[0].read_bytes()


def test_resume_with_another_batch_is_refused(trained):
    loader = DataLoader(make_loader().dataset, 3, collate_fn=frcnn.frcnn_collate_fn)
    with pytest.raises(ValueError, match=r"batch 2 \(now 3\)"):
        frcnn.train(
            make_model(), loader, 2, checkpoint_path=trained[0], resume=True, run={"seed": 0}
        )


def test_resume_from_bare_weights_is_refused(tmp_path):
    frcnn.save_checkpoint(tmp_path / "c.pt", make_model())  # whole, but of no run
    with pytest.raises(ValueError, match=r"c\.pt"):
        frcnn.train(make_model(), make_loader(), 2, checkpoint_path=tmp_path / "c.pt", resume=True)


# tiny_detector


def test_tiny_detector_trains_once(monkeypatch, tmp_path):
    trained, train = [], frcnn.train
    monkeypatch.setattr(frcnn, "CHECKPOINTS", tmp_path / "new")
    monkeypatch.setattr(frcnn, "TINY_STEPS", 2)
    monkeypatch.setattr(frcnn, "TINY_IMAGE_SIZE", SIZE)
    monkeypatch.setattr(frcnn, "train", lambda *a, **k: trained.append(train(*a, **k)))
    first = frcnn.tiny_detector()
    second = frcnn.tiny_detector()
    assert [history["step"] for history in trained] == [[1, 2]]
    assert_same_weights(first.state_dict(), second.state_dict())
    assert not first.training
    assert not second.training


def test_tiny_detector_of_two_processes_trains_once(tmp_path):
    code = """
import sys, time
from pathlib import Path
import frcnn_common as frcnn

folder, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
train = frcnn.train

def slow_train(*arguments, **options):
    (folder / f"trained-{me}").touch()
    time.sleep(0.5)  # without a lock the other would find no file either
    return train(*arguments, **options)

frcnn.train, frcnn.TINY_STEPS, frcnn.TINY_IMAGE_SIZE = slow_train, 2, 64
(folder / f"ready-{me}").touch()
while not (folder / f"ready-{other}").exists():
    time.sleep(0.01)
print(float(sum(p.double().sum() for p in frcnn.tiny_detector().state_dict().values())))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {
        "FRCNN_CHECKPOINTS": str(tmp_path / "checkpoints"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen(
            [*command, *pair], stdout=subprocess.PIPE, cwd=tmp_path, env=environment, text=True
        )
        for pair in (("a", "b"), ("b", "a"))
    ]
    sums = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert len(list(tmp_path.glob("trained-*"))) == 1
    assert sums[0] == sums[1]
