"""The files around the code agree with each other, and the module works where it promises to.

Dependencies and Pythons, figures, what the README quotes, folders of any name.
"""

import ast
import collections
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import conftest
import datasets
import PIL.Image
import pytest
import test_boxes
import test_hostile_data as sources
import test_proposals
import test_roi_head
import test_training
import yaml
from hypothesis import is_hypothesis_test
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import frcnn_common as frcnn

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text()


# --- dependencies and Pythons ---------------------------------------------------------


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_has_one_tested_version_inside_its_range():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    pins = {
        canonical(name): Version(version) for name, version in (line.split("==") for line in lines)
    }
    assert len(pins) == len(lines)
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert pins[canonical(requirement.name)] in requirement.specifier, requirement


def test_conda_installs_the_same_through_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == [
        "conda-forge",
        "nodefaults",
    ]  # the pytorch channel ended at 2.5
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e ."]}
    (python,) = (entry for entry in conda if entry.startswith("python="))
    assert (
        Version(python.removeprefix("python="))
        in Requirement(f"x{PROJECT['requires-python']}").specifier
    )


def test_module_imports_only_what_is_listed():
    tree = ast.parse((ROOT / "frcnn_common.py").read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    listed = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]} | {
        "pil"
    }  # pillow
    foreign = {
        canonical(name.split(".")[0])
        for name in imported
        if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign <= listed


PYTHONS = ("3.11", "3.12", "3.13")


def test_pythons_from_3_11_on_are_promised_and_no_older_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    promised = SpecifierSet(project["project"]["requires-python"])
    assert [f"3.{minor}" in promised for minor in range(9, 14)] == [False, False, True, True, True]
    assert project["tool"]["ruff"]["target-version"] == "py311"


@pytest.mark.parametrize("version", PYTHONS)
def test_the_module_is_written_in_every_python_that_is_promised(version):
    """By its grammar, and by each interpreter that this machine has, without a warning."""
    source = Path(frcnn.__file__).read_text(encoding="utf-8")
    ast.parse(source, feature_version=tuple(map(int, version.split("."))))
    python = shutil.which(f"python{version}")
    if python and subprocess.run([python, "-V"], capture_output=True, check=False).returncode == 0:
        check = "import sys; compile(sys.stdin.buffer.read(), 'frcnn_common.py', 'exec')"
        command = [python, "-W", "error", "-c", check]
        done = subprocess.run(command, input=source.encode(), capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()


# --- files ----------------------------------------------------------------------------


def test_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) - {"a"} <= targets


def test_readme_links_to_files_that_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_public_functions_and_classes_say_what_they_do():
    tree = ast.parse((ROOT / "frcnn_common.py").read_text())
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_figures_are_small_and_made_by_a_notebook():
    makers = "".join(notebook.read_text().replace('\\"', '"') for notebook in NOTEBOOKS)
    makers += (ROOT / "benchmarks" / "speed.py").read_text()
    figures = sorted((ROOT / "figures").iterdir())
    assert len(figures) > 40
    assert [path.name for path in figures if path.stat().st_size > 150_000] == []
    assert [path.name for path in figures if f'"{path.name}"' not in makers] == []


def test_no_file_is_large():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert [name for name in tracked if name and (ROOT / name).stat().st_size > 1_500_000] == []


# --- what the README quotes -----------------------------------------------------------


def test_readme_quotes_the_benchmark():
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    for name, (theirs, ours) in results["seconds of torchvision and ours"].items():
        assert f"| {name} | {ours / theirs:.2f} |" in README
    seeds = results["training"]
    ratios = [
        a["seconds"] / b["seconds"]
        for a, b in zip(seeds["ours"], seeds["torchvision"], strict=True)
    ]
    assert f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" in README
    for name, runs in (("here", seeds["ours"]), ("torchvision's parts", seeds["torchvision"])):
        columns = (
            (key, [run[key] for run in runs], places)
            for key, places in (("AP50", 3), ("AP", 3), ("seconds", 0))
        )
        quoted = [
            f"{statistics.median(v):.{p}f} ({min(v):.{p}f} to {max(v):.{p}f})"
            for _, v, p in columns
        ]
        assert f"| {name}, {runs[0]['steps']} steps | {' | '.join(quoted)} |" in README
    assert f"{results['input']['ratio']:.2f} of the images a second" in README
    memory = results["peak memory in MB"]
    assert f"{memory['ours']:.0f} MB at its peak, torchvision's {memory['theirs']:.0f} MB" in README
    whole = sum(stage["seconds"] for stage in results["stages"].values())
    shares = [
        f"{name} {100 * stage['seconds'] / whole:.0f} %"
        for name, stage in results["stages"].items()
    ]
    assert f"Time by stage, batch 2: {', '.join(shares)}." in README
    reached = [
        f"{name} {stage['of_best']:.2f}"
        for name, stage in results["stages"].items()
        if stage["gflops"]
    ]
    assert f"(1 is the limit): {', '.join(reached)}." in README
    for name, cost in results["growth"].items():
        (first, start), *_, (last, end) = cost.items()
        assert re.search(
            rf"{name}( in training)? {first} to {last}: {end / start:.1f} times", README
        )


# What the README's table of reliability quotes, and the files that hold it.
HOSTILE = sources.HOSTILE  # (name, sample, outcome, ...)
PROPERTIES = [  # files with properties that are tried on values of chance, and how many values
    ([sources], sources.EXAMPLES),
    ([test_boxes, test_proposals, test_roi_head], conftest.EXAMPLES),
]
KILLS, AIMED, LIMITS = test_training.KILLS, test_training.AIMED, test_training.LIMITS


def test_readme_states_what_was_tried():
    outcomes = collections.Counter(outcome for _, _, outcome, *_ in HOSTILE)
    served, skipped = outcomes["served"], outcomes["skipped"]
    ended = f"{served} served as promised, {skipped} skipped, named and counted, "
    ended += f"{outcomes['error']} ended with one clear error"
    assert f"| {outcomes.total()} | {ended} |" in README
    fuzzed = []
    for modules, examples in PROPERTIES:
        tests = [test for module in modules for test in vars(module).values()]
        fuzzed.append(f"{sum(map(is_hypothesis_test, tests))} × {examples}")
    assert f"| {' and '.join(fuzzed)} | every promise kept |" in README
    killed = f"killed with SIGKILL, {AIMED} times while it wrote | {KILLS} | {KILLS} left"
    assert killed in README
    assert f"{KILLS} of {KILLS} resumes" in README
    assert f"| {LIMITS} | the old checkpoint stayed whole" in README
    assert f"above {frcnn.MAX_PIXELS // 10**6} million pixels" in README


# --- a folder of any name -------------------------------------------------------------

NAME = "Kürs № 1 Ωß [a*] 100%"


IN_THE_FOLDER = """
import matplotlib.figure, runpy, sys

train = "train --model tiny --image-size 64 --batch 2 --steps 2 --checkpoint"
sys.argv[1:] = [*train.split(), "Modell ß.pt", "--source", sys.argv[1]]
try:
    runpy.run_module("frcnn_common", run_name="__main__", alter_sys=True)  # as python -m does
except SystemExit as end:
    assert end.code == 0

import frcnn_common as frcnn

frcnn.TINY_STEPS, frcnn.TINY_IMAGE_SIZE = 2, 64
frcnn.tiny_detector()
frcnn.tiny_detector()
frcnn.save_figure(matplotlib.figure.Figure(), "ß 1.png")
use = ["--checkpoint", "Modell ß.pt"]
sys.exit(
    frcnn.main(["evaluate", *use, "--source", "Bilder Ω", "--max-samples", "3"])
    or frcnn.main(["detect", *use, "Fotos №", "--out", "gezeichnet Ω"])
)
"""


def test_everything_works_below_a_path_with_spaces_and_other_letters(tmp_path):
    """Module, data, checkpoint, pictures, results; the terminal knows none of the letters."""
    folder = tmp_path / NAME
    (folder / "Bilder Ω").mkdir(parents=True)
    (folder / "Fotos №").mkdir()
    shutil.copy(frcnn.__file__, folder)
    for split, seeds in (("train", range(20)), ("val", range(100, 103))):
        rows = [frcnn.render_glyph_scene(seed, 64) for seed in seeds]
        datasets.Dataset.from_list(rows).to_parquet(
            folder / "Bilder Ω" / f"{split}-00000-of-00001.parquet"
        )
    PIL.Image.new("RGB", (50, 40), "red").save(folder / "Fotos №" / "Foto Ä.png")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("FRCNN_")
    }
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}

    command = [sys.executable, "-c", IN_THE_FOLDER, str(folder / "Bilder Ω")]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    trained, evaluated, detected = (
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")
    )
    assert (trained["steps"], detected["images"], detected["failed"]) == (2, 1, 0)
    assert list(evaluated) == list(frcnn.COCO_FIGURES)
    (record,) = json.loads((folder / "gezeichnet Ω" / "detections.json").read_text())
    assert Path(record["image"]) == Path("Fotos №", "Foto Ä.png")
    written = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".pt", ".jpg", ".png")
    }
    assert written == {
        "Modell ß.pt",
        str(Path("checkpoints", "tiny.pt")),
        str(Path("figures", "ß 1.png")),
        str(Path("Fotos №", "Foto Ä.png")),
        str(Path("gezeichnet Ω", "0000_Foto Ä.jpg")),
    }
