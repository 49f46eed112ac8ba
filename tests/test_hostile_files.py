"""Files from elsewhere: none runs code, none fills the memory, and every way by which one could is looked for."""

import ast
import functools
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import nbformat
import PIL.EpsImagePlugin
import PIL.Image
import pytest
from test_data import encoded, row, stream, write

import frcnn_common as frcnn

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROGRAMS = sorted(
    path for folder in ("", "benchmarks", "tests") for path in (ROOT / folder).glob("*.py")
)
LESSONS = [
    path for path in [*PROGRAMS, *NOTEBOOKS] if path.parent.name != "tests"
]  # what a learner runs


# --- the source ------------------------------------------------------------------------------------------------------


@functools.cache
def sources(path: Path) -> list[str]:
    """The code of a file; of a notebook cell by cell."""
    if path.suffix == ".py":
        return [path.read_text(encoding="utf-8")]
    return [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]


@functools.cache
def calls(source: str) -> list[tuple[str, ast.Call]]:
    """Every call and the name under which it is made, such as ``torch.load``."""
    nodes = ast.walk(ast.parse(source))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def literal(call: ast.Call, name: str) -> object:
    """The value that stands behind ``name=`` in a call; the class `ast` itself where none does, or no plain value."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else ast


def called(name: str, *endings: str) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def loads_that_could_run_code(source: str) -> list[str]:
    found = []
    for name, call in calls(source):
        pickled = called(
            name, "torch.load", "get_state_dict", "load_state_dict_from_url", "jit.load", "hub.load"
        )
        if pickled and not (
            called(name, "torch.load", "get_state_dict") and literal(call, "weights_only") is True
        ):
            found.append(ast.unparse(call))
        if called(
            name,
            "pickle.load",
            "pickle.loads",
            "Unpickler",
            "joblib.load",
            "yaml.load",
            "read_pickle",
        ):
            found.append(ast.unparse(call))
        if any(keyword.arg in ("allow_pickle", "trust_remote_code") for keyword in call.keywords):
            found.append(ast.unparse(call))
        if called(name, "load_dataset") and any(keyword.arg is None for keyword in call.keywords):
            found.append(ast.unparse(call))  # of **options nobody knows what is in them
    return found


def shells(source: str) -> list[str]:
    found = []
    for name, call in calls(source):
        if called(
            name, "os.system", "os.popen", "getoutput", "getstatusoutput", "create_subprocess_shell"
        ):
            found.append(ast.unparse(call))
        if any(keyword.arg == "shell" for keyword in call.keywords) or name.startswith(
            ("os.exec", "os.spawn")
        ):
            found.append(ast.unparse(call))
        if called(
            name, "subprocess.run", "Popen", "check_call", "check_output", "subprocess.call"
        ) and (not call.args or isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)):
            found.append(ast.unparse(call))  # one string instead of a list of arguments
    return found


def evaluated(source: str) -> list[str]:
    return [
        ast.unparse(call)
        for name, call in calls(source)
        if name in ("eval", "exec", "compile", "__import__")
    ]


LOADING = {
    "torch.load(path)": 1,
    "torch.load(path, weights_only=False)": 1,
    "torch.load(path, weights_only=safe)": 1,
    "torch.load(path, **options)": 1,
    "torch.load(path, map_location='cpu', weights_only=True)": 0,
    "weights.get_state_dict(progress=True)": 1,
    "weights.get_state_dict(weights_only=True)": 0,
    "pickle.loads(data)": 1,
    "numpy.load(path, allow_pickle=True)": 1,
    "numpy.load(path)": 0,
    "torch.hub.load('someone/repository', 'model')": 1,
    "datasets.load_dataset(name, trust_remote_code=True)": 1,
    "load_dataset(name, **options)": 1,
    "datasets.load_dataset(name, split='train', streaming=True)": 0,
}
SHELLS = {
    "subprocess.run(words, shell=True)": 1,
    "subprocess.run(f'ls {folder}')": 1,
    "subprocess.run('ls')": 1,
    "subprocess.run('ls ' + folder)": 1,
    "subprocess.run([sys.executable, '-m', 'frcnn_common', name])": 0,
    "os.system(line)": 1,
    "os.popen(line)": 1,
    "os.execv(program, words)": 1,
}


@pytest.mark.parametrize(("source", "count"), LOADING.items(), ids=LOADING)
def test_the_look_for_code_in_files_finds_it(source, count):
    assert len(loads_that_could_run_code(f"def f():\n    return [{source}]")) == count


@pytest.mark.parametrize(("source", "count"), SHELLS.items(), ids=SHELLS)
def test_the_look_for_shells_finds_them(source, count):
    assert len(shells(f"with x:\n    y = {source}")) >= count
    assert bool(shells(f"y = {source}")) == bool(count)


def test_the_look_goes_over_all_the_code():
    names = {path.name for path in [*PROGRAMS, *NOTEBOOKS]}
    assert {
        "frcnn_common.py",
        "build_site.py",
        "speed.py",
        "conftest.py",
        Path(__file__).name,
    } <= names
    assert len(NOTEBOOKS) == 7
    every = [
        name
        for path in [*PROGRAMS, *NOTEBOOKS]
        for source in sources(path)
        for name, _ in calls(source)
    ]
    assert sum(called(name, "torch.load") for name in every) >= 2
    assert sum(called(name, "load_dataset") for name in every) >= 2
    assert sum(called(name, "subprocess.run") for name in every) >= 2


@pytest.mark.parametrize("path", [*PROGRAMS, *NOTEBOOKS], ids=lambda path: path.name)
def test_nothing_loads_a_file_in_a_way_that_could_run_code(path):
    assert [call for source in sources(path) for call in loads_that_could_run_code(source)] == []


@pytest.mark.parametrize("path", [*PROGRAMS, *NOTEBOOKS], ids=lambda path: path.name)
def test_nothing_goes_through_a_shell(path):
    assert [call for source in sources(path) for call in shells(source)] == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_no_text_is_run_as_code(path):
    assert [call for source in sources(path) for call in evaluated(source)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_cell_calls_the_machine(path):
    lines = [line for source in sources(path) for line in source.splitlines()]
    assert [
        line for line in lines if re.match(r"\s*[!%]", line) or re.match(r"\s*\w+\s*=\s*[!%]", line)
    ] == []


# --- pictures --------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of_zeros(width: int, height: int, *more: bytes) -> bytes:
    """A whole, valid PNG, one bit a pixel, made without ever holding its pixels."""
    deflate, some = zlib.compressobj(9), 100
    line = bytes(1 + (width + 7) // 8)  # the filter, then the pixels
    packed = (
        b"".join(deflate.compress(line * min(some, height - y)) for y in range(0, height, some))
        + deflate.flush()
    )
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(more)
        + chunk(b"IDAT", packed)
        + chunk(b"IEND", b"")
    )


def header_alone(kind: str) -> bytes:
    """The first bytes of a picture of 60,000 × 60,000 pixels, and nothing behind them."""
    if kind == "bmp":
        return b"BM" + struct.pack(
            "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0
        )
    if kind == "gif":
        frame = struct.pack("<cHHHHBB", b",", 0, 0, 60_000, 60_000, 0, 8)
        return b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + frame
    if kind == "jpeg":
        return b"\xff\xd8\xff\xc0" + struct.pack(">HBHHBBBB", 11, 8, 60_000, 60_000, 1, 1, 0x11, 0)
    return b"P6 60000 60000 255\n"


BOMBS = {
    "30,000 × 30,000 zeros": lambda: png_of_zeros(30_000, 30_000),
    "13,000 × 13,000 zeros": lambda: png_of_zeros(13_000, 13_000),  # here Pillow would only warn
    "one row of 100 million": lambda: png_of_zeros(100_000_000, 1),
    "text that unpacks to 20 MB": lambda: png_of_zeros(
        8, 8, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000), 9))
    ),
    **{
        f"the head of a {kind}": lambda kind=kind: header_alone(kind)
        for kind in ("bmp", "gif", "jpeg", "ppm")
    },
}

# Run alone, so that the greatest memory is its own: a folder with the bomb between two good rows, then `detect`.
LOOK = """
import json, resource, sys, time, warnings
import frcnn_common as frcnn
folder, size, width, height = sys.argv[1], 64, int(sys.argv[2]), int(sys.argv[3])
frcnn.main(["detect", "--checkpoint", f"{folder}/c.pt", f"{folder}/good.png", "--out", f"{folder}/first"])
dataset = frcnn.COCOStreamDataset("train", source=f"{folder}/data", image_size=size, bbox_format="xyxy")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, start = peak(), time.perf_counter()
ids = [target["image_id"] for _, target in dataset]
seconds = time.perf_counter() - start
code = frcnn.main(["detect", "--checkpoint", f"{folder}/c.pt", f"{folder}/bomb.png", f"{folder}/good.png",
                   "--out", f"{folder}/out"])
print(json.dumps({"ids": ids, "skipped": dataset.skipped, "code": code, "seconds": seconds, "mb": peak() - before}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is of Unix")
def test_a_bomb_of_pixels_costs_one_line_and_no_memory(tmp_path):
    bomb, (width, height) = png_of_zeros(13_000, 13_000), (13_000, 13_000)
    assert len(bomb) < 100_000
    bombs = [bomb, png_of_zeros(30_000, 30_000)]
    rows = [row(1), row(13, bombs[0], (width, height)), row(30, bombs[1], (30_000, 30_000)), row(3)]
    write(tmp_path / "data", rows)
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "good.png").write_bytes(encoded(PIL.Image.new("RGB", (40, 30))))
    frcnn.save_checkpoint(tmp_path / "c.pt", frcnn.tiny_faster_rcnn())
    command = [sys.executable, "-c", LOOK, str(tmp_path), str(width), str(height)]
    environment = os.environ | {"PYTHONPATH": str(Path(frcnn.__file__).parent)}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["ids"], result["skipped"], result["code"]) == ([1, 3], 2, 2)
    assert result["mb"] < 300  # decoded, the smaller would take 700
    assert result["seconds"] < 5
    told = [line for line in re.split(r"[\r\n]+", done.stderr) if line and "%|" not in line]
    named = [line for line in told if "bomb" in line.lower() or "large" in line]
    assert [line for line in named if line.startswith("frcnn_common: ")] == [
        f"frcnn_common: {tmp_path}/bomb.png is no picture that can be read:"
        f" an image of 13000 × 13000 pixels is too large: at most {frcnn.MAX_PIXELS:,}"
    ]
    assert (
        sum("UserWarning: image_id" in line for line in named) == len(named) - 1 == 2
    )  # and not a line of Pillow's
    (record,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert record["image"].endswith("good.png")


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # pytest takes the module's filter away
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(kind, monkeypatch):
    content = BOMBS[kind]()
    PIL.Image.init()  # its plugins make small images of their own
    monkeypatch.setattr(
        PIL.Image.core, "new", lambda *arguments: pytest.fail(f"memory for {arguments}")
    )
    monkeypatch.setattr(
        PIL.Image.core, "fill", lambda *arguments: pytest.fail(f"memory for {arguments}")
    )
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"pixels|too large") as error:
        frcnn.decode_image(content)
    assert time.perf_counter() - start < 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("more", "accepted"), [(0, True), (1, False)])
def test_the_limit_is_exact(more, accepted, monkeypatch):
    monkeypatch.setattr(frcnn, "MAX_PIXELS", 300)
    content = encoded(PIL.Image.new("RGB", (300 + more, 1)))
    if accepted:
        assert frcnn.decode_image(content).size == (300, 1)
    else:
        with pytest.raises(
            ValueError, match="an image of 301 × 1 pixels is too large: at most 300"
        ):
            frcnn.decode_image(content)


def test_photographs_of_today_are_below_the_limit():
    assert frcnn.MAX_PIXELS > 9504 * 6336  # 60 megapixels, the largest of the common cameras
    assert frcnn.MAX_PIXELS * 3 * 4 < 2**30 * 1.1  # as float32, RGB: about 1 GB


def test_no_program_in_a_picture_is_run(monkeypatch):
    """An EPS file is a PostScript program; Pillow would start Ghostscript on it."""
    content = encoded(PIL.Image.new("RGB", (8, 8)), "eps")
    monkeypatch.setattr(
        PIL.EpsImagePlugin, "Ghostscript", lambda *arguments, **options: pytest.fail("it was run")
    )
    for size in (None, (8, 8)):
        with pytest.raises(ValueError, match="EPS file is a program"):
            frcnn.decode_image(content, size)


def test_a_path_in_a_row_is_not_opened(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(PIL.Image.new("RGB", (8, 8))))
    sample = row(7) | {"image": {"bytes": None, "path": str(secret)}}
    dataset = stream(write(tmp_path / "data", [row(1), sample]))
    with pytest.warns(UserWarning, match="image_id 7 skipped: its row holds no bytes of an image"):
        assert [target["image_id"] for _, target in dataset] == [1]
