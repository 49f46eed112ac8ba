"""To be merged into test_project.py: files from elsewhere run no code.

Ruff has rules against most ways by which a file could; the rest is looked for here.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat

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
    assert len(NOTEBOOKS) == 7
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
