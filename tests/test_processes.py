"""Several processes under torchrun, on gloo: two together do what one does with twice the batch.

Run under torchrun with a folder, this file is the driver: each rank imports everything once and
forks every scenario. What it writes, by scenario and rank, the tests read.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import frcnn_common as frcnn
import frcnn_sources

TRAIN = ["train", "--model", "tiny", "--source", "glyphs", "--image-size", "64"]
LONG = [*TRAIN, "--steps", "30", "--batch", "4"]
SHORT = [*TRAIN, "--steps", "6", "--batch", "2", "--save-every", "3"]
EVALUATE = ["evaluate", "--source", "glyphs", "--max-samples", "13"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is of Unix")


# --- the driver -----------------------------------------------------------------------------------


def train_noting_scenes(folder: Path) -> int:
    """The long run, with a note of every scene that is drawn."""
    render, notes = frcnn_sources.render_glyph_scene, folder / f"seen.{os.environ['RANK']}"

    def noted(seed: int, size: int) -> dict:
        with notes.open("a") as file:
            file.write(f"{seed} ")
        return render(seed, size)

    frcnn_sources.render_glyph_scene = noted
    return frcnn.main([*LONG, "--checkpoint", str(folder / "two.pt")])


def train_until_rank_0_dies(folder: Path) -> int:
    """The short run; rank 0 dies right after its first checkpoint, and rank 1 notices."""
    save = frcnn.save_checkpoint

    def save_and_die(*arguments: object, **state: object) -> None:
        save(*arguments, **state)
        os._exit(1)

    frcnn.save_checkpoint = save_and_die
    return frcnn.main([*SHORT, "--checkpoint", str(folder / "killed.pt")])


def use_the_parts(folder: Path) -> int:
    """Batch norm over both, and a stream that two workers of each read."""
    torch.distributed.init_process_group("gloo")
    rank, world = frcnn.process_rank()
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3)
    norm = frcnn.SyncedBatchNorm2d(5)
    mine = x[rank::world].clone().requires_grad_()
    out = norm(mine)
    (out.square() * torch.arange(1.0, 6.0)[:, None, None]).sum().backward()
    held = frcnn.COCOStreamDataset("train", 20, "glyphs", 32)
    loader = torch.utils.data.DataLoader(held, batch_size=None, num_workers=2)
    found = {"out": out.detach(), "grad": mine.grad, "weight": norm.weight.grad}
    found |= {"mean": norm.running_mean, "var": norm.running_var}
    found["ids"] = [target["image_id"] for _, target in loader]
    torch.save(found, folder / f"parts.{rank}.pt")
    torch.distributed.destroy_process_group()
    return 0


def meet_at(file: Path) -> None:
    """Let the ranks find each other through a file of their own.

    Torchrun's store serves one meeting: a second would read the addresses of the first.
    """
    place = {"init_method": f"file://{file}", "rank": int(os.environ["RANK"]), "world_size": 2}
    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = functools.partial(join, **place)


def forked(name: str, folder: Path, scenario: Callable[[Path], int]) -> int:
    """The exit code of a scenario in a fork of this process; its output goes to files."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if name != "two":  # which meets as torchrun says
        meet_at(folder / f"{name}.store")
    for stream, end in ((1, "out"), (2, "err")):
        path = folder / f"{name}.{os.environ['RANK']}.{end}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    code = 1
    try:
        code = scenario(folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def drive(folder: Path) -> None:
    def main(arguments: list[str], checkpoint: str, *more: str) -> Callable[[Path], int]:
        return lambda folder: frcnn.main(
            [*arguments, "--checkpoint", str(folder / checkpoint), *more]
        )

    scenarios = {
        "two": train_noting_scenes,
        "evaluated": main(EVALUATE, "two.pt"),
        "whole": main(SHORT, "whole.pt"),
        "killed": train_until_rank_0_dies,
        "resumed": main(SHORT, "resumed.pt", "--resume"),
        "parts": use_the_parts,
    }
    rank, codes = os.environ["RANK"], {}
    for name, scenario in scenarios.items():
        codes[name] = forked(name, folder, scenario)
        if name == "killed" and rank == "0":
            shutil.copy(folder / "killed.pt", folder / "resumed.pt")
    (folder / f"codes.{rank}.json").write_text(json.dumps(codes))


# --- what it left ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder in which two processes went through all scenarios."""
    folder = tmp_path_factory.mktemp("ran")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, __file__, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def codes(ran: Path, name: str) -> list[int]:
    """Exit codes of a scenario's two processes."""
    return [json.loads((ran / f"codes.{rank}.json").read_text())[name] for rank in (0, 1)]


def said(ran: Path, name: str, stream: str) -> str:
    """What both processes of a scenario wrote."""
    return "".join((ran / f"{name}.{rank}.{stream}").read_text() for rank in (0, 1))


@pytest.fixture
def alone(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """The command line in this one process, on the CPU as well: code, output, errors."""
    monkeypatch.setattr(frcnn, "DEVICE", torch.device("cpu"))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = frcnn.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def history(path: Path) -> dict[str, list]:
    return frcnn.load_checkpoint(path)[1]["history"]


# --- training -------------------------------------------------------------------------------------


DRAWN = "truth in white, detections above 0.5"


def test_one_line_reports_the_run(ran):
    assert codes(ran, "two") == [0, 0], said(ran, "two", "err")
    *others, line = said(ran, "two", "out").splitlines()
    assert others == [f"{ran / 'two_val'}: validation pictures, {DRAWN}"]
    result = json.loads(line)
    assert result["steps"] == 30
    assert result["images_per_second"] * result["seconds"] == pytest.approx(240)
    assert said(ran, "two", "err").count("| 0/30 ") == 1  # one bar


def test_one_checkpoint_that_one_process_can_load(ran):
    assert sorted(path.name for path in ran.glob("t*.pt")) == ["two.pt"]
    model, state = frcnn.load_checkpoint(ran / "two.pt")
    assert model.name == "tiny"
    assert len(state["history"]["loss"]) == 30
    assert state["history"]["loss"][-1] < 2 < state["history"]["loss"][0]
    assert state["run"]["processes"] == 2


def test_the_first_240_scenes_are_seen_once_over_the_two(ran):
    seen = [[int(seed) for seed in (ran / f"seen.{rank}").read_text().split()] for rank in (0, 1)]
    assert len(seen[0]) >= 120 <= len(seen[1])
    assert sorted(seen[0][:120] + seen[1][:120]) == list(range(240))


def test_first_losses_are_those_of_one_process_with_twice_the_batch(ran, alone, tmp_path):
    code, _, error = alone(*TRAIN, "--steps", 2, "--batch", 8, "--checkpoint", tmp_path / "one.pt")
    assert code == 0, error
    one, both = history(tmp_path / "one.pt"), history(ran / "two.pt")
    for name in ("loss", *frcnn.LOSS_NAMES):
        assert both[name][0] == pytest.approx(one[name][0], rel=1e-3), name


def test_resume_of_two_processes_is_exact(ran):
    assert codes(ran, "whole") == [0, 0], said(ran, "whole", "err")
    assert 0 not in codes(ran, "killed")
    assert frcnn.load_checkpoint(ran / "killed.pt")[1]["step"] == 3
    assert codes(ran, "resumed") == [0, 0], said(ran, "resumed", "err")
    expected, resumed = history(ran / "whole.pt"), history(ran / "resumed.pt")
    assert resumed["step"] == [1, 2, 3, 4, 5, 6]
    assert resumed["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_resume_of_two_processes_by_one_is_refused(ran, alone):
    before = (ran / "killed.pt").read_bytes()
    code, _, error = alone(*SHORT, "--checkpoint", ran / "killed.pt", "--resume")
    assert code == 2
    assert "processes 2 (now 1)" in error
    assert (ran / "killed.pt").read_bytes() == before


# --- evaluation -----------------------------------------------------------------------------------


def test_evaluation_gathers_over_the_processes(ran, alone):
    assert codes(ran, "evaluated") == [0, 0], said(ran, "evaluated", "err")
    (together,) = said(ran, "evaluated", "out").splitlines()
    code, line, error = alone(*EVALUATE, "--checkpoint", ran / "two.pt")
    assert code == 0, error
    assert json.loads(together) == pytest.approx(json.loads(line), abs=1e-4)


# --- parts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(ran) -> list[dict]:
    assert codes(ran, "parts") == [0, 0], said(ran, "parts", "err")
    return [torch.load(ran / f"parts.{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_batch_norm_sees_the_batches_of_all_processes(parts):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3).requires_grad_()
    norm = torch.nn.BatchNorm2d(5)
    out = norm(x)
    (out.square() * torch.arange(1.0, 6.0)[:, None, None]).sum().backward()
    for rank, found in enumerate(parts):
        torch.testing.assert_close(found["out"], out[rank::2].detach())
        torch.testing.assert_close(found["mean"], norm.running_mean)
        torch.testing.assert_close(found["var"], norm.running_var)
        torch.testing.assert_close(found["grad"], x.grad[rank::2], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(parts[0]["weight"] + parts[1]["weight"], norm.weight.grad)


def test_two_processes_with_two_workers_each_see_every_scene_once(parts):
    assert sorted(parts[0]["ids"] + parts[1]["ids"]) == list(range(20))
    assert min(len(found["ids"]) for found in parts) == 10


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
