"""DMT with the ancestors' settings: a distillation written out, teachers, students' files, scores, results."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from companion.errors import BadCheckpoint, MissingWeights
from companion.models.dmt import recipe as runs
from companion.models.dmt.model import loss
from companion.models.dmt.vit import ViT
from companion.training import checkpoints, fit, stored
from companion.training.hardware import CPU
from companion.training.schedules import schedule
from tests.conftest import interrupted, parameters
from tests.models.common import refuses
from tests.papers.common import shrink
from tests.recipes.runner import InOrder

given = partial(
    parameters, "dmt", profile="paper", dry_run=True, student="tiny", data_root="nowhere", accelerator="cpu"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Narrow encoders of 224 px instead of ViT-T and ViT-B."""
    shrink("dmt", monkeypatch)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_dry_run_has_the_images_of_two_steps_on_all_devices(devices, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "MICRO_BATCH", 1)
    _, training, _ = runs.distillation(given(devices=devices), tmp_path, real=False)
    assert len(training.data) == 2 * devices


def written_out(model, images, noises, r, warmup):
    """Distillation by the equations: losses of each step; the model's parameters are changed in place."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": r["weight_decay"]}]
    groups += [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, r["beta2"]))
    teachers = list(model.teachers.models.values())
    mean, square, losses = [0.0] * len(teachers), [0.0] * len(teachers), []
    for step, (x, noise) in enumerate(zip(images, noises, strict=True)):
        keep = noise.argsort(1)[:, :49]  # a quarter of 196
        at = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), 1 + keep], 1)[..., None]
        z = model.student(x, keep)
        decoded, loss = model.decoder(z, keep), 0
        for k, teacher in enumerate(teachers):
            with torch.no_grad():
                share, t = max(1 / (step + 1), 0.01), teacher.hidden(x)[0]
                t = F.layer_norm(t, t.shape[-1:], eps=1e-6)
                mean[k] = (1 - share) * mean[k] + share * t.mean((0, 1))
                square[k] = (1 - share) * square[k] + share * t.square().mean((0, 1))
                t = (t - mean[k]) / (square[k] - mean[k] ** 2).sqrt()
            token = F.smooth_l1_loss(model.adapters[k](z), t.take_along_dim(at, 1), beta=2.0)
            mapped = F.smooth_l1_loss(model.map_heads[k](decoded), t, beta=2.0)
            loss = loss + (token + mapped) / len(teachers)
        losses.append(float(loss.detach()))
        falling = (1 + math.cos(math.pi * (step - warmup) / (len(images) - warmup))) / 2
        for group in optimizer.param_groups:
            rising = r["lr"] * step / (warmup - 1)
            group["lr"] = rising if step < warmup else r["final_lr"] + (r["lr"] - r["final_lr"]) * falling
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_a_distillation_is_the_one_written_out(monkeypatch):
    """Six steps in three epochs, one of them warm-up: the same losses and the same changes of the parameters."""
    few, p = {"epochs": 3, "warmup_epochs": 1, "batch": 2}, given()
    monkeypatch.setattr(runs, "published", lambda name, real=runs.published: real(name) | few)
    generator = torch.Generator().manual_seed(0)
    images, noises = torch.randn(6, 2, 3, 224, 224, generator=generator), torch.rand(6, 2, 196, generator=generator)
    model = runs.build(p, runs.teachers(p))
    other, start = copy.deepcopy(model), {name: t.clone() for name, t in model.state_dict().items()}
    losses = written_out(other.train(), images, noises, runs.published("distil"), 2)

    masks = iter(noises)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **options: next(masks))
        data = InOrder(((image,) for image in images.flatten(0, 1)), 4)
        history = fit.fit(model, loss, data, **runs.stage(given(dry_run=False), len(data)) | {"hardware": CPU})
    np.testing.assert_allclose([row["loss"] for row in history], losses, rtol=1e-3)
    after, expected = model.state_dict(), other.state_dict()
    for name, parameter in model.named_parameters():
        ours, theirs = after[name] - start[name], expected[name] - start[name]
        if name.endswith("qkv.bias"):  # that of the keys changes no output: its gradient is rounding
            ours, theirs = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (ours, theirs))
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), name
        assert parameter.requires_grad or not ours.any(), name


def test_teachers_by_name_and_file(tmp_path):
    own = ViT(224, 16, 64, 1, 1)
    torch.save({"model": own.to_official()}, tmp_path / "mae.pth")
    found = runs.teachers(given(teacher_files=f" MAE = {tmp_path / 'mae.pth'}"))
    assert list(found.models) == ["MAE", "MoCo v3", "iBOT"] and found.widths == (64, 48, 48)
    assert torch.equal(found.models["MAE"].norm.weight, own.norm.weight)
    assert [model.positions for model in found.models.values()] == ["mae", "mocov3", "learned"]
    first, second = (found.models[n].blocks[0].mlp.fc1.weight for n in ("MoCo v3", "iBOT"))
    assert not torch.equal(first, second)
    refuses((lambda: runs.teachers(given(teachers="MAE", teacher_files="iBOT=a.pth")), "iBOT"))


def test_choices_of_the_reconstruction():
    for losses, weights in runs.LOSSES.items():
        p = given(losses=losses, mask_ratio=0.5, target_norm="ln")
        model = runs.build(p, runs.teachers(p))
        assert (model.token_weight, model.map_weight) == weights and model.visible == 98
        assert {norm.kind for norm in model.target_norms} == {"ln"}


def test_a_students_file_names_its_choices_and_its_size(tmp_path):
    """Its results would be filed under the parameters."""
    taught, file = given(teachers="DINO", losses="map", cached=True), str(tmp_path / "student.safetensors")
    _, training, _ = runs.distillation(taught, tmp_path, real=False)
    model = training.build()
    checkpoints.save(tmp_path, "student", training.weights(model), training.metadata(model))
    mine = {name: getattr(taught, name) for name in runs.DISTILLED} | {"weights": file}
    assert runs.encoder(given(**mine)).width == 48
    torch.save(ViT(32, 8, 64, 4, 4).to_official(), tmp_path / "wide.pth")
    refuses(
        (lambda: runs.encoder(given(weights=file)), "DINO"),
        (lambda: runs.encoder(given(**mine | {"cached": False})), "cached"),
        (lambda: runs.encoder(given(**mine | {"student": "base"})), "tiny"),
        (lambda: runs.encoder(given(weights=str(tmp_path / "wide.pth"))), "64"),
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Parameters that distil from a folder of three images."""
    root = tmp_path / "images"
    for name in ("", "a", "b/ä"):  # any depth, no label is needed
        (root / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(root / name / "image.PNG")
    monkeypatch.setattr(runs, "teacher", lambda p, name: torch.manual_seed(0) and ViT(224, 16, 48, 1, 4))
    return partial(given, dataset="folder", data_root=str(root), dry_run=False)


@pytest.mark.parametrize("cached", [False, True])
def test_a_folder_is_distilled_and_its_student_saved(folder, tmp_path, monkeypatch, cached):
    p = folder(cached=cached)
    few, whole = {"epochs": 1, "batch": 2, "schedule": schedule("constant", 0)}, runs.stage
    monkeypatch.setattr(runs, "stage", lambda p, images: whole(p, images) | few)
    result = runs.run(p, tmp_path)
    title, _, file = result.title.partition("; the student is ")
    assert title == "folder, 3 images" and list(result.teachers) == ["MAE", "MoCo v3", "iBOT"]
    ((task, steps, metric, loss),) = result.table.itertuples(index=False)
    assert (task, steps, metric) == ("distil", 1, "last loss") and loss > 0.1
    images = torch.randn(1, 3, 224, 224)
    loaded = runs.encoder(given(weights=file, cached=cached, dry_run=False))
    assert torch.equal(loaded(images), result.student(images))
    if cached:
        assert {f.name for f in (tmp_path / "teachers").iterdir()} == {"0.npy", "1.npy", "2.npy", "cache.json"}
        monkeypatch.setattr(runs.Teachers, "forward", None)
        runs.run(folder(cached=True, losses="map"), tmp_path)


def test_another_distillation_has_another_checkpoint_wherever_it_is_started(folder, tmp_path, monkeypatch):
    def trained(**changes):
        return runs.distillation(folder(**changes), tmp_path)[1].name

    first = trained()
    others = {trained(losses="map"), trained(seed=1), trained(mask_ratio=0.5), trained(student="base"), first}
    assert len(others) == 5
    monkeypatch.chdir(tmp_path)
    assert trained(data_root="images") == first
    (tmp_path / "images/image.PNG").rename(tmp_path / "images/a/another.png")
    assert trained() not in others, "as many images, not the same"
    refuses((lambda: trained(dataset="pretraining/coco"), "folder"))


@pytest.mark.parametrize(("devices", "images", "batch"), [(1, 1001, 1001), (2, 1001, 1000), (4, 5000, 4096)])
def test_a_small_folder_has_a_batch_for_its_devices_and_its_learning_rate(devices, images, batch):
    stage = runs.stage(given(devices=devices, dry_run=False), images)
    (group,) = stage["optimizer"](nn.Linear(1, 1, bias=False)).param_groups[:1]
    rates = stage["schedule"](group["lr"], 300, 1)
    assert stage["batch"] == batch and stage["hardware"].accumulate == math.ceil(batch / (256 * devices))
    assert rates.max() == pytest.approx(1.5e-4 * batch / 256) and stage["epochs"] == 300
    assert rates[0] == 0 and rates[9] == rates.max() and rates[-1] < 0.01 * rates.max()


@pytest.mark.parametrize(
    ("task", "count", "shares"),
    [
        ("detect", 118_287, {0: 1 / 250, 250: 1, 163_888: 1, 163_889: 0.1, 177_546: 0.01}),
        ("segment", 20_210, {0: 0, 1500: 1, -1: 0}),
        ("fine-tune", 5_000, {0: 0, 20: 1, -1: 0}),
    ],
)
def test_real_sets_are_trained_for_the_published_steps(task, count, shares, monkeypatch, tmp_path):
    """Neither dataset is a whole number of batches."""

    class Many(list):
        def __len__(self):
            return count

    monkeypatch.setattr(runs.pretraining, "load", lambda *args: Many())
    r, training = runs.published(task), runs.downstream(given(task=task, dry_run=False, encoder="random"), tmp_path)[1]
    model, steps = training.build(), round(training.fit["epochs"] * (count // training.fit["batch"]))
    assert steps == (r["steps"] if "steps" in r else r["epochs"] * (count // r["batch"]))
    groups = training.fit["optimizer"](model).param_groups
    rates = [training.fit["schedule"](group["lr"], steps, 1) for group in groups]
    highest = max(rates, key=max)
    assert len(highest) == steps and min(rates, key=max).max() < 0.5 * r["lr"]
    for step, share in shares.items():
        assert highest[step] == pytest.approx(share * r["lr"], rel=0.2, abs=2e-3 * r["lr"]), step


class Outputs(nn.Module):
    """Fixed outputs: the first class, or the second right of column 32, or the box that is there."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, images):
        if self.task == "detect":
            box = torch.tensor([[32.0, 32, 96, 96]])
            mask = torch.zeros(1, 1, 128, 128)
            mask[..., 32:96, 32:96] = 1
            return [{"boxes": box, "labels": torch.tensor([1]), "scores": torch.ones(1), "masks": mask} for _ in images]
        logits = torch.zeros(len(images), 150, *images.shape[2:] * (self.task == "segment"))
        logits[:, 0] = 1
        if self.task == "segment":
            logits[:, 1, :, 32:] = 2
        return logits


def test_the_weights_of_a_probe_have_its_encoder(tmp_path):
    _, training, _ = runs.downstream(given(task="linear probe"), tmp_path, real=False)
    assert "0.vit.cls_token" in training.weights(training.build())


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("fine-tune", {"top-1": 12.5}),  # classes 0 to 7
        ("linear probe", {"top-1": 12.5}),
        ("segment", {"mIoU": 50 * (1 / 2 + 2 / 3)}),  # the classes change at column 64 of 128
        ("detect", {"box AP": 100.0, "mask AP": 100.0}),
    ],
)
def test_scores_are_those_of_the_outputs(task, expected, tmp_path):
    _, _, score = runs.downstream(given(task=task), tmp_path, real=False)
    assert score(Outputs(task)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", ["linear probe", "detect", "segment"])
def test_a_killed_run_computes_no_saved_image_again(task, tmp_path, monkeypatch):
    """Of 8 images 4 are saved when the fifth, or the third pair of the probe's features, is interrupted."""
    for module, name, value in ((stored, "EVERY", 4), (stored, "FLUSHED", 0), (runs, "MICRO_BATCH", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(runs, "TEST_BATCH", 1)
    model, seen = (runs.down.Features, 2) if task == "linear probe" else (Outputs, 4)

    def result(out, **changes):
        _, training, score = runs.downstream(given(task=task, **changes), out, real=False)
        return training.data().tensors[0] if task == "linear probe" else score(Outputs(task))

    expected = result(tmp_path / "whole")
    with interrupted(monkeypatch, model, "forward", seen):
        result(tmp_path / "killed")
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda self, images: calls.append(1) or forward(self, images))
    found = result(tmp_path / "killed")
    assert len(calls) == seen and (found == expected if task != "linear probe" else torch.equal(found, expected))
    result(tmp_path / "killed")
    assert len(calls) == seen
    result(tmp_path / "killed", precision="bf16-mixed")
    assert len(calls) == 3 * seen, "of another precision"


def test_what_is_missing_or_of_another_model_is_refused(tmp_path, monkeypatch):
    real = given(task="fine-tune", dry_run=False)
    refuses((lambda: runs.downstream(given(task="fine-tune", dataset="vtab/dtd"), tmp_path), "vtab/dtd"))
    monkeypatch.setattr("companion.backbones.try_to_load_from_cache", lambda *a: None)
    refuses((lambda: runs.encoder(real), "distil"), (lambda: runs.teacher(real, "MAE"), "mae"), error=MissingWeights)
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    other = given(dry_run=False, weights=str(tmp_path / "x.pth"))
    refuses((lambda: runs.encoder(other), "pos_embed"), error=BadCheckpoint)
    assert runs.encoder(given(encoder="teacher")).positions == "mae"


def test_results_are_collected_in_rows_of_their_own(tmp_path):
    row = {"task": "fine-tune", "student": "tiny", "encoder": "distilled", "teachers": "MAE, MoCo v3, iBOT"}
    row |= runs.CHOICES | {"seed": 0, "metric": "top-1", "score": 70.0}
    others = [{"seed": 1, "score": 72.0}, {"losses": "map", "score": 60.0}, {"encoder": "teacher", "score": 83.0}]
    rows = runs.RESULTS.measured(tmp_path / "measured.csv", row, *(row | other for other in others))
    assert runs.cells(rows, "imagenet") == {
        ("reconstruction (MAE, MoCo v3, iBOT), ViT-T", "imagenet_top1"): 71.0,
        ("reconstruction (MAE, MoCo v3, iBOT; losses map), ViT-T", "imagenet_top1"): 60.0,
        ("MAE, ViT-B", "imagenet_top1"): 83.0,
    }
