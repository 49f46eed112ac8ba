"""Dead processes, full disks, wrong hands: a run goes on to the same end, and a learner reads one line.

Run as a script with a folder, this file is the driver of the kills: it imports everything once and forks every attempt.
"""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jupyter_client
import pytest
import torch

import frcnn_common as frcnn

KILLS = 50  # moments at which a run is killed; README's table quotes it
AIMED = 20  # of them so many while a checkpoint is being written
RUN = "train --model tiny --source glyphs --image-size 64 --batch 1 --steps 10 --save-every 2 --checkpoint"
SAVES = 5
INTERRUPTS = 4  # of a cell in a notebook
LIMITS = 8  # sizes at which the disk is full
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def same(left: object, right: object) -> bool:
    """Whether two checkpoints hold the same, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def unfinished(folder: Path) -> list[Path]:
    """Files that a checkpoint is being written into, or was when its writer died."""
    return list(folder.glob(".*.tmp"))


# Kills


def in_a_child(function, *arguments) -> int:
    """The process id of a copy of this process that calls the function, and nothing else."""
    child = os.fork()
    if not child:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 1
        try:
            code = function(*arguments)
        finally:
            os._exit(code)
    return child


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_whole(path: Path, clock: Path) -> int:
    """The run that nobody kills, and how long it and each of its saves take."""
    save, seconds, start = frcnn.save_checkpoint, [], time.perf_counter()

    def timed(*arguments, **state):
        before = time.perf_counter()
        save(*arguments, **state)
        seconds.append(time.perf_counter() - before)

    frcnn.save_checkpoint = timed
    code = frcnn.main([*RUN.split(), str(path)])
    clock.write_text(json.dumps({"run": time.perf_counter() - start, "saves": seconds}))
    return code


def kill_in_a_save(child: int, folder: Path, number: int, delay: float) -> None:
    """Kill the child so long after it has begun to write for the so-many-th time, unless it ends before."""
    begun, writing = 0, False
    while (
        begun < number and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        writing, before = bool(unfinished(folder)), writing
        begun += writing and not before
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)


def resume(path: Path, whole: Path, report: Path) -> int:
    """What the killed run left, and whether it goes on from there to the end of the one that nobody killed."""
    step = frcnn.load_checkpoint(path)[1]["step"] if path.exists() else 0
    torn = len(unfinished(path.parent))
    code = frcnn.main([*RUN.split(), str(path), "--resume"])
    equal = same(torch.load(path, weights_only=True), torch.load(whole, weights_only=True))
    left = sorted(file.name for file in path.parent.iterdir())
    report.write_text(
        json.dumps({"step": step, "torn": torn, "code": code, "equal": equal, "left": left})
    )
    return 0


def drive(folder: Path) -> list[dict]:
    """Kill the run at `KILLS` moments, each time from its beginning, and resume each to the end."""
    torch.set_num_threads(1)
    whole, clock, report = folder / "whole.pt", folder / "clock.json", folder / "report.json"
    assert end_of(in_a_child(train_whole, whole, clock)) == 0
    seconds = json.loads(clock.read_text())
    rng, killed = random.Random(0), []
    for attempt in range(2 * KILLS):
        if len(killed) == KILLS:
            break
        path = folder / f"attempt-{attempt}" / "killed.pt"
        path.parent.mkdir()
        aimed = len(killed) < AIMED
        child = in_a_child(frcnn.main, [*RUN.split(), str(path)])
        if aimed:
            delay = rng.uniform(0, statistics.median(seconds["saves"]))
            kill_in_a_save(child, path.parent, rng.randint(1, SAVES), delay)
        else:
            time.sleep(rng.uniform(0, seconds["run"]))
            os.kill(child, signal.SIGKILL)
        if end_of(child) != -signal.SIGKILL:
            continue  # it had ended before
        report.unlink(missing_ok=True)
        assert end_of(in_a_child(resume, path, whole, report)) == 0, (
            f"attempt {attempt} left what cannot be resumed"
        )
        killed.append({"aimed": aimed} | json.loads(report.read_text()))
        for file in path.parent.iterdir():
            file.unlink()  # 33 MB each
    return killed


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "waitid"), reason="fork and waitid are of Linux")
def test_runs_killed_at_50_moments_all_end_as_the_one_nobody_killed(tmp_path):
    """Every checkpoint after a kill is absent or whole; every end is the same bit for bit, the generators included."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | ON_CPU,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    killed = json.loads(done.stdout)
    assert len(killed) == KILLS
    assert [record for record in killed if record["code"] != 0 or not record["equal"]] == []
    assert [record for record in killed if record["left"] != ["killed.pt"]] == []
    # The moments were all over the run, and in the middle of writing.
    assert len({record["step"] for record in killed}) >= 5
    assert sum(record["torn"] for record in killed) >= AIMED / 2


# Ctrl-C in a notebook

CELL = """
import torch
from torch.utils.data import DataLoader
import frcnn_common as frcnn

def run(path, workers, resume):
    torch.manual_seed(0)
    model = frcnn.tiny_faster_rcnn()
    dataset = frcnn.COCOStreamDataset("train", source="glyphs", image_size=64)
    loader = DataLoader(dataset, 1, num_workers=workers, collate_fn=frcnn.frcnn_collate_fn)
    frcnn.train(model, loader, 40, checkpoint_path=path, save_every=2, resume=resume)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A notebook's kernel that has `run`: its manager, its client, and its folder."""
    folder = tmp_path_factory.mktemp("kernel")
    manager, client = jupyter_client.manager.start_new_kernel(env=os.environ | ON_CPU, cwd=folder)
    assert client.execute_interactive(CELL, timeout=120)["content"]["status"] == "ok"
    yield manager, client, folder
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_cell_leaves_the_kernel_alive_and_a_checkpoint_to_resume_from(
    workers, kernel
):
    """One run is interrupted several times, every second time while it writes."""
    manager, client, folder = kernel
    path, rng, steps = folder / f"cut-{workers}.pt", random.Random(workers), [0]
    for interrupt in range(INTERRUPTS):
        saved = path.stat().st_mtime_ns if path.exists() else None
        client.execute(f"run({path.name!r}, {workers}, resume=True)", stop_on_error=False)
        deadline = time.monotonic() + 60
        while (
            path.stat().st_mtime_ns if path.exists() else None
        ) == saved and time.monotonic() < deadline:
            time.sleep(0.005)
        while interrupt % 2 and not unfinished(folder) and time.monotonic() < deadline:
            pass
        time.sleep(rng.uniform(0, 0.04))
        manager.interrupt_kernel()
        stopped = client.get_shell_msg(timeout=60)["content"]
        assert (stopped["status"], stopped.get("ename")) == ("error", "KeyboardInterrupt")
        alive = client.execute_interactive("", user_expressions={"sum": "1 + 1"}, timeout=60)[
            "content"
        ]
        assert alive["user_expressions"]["sum"]["data"]["text/plain"] == "2"
        assert unfinished(folder) == []
        steps.append(frcnn.load_checkpoint(path)[1]["step"])
    assert steps == sorted(steps)
    assert 0 < steps[1] < steps[-1] < 40
    for name, resume in ((path.name, True), (f"whole-{workers}.pt", False)):
        reply = client.execute_interactive(f"run({name!r}, {workers}, {resume})", timeout=120)
        assert reply["content"]["status"] == "ok"
    assert same(
        *(
            torch.load(folder / f"{name}-{workers}.pt", weights_only=True)
            for name in ("cut", "whole")
        )
    )


# Saving fails


class Refusing:
    """A file that takes so many writes and raises at the next."""

    def __init__(self, file, writes, error):
        self.file, self.writes, self.error = file, writes, error

    def write(self, data):
        self.writes -= 1
        if self.writes == -1 or (
            self.writes < 0 and isinstance(self.error, OSError)
        ):  # a full disk stays full
            raise self.error
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


class Small(torch.nn.Linear):
    """What a checkpoint needs of a model."""

    name = "small"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_a_write_that_is_refused_keeps_its_reason_and_the_old_file(error, monkeypatch, tmp_path):
    """At every write of `torch.save`, which by itself would end with an assertion of its own."""
    path, save = tmp_path / "c.pt", torch.save
    frcnn.save_checkpoint(path, Small(3, 2), step=1)
    before, refused = path.read_bytes(), 0
    for writes in itertools.count():
        monkeypatch.setattr(
            torch, "save", lambda state, file, n=writes: save(state, Refusing(file, n, error))
        )
        try:
            frcnn.save_checkpoint(path, Small(3, 2), step=2)
            break
        except type(error) as raised:
            refused += 1
            assert isinstance(raised, KeyboardInterrupt) or str(path) in str(raised)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
    assert refused > 10
    assert torch.load(path, weights_only=True)["step"] == 2


@pytest.fixture
def largest_file():
    """``largest_file(size)``: no file of this process may grow further, as on a full disk; None takes it back."""
    resource = pytest.importorskip("resource", reason="limits are of Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


def test_a_full_disk_costs_one_line_and_no_step_that_was_saved(
    largest_file, capfd, monkeypatch, tmp_path
):
    monkeypatch.setattr(frcnn, "DEVICE", torch.device("cpu"))
    line = "train --model tiny --source glyphs --image-size 64 --batch 1 --steps 4 --save-every 2 --checkpoint"
    path, whole = tmp_path / "cut.pt", tmp_path / "whole.pt"
    assert frcnn.main([*line.split(), str(whole)]) == 0
    save = frcnn.save_checkpoint

    def stop_after_the_first(*arguments, **state):
        save(*arguments, **state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frcnn, "save_checkpoint", stop_after_the_first)
        assert frcnn.main([*line.split(), str(path)]) == 130
    before, size = path.read_bytes(), whole.stat().st_size
    for i in range(LIMITS):
        capfd.readouterr()
        largest_file(max(2**17, size * i // LIMITS, size - 1 if i == LIMITS - 1 else 0))
        code = frcnn.main([*line.split(), str(path), "--resume"])
        largest_file(None)
        error = capfd.readouterr().err.splitlines()[-1]
        assert code == 2
        assert (
            error
            == f"frcnn_common: error: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: {str(path)!r}"
        )
        assert path.read_bytes() == before
        assert sorted(tmp_path.iterdir()) == [path, whole]
    assert frcnn.main([*line.split(), str(path), "--resume"]) == 0
    assert same(torch.load(path, weights_only=True), torch.load(whole, weights_only=True))


# A checkout that cannot be written

READ_ONLY = """
import contextlib, io, json, matplotlib.figure
import frcnn_common as frcnn

frcnn.TINY_STEPS, frcnn.TINY_IMAGE_SIZE = 2, 64
trained, train = [], frcnn.train
frcnn.train = lambda *arguments, **options: trained.append(options["checkpoint_path"]) or train(*arguments, **options)

def use():
    # A figure, and the tiny detector, where nothing can be written.
    before, said = sorted(frcnn.ROOT.rglob("*")), io.StringIO()
    folders = [frcnn.ROOT, *(path for path in before if path.is_dir())]
    trained.clear()
    for folder in folders:
        folder.chmod(0o555)
    with contextlib.redirect_stdout(said):
        frcnn_lesson.save_figure(matplotlib.figure.Figure(), "plot.png")
        model = frcnn.tiny_detector()
    for folder in folders:
        folder.chmod(0o755)
    assert not model.training
    assert sorted(frcnn.ROOT.rglob("*")) == before
    weights = [float(value.double().abs().sum()) for value in model.state_dict().values()]
    return {"said": said.getvalue().splitlines(), "trained": list(trained), "weights": weights}

reports = [use()]
frcnn.FIGURES.mkdir()
frcnn.CHECKPOINTS.mkdir()
reports.append(use())
frcnn.tiny_detector()
(frcnn.CHECKPOINTS / "tiny.pt.lock").unlink(missing_ok=True)  # as in a copy that a teacher made
reports.append(use())
print(json.dumps(reports))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="these permissions are of Unix")
def test_a_read_only_checkout_says_what_it_does_not_save_and_goes_on(tmp_path):
    """Without the folders, with empty ones, and with a detector that was saved before: that one is taken."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(frcnn.__file__, checkout)
    bound = []
    if os.geteuid() == 0:  # whom no permission binds as long as he has this capability
        bound = ["setpriv", "--bounding-set", "-dac_override"]
        if not shutil.which(bound[0]):
            pytest.skip("root may write everywhere, and there is no setpriv to take that away")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("FRCNN_")
    } | ON_CPU
    command = [*bound, sys.executable, "-Bc", READ_ONLY]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    without, empty, saved = json.loads(done.stdout.splitlines()[-1])
    refused = f"[Errno {errno.EACCES}] {os.strerror(errno.EACCES)}: "
    figures, checkpoints = checkout / "figures", checkout / "checkpoints"
    detector = "The tiny detector is trained and not saved: "
    assert without["said"] == [
        f"plot.png is not saved: {refused}{str(figures)!r}",
        f"{detector}{refused}{str(checkpoints)!r}",
    ]
    assert empty["said"] == [
        f"plot.png is not saved: {refused}{str(figures / 'plot.png')!r}",
        f"{detector}{refused}{str(checkpoints / 'tiny.pt.lock')!r}",
    ]
    assert saved["said"] == empty["said"][:1]
    assert [report["trained"] for report in (without, empty, saved)] == [[None], [None], []]
    assert (
        without["weights"] == empty["weights"] == saved["weights"]
    )  # unsaved or saved, it is the same detector


if __name__ == "__main__":
    print(json.dumps(drive(Path(sys.argv[1]))))
