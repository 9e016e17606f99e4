"""Cached teachers: the same losses, resumed to the same bits, and refused for other teachers or images."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from companion.errors import BadParameter, CompanionError, CorruptFile
from companion.models.dmt import DMT, Teachers, build, loss
from companion.models.dmt import cache as dmt_cache
from companion.models.dmt.cache import Distilled, Views
from companion.training import fit
from companion.training.schedules import adamw, schedule
from tests.conftest import interrupted
from tests.models.common import refuses


def teachers(seed=1, **options):
    torch.manual_seed(seed)
    models = {"MAE": build("pocket teacher"), "MoCo v3": build("pocket teacher", width=64)}
    return Teachers(models, **options)


def student():
    torch.manual_seed(2)
    return build("pocket")


@pytest.fixture
def images():
    return torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))


CROP = v2.Compose([v2.RandomResizedCrop(32, (0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()])
CPU = {"hardware": fit.CPU}


def test_a_view_is_always_the_same(images):
    views = Views(images, CROP, seed=5)
    assert len(views) == 10
    first, state = [views[i] for i in (0, 1)], torch.random.get_rng_state()
    torch.manual_seed(9)
    assert all(torch.equal(views[i], x) for i, x in enumerate(first))
    torch.random.set_rng_state(state)
    assert torch.equal(views[0], first[0]) and torch.equal(torch.random.get_rng_state(), state)
    same = Views(images[:1].expand(2, -1, -1, -1), CROP)
    assert not torch.equal(same[0], same[1]), "each image has an augmentation of its own"
    assert not torch.equal(Views(images, CROP, seed=6)[0], first[0])
    assert torch.equal(Views(images)[3], images[3]) and torch.equal(Views(TensorDataset(images, images))[3], images[3])


@pytest.mark.parametrize("dtype", dmt_cache.DTYPES)
def test_cached_losses_are_the_losses(images, tmp_path, dtype):
    asked, views = teachers(), Views(images)
    cache = dmt_cache.build(tmp_path, asked, views, dtype=dtype, batch=4, **CPU)
    assert len(cache) == 10 and cache.names == ("MAE", "MoCo v3")
    assert [t.shape for t in cache[3]] == [(17, 48), (17, 64)]
    limit = 1e-6 if dtype == "float32" else 2e-3
    for tokens, true in zip(cache.tensors(), asked(images).tokens, strict=True):
        assert str(tokens.dtype) == f"torch.{dtype}" and (tokens.float() - true).abs().max() < limit
    model, noise = DMT(student(), asked, decoder="pocket", mask_ratio=0.5), torch.rand(10, 16)
    live, read = model(images, noise=noise), model(images, cache.tensors(), noise)
    assert torch.allclose(live.total, read.total, rtol=limit)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.npy")) == dmt_cache.size(10, 17, (48, 64), dtype) + 2 * 128
    assert dmt_cache.size(1, 197, (768,) * 3) == 907_776


def test_training_from_the_cache_is_training_with_the_teachers(images, tmp_path):
    views, asked = Views(images), teachers()
    cache = dmt_cache.build(tmp_path, asked, views, dtype="float32", batch=4, **CPU)
    histories = []
    for data, found in [(TensorDataset(images), asked), (Distilled(views, cache), asked.widths)]:
        torch.manual_seed(3)
        model = DMT(student(), found, decoder="pocket", mask_ratio=0.5)
        options = {"optimizer": adamw(1e-3), "schedule": schedule("cosine", 0)} | CPU
        rows = fit.fit(model, loss, data, epochs=2, batch=5, **options)
        histories.append([row["loss"] for row in rows])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    refuses((lambda: Distilled(Views(images[1:]), cache), "rows"))


def test_a_killed_build_resumes(images, tmp_path, monkeypatch):
    whole = dmt_cache.build(tmp_path / "whole", teachers(), Views(images), batch=2, every=1, **CPU)
    folder, calls = tmp_path / "killed", []
    with interrupted(monkeypatch, Teachers, "forward", 3):
        dmt_cache.build(folder, teachers(), Views(images), batch=2, every=1, **CPU)
    assert json.loads((folder / "progress.json").read_text())["done"] == 6
    assert not list(folder.glob("*.npy"))
    refuses((lambda: dmt_cache.build(folder, teachers(seed=8), Views(images), batch=2, **CPU), "teachers"))
    asked = teachers()
    asked.register_forward_pre_hook(lambda module, given: calls.append(0))
    cache = dmt_cache.build(folder, asked, Views(images), batch=2, **CPU)
    assert len(calls) == 2, "the last four images alone"
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors(), whole.tensors(), strict=True))
    assert {f.name for f in folder.iterdir()} == {"0.npy", "1.npy", "cache.json"}


def test_a_finished_cache_asks_nobody(images, tmp_path, monkeypatch):
    dmt_cache.build(tmp_path, teachers(), Views(images), **CPU)
    monkeypatch.setattr(Teachers, "forward", None)
    assert len(dmt_cache.build(tmp_path, teachers(), Views(images), **CPU)) == 10


def test_a_cache_of_something_else_is_refused(images, tmp_path):
    dmt_cache.build(tmp_path, teachers(), Views(images), **CPU)
    before, reheaded = {f.name: f.read_bytes() for f in tmp_path.iterdir()}, teachers()
    reheaded.models["MAE"].blocks[0].attn.num_heads = 8
    for asked, views, options, word in [
        (teachers(seed=8), Views(images), {}, "teachers"),
        (reheaded, Views(images), {}, "teachers"),
        (teachers(), Views(images + 0.01), {}, "images"),
        (teachers(), Views(images, seed=1), {}, "images"),
        (teachers(), Views(images, CROP), {}, "images"),
        (teachers(), Views(images[1:]), {}, "rows"),
        (teachers(), Views(images), {"dtype": "float32"}, "dtype"),
    ]:
        with pytest.raises(BadParameter, match=f"cache, {word}"):
            dmt_cache.build(tmp_path, asked, views, **options, **CPU)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_bad_caches(images, tmp_path, monkeypatch):
    def build(name, asked=None, **options):
        return dmt_cache.build(tmp_path / name, asked or teachers(), Views(images), **options, **CPU)

    loud = teachers()
    loud.models["MAE"].blocks[-1].mlp.fc2.weight.data *= 1e7
    refuses((lambda: build("a", teachers(view="same")), "teacher_view"), (lambda: build("a", dtype="int8"), "dtype"))
    refuses((lambda: build("loud", loud), "MAE returns values that float16 cannot hold"), error=CompanionError)
    settings, file = build("b").settings, tmp_path / "b" / "0.npy"
    file.write_bytes(file.read_bytes()[:5000])
    refuses((lambda: build("b"), r"0\.npy"), error=CorruptFile)
    np.save(file, np.zeros((10, 17, 47), np.float16))
    refuses((lambda: build("b"), r"0\.npy"), error=CorruptFile)
    (tmp_path / "b" / "cache.json").write_text("{}")
    refuses((lambda: build("b"), "cache, rows"))
    dmt_cache._start(tmp_path / "part", settings)
    (tmp_path / "part" / "1.part").write_bytes(b"cut")
    refuses((lambda: build("part"), r"1\.part"), error=CorruptFile)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    refuses((lambda: build("c"), "are free"), error=CompanionError)
