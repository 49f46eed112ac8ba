"""The files around the code agree with each other, and the module works where it promises to.

Dependencies and Pythons, figures, what the README quotes, folders of any name.
"""

import ast
import bisect
import collections
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import conftest
import datasets
import nbformat
import PIL.Image
import pytest
import test_boxes
import test_proposals
import test_roi_head
import test_sources as sources
import test_training
import yaml
from hypothesis import is_hypothesis_test
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import frcnn_common as frcnn
import frcnn_lesson
import frcnn_sources

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text()


# --- dependencies and Pythons ---------------------------------------------------------------------


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
    imported = set()
    for file in ("frcnn_common.py", "frcnn_sources.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    listed = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]} | {
        "pil"
    }  # pillow
    foreign = {
        canonical(name.split(".")[0])
        for name in imported
        if name.split(".")[0] not in sys.stdlib_module_names
    } - {"frcnn-common", "frcnn-sources"}
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


# --- files ----------------------------------------------------------------------------------------


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
    large = [name for name in tracked if name and (ROOT / name).stat().st_size > 1_500_000]
    assert large == [frcnn.TINY_DETECTOR.name]


# --- what the README quotes -----------------------------------------------------------------------


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
    assert frcnn.TRAIN_DEFAULTS["tiny"]["epochs"] == 30
    assert f"every picture thirty times, in {frcnn.TINY_STEPS} steps at least" in README


# --- a folder of any name -------------------------------------------------------------------------

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
import frcnn_lesson

frcnn.tiny_detector()
frcnn_lesson.save_figure(matplotlib.figure.Figure(), "ß 1.png")
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
    for module in (frcnn, frcnn_lesson, frcnn_sources):
        shutil.copy(module.__file__, folder)
    shutil.copy(frcnn.TINY_DETECTOR, folder)
    for split, seeds in (("train", range(20)), ("val", range(100, 103))):
        rows = [frcnn_sources.render_glyph_scene(seed, 64) for seed in seeds]
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
        "tiny_detector.pt",
        *(str(Path("Modell ß_val", f"{number}.jpg")) for number in range(100, 103)),
        str(Path("figures", "ß 1.png")),
        str(Path("Fotos №", "Foto Ä.png")),
        str(Path("gezeichnet Ω", "0000_Foto Ä.jpg")),
    }


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROGRAMS = [
    path for folder in (".", "benchmarks", "tests") for path in sorted((ROOT / folder).glob("*.py"))
]
RUFF = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json"]


# --- what ruff refuses ----------------------------------------------------------------------------

IMPORTS = "import asyncio, builtins, joblib, marshal, os, pandas, pickle, subprocess, torch, yaml\n"
REFUSED = [
    "torch.hub.load('someone/repository', 'model')",
    "torch.hub.load_state_dict_from_url(url)",
    "torch.jit.load(path)",
    "joblib.load(path)",
    "pickle.load(file)",
    "pickle.loads(data)",
    "pickle.Unpickler(file)",
    "marshal.loads(data)",
    "pandas.read_pickle(path)",
    "yaml.load(file)",
    "subprocess.run(words, shell=True)",
    "os.system(line)",
    "os.popen(line)",
    "os.execv(program, words)",
    "os.spawnv(os.P_WAIT, program, words)",
    "subprocess.getoutput(line)",
    "subprocess.getstatusoutput(line)",
    "asyncio.create_subprocess_shell(line)",
    "eval(text)",
    "builtins.eval(text)",
    "exec(text)",
]


def security_rules() -> str:
    """The codes of pyproject.toml that are about code in data, for the command line."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    select = settings["tool"]["ruff"]["lint"]["select"]
    return ",".join(code for code in select if re.fullmatch(r"S\d+|TID251", code))


def test_ruff_refuses_what_could_run_code_from_a_file():
    source = IMPORTS + "".join(f"{line}\n" for line in REFUSED)
    command = [*RUFF, "--select", security_rules(), "--stdin-filename", "lesson.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True)
    lines = {found["location"]["row"] - 2 for found in json.loads(done.stdout)}
    assert [line for i, line in enumerate(REFUSED) if i not in lines] == []


def test_ruff_finds_nothing_of_that_kind_in_the_project():
    command = [*RUFF, "--select", security_rules(), *map(str, [*PROGRAMS, *NOTEBOOKS])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert [(found["filename"], found["message"]) for found in json.loads(done.stdout)] == []


# --- what ruff has no rule for --------------------------------------------------------------------

STARTS_A_PROGRAM = ("subprocess.run", "Popen", "check_call", "check_output", "subprocess.call")
TEXT_AS_CODE = ("compile", "__import__")  # the tests may
UNSAFE_OPTIONS = {"allow_pickle", "trust_remote_code", "shell"}


def called(name: str, *endings: str) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def unsafe_calls(source: str) -> list[str]:
    """Loads that may unpickle, options that let data run code, programs started by one string."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        unsafe = bool(options.keys() & UNSAFE_OPTIONS)
        if called(name, "torch.load", "get_state_dict"):
            unsafe |= options.get("weights_only") != "True"
        if called(name, "load_state_dict_from_url", "jit.load", "hub.load"):
            unsafe = True  # ruff sees them where it sees the import
        if called(name, "load_dataset"):
            unsafe |= None in options  # of **options nobody knows what is in them
        if called(name, *STARTS_A_PROGRAM):
            words = call.args[0] if call.args else None
            unsafe |= words is None or isinstance(words, ast.Constant | ast.JoinedStr | ast.BinOp)
        if unsafe or name in TEXT_AS_CODE:
            found.append(ast.unparse(call))
    return found


def sources(path: Path) -> list[str]:
    """The code of a file; of a notebook cell by cell."""
    if path.suffix == ".py":
        return [path.read_text(encoding="utf-8")]
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


UNSAFE = [
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "torch.load(path, weights_only=safe)",
    "torch.load(path, **options)",
    "weights.get_state_dict(progress=True)",
    "weights.load_state_dict_from_url(url)",
    "numpy.load(path, allow_pickle=True)",
    "load_dataset(name, **options)",
    "datasets.load_dataset(name, trust_remote_code=True)",
    "subprocess.run(words, shell=some)",
    "subprocess.run(f'ls {folder}')",
    "subprocess.run('ls')",
    "subprocess.Popen('ls ' + folder)",
    "subprocess.run(args=words)",
    "compile(text, 'name', 'exec')",
    "__import__(name)",
]
SAFE = [
    "torch.load(path, map_location='cpu', weights_only=True)",
    "weights.get_state_dict(weights_only=True)",
    "numpy.load(path)",
    "datasets.load_dataset(name, split='train', streaming=True)",
    "subprocess.run([sys.executable, '-m', 'frcnn_common', name])",
    "re.compile(pattern)",
]


def test_the_search_finds_what_ruff_has_no_rule_for():
    assert [line for line in UNSAFE if len(unsafe_calls(f"def f():\n    x = [{line}]")) != 1] == []
    assert [line for line in SAFE if unsafe_calls(f"def f():\n    x = [{line}]")] == []


def test_every_load_and_every_program_is_a_safe_one():
    """`torch.load` everywhere with weights_only=True, and the others of `UNSAFE` nowhere."""
    assert {path.name for path in PROGRAMS} >= {"frcnn_common.py", "speed.py", "conftest.py"}
    assert len(NOTEBOOKS) == 8
    texts = [(path, source) for path in [*PROGRAMS, *NOTEBOOKS] for source in sources(path)]
    calls = [(path, call) for path, source in texts for call in unsafe_calls(source)]
    in_lessons = [(path.name, call) for path, call in calls if path.parent != ROOT / "tests"]
    in_tests = [(path.name, call) for path, call in calls if path.parent == ROOT / "tests"]
    assert in_lessons == []
    assert [found for found in in_tests if not found[1].startswith(TEXT_AS_CODE)] == []
    every = "\n".join(source for _, source in texts)
    for name in ("torch.load(", "load_dataset(", "subprocess.run("):
        assert every.count(name) >= 2  # the search went over them


def test_no_cell_calls_the_machine():
    """A line such as !ls or %pip, alone or behind a name, or the same as a call."""
    machine = re.compile(r"\s*(\w+\s*=\s*)?[!%]|.*get_ipython")
    lines = [
        (path.name, line)
        for path in NOTEBOOKS
        for source in sources(path)
        for line in source.splitlines()
    ]
    assert len(lines) > 1000
    assert [found for found in lines if machine.match(found[1])] == []


# --- how the module reads -------------------------------------------------------------------------

MODULE = ROOT / "frcnn_common.py"
PARTS = [
    "1. Constants",
    "2. Boxes",
    "3. Data set",
    "4. Backbone",
    "5. Proposals",
    "6. ROI head",
    "7. Detector",
    "8. Training",
    "9. Evaluation",
    "10. Drawing",
    "A. Where rows come from",
    "B. Several processes",
    "C. Published weights",
    "D. Command line",
]


def code_lines(source: str) -> list[int]:
    """Numbers of the lines that hold code: no docstring, no comment alone, nothing blank."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent.add(tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sorted(lines)


def first_line(source: str, start: str) -> int:
    return next(i for i, line in enumerate(source.splitlines(), 1) if line.startswith(start))


def test_what_counts_as_a_line_of_code():
    source = (
        '"""Doc\nstring."""\n\nX = (\n    1,  # one\n)\n# a comment\n\n\ndef f():\n    """Doc."""\n'
    )
    assert code_lines(source + "    return X\n") == [4, 5, 6, 10, 12]


def test_the_module_reads_in_the_order_of_the_data():
    rule = "# " + "-" * 98
    source = MODULE.read_text(encoding="utf-8")
    assert re.findall(rf"^{rule}\n# (.+)\n{rule}$", source, re.MULTILINE) == PARTS


def test_the_detector_comes_soon_and_the_module_is_short():
    source = MODULE.read_text(encoding="utf-8")
    lines = code_lines(source)
    before_the_network = bisect.bisect(lines, first_line(source, "class Bottleneck"))
    to_the_end_of_the_detector = bisect.bisect(lines, first_line(source, "# 8. Training"))
    assert before_the_network <= 330
    assert to_the_end_of_the_detector <= 850
    assert len(lines) <= 1850


def test_lines_of_code_are_short():
    source = MODULE.read_text(encoding="utf-8")
    assert max(map(len, source.splitlines())) <= 100
    lengths = sorted(len(source.splitlines()[i - 1]) for i in code_lines(source))
    assert statistics.median(lengths) <= 48
    assert lengths[len(lengths) * 9 // 10] <= 92


def test_functions_are_short():
    source = MODULE.read_text(encoding="utf-8")
    lines = code_lines(source)
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    sizes = []
    for node in functions:
        size = bisect.bisect(lines, node.end_lineno) - bisect.bisect_left(lines, node.lineno)
        sizes.append((size, node.name))
    assert len(sizes) > 100
    assert [(size, name) for size, name in sizes if size > 40] == []


def test_forward_comes_before_the_plumbing():
    modules = []
    for node in ast.parse(MODULE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            if "forward" in methods and "backward" not in methods:
                assert methods[methods[0] == "__init__"] == "forward", node.name
                modules.append(node.name)
    assert len(modules) >= 10
