"""Several processes under torchrun, on gloo: what two do together is what one does with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import frcnn_common as frcnn

# The command line, with a note of every scene that is drawn.
DRIVER = """
import os, sys
import frcnn_common as frcnn

render = frcnn.render_glyph_scene

def noted(seed, size):
    with open(f"{os.environ['SEEN']}.{os.environ['RANK']}", "a") as file:
        file.write(f"{seed} ")
    return render(seed, size)

frcnn.render_glyph_scene = noted
sys.exit(frcnn.main())
"""


def command(
    processes: int, *arguments: object, seen: Path | None = None
) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "frcnn_common"]
    if processes > 1:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        if seen:
            driver = seen.with_suffix(".py")
            driver.write_text(DRIVER)
            environment["SEEN"] = str(seen)
            launch.append(str(driver))
        else:
            launch += ["-m", "frcnn_common"]
    return subprocess.run(
        [*launch, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


TRAIN = ("train", "--model", "tiny", "--source", "glyphs", "--steps", 30)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """30 steps of two processes with a batch of 4 each."""
    folder = tmp_path_factory.mktemp("two")
    done = command(2, *TRAIN, "--batch", 4, "--checkpoint", folder / "two.pt", seen=folder / "seen")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_one_line_reports_the_run(two):
    (line,) = two[1].stdout.splitlines()
    result = json.loads(line)
    assert result["steps"] == 30
    assert result["images_per_second"] * result["seconds"] == pytest.approx(240)
    assert two[1].stderr.count("| 0/30 ") == 1  # one bar


def test_one_checkpoint_that_one_process_can_load(two):
    assert [path.name for path in two[0].glob("*.pt")] == ["two.pt"]
    model, state = frcnn.load_checkpoint(two[0] / "two.pt")
    assert model.name == "tiny"
    assert len(state["history"]["loss"]) == 30
    assert state["history"]["loss"][-1] < 2 < state["history"]["loss"][0]
    assert state["run"]["processes"] == 2


def test_the_first_240_scenes_are_seen_once_over_the_two(two):
    seen = [
        [int(seed) for seed in (two[0] / f"seen.{rank}").read_text().split()] for rank in (0, 1)
    ]
    assert len(seen[0]) >= 120 <= len(seen[1])
    assert sorted(seen[0][:120] + seen[1][:120]) == list(range(240))


def test_first_losses_are_those_of_one_process_with_twice_the_batch(two, tmp_path):
    done = command(1, *TRAIN[:-1], 2, "--batch", 8, "--checkpoint", tmp_path / "one.pt")
    assert done.returncode == 0, done.stderr
    one = frcnn.load_checkpoint(tmp_path / "one.pt")[1]["history"]
    both = frcnn.load_checkpoint(two[0] / "two.pt")[1]["history"]
    for name in ("loss", *frcnn.LOSS_NAMES):
        assert both[name][0] == pytest.approx(one[name][0], rel=1e-3), name


def test_evaluation_gathers_over_the_processes(two):
    arguments = (
        "evaluate",
        "--checkpoint",
        two[0] / "two.pt",
        "--source",
        "glyphs",
        "--max-samples",
        13,
    )
    alone, together = command(1, *arguments), command(2, *arguments)
    assert alone.returncode == together.returncode == 0, together.stderr
    assert len(together.stdout.splitlines()) == 1
    assert json.loads(together.stdout) == pytest.approx(json.loads(alone.stdout), abs=1e-4)


def test_resume_of_two_processes_is_exact_and_one_is_refused(two, tmp_path):
    begin = (
        "train",
        "--model",
        "tiny",
        "--source",
        "glyphs",
        "--batch",
        2,
        "--steps",
        6,
        "--save-every",
        3,
    )
    whole = tmp_path / "whole.pt"
    assert command(2, *begin, "--checkpoint", whole).returncode == 0
    killed = tmp_path / "killed.pt"
    stop = (
        "import frcnn_common as f, os; s = f.save_checkpoint\n"
        + (
            "def save(*a, **k):\n    s(*a, **k)\n    os._exit(1)\n"  # rank 0 dies right after its first checkpoint
            "f.save_checkpoint = save\nraise SystemExit(f.main())\n"
        )
    )
    (tmp_path / "stop.py").write_text(stop)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    arguments = [str(a) for a in (*begin, "--checkpoint", killed)]
    died = subprocess.run(
        [*launch, str(tmp_path / "stop.py"), *arguments],
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert died.returncode != 0
    assert frcnn.load_checkpoint(killed)[1]["step"] == 3

    refused = command(1, *begin, "--checkpoint", killed, "--resume")
    assert refused.returncode == 2
    assert "processes 2 (now 1)" in refused.stderr
    assert frcnn.load_checkpoint(killed)[1]["step"] == 3

    assert command(2, *begin, "--checkpoint", killed, "--resume").returncode == 0
    expected, resumed = (frcnn.load_checkpoint(path)[1]["history"] for path in (whole, killed))
    assert resumed["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def _worker(rank: int, world: int, store: str, results: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3)
    norm = frcnn.SyncedBatchNorm2d(5)
    mine = x[rank::world].clone().requires_grad_()
    out = norm(mine)
    (out.square() * torch.arange(1.0, 6.0)[:, None, None]).sum().backward()
    held = frcnn.COCOStreamDataset("train", 20, "glyphs", 32)
    torch.save(
        {
            "out": out.detach(),
            "grad": mine.grad,
            "weight": norm.weight.grad,
            "mean": norm.running_mean,
            "var": norm.running_var,
            "ids": [
                target["image_id"]
                for _, target in torch.utils.data.DataLoader(held, batch_size=None, num_workers=2)
            ],
        },
        f"{results}.{rank}",
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(_worker, (2, str(folder / "store"), str(folder / "out")), nprocs=2)
    return [torch.load(folder / f"out.{rank}", weights_only=True) for rank in (0, 1)]


def test_batch_norm_sees_the_batches_of_all_processes(workers):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3).requires_grad_()
    norm = torch.nn.BatchNorm2d(5)
    out = norm(x)
    (out.square() * torch.arange(1.0, 6.0)[:, None, None]).sum().backward()
    for rank, found in enumerate(workers):
        torch.testing.assert_close(found["out"], out[rank::2].detach())
        torch.testing.assert_close(found["mean"], norm.running_mean)
        torch.testing.assert_close(found["var"], norm.running_var)
        torch.testing.assert_close(found["grad"], x.grad[rank::2], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(workers[0]["weight"] + workers[1]["weight"], norm.weight.grad)


def test_two_processes_with_two_workers_each_see_every_scene_once(workers):
    assert sorted(workers[0]["ids"] + workers[1]["ids"]) == list(range(20))
    assert min(len(found["ids"]) for found in workers) == 10
