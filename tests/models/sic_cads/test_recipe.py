"""SIC-CADS' published recipe: training data, loss, weights of a recogniser, test, tables of results."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from companion.errors import BadCheckpoint, CorruptFile, MissingData, MissingWeights
from companion.io.files import write_json
from companion.models.sic_cads import model as sic_cads
from companion.models.sic_cads import official, predictions, recipe
from companion.training import stored
from companion.training.checkpoints import save
from companion.training.hardware import Hardware
from tests.conftest import parameters
from tests.data.test_detection import coco, image, sizes  # noqa: F401
from tests.models.common import refuses
from tests.papers.common import shrink
from tests.papers.sic_cads import small_clip


def given(**changes) -> SimpleNamespace:
    return parameters("sic_cads", **{"profile": "paper", "data_root": "nowhere", "accelerator": "cpu"} | changes)


@pytest.fixture
def small(monkeypatch):
    """Small backbones and detector instead of the full-size ones."""
    shrink("sic_cads", monkeypatch)


def recogniser(seed: int = 0) -> recipe.Recogniser:
    text = torch.nn.functional.normalize(torch.randn(80, 24, generator=torch.Generator().manual_seed(5)), dim=-1)
    return recipe.build(given(seed=seed), small_clip(), text, torch.arange(80) % 3 == 0, "random")


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return images, torch.rand(count, 80, generator=generator) < 0.1, torch.tensor([True, False] * (count // 2))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet50_miil_21k.pth", "resnet50_miil_21k.pkl"])
def test_the_published_resnet_is_read_from_either_file(name, tmp_path):
    """MIIL's is a checkpoint of timm's ResNet-50 with other classes, the authors' a pickle of its tensors."""
    theirs = timm.create_model(recipe.BODY, num_classes=5).state_dict()
    if name.endswith(".pth"):
        torch.save({"state_dict": theirs}, tmp_path / name)
    else:
        content = {"model": theirs, "__author__": "third_party", "matching_heuristics": True}
        (tmp_path / name).write_bytes(pickle.dumps(content))
    body = recipe.backbones.build(recipe.BODY, tmp_path / name).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in body.items()) and body.keys() < theirs.keys()


# --- training ---------------------------------------------------------------------------------------------------------


def test_boxes_and_captions_take_turns(coco):  # noqa: F811
    p = given(data_root=str(coco))
    texts = [{"image_id": i, "caption": text} for i, text in ((1, "a dog"), (2, "a man"), (4, "a bus"))]
    captions = {"images": [image(i) for i in (1, 2, 3, 4)], "annotations": texts}
    write_json(coco / "coco" / "annotations" / "captions_train2017.json", captions)
    _, images = recipe.data(p)
    found, train = recipe.training_data(p, images), images["train"]
    torch.manual_seed(0)
    groups = [found[0] for _ in range(40)]
    labels = torch.cat([positives for _, positives, boxes in groups if not boxes[0]])
    named = {train.class_names[i] for i in labels.any(0).nonzero().flatten()}
    assert named == {"dog", "person", "bus"}, "novel ones too"
    assert groups[0][0].shape == (4, 3, 480, 480) and len(found) == (len(train) + 3) // 4
    assert isinstance(recipe.training_data(given(captions=False), images), recipe.Crops)


def test_images_are_resized_as_for_the_detector_but_not_in_training(small, monkeypatch):
    model, (images, *_) = recogniser().eval(), batch(2)
    monkeypatch.setattr(recipe, "SHORTER", 128)
    assert recipe.detector_size(60, 64) == [128, 137], "rounded, not floored"
    plain, plain_input = sic_cads.MLR.crops, sic_cads.MLR.prepared
    assert model.prepared(images).shape[-1] == 416
    assert torch.equal(model.prepared(images, False), plain_input(model, images, False)), "also in eval mode"
    assert torch.equal(model.crops(images), plain(model, recipe.resize(images, [128], antialias=True)))
    assert torch.equal(model.train().crops(images), plain(model, images))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_trained_weights_are_loaded_with_another_vocabulary(small, tmp_path):
    model, other = recogniser(), (small_clip(), torch.randn(7, 24), torch.zeros(7, dtype=torch.bool))
    model.body.bn1.weight.data.mul_(1.5)  # of a frozen norm, which training does not change but the file must hold
    weights = official.trained_weights(model)
    file = save(tmp_path, "mlr", weights)
    p = given(seed=9, checkpoint=str(file))

    def load(p: SimpleNamespace) -> recipe.Recogniser:
        return recipe.recogniser(p, *other, {})[0]()

    again = load(p)
    assert again.text.shape == (7, 24)
    assert all(torch.equal(t, weights[n]) for n, t in official.trained_weights(again).items())
    del weights["body.bn1.weight"]
    save(tmp_path, "mlr", weights)
    refuses((lambda: load(p), "body.bn1.weight"), error=BadCheckpoint)
    refuses((lambda: load(given(checkpoint="nothing.pth")), "nothing.pth"), error=MissingWeights)
    file.write_bytes(file.read_bytes()[:100])
    refuses((lambda: load(p), "mlr"), error=CorruptFile)


def test_a_file_of_the_authors_is_loaded(monkeypatch):
    body = timm.create_model("resnet50", num_classes=0)
    theirs = sic_cads.MLR(body, torch.randn(5, 24), torch.zeros(5, dtype=torch.bool))
    state = {f"ovmlr_model.{name}": torch.randn_like(t) for name, t in theirs.to_official().items()}
    monkeypatch.setattr(official.backbones, "read_state", lambda path: state)
    found = official.load(recipe.Recogniser(body, torch.randn(9, 24), torch.ones(9) > 0), __file__)
    assert torch.equal(found.heads.shared.weight, state["ovmlr_model.mlr_lin.weight"]) and len(found.text) == 9


def test_what_is_missing_is_named(tmp_path, monkeypatch, coco):  # noqa: F811
    def run(**changes):
        return lambda: recipe.run(given(**changes), tmp_path)

    refuses((run(dataset="detection/objects365"), "ov-lvis"))
    refuses((run(data_root=str(tmp_path / "empty")), "cocodataset"), error=MissingData)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses((run(data_root=str(coco), captions=False), "owlvit"), error=MissingWeights)


# --- from data to results ---------------------------------------------------------------------------------------------


def test_detections_of_lvis_are_of_classes_that_count():
    test = recipe.generated(given(dataset="detection/ov-lvis"), 1)
    found = SimpleNamespace(test=test, threshold=0.0, nms=None, top=300)
    matrix = torch.rand(4, 1203, generator=torch.Generator().manual_seed(0))
    every = predictions._best(found, 0, torch.zeros(4, 4), matrix)
    absent = every.classes[:2].tolist()
    test.truth["images"][0]["neg_category_ids"] = [test.categories[i] for i in absent]
    annotated = {*test.target(0).labels.tolist(), *absent}
    counted = predictions._best(found, 0, torch.zeros(4, 4), matrix)
    assert [c for c in every.classes.tolist() if c in annotated] == counted.classes.tolist()
    assert 2 <= len(counted.scores) < len(every.scores) == 300


@pytest.mark.parametrize(("dataset", "novel"), [("detection/ov-lvis", 100.0), ("detection/ov-coco", 50.0)])
def test_only_lvis_forgives_classes_that_nobody_looked_for(dataset, novel):
    """In its style; COCO's annotators looked for all classes in all images."""
    test = recipe.generated(given(dataset=dataset), 2)
    truth = test.truth
    box = next(row for row in truth["annotations"] if row["category_id"] in test.novel)
    other = next(image["id"] for image in truth["images"] if image["id"] != box["image_id"])
    rows = [box | {"score": 0.5}, box | {"score": 0.9, "image_id": other}]
    of = {"name": test.name, "truth": truth | {"annotations": [box]}, "novel": test.novel, "base": test.base}
    found = SimpleNamespace(test=SimpleNamespace(**of), top=300, detections=lambda branch: rows)
    assert predictions.Predictions.ap50(found, "")["novel"] == pytest.approx(novel, abs=1)


def test_tests_are_in_float32_also_after_a_training_in_half_precision(small):
    test = recipe.generated(given(), 2)
    detect = torch.nn.Linear(4, 80)  # a detector that half precision would change

    def found(image: torch.Tensor) -> sic_cads.Output:
        boxes = torch.arange(8.0).reshape(2, 4)
        return sic_cads.Output(boxes, detect(boxes).sigmoid(), image.shape[-2:])

    model, precisions = recogniser(), ("32-true", "bf16-mixed")
    plain, mixed = (
        predictions.collect(model, found, test, Hardware("cpu", precision=name), title="") for name in precisions
    )
    assert plain.scores.keys() == mixed.scores.keys() == set(predictions.BRANCHES)
    assert all(torch.equal(each, mixed.scores[name]) for name, each in plain.scores.items())
    assert all(map(torch.equal, plain.probabilities, mixed.probabilities))


def test_a_killed_test_predicts_no_saved_image_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "EVERY", 2)
    test, model, seen = recipe.generated(given(), 5), recogniser(), []

    def detect(image: torch.Tensor) -> sic_cads.Output:
        seen.append(image)
        if len(seen) == 4:
            raise KeyboardInterrupt
        scores = torch.rand(6, 80, generator=torch.Generator().manual_seed(int(image.sum())))
        return sic_cads.Output(scores[:, :4].cumsum(1), scores, image.shape[-2:])

    def predict(folder: Path | None):
        return predictions.collect(model, detect, test, branches=["visual+"], folder=folder, title="")

    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["0.pt"]
    resumed, done = predict(tmp_path), len(seen)
    whole, finished = predict(None), predict(tmp_path)
    assert done == 4 + 3 and len(seen) == done + 5  # two images were saved; nothing of a finished test is done again
    for found in (resumed, finished):
        for branch in ("", "visual+"):
            assert found.detections(branch) == whole.detections(branch) != []
        assert found.scores.keys() == whole.scores.keys() == {"visual+"}
        assert torch.equal(found.scores["visual+"], whole.scores["visual+"])
        assert all(map(torch.equal, found.probabilities, whole.probabilities))
    (tmp_path / "2.pt").write_bytes(b"?")
    refuses((lambda: predict(tmp_path), r"2.pt"), error=CorruptFile)


def test_a_method_is_labelled_by_its_differences_from_the_published_setting():
    plain, stand_in = "owlvit-base-patch32 + SIC-CADS, gamma 0.7", ", from resnet50.a1_in1k"
    ours = {"dataset": "detection/objects365", "checkpoint": "a/recogniser ov-lvis seed 0, 1f.safetensors"}
    other = ours | {"checkpoint": ours["checkpoint"].replace(" 0", f" 0{stand_in}")}
    for changes, gamma, expected in (
        ({"weights": "a/resnet50_miil_21k.pkl"}, 0.7, plain),
        ({}, 0.7, plain + stand_in),
        ({"clip": "ViT-B-16-quickgelu/openai"}, 0.7, plain + ", ViT-B-16-quickgelu/openai" + stand_in),
        ({"captions": False}, 0.7, plain + ", no captions" + stand_in),
        ({"checkpoint": "a/x.pth"}, 0.7, plain + ", weights of x.pth"),
        (ours, 0.7, plain),  # it is transferred
        (other, 0.7, f"{plain}, weights of {Path(other['checkpoint']).name}"),
        ({"captions": False, "checkpoint": "x.pth"}, 0.0, "owlvit-base-patch32"),
    ):
        assert recipe.label(given(**changes), gamma) == expected
