"""From detections to COCO's figures: `detect`, `detect_dataset`, `coco_evaluation`, `evaluate`.

Ground truth handed in as predictions scores 1.0, and every slip scores less.
"""

import json

import PIL.Image
import pytest
import torch
from conftest import GOOD, assert_trains, row, stream, write

import frcnn_common as frcnn

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class Replay(torch.nn.Module):
    """A detector that finds what the data set says, in its order."""

    def __init__(self, dataset):
        super().__init__()
        self.targets = iter([target for _, target in dataset])

    def forward(self, images):
        found = [next(self.targets) for _ in images]
        return [as_result(target) for target in found], []


def as_result(target):
    return {
        "boxes": target["boxes"],
        "labels": target["labels"],
        "scores": torch.ones(len(target["labels"])),
    }


def make_dataset(source, max_samples=12):
    return frcnn.COCOStreamDataset("val", max_samples, str(source), 64, bbox_format="xyxy")


@pytest.fixture(params=["glyphs", "coco"])
def dataset(request):
    return make_dataset(
        "glyphs" if request.param == "glyphs" else request.getfixturevalue("coco_tiny")
    )


@pytest.fixture
def truth(dataset):
    return frcnn.detect_dataset(Replay(dataset), dataset)[0]


def image(boxes=(), labels=None, area=None, image_id=1):
    """One image of 100 × 100 px for `coco_evaluation`, as truth and as a result."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.ones(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    area = frcnn.box_area(boxes) if area is None else torch.tensor(area)
    scores = torch.ones(len(boxes))
    return {"image_id": image_id, "orig_size": (100, 100), "boxes": boxes, "labels": labels} | {
        "area": area,
        "scores": scores,
    }


def figures(truth, results, annotations=None):
    stats = frcnn.coco_evaluation(truth, results, annotations).stats.tolist()
    return dict(zip(NAMES, stats, strict=True))


# --- ground truth as predictions ------------------------------------------------------------------


def test_ground_truth_scores_1(truth):
    scores = figures(truth, [as_result(target) for target in truth])
    assert [scores[name] for name in ("AP", "AP50", "AP75", "AR100")] == pytest.approx([1.0] * 4)
    assert all(scores[name] in (-1, pytest.approx(1.0)) for name in ("APs", "APm", "APl"))


def test_a_model_that_replays_the_targets_scores_1(dataset):
    scores = frcnn.evaluate(Replay(dataset), dataset, batch_size=5)
    assert tuple(scores) == NAMES
    assert scores["AP"] == pytest.approx(1.0)
    assert scores["AR100"] == pytest.approx(1.0)


def test_labels_off_by_one_score_0(truth):
    results = [as_result(t) | {"labels": t["labels"] % 80 + 1} for t in truth]
    assert figures(truth, results)["AP"] == pytest.approx(0, abs=0.01)


def test_boxes_in_pixels_of_the_input_score_0(coco_tiny):
    dataset = make_dataset(coco_tiny)
    truth, _ = frcnn.detect_dataset(Replay(dataset), dataset)
    results = [as_result(target) for _, target in dataset]  # 64 px instead of about 640
    assert figures(truth, results)["AP"] < 0.05


def test_boxes_come_back_in_pixels_of_the_original(coco_tiny):
    objects = json.loads((coco_tiny / "instances_val.json").read_text())["annotations"]
    expected = {}
    for record in objects:
        x, y, width, height = record["bbox"]
        if not record["iscrowd"]:
            expected.setdefault(record["image_id"], []).append([x, y, x + width, y + height])
    dataset = make_dataset(coco_tiny)
    for target, found in zip(*frcnn.detect_dataset(Replay(dataset), dataset), strict=True):
        for boxes in (target["boxes"], found["boxes"]):
            torch.testing.assert_close(
                boxes, torch.tensor(expected[target["image_id"]]), rtol=0, atol=0.02
            )


# --- COCO's own file ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(coco_tiny):
    """COCO's file, the images of our set, and the file's boxes of each, with crowds or without."""
    path = coco_tiny / "instances_val.json"
    dataset = make_dataset(coco_tiny, 50)
    truth, _ = frcnn.detect_dataset(Replay(dataset), dataset)
    records = json.loads(path.read_text())["annotations"]

    def results(with_crowds):
        found = []
        for target in truth:
            mine = [
                r
                for r in records
                if r["image_id"] == target["image_id"] and r["iscrowd"] <= with_crowds
            ]
            boxes = torch.tensor([r["bbox"] for r in mine], dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor(
                [frcnn.COCO_CATEGORY_IDS.index(r["category_id"]) for r in mine], dtype=torch.int64
            )
            found.append(
                {
                    "boxes": boxes,
                    "labels": labels,
                    "scores": torch.tensor([0.5 + r["iscrowd"] / 2 for r in mine]),
                }
            )
        return found

    return path, truth, results


def test_own_boxes_of_the_annotation_file_score_1(official):
    path, truth, results = official
    scores = figures(truth, results(with_crowds=False), path)
    assert [scores[name] for name in ("AP", "APs", "APm", "APl", "AR100")] == pytest.approx(
        [1.0] * 5
    )


def test_a_detected_crowd_is_no_mistake_where_the_file_has_it(official):
    path, truth, results = official
    assert figures(truth, results(with_crowds=True), path)["AP"] == pytest.approx(1.0)
    assert figures(truth, results(with_crowds=True))["AP"] < 0.999


def test_evaluate_takes_the_annotation_file(coco_tiny):
    dataset = make_dataset(coco_tiny)
    scores = frcnn.evaluate(Replay(dataset), dataset, annotations=coco_tiny / "instances_val.json")
    assert scores["AP"] == pytest.approx(1.0)


def test_only_evaluated_images_count(official):
    path, truth, results = official
    assert figures(truth[:5], results(with_crowds=False)[:5], path)["AR100"] == pytest.approx(1.0)


def test_image_unknown_to_the_file_is_refused(coco_tiny):
    dataset = make_dataset("glyphs", 3)
    with pytest.raises(ValueError, match=r"instances_val\.json does not hold 3 .*1000000000"):
        frcnn.evaluate(Replay(dataset), dataset, annotations=coco_tiny / "instances_val.json")


WITHOUT_CATEGORIES = '{"images": [{"id": 1, "width": 9, "height": 9}], "annotations": []}'


@pytest.mark.parametrize("content", ["[]", "hello", '{"images": []}', "", WITHOUT_CATEGORIES])
def test_foreign_annotation_file_is_refused(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError):
        frcnn.coco_evaluation([image([[0, 0, 9, 9]])], [image([[0, 0, 9, 9]])], path)


# --- records as pycocotools wants them ------------------------------------------------------------


def test_category_ids_are_official():
    everything = image([[0, 0, 50, 50]] * 80, list(range(1, 81)))
    evaluation = frcnn.coco_evaluation([everything], [everything])
    assert [r["category_id"] for r in evaluation.cocoDt.dataset["annotations"]] == list(
        frcnn.COCO_CATEGORY_IDS[1:]
    )
    assert [r["category_id"] for r in evaluation.cocoGt.dataset["annotations"]] == list(
        frcnn.COCO_CATEGORY_IDS[1:]
    )
    names = {c["id"]: c["name"] for c in evaluation.cocoGt.dataset["categories"]}
    assert (len(names), names[1], names[13], names[90]) == (80, "person", "stop sign", "toothbrush")


def test_annotation_ids_begin_at_1():
    both = [image([[0, 0, 50, 50]], image_id=i) for i in range(3)]
    evaluation = frcnn.coco_evaluation(both, both)
    assert sorted(evaluation.cocoGt.anns) == [1, 2, 3]
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_boxes_are_corner_and_size_in_the_records():
    evaluation = frcnn.coco_evaluation([image([[10, 20, 40, 80]])], [image([[11, 22, 44, 88]])])
    assert evaluation.cocoGt.dataset["annotations"][0]["bbox"] == [10, 20, 30, 60]
    assert evaluation.cocoDt.dataset["annotations"][0]["bbox"] == [11, 22, 33, 66]


# --- known figures --------------------------------------------------------------------------------


def test_iou_decides_which_figure_counts():
    scores = figures(
        [image([[0, 0, 50, 50]])], [image([[0, 0, 50, 31]])]
    )  # IoU 0.62: 0.50, 0.55 and 0.60 of ten
    assert scores["AP"] == pytest.approx(0.3)
    assert scores["AP50"] == pytest.approx(1.0)
    assert scores["AP75"] == 0


def test_first_detections_count_for_ar():
    boxes = [[10.0 * i, 0, 10.0 * i + 8, 8] for i in range(4)]
    scores = figures([image(boxes)], [image(boxes)])
    assert [scores["AR1"], scores["AR10"], scores["AR100"]] == pytest.approx([0.25, 1.0, 1.0])


def test_score_decides_the_order():
    boxes = [[0, 0, 50, 50], [50, 50, 99, 99]]
    truth, results = image(boxes[:1]), image(boxes)
    right_first = figures([truth], [results | {"scores": torch.tensor([0.9, 0.1])}])
    wrong_first = figures([truth], [results | {"scores": torch.tensor([0.1, 0.9])}])
    assert right_first["AP"] == pytest.approx(1.0)
    assert wrong_first["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize(("area", "name"), [(900.0, "APs"), (1600.0, "APm"), (10_000.0, "APl")])
def test_area_of_the_data_set_decides_the_size(area, name):
    square = image([[0, 0, 40, 40]], area=[area])
    scores = figures([square], [square])
    assert [n for n in ("APs", "APm", "APl") if scores[n] != -1] == [name]


def test_detection_on_an_image_without_objects_is_a_mistake():
    truth = [image([[0, 0, 50, 50]], image_id=1), image(image_id=2)]
    found = [image([[0, 0, 50, 50]]) | {"scores": torch.tensor([0.5])}, image([[0, 0, 50, 50]])]
    assert figures(truth, found)["AP"] == pytest.approx(0.5)


# --- nothing found, nothing there -----------------------------------------------------------------


def test_no_detections_score_0(truth):
    scores = figures(truth, [image()] * len(truth))
    assert [scores[name] for name in ("AP", "AP50", "AR1", "AR100")] == [0, 0, 0, 0]


def test_no_detections_score_0_with_the_annotation_file(official):
    path, truth, _ = official
    assert figures(truth, [image()] * len(truth), path)["AP"] == 0


def test_no_objects_at_all_give_minus_1():
    assert set(figures([image()], [image([[0, 0, 9, 9]])]).values()) == {-1}


def test_data_set_without_images_is_refused(monkeypatch):
    monkeypatch.setattr(frcnn, "rows_of", lambda stream, source: iter([]))
    with pytest.raises(ValueError, match="glyphs gives not one image"):
        frcnn.evaluate(Replay([]), make_dataset("glyphs"))


# --- the model ------------------------------------------------------------------------------------


def test_detect_dataset_restores_the_mode_after_an_error():
    model = frcnn.tiny_faster_rcnn().train()

    def fail(module, inputs):
        raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        frcnn.detect_dataset(model, make_dataset("glyphs", 2))
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_mode(training):
    torch.manual_seed(0)
    model = frcnn.tiny_faster_rcnn().train(training)
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frcnn.evaluate(model, make_dataset("glyphs", 2))
    assert modes == [False]
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluate_prints_nothing(dataset, capsys):
    frcnn.evaluate(Replay(dataset), dataset)
    assert capsys.readouterr().out == ""


# --- detect ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1, 1)])
@pytest.mark.parametrize("image_size", [33, 128, (40, 67)])
def test_detect_on_lines_and_dots_that_also_train(size, image_size):
    picture = PIL.Image.fromarray(torch.rand(size[1], size[0], 3).mul(255).byte().numpy())
    pixels, (height, width) = frcnn.prepare_image(picture, image_size)
    model = frcnn.tiny_faster_rcnn().train()
    target = {"boxes": torch.tensor([[0.0, 0, width, height]]), "labels": torch.tensor([80])}
    images = torch.stack((pixels, pixels))
    assert_trains(model, model(images, [target] * 2, [(height, width)] * 2))
    model.SCORE_THR, model.rpn.min_sz = 0.0, 0.5
    found = frcnn.detect(model, picture, image_size)
    assert len(found["boxes"]) > 0
    assert found["boxes"].isfinite().all()
    assert (found["boxes"][:, 2:] <= torch.tensor(size) + 1e-2).all()


def test_two_images_of_one_image_id_are_not_scored_as_one(tmp_path):
    source = write(
        tmp_path / "data", [row(i, boxes=[GOOD] * 20) for i in (1, 2, 1, 3)], split="val"
    )
    with pytest.raises(ValueError, match=r"1 images come more than once, such as image_id 1$"):
        frcnn.evaluate(frcnn.tiny_faster_rcnn(), stream(source, "val", 64))
