"""SIC-CADS' published recipe: settings, training data, weights of a recogniser, resume, tables of results."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch

from companion import backbones
from companion.data import detection
from companion.errors import BadParameter, CorruptFile, MissingData, MissingWeights
from companion.evaluation.claims import judge_measured
from companion.models.sic_cads import model as sic_cads
from companion.models.sic_cads import recipe
from companion.models.sic_cads.model import distillation_loss, pool, rank_loss
from companion.ops.files import write_json
from companion.ops.papers import paper
from companion.training.checkpoints import save, trained_state
from tests.conftest import parameters
from tests.data.test_detection import box, coco, coco_categories, image, lvis_file, picture, sizes  # noqa: F401
from tests.models.common import assert_goes_on, refuses
from tests.small import shrink, small_clip
from tests.test_detectors import owl


def given(**changes) -> SimpleNamespace:
    return parameters("sic_cads", **{"profile": "paper", "data_root": "nowhere", "accelerator": "cpu"} | changes)


@pytest.fixture
def small(monkeypatch):
    """Small backbones and detector instead of the full-size ones."""
    shrink("sic_cads", monkeypatch)


def test_the_recipes_are_the_released_ones():
    lvis, both = recipe.recipe("detection/ov-lvis"), recipe.recipe("detection/ov-coco", captions=True)
    assert (lvis.iterations, lvis.batch, lvis.lr, lvis.size, lvis.crop) == (90_000, 64, 2e-4, 480, 0.7)
    assert (both.iterations, both.batch, both.lr, both.size, both.crop) == (180_000, 16, 5e-5, 480, 0.5)
    assert (both.group, recipe.recipe("detection/ov-coco").group, lvis.group) == (4, 1, 1)
    assert [recipe.gamma(given(dataset=f"detection/{name}")) for name in ("ov-coco", "ov-lvis", "objects365")] == [
        0.7,
        0.5,
        0.5,
    ] and recipe.gamma(given(gamma=0.3)) == 0.3
    assert (lvis.clip, lvis.repeat, both.clip, both.repeat) == (1.0, 0.001, None, None)
    assert (lvis.options["tau"], both.options["tau"], both.options["lambda_novel"]) == (50, 20, 0.5)
    foreign = recipe.recipe("detection/objects365")
    novel = torch.ones(3, dtype=torch.bool)
    share = sic_cads.text_share(novel, foreign.options["lambda_base"], foreign.options["lambda_novel"])
    torch.testing.assert_close(share, torch.full((3,), sic_cads.CROSS_DATASET))


def test_learning_rates_rise_on_a_line_to_the_cosine():
    r = recipe.recipe("detection/ov-lvis")
    found = recipe.learning_rates(r, r.iterations)
    assert found[0] == pytest.approx(r.lr * 1e-4) and found[-1] < 1e-9
    reached = (1 + np.cos(np.pi / 9)) / 2
    assert found[r.warmup // 2] == pytest.approx(r.lr * (1e-4 + reached) / 2)
    assert found[r.warmup] == pytest.approx(r.lr * reached)
    assert recipe.learning_rates(r, 90).argmax() == 10


def test_a_class_stays_while_a_part_of_a_box_does(tmp_path):
    picture(tmp_path / "1.jpg")  # 12 x 8
    boxes = [([0, 0, 2, 8], 1, 0), ([0, 0, 12, 8], 2, 0), ([0, 0, 12, 8], 3, 1)]
    same = {"image_id": 1, "area": 9}
    rows = [same | {"id": i, "category_id": c, "bbox": b, "iscrowd": x} for i, (b, c, x) in enumerate(boxes, 1)]
    found = {"images": [image(1)], "annotations": rows, "categories": [{"id": i, "name": f"{i}"} for i in (1, 2, 3)]}
    write_json(tmp_path / "a.json", found)
    crops = recipe.Crops(detection.own_folder(tmp_path / "a.json", tmp_path), 32, 0.5)
    torch.manual_seed(0)
    drawn = [crops[0] for _ in range(40)]
    pixels, _, boxes = drawn[0]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8 and boxes is True
    seen = torch.stack([positives for _, positives, _ in drawn])
    assert seen[:, 1].all() and not seen[:, 2].any()  # a crowd is no label
    assert 0 < seen[:, 0].float().mean() < 1  # the box at the left edge is sometimes truncated
    labels = recipe.Crops(crops.data, 32, 0.5, boxes=False)
    assert labels[0][1].tolist() == [True, True, True] and labels[0][2] is False


def test_boxes_and_captions_take_turns(coco):  # noqa: F811
    train = detection.load("detection/ov-coco", coco, "train")
    p = given(data_root=str(coco))
    with pytest.raises(MissingData, match="captions_train2017"):
        recipe.training_data(p, train)
    texts = [{"image_id": i, "caption": text} for i, text in ((1, "a dog"), (2, "a man"), (4, "a bus"))]
    captions = {"images": [image(i) for i in (1, 2, 3, 4)], "annotations": texts}
    write_json(coco / "coco" / "annotations" / "captions_train2017.json", captions)
    found = recipe.training_data(p, train)
    torch.manual_seed(0)
    groups = [found[0] for _ in range(40)]
    assert isinstance(found, recipe.Turns) and groups[0][0].shape == (4, 3, 480, 480)
    kinds = torch.stack([boxes for *_, boxes in groups])
    assert (kinds == kinds[:, :1]).all() and 10 < kinds[
        :, 0
    ].sum() < 30  # of one source each, as often one as the other
    labels = torch.stack([positives for _, positives, boxes in groups if not boxes[0]])
    named = {train.class_names[i] for i in labels.flatten(0, 1).any(0).nonzero().flatten()}
    assert named == {"dog", "person", "bus"}  # novel names too, as released
    assert isinstance(recipe.training_data(given(captions=False), train), recipe.Crops)


def test_images_of_rare_classes_are_repeated(tmp_path, sizes, monkeypatch):  # noqa: F811
    """Of 8 images one shows the common class: at a threshold of a half it comes sqrt(1/2 / 1/8) = 2 times."""
    sizes("detection/ov-lvis", sizes={"train": 8, "test": 8}, classes=3)
    content = lvis_file()
    (shown,) = content["images"]
    content["images"] = [shown | {"id": i, "coco_url": f"{shown['coco_url'][:-5]}{i}.jpg"} for i in range(1, 9)]
    content["annotations"] = [box(i, i, 3 if i == 5 else 1) for i in range(1, 9)]
    for split in ("train", "val"):
        write_json(tmp_path / "lvis" / f"lvis_v1_{split}.json", content)
    for i in range(1, 9):
        picture(tmp_path / "coco" / "val2017" / f"{i:012d}.jpg")
    train, whole = detection.load("detection/ov-lvis", tmp_path, "train"), recipe.recipe
    assert len(recipe.training_data(given(dataset="detection/ov-lvis"), train)) == 8  # none is rarer than 0.001
    monkeypatch.setattr(recipe, "recipe", lambda *names: dataclasses.replace(whole(*names), repeat=0.5))
    found = recipe.training_data(given(dataset="detection/ov-lvis"), train)
    assert [found.drawn(i) for i in range(len(found))] == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    crop, positives, boxes = found[5]
    assert crop.shape == (3, 480, 480) and boxes is True
    assert [train.class_names[i] for i in positives.nonzero().flatten()] == ["d"]


def test_fractions_of_repeat_factors_are_drawn_at_each_pass():
    factors = np.array([1.0, 2.5, 1.0, 3.25])
    repeated = recipe.Repeated(None, factors)
    torch.manual_seed(0)
    passes = np.array([[repeated.drawn(i) for i in range(len(repeated))] for _ in range(3000)])
    counts = np.stack([(passes == i).sum(1) for i in range(4)], 1)
    assert passes.shape[1] == 9 and (counts >= np.floor(factors)).all()
    assert len({tuple(row) for row in counts}) > 2  # not drawn once for all
    np.testing.assert_allclose(counts.mean(0) / 9, factors / factors.sum(), atol=0.01)


def recogniser(seed: int = 0) -> recipe.Recogniser:
    clip = small_clip()
    text = torch.nn.functional.normalize(torch.randn(80, 24, generator=torch.Generator().manual_seed(5)), dim=-1)
    return recipe.build(given(seed=seed), clip, text, torch.arange(80) % 3 == 0, "random")


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return images, torch.rand(count, 80, generator=generator) < 0.1, torch.tensor([True, False] * (count // 2))


def test_boxes_rank_base_classes_and_captions_all(small):
    model, (images, positives, boxes) = recogniser().train(), batch()
    value = recipe.loss(model, (images, positives, boxes))
    torch.testing.assert_close(value["loss"], value["rank"] + value["distill"])
    e_text, e_image = model(images, raw=True)
    scores = model.tau * pool(e_text @ model.text.mT, 2)
    ranked = [rank_loss(scores[boxes], positives[boxes], ~model.novel), rank_loss(scores[~boxes], positives[~boxes])]
    expected = sum(ranked) / 2 + model.distill * distillation_loss(e_image, model.teacher_embeddings(images))
    torch.testing.assert_close(value["loss"], expected)
    whole = recipe.loss(model, (images, positives, torch.ones(4, dtype=torch.bool)))
    torch.testing.assert_close((whole["rank"], whole["distill"]), model.loss(images, positives))
    grouped = recipe.BatchLoss(model)(*(x.unflatten(0, (2, 2)) for x in (images, positives, boxes)))
    torch.testing.assert_close(grouped, value)


def test_images_are_resized_as_for_the_detector(small, monkeypatch):
    model, (images, *_) = recogniser().eval(), batch(2)
    monkeypatch.setattr(recipe, "SHORTER", 128)
    assert model.prepared(images).shape[-1] == 416
    larger = recipe.resize(images, [128], antialias=True)
    plain = sic_cads.MLR.crops(model, larger)
    assert torch.equal(model.crops(images), plain)
    model.train()
    assert torch.equal(model.crops(images), sic_cads.MLR.crops(model, images))


def test_groups_make_a_step(small):
    """Two groups of 4 are a batch of 8, loaded and stacked as groups."""
    images, positives, _ = batch(8)

    class Source(torch.utils.data.Dataset):
        def __init__(self, boxes: bool):
            self.boxes = boxes

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int):
            return images[index], positives[index], self.boxes

    model, shapes = recogniser(), []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    turns = recipe.Turns([Source(True), Source(False)], 4)
    history = recipe.train_model(given(), turns, None, model, batch=8, epochs=1)
    assert len(history) == 2 and shapes == [(8, 3, 64, 64)] * 2
    assert all(row["loss"] == pytest.approx(row["rank"] + row["distill"]) for row in history)


def test_training_clips_each_entry_of_the_gradient(small, monkeypatch):
    model, data, used = recogniser(), torch.utils.data.TensorDataset(*batch(8)), []
    before, fit = {n: t.clone() for n, t in trained_state(model).items()}, recipe.fit
    monkeypatch.setattr(recipe, "fit", lambda *args, **options: used.append((args, options)) or fit(*args, **options))
    history = recipe.train_model(given(dataset="detection/ov-lvis"), data, None, model, batch=4, epochs=1)
    assert len(history) == 2 and history[0]["lr"] == pytest.approx(2e-4 * 1e-4)
    assert [callback.max_value for callback in used[0][1]["callbacks"]] == [1.0] and not model.training
    assert any(not torch.equal(t, before[n]) for n, t in trained_state(model).items())
    recipe.train_model(given(), data, None, model, batch=4, epochs=1)
    assert used[1][1]["callbacks"] == []  # OV-COCO's recipe does not clip
    with pytest.raises(BadParameter, match="batch"):
        recipe.train_model(given(), data, None, model)
    # on several devices only a forward pass of what is trained may be called, no method of it
    (module, loss, _), items = used[0][0], batch()
    assert loss(lambda *given: given, items) == items
    torch.testing.assert_close(module.train()(*items), recipe.loss(model, items))


def test_trained_weights_are_loaded_with_another_vocabulary(small, tmp_path):
    model = recogniser()
    model.body.bn1.weight.data.mul_(1.5)  # of a frozen norm, which training does not change but the file must hold
    file = save(tmp_path, "mlr", recipe.trained_weights(model))
    clip, other = small_clip(), torch.randn(7, 24)
    again = recipe.load(given(seed=9, checkpoint=str(file)), clip, other, torch.zeros(7, dtype=torch.bool))
    assert again.text.shape == (7, 24)
    assert all(torch.equal(t, recipe.trained_weights(again)[n]) for n, t in recipe.trained_weights(model).items())
    with pytest.raises(MissingWeights, match=r"visual\+"):
        recipe.load(given(checkpoint="nothing.pth"), clip, other, torch.zeros(7, dtype=torch.bool))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorruptFile, match="mlr"):
        recipe.load(given(checkpoint=str(file)), clip, other, torch.zeros(7, dtype=torch.bool))


def test_the_authors_names_are_taken_up(monkeypatch):
    body = timm.create_model("resnet50", num_classes=0)
    theirs = sic_cads.MLR(body, torch.randn(5, 24), torch.zeros(5, dtype=torch.bool))
    torch.manual_seed(4)
    state = {f"ovmlr_model.{name}": torch.randn_like(t) for name, t in theirs.to_official().items()}
    monkeypatch.setattr(recipe.backbones, "read_state", lambda path: state)
    monkeypatch.setattr(recipe, "build", lambda *_: recipe.Recogniser(body, torch.randn(9, 24), torch.ones(9) > 0))
    found = recipe.load(given(checkpoint=__file__), None, None, None)
    assert torch.equal(found.heads.shared.weight, state["ovmlr_model.mlr_lin.weight"]) and len(found.text) == 9


def test_what_does_not_go_together_or_is_missing_is_said(tmp_path, monkeypatch, coco):  # noqa: F811
    def setting(**changes):
        return lambda: recipe.setting(given(**changes), tmp_path)

    refuses(
        (setting(dry_run=True, detector="IDEA-Research/grounding-dino-tiny"), "OWL"),
        (setting(dataset="detection/objects365"), "checkpoint"),
    )
    refuses((setting(data_root=str(tmp_path / "empty")), "cocodataset"), error=MissingData)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses((setting(data_root=str(coco)), "owlvit"), error=MissingWeights)
    monkeypatch.setattr(recipe.detectors, "build", lambda name, names, weights: owl("owlvit", list(names)))
    refuses((setting(data_root=str(coco)), "openclip"), error=MissingWeights)


def test_detections_of_lvis_are_of_classes_that_count():
    test = recipe.generated(given(dataset="detection/ov-lvis"), 1)
    found = SimpleNamespace(test=test, threshold=0.0, nms=None, top=300)
    matrix = torch.rand(4, 1203, generator=torch.Generator().manual_seed(0))
    every = recipe._best(found, 0, torch.zeros(4, 4), matrix)
    test.truth["images"][0]["neg_category_ids"] = [test.categories[i] for i in every.classes[:2].tolist()]
    counted = recipe._best(found, 0, torch.zeros(4, 4), matrix)
    annotated = set(test.target(0).labels.tolist()) | set(every.classes[:2].tolist())
    assert [c for c in every.classes.tolist() if c in annotated] == counted.classes.tolist()
    assert 2 <= len(counted.scores) < len(every.scores) == 300


def test_without_training_nothing_is_saved(small, coco, tmp_path):  # noqa: F811
    p = given(data_root=str(coco), branch="visual+", images=1)
    found = recipe.setting(p, tmp_path / "out")
    model, history = recipe.train(found, batch=1, epochs=2)
    assert history == [] and not (tmp_path / "out").exists()
    assert len(found.test) == 1 and found.novel.sum() == 17 and found.base.sum() == 48 and len(found.names) == 80
    outputs = recipe.predict(found, model)
    assert outputs.boxes[0].shape == (16, 4) and outputs.probabilities[0].shape == (16, 80)
    assert set(recipe.benchmark(p, found.test, recipe.detections(found, outputs))) == {"novel", "base", "all"}
    assert set(recipe.ap50(found, outputs)) == {"novel", "base", "all"}


def test_a_killed_training_resumes_to_the_same_bits_and_saves_weights(small, coco, monkeypatch, tmp_path):  # noqa: F811
    of = recipe.Checkpoint.of
    monkeypatch.setattr(recipe.Checkpoint, "of", lambda *args, every, **facts: of(*args, every=2, **facts))

    def train(out, **changes):
        return recipe.train(
            recipe.setting(given(data_root=str(coco), captions=False, **changes), out), batch=1, epochs=3
        )

    model, out = assert_goes_on(train, tmp_path, monkeypatch, recipe, "loss", 2)
    (file,) = (out / "trained").iterdir()
    read = recipe.setting(given(data_root=str(coco), checkpoint=str(file)), tmp_path).build()  # what `checkpoint` takes
    found = recipe.trained_weights(read)
    assert all(torch.equal(t, found[name]) for name, t in recipe.trained_weights(model).items())
    assert train(out, seed=1)[1] != train(out)[1] and len(list((out / "trained").iterdir())) == 2


@pytest.mark.parametrize("dataset", ["detection/ov-coco", "detection/ov-lvis", "detection/openimages"])
def test_the_dry_run_has_as_many_classes_as_the_dataset(small, dataset):
    p = given(dataset=dataset, dry_run=True)
    found = recipe.setting(p, Path("nowhere"))
    classes = {"detection/ov-coco": 80, "detection/ov-lvis": 1203, "detection/openimages": 500}[dataset]
    model, history = recipe.train(found)
    assert len(history) == 2 and len(found.names) == classes and found.test[0][0].shape == (3, 480, 640)
    outputs = recipe.predict(found, model)
    assert outputs.probabilities[0].shape[1] == classes and outputs.p["SIC-CADS"].shape == (2, classes)
    scores = recipe.benchmark(p, found.test, recipe.detections(found, outputs))
    assert all(np.isfinite(value) for value in scores.values())


@pytest.mark.slow
@pytest.mark.large
def test_the_dry_run_at_full_size():
    found = recipe.setting(given(dry_run=True), Path("nowhere"))
    model, history = recipe.train(found)
    assert sum(t.numel() for t in model.trained().values()) == 28_504_768 and len(history) == 2
    boxes, probabilities = found.detect(found.test[0][0])
    assert boxes.shape == (576, 4) and probabilities.shape == (576, 80)


def test_results_are_shown_next_to_the_published(tmp_path):
    path = tmp_path / "measured.csv"
    p = given()
    row = {"method": recipe.label(p, 0.7), "dataset": p.dataset, "images": 0, "seed": 0}
    for changes in (
        {"novel": 30.0, "base": 50.0, "all": 45.0},
        {"novel": 30.0, "base": 50.0, "all": 47.0, "seed": 1},
        {"method": "few", "images": 10, "novel": 99.0},
        {"method": "o", "dataset": "detection/objects365", "Objects365": 20.0},
    ):
        rows = recipe.measured(path, row | changes)
    name = "owlvit-base-patch32 + SIC-CADS, gamma 0.7"
    assert recipe.cells(rows, "ov-coco") == {(name, "novel"): 30, (name, "base"): 50, (name, "all"): 46}
    found = recipe.tables(path)
    assert len(found) == 3 and found["Across data sets"].set_index("method").loc["o", "Objects365"] == "– / 20.00"
    assert recipe.label(p, 0.0) == "owlvit-base-patch32"
    assert isinstance(found["OV-LVIS"], pd.DataFrame)


def test_what_is_not_as_published_has_a_row_of_its_own():
    plain = "owlvit-base-patch32 + SIC-CADS, gamma 0.7"
    ours = {"dataset": "detection/objects365", "checkpoint": "a/recogniser ov-lvis seed 0, 1f.safetensors"}
    for changes, added in (
        ({}, ""),
        ({"clip": "ViT-B-16-quickgelu/openai"}, ", ViT-B-16-quickgelu/openai"),
        ({"captions": False}, ", no captions"),
        ({"captions": False, "dataset": "detection/ov-lvis"}, ""),
        ({"checkpoint": "a/x.pth"}, ", weights of x.pth"),
        (ours, ""),  # it is transferred
        (ours | {"checkpoint": "x.pth"}, ", weights of x.pth"),
    ):
        assert recipe.label(given(**changes), 0.7) == plain + added
    assert recipe.label(given(branch="visual+", captions=False), 0.5) == "owlvit-base-patch32 + visual+, gamma 0.5"
    assert recipe.label(given(captions=False, checkpoint="x.pth"), 0.0) == "owlvit-base-patch32"


def test_the_papers_gains_are_judged_by_what_was_measured(tmp_path):
    p, path = given(), tmp_path / "measured.csv"

    def judged(refined: float) -> dict[str, bool | None]:
        row = {"dataset": p.dataset, "images": 0, "seed": 0, "base": 50.0, "all": 45.0}
        recipe.measured(path, row | {"method": recipe.label(p, 0.0), "novel": 30.0})
        rows = recipe.measured(path, row | {"method": recipe.label(p, recipe.gamma(p)), "novel": refined})
        claims = {claim["id"]: claim.get("measured") for claim in paper("sic_cads")["claims"] if "measured" in claim}
        return {name: judge_measured(terms, recipe.claim_cells(rows))[0] for name, terms in claims.items()}

    assert judged(32.0) == {"full-lvis": None, "full-coco": True, "full-objects365": None}
    assert judged(31.0)["full-coco"] is False
    few = recipe.measured(path, {"method": "x", "dataset": p.dataset, "images": 10, "seed": 0, "novel": 9.0})
    assert ("x", "OV-COCO novel") not in recipe.claim_cells(few)  # of some of the images only


def test_the_protocol_is_what_runs(monkeypatch):
    monkeypatch.setattr(recipe, "WEIGHT_DECAY", 0.25)
    monkeypatch.setattr(recipe, "FLIP", 0.125)
    found = recipe.protocol()
    assert "0.25" in found["optimiser"] and "0.125" in found["augmentation"] and "180,000 (OV-COCO)" in found["steps"]


def test_the_default_file_of_clip_is_loaded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(backbones, "build", lambda name, weights: asked.append((name, weights)))
    p = given(data_root=str(tmp_path))
    recipe.clip_model(p)
    usual = recipe.weights_file(p, "clip")
    usual.parent.mkdir()
    usual.write_bytes(b"")
    recipe.clip_model(p)
    recipe.clip_model(given(data_root=str(tmp_path), clip="ViT-L-14-quickgelu/openai"))
    assert [weights for _, weights in asked] == ["pretrained", usual, "pretrained"]
    assert Path(usual).name in {w.get("file") for w in paper("sic_cads")["weights"]}
    assert len(coco_categories()) == 80
