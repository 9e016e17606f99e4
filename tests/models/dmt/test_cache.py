"""Cached teachers: the same tokens and losses, a killed build, and caches of other teachers or images."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from companion.errors import CompanionError, CorruptFile
from companion.models.dmt import DMT, Teachers, build
from companion.models.dmt import cache as dmt_cache
from companion.models.dmt.cache import Distilled, Views
from companion.training import fit
from tests.conftest import interrupted
from tests.models.common import refuses

IMAGES = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CROP = v2.Compose([v2.RandomResizedCrop(32, (0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()])


def teachers(seed=1, **options):
    torch.manual_seed(seed)
    models = {"MAE": build("pocket teacher"), "MoCo v3": build("pocket teacher", width=64)}
    return Teachers(models, **options)


def cached(folder, asked=None, views=None, **options):
    return dmt_cache.build(folder, asked or teachers(), views or Views(IMAGES), hardware=fit.CPU, **options)


def test_a_view_is_always_the_same():
    views = Views(IMAGES, CROP, seed=5)
    first, state = [views[i] for i in (0, 1)], torch.random.get_rng_state()
    torch.manual_seed(9)
    assert all(torch.equal(views[i], x) for i, x in enumerate(first))
    torch.random.set_rng_state(state)
    assert torch.equal(views[0], first[0]) and torch.equal(torch.random.get_rng_state(), state)
    same = Views(IMAGES[:1].expand(2, -1, -1, -1), CROP)
    assert not torch.equal(same[0], same[1]), "each image has an augmentation of its own"
    assert not torch.equal(Views(IMAGES, CROP, seed=6)[0], first[0])
    assert torch.equal(Views(TensorDataset(IMAGES, IMAGES))[3], IMAGES[3])


@pytest.mark.parametrize("dtype", dmt_cache.DTYPES)
def test_cached_losses_are_the_losses(tmp_path, dtype):
    asked = teachers()
    cache = cached(tmp_path, asked, dtype=dtype, batch=4)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-3, "atol": 2e-3}
    for tokens, true, other in zip(cache.tensors(), asked(IMAGES).tokens, teachers(8)(IMAGES).tokens, strict=True):
        assert str(tokens.dtype) == f"torch.{dtype}"
        torch.testing.assert_close(tokens.float(), true, **near)
        assert (true - other).abs().max() > 0.1
    image, *rows = Distilled(Views(IMAGES), cache)[3]
    assert torch.equal(image, IMAGES[3]) and [row.shape for row in rows] == [(17, 48), (17, 64)]
    assert all(torch.equal(row, tokens[3]) for row, tokens in zip(rows, cache.tensors(), strict=True))
    torch.manual_seed(2)
    model, noise = DMT(build("pocket"), asked, decoder="pocket", mask_ratio=0.5), torch.rand(10, 16)
    live, read = model(IMAGES, noise=noise), model(IMAGES, cache.tensors(), noise)
    torch.testing.assert_close(live.total, read.total, **near)
    assert sum(f.stat().st_size for f in tmp_path.glob("*.npy")) == dmt_cache.size(10, 17, (48, 64), dtype) + 2 * 128


def test_a_killed_build_resumes(tmp_path, monkeypatch):
    whole = cached(tmp_path / "whole", batch=2, every=1)
    folder, calls = tmp_path / "killed", []
    with interrupted(monkeypatch, Teachers, "forward", 3):
        cached(folder, batch=2, every=1)
    assert json.loads((folder / "cache.json").read_text())["done"] == 6
    refuses((lambda: cached(folder, teachers(seed=8), batch=2), "teachers"))
    asked = teachers()
    asked.register_forward_pre_hook(lambda module, given: calls.append(0))
    cache = cached(folder, asked, batch=2)
    assert len(calls) == 2, "the last four images alone"
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors(), whole.tensors(), strict=True))
    assert {f.name for f in folder.iterdir()} == {"0.npy", "1.npy", "cache.json"}


def test_a_cache_of_something_else_is_refused_and_left_alone(tmp_path, monkeypatch):
    cached(tmp_path)
    before, reheaded = {f.name: f.read_bytes() for f in tmp_path.iterdir()}, teachers()
    reheaded.models["MAE"].blocks[0].attn.num_heads = 8
    refuses(
        (lambda: cached(tmp_path, teachers(seed=8)), "teachers"),
        (lambda: cached(tmp_path, reheaded), "teachers"),
        (lambda: cached(tmp_path, views=Views(IMAGES + 0.01)), "images"),
        (lambda: cached(tmp_path, views=Views(IMAGES, CROP)), "images"),
        (lambda: cached(tmp_path, views=Views(IMAGES[1:])), "rows"),
        (lambda: cached(tmp_path, dtype="float32"), "float32"),
        (lambda: Distilled(Views(IMAGES[1:]), cached(tmp_path)), "rows"),
    )
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    monkeypatch.setattr(Teachers, "forward", None)
    assert len(cached(tmp_path)) == 10, "a finished cache runs no teacher"


def test_damaged_caches_and_what_cannot_be_cached(tmp_path, monkeypatch):
    def build(name, asked=None):
        return lambda: cached(tmp_path / name, asked)

    large = teachers()
    large.models["MAE"].blocks[-1].mlp.fc2.weight.data *= 1e7
    refuses((build("a", teachers(view="same")), "same"))
    refuses((build("large", large), "float16"), error=CompanionError)
    file = build("b")().folder / "0.npy"
    file.write_bytes(file.read_bytes()[:5000])
    refuses((build("b"), r"0\.npy"), error=CorruptFile)
    np.save(file, np.zeros((10, 17, 47), np.float16))
    refuses((build("b"), r"0\.npy"), error=CorruptFile)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    refuses((build("c"), "GB"), error=CompanionError)
