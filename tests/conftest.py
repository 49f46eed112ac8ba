"""What all tests share: no network, one seed, one place for real pictures, and helpers."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported
os.environ.setdefault("FRCNN_DATA", "glyphs")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one process a core

import torch  # it reads the number of threads
from hypothesis import settings
from hypothesis import strategies as st

import frcnn_common as frcnn

# --- seeds and boxes of chance --------------------------------------------------------

EXAMPLES = 200  # of each property; README's table quotes it
chance = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_boxes(
    count: int, seed: int = 0, side: float = 200.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping boxes ``[N, 4]`` and scores ``[N]``."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side
    size = torch.rand(count, 2, generator=generator) * side / 2 + 1
    return torch.cat((corner, corner + size), dim=1), torch.rand(count, generator=generator)


def objects(count: int, height: int, width: int, classes: int) -> dict:
    """So many boxes of any size inside the image, and their labels."""
    first, second = (torch.rand(count, 2) * torch.tensor([width, height]) for _ in range(2))
    least = torch.tensor([width, height]) * 0.01
    low, high = torch.minimum(first, second), torch.maximum(first, second) + least
    boxes = torch.cat((low, torch.minimum(high, torch.tensor([width, height]))), dim=1)
    return {"boxes": boxes, "labels": torch.randint(1, classes, (count,))}


# float32 holds areas up to 1e38 and differences down to a part in 1e7;
# sides from nothing to 1e15 are tried.
NAN, INF = float("nan"), float("inf")
_side = st.one_of(
    st.just(0.0), st.floats(0, 400, width=32), st.sampled_from([1e-30, 1e-7, 1e-3, 1e6, 1e15])
)
_corner = st.one_of(
    st.floats(-50, 450, width=32), st.sampled_from([0.0, 1e-30, -1e6, 1e6, 1e15, -1e15])
)
any_box = st.tuples(_corner, _corner, _side, _side).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
_few_values = st.integers(0, 12)
small_box = st.tuples(_few_values, _few_values, _few_values, _few_values).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
hostile_boxes = st.lists(any_box | small_box, max_size=30).map(
    lambda b: torch.tensor(b).reshape(-1, 4).float()
)
solid_box = st.tuples(
    *[st.floats(-1e3, 1e3, width=32)] * 2, *[st.floats(0.125, 1e3, width=32)] * 2
).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
coder_weights = st.sampled_from([(1, 1, 1, 1), (10, 10, 5, 5)])


# --- networks -------------------------------------------------------------------------


def assert_trains(model: frcnn.FasterRCNN, losses: dict[str, torch.Tensor]) -> None:
    """Four finite float32 losses, and finite gradients wherever there is one."""
    assert list(losses) == list(frcnn.LOSS_NAMES)
    for loss in losses.values():
        assert (loss.dtype, loss.ndim, bool(loss.isfinite() & (loss >= 0))) == (
            torch.float32,
            0,
            True,
        ), losses
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """Real COCO images in the Hub's columns: ``$FRCNN_COCO_TINY``, else ``shared/coco-tiny``."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "coco-tiny"
    folder = Path(os.environ.get("FRCNN_COCO_TINY", beside))
    if not folder.is_dir():
        pytest.skip(f"needs real COCO images: no folder {folder}; name one with FRCNN_COCO_TINY")
    return folder
