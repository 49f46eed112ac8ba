"""What the notebooks share beside the detector: how figures look and are saved; sliders; memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from torch import Tensor, nn

from frcnn_common import PALETTE, first_line

FIGURES = Path(os.environ.get("FRCNN_FIGURES", Path(__file__).resolve().parent / "figures"))

_BLOCKS = {  # of the detector, in the order of the data, and what leaves them
    "data": "image\n[3, H, W]",
    "backbone": "C2 … C5\nstrides 4 … 32",
    "FPN": "P2 … P6\n256 channels",
    "RPN": "proposals\n[K, 4]",
    "ROI head": "scores, deltas\n[K, 81], [K, 81, 4]",
    "detections": "boxes, labels,\nscores",
}


def set_up_figures(quality: int = 85) -> None:
    """Letters that can be read from the back row, and JPEG inside the notebook to keep it small."""
    set_matplotlib_formats("jpeg", pil_kwargs={"quality": quality})
    plt.rcParams.update({"font.size": 12, "figure.dpi": 80})


def draw_detector(*lit: str) -> Figure:
    """The detector as a chain of blocks, those named lit up: data, backbone, FPN, RPN, …"""
    unknown = set(lit) - set(_BLOCKS)
    if unknown:
        raise ValueError(f"no such block: {sorted(unknown)}; there are {list(_BLOCKS)}")
    figure = Figure(figsize=(11, 1.7))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(-0.6, len(_BLOCKS) - 0.4), ylim=(0, 1))
    ax.set_axis_off()
    centred = {"ha": "center", "va": "center"}
    for i, (name, output) in enumerate(_BLOCKS.items()):
        face, ink = (PALETTE[4], "white") if name in lit else ("#e8e8e8", "#555555")
        edge = "black" if name in lit else "#aaaaaa"
        box = {"boxstyle": "round,pad=0.5", "facecolor": face, "edgecolor": edge}
        ax.text(i, 0.72, name, fontsize=15, color=ink, bbox=box, **centred)
        ink = "black" if name in lit else "#555555"
        ax.text(i, 0.22, output, fontsize=11, color=ink, **centred)
        if i:
            arrow = {"arrowstyle": "->", "lw": 2}
            ax.annotate("", (i - 0.38, 0.72), (i - 0.62, 0.72), arrowprops=arrow)
    return figure


def with_sliders(draw: Callable, **controls: object) -> None:
    """Let the reader move what ``draw`` takes (ipywidgets by name); once, with ``$FRCNN_STILL``.

    A widget is an empty box on a page that nobody runs, so `make run` and `make test` ask for the
    still picture, drawn at the values that the controls have.
    """
    if os.environ.get("FRCNN_STILL"):
        draw(**{name: control.value for name, control in controls.items()})
    else:
        ipywidgets.interact(draw, **controls)


def save_figure(figure: Figure, name: str) -> None:
    """Write a figure to ``figures/`` or say why not: .jpg for scenes, .png for plots."""
    if name.endswith(".jpg"):
        options = {"pil_kwargs": {"quality": 80}}
    else:
        options = {"metadata": {"Software": None}}  # the same file from every matplotlib
    try:
        FIGURES.mkdir(parents=True, exist_ok=True)
        figure.savefig(FIGURES / name, dpi=90, bbox_inches="tight", **options)
    except OSError as error:  # a read-only checkout, a full disk: the notebook shows it anyway
        print(f"{name} is not saved: {first_line(error)}")


@contextlib.contextmanager
def saved_bytes(*modules: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps inside for the way back, ``{address of a storage: bytes}``.

    A storage that several layers keep counts once; parameters and buffers of ``modules``, which are
    there anyway, do not count.
    """
    own = {t.untyped_storage().data_ptr() for m in modules for t in _tensors_of(m)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
