"""SIC-CADS' published recipe: values and rates, what is learned from, files of a recogniser, results that gather."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, set_model_preprocess_cfg
from torch.utils.data import ConcatDataset, Subset

from companion import backbones, detectors
from companion.data import detection
from companion.errors import BadParameter, CorruptFile, MissingData, MissingWeights
from companion.models.sic_cads import model as sic_cads
from companion.models.sic_cads import recipe as full
from companion.models.sic_cads.model import distillation_loss, pool, rank_loss
from companion.ops.files import write_json
from companion.ops.papers import paper
from companion.training.fit import trained_state
from tests.data.test_detection import coco, coco_categories, image, lvis_file, picture, sizes  # noqa: F401
from tests.test_detectors import owl


def given(**changes) -> SimpleNamespace:
    settings = dict(
        profile="paper",
        dry_run=False,
        seed=0,
        dataset="detection/ov-coco",
        branch="SIC-CADS",
        detector=full.OWLVIT,
        clip=full.CLIP,
        checkpoint="",
        captions=False,
        gamma=0.5,
        pictures=0,
        data_root="nowhere",
        weights="",
        accelerator="cpu",
        devices=1,
        precision="32-true",
    )
    return SimpleNamespace(**settings | changes)


def small_clip() -> CLIP:
    torch.manual_seed(3)
    vision = CLIPVisionCfg(1, width=32, head_width=16, patch_size=16, image_size=32)
    model = CLIP(24, vision, CLIPTextCfg(77, 49408, width=16, heads=2, layers=1)).eval()
    set_model_preprocess_cfg(model, {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    return model


@pytest.fixture
def small(monkeypatch):
    """Small backbones and detector in the place of the full-size ones."""

    def build(name: str, weights: object = "pretrained", **options):
        if name.startswith("openclip:"):
            return small_clip()
        return timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=0)

    monkeypatch.setattr(full.backbones, "build", build)
    monkeypatch.setattr(full.detectors, "build", lambda name, names, weights: owl("owlvit", list(names)))
    monkeypatch.setattr(full, "SHORTER", 64)
    monkeypatch.setattr(full, "WORKERS", 0)


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipes_are_the_released_ones():
    lvis, both = full.recipe("detection/ov-lvis"), full.recipe("detection/ov-coco", captions=True)
    assert (lvis.iterations, lvis.batch, lvis.lr, lvis.size, lvis.crop) == (90_000, 64, 2e-4, 480, 0.7)
    assert (both.iterations, both.batch, both.lr, both.size, both.crop) == (180_000, 32, 5e-5, 480, 0.5)
    assert full.recipe("detection/ov-coco").batch == 16
    assert (lvis.clip, lvis.repeat, both.clip, both.repeat) == (1.0, 0.001, None, None)
    assert (lvis.options["tau"], both.options["tau"], both.options["lambda_novel"]) == (50, 20, 0.5)
    foreign = full.recipe("detection/objects365")
    novel = torch.ones(3, dtype=torch.bool)
    share = sic_cads.text_share(novel, foreign.options["lambda_base"], foreign.options["lambda_novel"])
    torch.testing.assert_close(share, torch.full((3,), sic_cads.CROSS_DATASET))


def test_rates_rise_in_a_line_and_fall_on_a_cosine():
    r = full.recipe("detection/ov-lvis")
    rates = full.learning_rates(r, r.iterations)
    assert rates[0] == pytest.approx(r.lr * 1e-4) and rates[-1] < 1e-9
    half = r.warmup // 2
    cosine = (1 + np.cos(np.pi * half / r.iterations)) / 2
    assert rates[half] == pytest.approx(r.lr * cosine * (1e-4 + (1 - 1e-4) / 2))
    assert rates[r.warmup] == pytest.approx(r.lr * (1 + np.cos(np.pi / 9)) / 2)
    assert full.learning_rates(r, 90).argmax() == 10


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_class_stays_while_a_part_of_a_box_does(tmp_path):
    picture(tmp_path / "1.jpg")  # 12 x 8
    boxes = [([0, 0, 2, 8], 1, 0), ([0, 0, 12, 8], 2, 0), ([0, 0, 12, 8], 3, 1)]
    rows = [
        {"id": i, "image_id": 1, "category_id": c, "bbox": b, "area": 9, "iscrowd": crowd}
        for i, (b, c, crowd) in enumerate(boxes, 1)
    ]
    found = {"images": [image(1)], "annotations": rows, "categories": [{"id": i, "name": f"{i}"} for i in (1, 2, 3)]}
    write_json(tmp_path / "a.json", found)
    lessons = full.Lessons(detection.own_folder(tmp_path / "a.json", tmp_path), 32, 0.5)
    torch.manual_seed(0)
    drawn = [lessons[0] for _ in range(40)]
    pixels, _, boxes = drawn[0]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8 and boxes is True
    seen = torch.stack([positives for _, positives, _ in drawn])
    assert seen[:, 1].all() and not seen[:, 2].any()  # a crowd is no label
    assert 0 < seen[:, 0].float().mean() < 1  # the box at the left edge is cut off now and then
    labels = full.Lessons(lessons.data, 32, 0.5, boxes=False)
    assert labels[0][1].tolist() == [True, True, True] and labels[0][2] is False


def test_captions_join_the_boxes(coco):  # noqa: F811
    train = detection.load("detection/ov-coco", coco, "train")
    p = given(captions=True, data_root=str(coco))
    with pytest.raises(MissingData, match="captions_train2017"):
        full.lessons(p, train)
    captions = {
        "images": [image(i) for i in (1, 2, 3, 4)],
        "annotations": [{"image_id": i, "caption": text} for i, text in ((1, "a dog"), (2, "a cat"), (4, "a bus"))],
    }
    write_json(coco / "coco" / "annotations" / "captions_train2017.json", captions)
    found = full.lessons(p, train)
    assert isinstance(found, ConcatDataset) and [found[i][2] for i in range(len(found))] == [True] * 3 + [False] * 3
    named = {train.class_names[int(found[i][1].nonzero())] for i in (3, 4, 5)}
    assert named == {"dog", "cat", "bus"}  # novel names too, as released


def test_rare_pictures_are_shown_more_often(tmp_path, sizes):  # noqa: F811
    sizes("detection/ov-lvis", sizes={"train": 1, "test": 1}, classes=3)
    for split in ("train", "val"):
        write_json(tmp_path / "lvis" / f"lvis_v1_{split}.json", lvis_file())
    picture(tmp_path / "coco" / "val2017" / "000000000001.jpg")
    found = full.lessons(given(dataset="detection/ov-lvis"), detection.load("detection/ov-lvis", tmp_path, "train"))
    assert isinstance(found, Subset) and len(found) == 1


# --- the recogniser ---------------------------------------------------------------------------------------------------


def recogniser(seed: int = 0) -> full.Recogniser:
    clip = small_clip()
    text = torch.nn.functional.normalize(torch.randn(80, 24, generator=torch.Generator().manual_seed(5)), dim=-1)
    return full.build(given(seed=seed), clip, text, torch.arange(80) % 3 == 0, "random")


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return images, torch.rand(count, 80, generator=generator) < 0.1, torch.tensor([True, False] * (count // 2))


def test_boxes_rank_base_classes_and_captions_all(small):
    model, (images, positives, boxes) = recogniser().train(), batch()
    value = full.loss(model, (images, positives, boxes))
    e_text, e_image = model(images, raw=True)
    scores = model.tau * pool(e_text @ model.text.mT, 2)
    ranked = [rank_loss(scores[boxes], positives[boxes], ~model.novel), rank_loss(scores[~boxes], positives[~boxes])]
    expected = sum(ranked) / 2 + model.distill * distillation_loss(e_image, model.teach(images))
    torch.testing.assert_close(value, expected)
    whole = full.loss(model, (images, positives, torch.ones(4, dtype=torch.bool)))
    torch.testing.assert_close(whole, sum(model.loss(images, positives)))


def test_pictures_are_brought_to_the_detectors_size(small, monkeypatch):
    model, (images, *_) = recogniser().eval(), batch(2)
    monkeypatch.setattr(full, "SHORTER", 128)
    assert model.prepared(images).shape[-1] == 416
    larger = full.resize(images, [128], antialias=True)
    plain = sic_cads.MLR.crops(model, larger)
    assert torch.equal(model.crops(images), plain)
    model.train()
    assert torch.equal(model.crops(images), sic_cads.MLR.crops(model, images))


def test_training_clips_each_entry_and_leaves_no_hook(small):
    p, model = given(dataset="detection/ov-lvis"), recogniser()
    before = {n: t.clone() for n, t in trained_state(model).items()}
    data = torch.utils.data.TensorDataset(*batch(8))
    history = full.learn(p, data, model, batch=4, epochs=1)
    assert len(history) == 2 and history[0]["lr"] == pytest.approx(2e-4 * 1e-4)
    assert any(not torch.equal(t, before[n]) for n, t in trained_state(model).items())
    assert not model.training and all(not t._backward_hooks for t in model.trained().values())
    with pytest.raises(BadParameter, match="precision"):
        full.learn(given(dataset="detection/ov-lvis", precision="16-mixed"), data, model, batch=4)
    with pytest.raises(BadParameter, match="batch"):
        full.learn(p, data, model)


def test_the_loss_is_one_call_of_the_model(small, monkeypatch):
    """On several devices only a forward pass of what is trained may be called, no method of it."""
    model, items, seen = recogniser(), batch(), {}
    monkeypatch.setattr(full, "fit", lambda model, loss, data, **options: seen.update(model=model, loss=loss) or [])
    full.learn(given(), torch.utils.data.TensorDataset(*batch(8)), model, batch=4, epochs=1)
    assert seen["loss"](lambda *given: given, items) == items
    torch.testing.assert_close(seen["model"].train()(*items), full.loss(model, items))


def test_a_recogniser_is_kept_and_taken_up_with_another_vocabulary(small, tmp_path):
    model, file = recogniser(), tmp_path / "mlr.safetensors"
    model.body.bn1.weight.data.mul_(1.5)  # of a frozen norm, which training does not change but the file must hold
    full.save(model, file)
    clip, other = small_clip(), torch.randn(7, 24)
    again = full.load(given(seed=9, checkpoint=str(file)), clip, other, torch.zeros(7, dtype=torch.bool))
    assert again.text.shape == (7, 24)
    assert all(torch.equal(t, full.kept(again)[n]) for n, t in full.kept(model).items())
    with pytest.raises(MissingWeights, match=r"visual\+"):
        full.load(given(checkpoint="nothing.pth"), clip, other, torch.zeros(7, dtype=torch.bool))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorruptFile, match="mlr"):
        full.load(given(checkpoint=str(file)), clip, other, torch.zeros(7, dtype=torch.bool))


def test_the_authors_names_are_taken_up(monkeypatch):
    body = timm.create_model("resnet50", num_classes=0)
    theirs = sic_cads.MLR(body, torch.randn(5, 24), torch.zeros(5, dtype=torch.bool))
    torch.manual_seed(4)
    state = {f"ovmlr_model.{name}": torch.randn_like(t) for name, t in theirs.to_official().items()}
    monkeypatch.setattr(full.backbones, "read_state", lambda path: state)
    monkeypatch.setattr(full, "build", lambda *_: full.Recogniser(body, torch.randn(9, 24), torch.ones(9) > 0))
    found = full.load(given(checkpoint=__file__), None, None, None)
    assert torch.equal(found.heads.shared.weight, state["ovmlr_model.mlr_lin.weight"]) and len(found.text) == 9


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": "detection/ov-lvis", "captions": True}, "captions"),
        ({"dry_run": True, "detector": "IDEA-Research/grounding-dino-tiny"}, "OWL"),
        ({"dataset": "detection/objects365"}, "checkpoint"),
    ],
)
def test_parameters_that_do_not_go_together(changes, said):
    with pytest.raises(BadParameter, match=said):
        full.parts(given(**changes), Path("nowhere"))


def test_what_is_missing_is_said(tmp_path, monkeypatch, coco):  # noqa: F811
    with pytest.raises(MissingData, match="cocodataset"):
        full.parts(given(data_root=str(tmp_path / "empty")), tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="owlvit"):
        full.parts(given(data_root=str(coco)), tmp_path)
    monkeypatch.setattr(full.detectors, "build", lambda name, names, weights: owl("owlvit", list(names)))
    with pytest.raises(MissingWeights, match="openclip"):
        full.parts(given(data_root=str(coco)), tmp_path)


@pytest.mark.parametrize("branch", ["SIC-CADS", "visual+"])
def test_real_pictures_from_end_to_end(small, coco, branch, tmp_path):  # noqa: F811
    p = given(data_root=str(coco), branch=branch, pictures=1)
    found = full.parts(p, tmp_path / "out")
    model = found["build"]()
    history = found["learn"](model, batch=1, epochs=2)
    assert len(history) == (2 if branch == "SIC-CADS" else 0)
    assert len(found["test"]) == 1 and found["novel"].sum() == 17 and found["base"].sum() == 48
    pixels, _ = found["test"][0]
    boxes, probabilities = found["detect"](pixels)
    assert boxes.shape == (16, 4) and probabilities.shape == (16, 80)
    said = model.eval().recognise(pixels[None]).p[0]
    best = detectors.refined(detectors.Output(boxes, probabilities, pixels.shape[1:]), said, p.gamma)
    rows = detectors.rows(best, found["test"].image_ids[0], found["test"].categories)
    assert set(full.scores(p, found["test"], rows)) == {"novel", "base", "all"}
    kept = sorted(path.suffix for path in (tmp_path / "out").glob("trained/*"))
    if branch == "visual+":
        assert not kept
        return
    # a second run reads what the first one trained, and the file is what `checkpoint` takes
    assert kept == [".pt", ".safetensors"]
    again = full.parts(p, tmp_path / "out")
    second = again["build"]()
    written = next((tmp_path / "out" / "trained").glob("*.pt")).stat().st_mtime_ns
    assert again["learn"](second, batch=1, epochs=2) == history
    assert next((tmp_path / "out" / "trained").glob("*.pt")).stat().st_mtime_ns == written
    file = next((tmp_path / "out" / "trained").glob("*.safetensors"))
    third = full.parts(given(**vars(p) | {"checkpoint": str(file)}), tmp_path)["build"]()
    for name, tensor in full.kept(model).items():
        assert torch.equal(full.kept(second)[name], tensor) and torch.equal(full.kept(third)[name], tensor), name
    other = full.parts(given(**vars(p) | {"seed": 1}), tmp_path / "out")
    assert other["learn"](other["build"](), batch=1, epochs=2) != history


@pytest.mark.parametrize("dataset", ["detection/ov-coco", "detection/ov-lvis", "detection/openimages"])
def test_the_dry_run_has_as_many_classes_as_the_data_set(small, monkeypatch, dataset):
    p = given(dataset=dataset, dry_run=True)
    smaller = full.recipe(dataset).__class__(**vars(full.recipe(dataset)) | {"size": 64})
    monkeypatch.setattr(full, "recipe", lambda dataset, captions=False: smaller)
    found = full.parts(p, Path("nowhere"))
    classes = {"detection/ov-coco": 80, "detection/ov-lvis": 1203, "detection/openimages": 500}[dataset]
    assert len(found["names"]) == classes
    model = found["build"]()
    assert len(found["learn"](model)) == 2
    pixels, _ = found["test"][0]
    assert pixels.shape == (3, 480, 640)
    boxes, probabilities = found["detect"](pixels)
    assert probabilities.shape[1] == classes and model.recognise(pixels[None]).p.shape == (1, classes)
    best = sic_cads.detect(boxes, probabilities, 1e-3, None, 100)
    scores = full.scores(p, found["test"], detectors.rows(best, 0, found["test"].categories))
    assert all(np.isfinite(value) for value in scores.values())


@pytest.mark.slow
def test_the_dry_run_at_full_size():
    found = full.parts(given(dry_run=True), Path("nowhere"))
    model = found["build"]()
    assert sum(t.numel() for t in model.trained().values()) == 28_504_768
    assert len(found["learn"](model)) == 2
    boxes, probabilities = found["detect"](found["test"][0][0])
    assert boxes.shape == (576, 4) and probabilities.shape == (576, 80)


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_gather_and_stand_beside_the_published(tmp_path):
    path = tmp_path / "measured.csv"
    p = given(gamma=0.7)
    row = {"method": full.label(p), "dataset": p.dataset, "pictures": 0, "seed": 0, "novel": 30.0, "base": 50.0}
    full.measured(path, row | {"all": 45.0})
    full.measured(path, row | {"all": 47.0, "seed": 1})
    full.measured(path, {"method": "few", "dataset": p.dataset, "pictures": 10, "seed": 0, "novel": 99.0})
    rows = full.measured(
        path, {"method": "o", "dataset": "detection/objects365", "pictures": 0, "seed": 0, "Objects365": 20.0}
    )
    name = "owlvit-base-patch32 + SIC-CADS, gamma 0.7"
    assert full.cells(rows, "ov-coco") == {(name, "novel"): 30, (name, "base"): 50, (name, "all"): 46}
    found = full.tables(rows)
    assert len(found) == 3 and found["Across data sets"].set_index("method").loc["o", "Objects365"] == "– / 20.00"
    assert full.label(p, refined=False) == "owlvit-base-patch32"
    assert isinstance(found["OV-LVIS"], pd.DataFrame)


def test_the_usual_file_of_clip_is_taken(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(backbones, "build", lambda name, weights: asked.append((name, weights)))
    p = given(data_root=str(tmp_path))
    full.clip_model(p)
    usual = full.file_of(p, "clip")
    usual.parent.mkdir()
    usual.write_bytes(b"")
    full.clip_model(p)
    full.clip_model(given(data_root=str(tmp_path), clip="ViT-L-14-quickgelu/openai"))
    assert [weights for _, weights in asked] == ["pretrained", usual, "pretrained"]
    assert Path(usual).name in {w.get("file") for w in paper("sic_cads")["weights"]}
    assert len(coco_categories()) == 80
