"""DMT with the ancestors' settings: schedules, teachers by name and file, dry runs of all tasks, collected results."""

import itertools
import math
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from companion.errors import BadCheckpoint, BadParameter, CorruptFile, MissingData, MissingWeights
from companion.evaluation.recipe_parity import InOrder
from companion.models.dmt import recipe as runs
from companion.models.dmt import teachers as dmt_teachers
from companion.models.dmt.model import DMT, Teachers
from companion.models.dmt.vit import ViT
from companion.training.checkpoints import save
from tests.conftest import parameters
from tests.models.common import assert_goes_on, refuses
from tests.small import shrink

given = partial(
    parameters, "dmt", profile="paper", dry_run=True, student="tiny", data_root="nowhere", accelerator="cpu"
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(runs, "WORKERS", 0)


@pytest.fixture
def small(monkeypatch):
    """Narrow encoders of 224 px instead of ViT-T and ViT-B."""
    shrink("dmt", monkeypatch)


def test_schedule_is_the_generic_stage_of_g2sd():
    rates = runs.distil_rates(10)
    assert len(rates) == 3000 and rates[0] == 0 and rates.max() == pytest.approx(1.5e-4 * 4096 / 256)
    assert rates[99] == rates.max() and rates[-1] == pytest.approx(2.5e-6, rel=0.01)
    assert runs.recipe("segment")["steps"] == 160_000 and "steps" not in runs.recipe("fine-tune")


def blocks(state: dict[str, torch.Tensor], name: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    """The pre-norm blocks of a ViT, `name`.0 and so on, in plain PyTorch."""
    for i in range(len({key for key in state if re.fullmatch(rf"{re.escape(name)}\.\d+\.norm1\.weight", key)})):

        def linear(part: str, y: torch.Tensor, i: int = i) -> torch.Tensor:
            return y @ state[f"{name}.{i}.{part}.weight"].T + state[f"{name}.{i}.{part}.bias"]

        qkv = linear("attn.qkv", norm(state, f"{name}.{i}.norm1", x)).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear("attn.proj", attended.transpose(1, 2).flatten(2))
        inner = linear("mlp.fc1", norm(state, f"{name}.{i}.norm2", x))
        x = x + linear("mlp.fc2", inner * (1 + torch.erf(inner / 2**0.5)) / 2)
    return x


def norm(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm, eps 1e-6; without affine where there is no `name`."""
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"] if name else x


def embedded(state: dict[str, torch.Tensor], name: str, images: torch.Tensor) -> torch.Tensor:
    """The tokens that enter the first block: patches of 16 pixels and the [CLS] token, positions added."""
    kernel, bias = state[f"{name}patch_embed.proj.weight"], state[f"{name}patch_embed.proj.bias"]
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = torch.cat([state[f"{name}cls_token"].expand(len(images), -1, -1), patches @ kernel.flatten(1).T + bias], 1)
    return x + state[f"{name}pos_embed"]


def written_out(state, trained, images, noises, teachers, r, steps, warmup):
    """Distillation by the equations, from the tensors of a model: losses of each step; `state` is changed in place."""
    mean = {name: 0 for name in teachers}
    square, moments, losses = dict(mean), {name: (0, 0) for name in trained}, []
    for step in range(steps):
        x, order = images[step], noises[step].argsort(1)
        keep = order[:, :49]  # a quarter of 196
        for name in trained:
            state[name] = state[name].detach().requires_grad_()
        whole = embedded(state, "student.", x)
        visible = whole[:, 1:].take_along_dim(keep[..., None], 1)
        z = norm(state, "student.norm", blocks(state, "student.blocks", torch.cat([whole[:, :1], visible], 1), 4))

        y = z @ state["decoder.embed.weight"].T + state["decoder.embed.bias"]
        # all positions get the mask token, and the visible ones their own
        positions = [
            torch.stack([y[b, 1 + list(keep[b]).index(i)] if i in keep[b] else state["decoder.mask_token"][0, 0]
                         for i in range(196)])
            for b in range(len(x))
        ]  # fmt: skip
        y = torch.cat([y[:, :1], torch.stack(positions)], 1) + state["decoder.pos_embed"]
        y = norm(state, "decoder.norm", blocks(state, "decoder.blocks", y, 4))

        loss = 0
        for k, name in enumerate(teachers):
            with torch.no_grad():
                seen = embedded(state, f"teachers.models.{name}.", x)
                t = norm(state, "", blocks(state, f"teachers.models.{name}.blocks", seen, 4))
                share = max(1 / (step + 1), 0.01)
                mean[name] = (1 - share) * mean[name] + share * t.mean((0, 1))
                square[name] = (1 - share) * square[name] + share * t.square().mean((0, 1))
                t = (t - mean[name]) / (square[name] - mean[name] ** 2).sqrt()
            at = torch.cat([t[:, :1], t[:, 1:].take_along_dim(keep[..., None], 1)], 1)
            for part, own, target in (("adapters", z, at), ("map_heads", y, t)):
                gap = (own @ state[f"{part}.{k}.weight"].T + state[f"{part}.{k}.bias"] - target).abs()
                loss = loss + torch.where(gap < 2, gap**2 / 4, gap - 1).mean() / len(teachers)
        losses.append(float(loss.detach()))

        lr = r["lr"] * step / (warmup - 1)
        if step >= warmup:
            half = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
            lr = r["final_lr"] + (r["lr"] - r["final_lr"]) * half
        gradients = torch.autograd.grad(loss, [state[name] for name in trained])
        for name, g in zip(trained, gradients, strict=True):
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * g, r["beta2"] * second + (1 - r["beta2"]) * g**2
            moments[name], value = (first, second), state[name].detach()
            value = value * (1 - lr * r["weight_decay"] * (value.ndim >= 2))
            step_size = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - r["beta2"] ** (step + 1))).sqrt() + 1e-8)
            state[name] = value - lr * step_size
    return losses


def test_a_distillation_is_the_one_written_out(small, monkeypatch):
    """Six steps in three epochs, one of them warm-up: the same losses and the same changes of the parameters."""
    few, p = {"epochs": 3, "warmup_epochs": 1, "batch": 2}, given()
    monkeypatch.setattr(runs, "recipe", lambda name, real=runs.recipe: real(name) | few)
    generator = torch.Generator().manual_seed(0)
    images, noises = torch.randn(6, 2, 3, 224, 224, generator=generator), torch.rand(6, 2, 196, generator=generator)
    found = runs.teachers(p)
    model = runs.build(p, found)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    trained = [name for name, t in model.named_parameters() if t.requires_grad]
    state = dict(start)
    losses = written_out(state, trained, images, noises, found.names, runs.recipe("distil"), 6, 2)

    masks = iter(noises)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **options: next(masks))
        data = InOrder(((image,) for image in images.flatten(0, 1)), 4)
        history = runs.distil(p, model, data, batch=2)
    np.testing.assert_allclose([row["loss"] for row in history], losses, rtol=1e-3)
    for name, after in model.state_dict().items():
        if name in trained:
            ours, theirs = after - start[name], state[name] - start[name]
            if name.endswith("qkv.bias"):  # that of the keys changes no output: its gradient is rounding
                ours, theirs = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (ours, theirs))
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm(), name


def test_teachers_by_name_and_file(tmp_path, small):
    assert runs.named(" MAE , iBOT") == ["MAE", "iBOT"]
    assert runs.files("MAE=a.pth, MoCo v3 = b.pth") == {"MAE": "a.pth", "MoCo v3": "b.pth"}
    torch.manual_seed(5)
    own = ViT(224, 16, 64, 1, 1)
    torch.save({"model": own.to_official()}, tmp_path / "mae.pth")
    found = runs.teachers(given(teacher_files=f"MAE={tmp_path / 'mae.pth'}"))
    assert found.names == ("MAE", "MoCo v3", "iBOT") and found.widths == (64, 48, 48)
    assert torch.equal(found.models["MAE"].norm.weight, own.norm.weight)
    kinds = [model.positions for model in found.models.values()]
    assert kinds == ["mae", "mocov3", "learned"]
    first, second = (found.models[n].blocks[0].mlp.fc1.weight for n in ("MoCo v3", "iBOT"))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("losses", list(runs.LOSSES))
def test_dry_run_of_distillation(losses, small, tmp_path):
    setting = runs.setting(given(losses=losses, fusion="mean" if losses == "map" else "separate"), tmp_path)
    model = setting.build("DMT")
    frozen = {n: t.clone() for n, t in model.teachers.state_dict().items()}
    first = [t.clone() for t in model.student.parameters()]
    history = setting.learn(model, "DMT")
    assert [row["step"] for row in history] == [0, 1] and list(setting.learning_rates) == ["DMT"]
    weights = dict(zip(("token loss", "map loss", "relation loss"), runs.LOSSES[losses], strict=True))
    assert history[0]["loss"] == pytest.approx(sum(history[0][name] for name in weights), rel=1e-5)
    assert all((history[0][name] > 0) == bool(weight) for name, weight in weights.items())
    assert any(not torch.equal(a, b) for a, b in zip(first, model.student.parameters(), strict=True))
    assert all(torch.equal(t, frozen[n]) for n, t in model.teachers.state_dict().items())
    path = runs.save_student(model, tmp_path / "student.safetensors")
    loaded = runs.encoder(given(weights=str(path), dry_run=False))
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded(images), model.export()(images))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.safetensors"] and setting.trained is None


def test_the_heads_of_a_student_that_learned_relations_are_saved(tmp_path):
    """They are not in the tensors: a plain ViT-T has three in the last block, and other outputs."""
    teachers = Teachers({"MAE": ViT(32, 8, 48, 1, 12)})
    torch.manual_seed(0)
    model = DMT(ViT(32, 8, 192, 12, 3, last_heads=12), teachers, relation_weight=1.0, decoder="pocket")
    path = runs.save_student(model, tmp_path / "student.safetensors")
    loaded, images = runs.encoder(given(weights=str(path))), torch.randn(2, 3, 32, 32)
    assert [block.attn.num_heads for block in loaded.blocks] == [3] * 11 + [12]
    assert torch.equal(loaded(images), model.export()(images))
    assert not torch.equal(ViT.from_official(dmt_teachers.read(path))(images), loaded(images))
    assert runs.down.like(loaded).heads == 12 and runs.down.classifier(loaded, 5).blocks[-1].attn.num_heads == 12


def test_a_students_file_names_its_choices_and_its_size(tmp_path, small, monkeypatch):
    """Its results would be filed under the parameters."""
    taught = given(teachers="DINO", fusion="mean", cached=True)
    monkeypatch.setattr(runs, "released", lambda p, name: ViT(224, 16, 48, 1, 4))
    setting = runs.setting(taught, tmp_path)
    file = str(tmp_path / "student.safetensors")
    runs.save_student(setting.build("DMT"), file, {name: getattr(taught, name) for name in runs.DISTILLED})
    mine = {name: getattr(taught, name) for name in runs.DISTILLED} | {"weights": file}
    assert runs.encoder(given(**mine)).width == 48
    refuses(
        (lambda: runs.encoder(given(weights=file)), r"teachers = 'MAE, MoCo v3, iBOT' .*'DINO'.*student\.safetensors"),
        (lambda: runs.encoder(given(**mine | {"fusion": "gate"})), "fusion = 'gate' .*'mean'"),
        (lambda: runs.encoder(given(**mine | {"cached": False})), "cached = False .*True"),
        (lambda: runs.encoder(given(**mine | {"student": "base"})), "student = 'base' .*'tiny'"),
    )
    torch.save(ViT(32, 8, 48, 4, 3).to_official(), tmp_path / "authors.pth")  # without choices
    assert runs.encoder(given(weights=str(tmp_path / "authors.pth"))).width == 48
    torch.save(ViT(32, 8, 64, 4, 4).to_official(), tmp_path / "wide.pth")
    wide = given(weights=str(tmp_path / "wide.pth"))
    refuses((lambda: runs.encoder(wide), r"student = 'tiny' .*wide\.pth: width 64, depth 4 \(ViT-tiny has 48 and 4\)"))
    save(tmp_path, "damaged", ViT(32, 8, 48, 4, 3).to_official(), {"distilled": "{"})
    damaged = given(weights=str(tmp_path / "damaged.safetensors"))
    refuses((lambda: runs.encoder(damaged), "'distilled' is damaged"), error=CorruptFile)


def test_a_small_folder_has_a_batch_for_its_devices_and_its_learning_rate(small, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(runs, "fit", lambda model, loss, data, **options: seen.update(options) or [])
    few = type("Few", (list,), {"sources": ()})(range(1001))
    monkeypatch.setattr(runs, "_images_to_distil", lambda p: few)
    for devices, images, batch in ((1, 1001, 1001), (2, 1001, 1000), (4, 5000, 4096)):
        runs.distil(given(devices=devices), torch.nn.Linear(1, 1), range(images))
        rates = seen["schedule"](0.0, 0, 0)
        assert seen["batch"] == batch and rates.max() == pytest.approx(1.5e-4 * batch / 256) and len(rates) == 300
    monkeypatch.setattr(runs, "released", lambda p, name: ViT(224, 16, 48, 1, 4))
    found = runs.setting(given(dataset="folder", dry_run=False, devices=2), tmp_path)
    assert found.learning_rates == {"DMT": pytest.approx(1.5e-4 * 1000 / 256)}


def test_dry_run_from_a_cache(small, tmp_path, monkeypatch):
    setting = runs.setting(given(cached=True), tmp_path)
    model = setting.build("DMT")
    assert model.teachers is None
    assert len(setting.learn(model, "DMT")) == 2
    assert {f.name for f in (tmp_path / "teachers").iterdir()} == {"0.npy", "1.npy", "2.npy", "cache.json"}
    monkeypatch.setattr(Teachers, "forward", None)
    again = runs.setting(given(cached=True), tmp_path)
    again.learn(again.build("DMT"), "DMT")
    with pytest.raises(BadParameter, match="teachers"):
        other = runs.setting(given(cached=True, seed=1), tmp_path)
        other.learn(other.build("DMT"), "DMT")
    with pytest.raises(BadParameter, match="losses"):
        runs.setting(given(cached=True, losses="with relations"), tmp_path)


def test_gradients_of_micro_batches_are_those_of_the_whole_batch(small):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(4, 3, 224, 224, generator=generator))
    found = []
    for micro_batch in (4, 2):
        p = given(mask_ratio=0.0, target_norm="ln")  # nothing is drawn
        model = runs.build(p, runs.teachers(p))
        history = runs.distil(p, model, data, rates=np.full(2, 1e-3), micro_batch=micro_batch, batch=4)
        found.append([[row[name] for name in ("loss", "token loss", "map loss")] for row in history])
    np.testing.assert_allclose(*found, rtol=1e-3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Parameters that distil from a folder of three images, with a checkpoint after each step."""
    root = tmp_path / "images"
    for name in ("", "a", "b/ä"):  # any depth, no label is needed
        (root / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(root / name / "image.PNG")
    (root / ".hidden.png").write_text("")
    monkeypatch.setattr(runs, "EVERY", 1)
    monkeypatch.setattr(runs, "released", lambda p, name: torch.manual_seed(0) and ViT(224, 16, 48, 1, 4))
    return given(dataset="folder", data_root=str(root), dry_run=False)


def test_a_killed_distillation_resumes_to_the_same_bits_and_saves_its_student(small, folder, tmp_path, monkeypatch):
    """The running statistics of the targets too."""

    def train(out):
        found = runs.setting(folder, out)
        assert "3 images" in found.title
        model = found.build("DMT")
        return model, found.learn(model, "DMT", rates=np.full(4, 1e-3), batch=2)

    model, out = assert_goes_on(train, tmp_path, monkeypatch, DMT, "forward", 2)
    (file,), images = (out / "trained").iterdir(), torch.randn(1, 3, 224, 224)
    assert torch.equal(runs.encoder(given(weights=str(file), dry_run=False))(images), model.export()(images))


def test_another_distillation_has_another_checkpoint_wherever_it_is_started(small, folder, tmp_path, monkeypatch):
    def trained(**changes):
        return runs.setting(type(folder)(**vars(folder) | changes), tmp_path).trained

    first = trained()
    others = {trained(fusion="mean"), trained(seed=1), trained(mask_ratio=0.5), trained(student="base"), first}
    assert len(others) == 5
    monkeypatch.chdir(tmp_path)
    assert trained(data_root="images") == first
    (tmp_path / "images/image.PNG").rename(tmp_path / "images/a/another.png")
    assert trained() not in others, "as many images, not the same"


@pytest.mark.parametrize("task", [task for task in runs.USUAL if task != "distil"])
def test_dry_run_downstream(task, small, monkeypatch):
    if task == "detect":  # the slow test takes the full size
        few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 5, "box_batch_size_per_image": 16}
        original, few = runs.down.detector, few | {"size": 256, "channels": 16}
        monkeypatch.setattr(runs.down, "detector", lambda vit, classes, **o: original(vit, classes, **o | few))
        monkeypatch.setattr(runs, "_Generated", lambda task, count, side, seed: GENERATED(task, count, 256, seed))
        monkeypatch.setattr(runs.down, "Crops", lambda data, size: CROPS(data, 256))
    found = runs.downstream(given(task=task))
    model = found.build()
    history = found.learn(model)
    assert len(history) == 2 and np.isfinite([row["loss"] for row in history]).all()
    scores = found.score(model)
    wanted = {"detect": {"box AP", "mask AP"}, "segment": {"mIoU"}}.get(task, {"top-1"})
    assert set(scores) == wanted and all(0 <= v <= 100 for v in scores.values())
    assert "dry run" in found.title


GENERATED, CROPS = runs._Generated, runs.down.Crops


@pytest.mark.parametrize("task, count", [("detect", 118_287), ("segment", 20_210)])
def test_real_sets_are_trained_for_the_published_steps(task, count, small, monkeypatch, tmp_path):
    """Neither dataset is a whole number of batches."""

    class Many(GENERATED):
        def __init__(self):
            super().__init__(task, count, 64, 0) if task == "segment" else super().__init__(task, 1, 64, 0)
            self.count = count

    asked = []

    def fit(model, loss, data, *, epochs, batch, schedule, checkpoint, **options):
        steps = round(epochs * (len(data) // batch))
        asked.append(({len(rates(0.0, steps, 1)) for rates in schedule.values()}, steps, checkpoint.path.parent.name))
        return []

    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(runs.pretraining, "load", lambda name, root, split: Many())
    found = runs.downstream(given(task=task, dry_run=False, encoder="random"), tmp_path)
    found.learn(found.build())
    steps = int(runs.recipe(task)["steps"])
    assert asked == [({steps}, steps, "checkpoints")]


@pytest.mark.parametrize("task", ["fine-tune", "linear probe"])
def test_a_killed_task_resumes_to_the_same_bits_and_saves_its_weights(task, small, monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(4, 3, 224, 224, generator=generator), torch.arange(4))
    few = {"batch": 2, "epochs": 2, "warmup_epochs": 0}
    monkeypatch.setattr(runs, "EVERY", 1)
    monkeypatch.setattr(runs, "_images", lambda p, split, transform: data)
    monkeypatch.setattr(runs, "recipe", lambda name, real=runs.recipe: real(name) | few)
    monkeypatch.setattr(runs.down, "mixed_loss", lambda classes, real=runs.down.mixed_loss: real(classes, 0, 0))

    def train(out):
        found = runs.downstream(given(task=task, dry_run=False, encoder="random"), out)
        model = found.build()
        return model, found.learn(model)

    model, out = assert_goes_on(train, tmp_path, monkeypatch, runs.down.F, "cross_entropy", 2)
    (file,) = (out / "trained").iterdir()
    assert load_file(file).keys() == model.state_dict().keys()


def test_bad_parameters(tmp_path, small, monkeypatch):
    real = given(task="fine-tune", dry_run=False)
    refuses(
        (lambda: runs.downstream(given(task="distil")), "task"),
        (lambda: runs.downstream(given(task="fine-tune", dataset="vtab/dtd")), "dataset"),
        (lambda: runs.named(""), "teachers"),
        (lambda: runs.named("MAE, MAE"), "teachers"),
        (lambda: runs.named("MAE, BEiT"), "teachers"),
        (lambda: runs.files("MAE"), "teacher_files"),
        (lambda: runs.files("BEiT=a"), "teacher_files"),
        (lambda: runs.files("MAE="), "teacher_files"),
        (lambda: runs.teachers(given(teachers="MAE", teacher_files="iBOT=a.pth")), "teacher_files"),
        (lambda: runs._images_to_distil(given(dataset="pretraining/coco")), "folder"),
    )
    refuses(
        (lambda: runs.downstream(real), "imagenet"),
        (lambda: runs._images_to_distil(given()), "imagenet"),
        (lambda: runs._images_to_distil(given(dataset="folder", data_root=str(tmp_path / "none"))), "no images"),
        error=MissingData,
    )
    monkeypatch.setattr("companion.backbones.try_to_load_from_cache", lambda *a: None)
    refuses(
        (lambda: runs.encoder(real), "distil"),
        (lambda: runs.setting(given(dry_run=False), None), "mae"),
        error=MissingWeights,
    )
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    refuses(
        (lambda: runs.encoder(given(dry_run=False, weights=str(tmp_path / "x.pth"))), "pos_embed"), error=BadCheckpoint
    )
    assert runs.encoder(given(encoder="random", dry_run=False)).width == 48
    assert runs.encoder(given(encoder="teacher")).positions == "mae"


def test_augmentation_gives_normalised_crops():
    torch.manual_seed(0)
    out = runs.augment()(torch.rand(3, 50, 80))
    assert out.shape == (3, 224, 224)
    low, high = (0 - np.array(runs.down.MEAN)) / runs.down.STD, (1 - np.array(runs.down.MEAN)) / runs.down.STD
    assert (out.amin((1, 2)).numpy() >= low - 1e-5).all() and (out.amax((1, 2)).numpy() <= high + 1e-5).all()
    assert repr(runs.augment()) == repr(runs.augment())  # a cache's key


def test_results_are_collected_in_rows_of_their_own(tmp_path):
    row = {"task": "fine-tune", "student": "tiny", "encoder": "distilled", "teachers": "MAE, MoCo v3, iBOT"}
    row |= runs.CHOICES | {"seed": 0, "metric": "top-1", "score": 70.0}
    path = tmp_path / "measured.csv"
    runs.measured(path, row, row | {"seed": 1, "score": 72.0}, row | {"task": "linear probe", "score": 10.0})
    runs.measured(path, row | {"fusion": "gate", "mask_ratio": 0.5, "score": 60.0})
    rows = runs.measured(path, row | {"encoder": "teacher", "score": 83.0})
    assert isinstance(rows, pd.DataFrame) and len(rows) == 5
    cached = runs.cells(runs.measured(tmp_path / "c.csv", row, row | {"cached": True, "score": 50.0}), "imagenet")
    assert list(cached.values()) == [70.0, 50.0] and "; cached True)" in list(cached)[1][0]
    pd.DataFrame([row]).drop(columns="cached").to_csv(tmp_path / "old.csv", index=False)
    assert runs.measured(tmp_path / "old.csv", row | {"score": 71.0}).score.tolist() == [71.0]
    found = runs.cells(rows, "imagenet")
    assert found == {
        ("reconstruction (MAE, MoCo v3, iBOT), ViT-T", "imagenet_top1"): 71.0,
        ("reconstruction (MAE, MoCo v3, iBOT; fusion gate; mask_ratio 0.5), ViT-T", "imagenet_top1"): 60.0,
        ("MAE, ViT-B", "imagenet_top1"): 83.0,
    }
    shown = runs.tables(rows)["ImageNet-1k after fine-tuning"]
    own = shown[shown.method.str.startswith("reconstruction")]
    assert set(own.imagenet_top1) == {"– / 71.00", "– / 60.00"}
    assert (shown[shown.method == "DMT, ViT-T"].imagenet_top1 == "–").all()
    assert list(itertools.chain(*(t.columns[:1] for t in runs.tables(rows).values()))) == ["method"] * 3


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("task", list(runs.USUAL))
def test_dry_run_at_full_size(task, tmp_path):
    p = given(task=task, student="small")
    if task == "distil":
        setting = runs.setting(p, tmp_path)
        assert len(setting.learn(setting.build("DMT"), "DMT")) == 2
    else:
        found = runs.downstream(p)
        model = found.build()
        assert len(found.learn(model)) == 2
        assert found.score(model)


def test_the_protocol_is_that_of_the_profile(monkeypatch):
    """Its numbers are read off what is run."""
    assert "300 epochs" in runs.protocol()["distillation"] and "163,889 and 177,546" in runs.protocol()["detection"]
    monkeypatch.setattr(runs, "recipe", lambda name, real=runs.recipe: real(name) | {"epochs": 7.0})
    monkeypatch.setattr(runs, "CROP", (0.5, 1.0))
    assert "7 epochs" in runs.protocol()["distillation"]
    assert runs.protocol()["distillation, images"].startswith("crop of 50 to 100 %")
    assert runs.augment().transforms[0].scale == (0.5, 1.0)
