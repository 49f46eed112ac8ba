"""The files around the code agree with each other, and the notebooks are as committed ones should be."""

import ast
import collections
import json
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import test_hostile_data
import test_hostile_model
import test_hostile_processes
import yaml
from hypothesis import is_hypothesis_test
from packaging.requirements import Requirement
from packaging.version import Version

import frcnn_common as frcnn

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize("path", sorted((ROOT / "figures").iterdir()), ids=lambda path: path.name)
def test_figure_is_small_and_made_by_a_notebook(path):
    assert path.stat().st_size <= 150_000
    makers = [notebook.read_text().replace('\\"', '"') for notebook in NOTEBOOKS]
    makers.append((ROOT / "benchmarks" / "speed.py").read_text())
    assert any(f'"{path.name}"' in maker for maker in makers)


def test_no_file_is_large():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert [name for name in tracked if name and (ROOT / name).stat().st_size > 1_500_000] == []


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


def test_readme_states_what_was_tried():
    outcomes = collections.Counter(outcome for _, _, outcome, *_ in test_hostile_data.HOSTILE)
    ended = (
        f"{outcomes['served']} served as promised, {outcomes['skipped']} skipped, named and counted"
    )
    assert (
        f"| {outcomes.total()} | {ended}, {outcomes['error']} ended with one clear error |"
        in README
    )
    modules = (test_hostile_data, test_hostile_model)
    fuzzed = [
        f"{sum(map(is_hypothesis_test, vars(module).values()))} × {module.EXAMPLES}"
        for module in modules
    ]
    assert f"| {' and '.join(fuzzed)} | every promise kept |" in README
    kills = test_hostile_processes.KILLS
    assert (
        f"killed with SIGKILL, {test_hostile_processes.AIMED} times while it wrote | {kills} | {kills} left"
        in README
    )
    assert f"{kills} of {kills} resumes" in README
    assert f"| {test_hostile_processes.LIMITS} | the old checkpoint stayed whole" in README
    assert f"above {frcnn.MAX_PIXELS // 10**6} million pixels" in README
