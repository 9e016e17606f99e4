"""Cached teachers: fixed views, the same tokens and losses, and caches of other teachers or images."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from companion.errors import CompanionError, CorruptFile
from companion.models.dmt import DMT, Teachers, build
from companion.models.dmt import cache as dmt_cache
from companion.models.dmt.cache import Views
from companion.training import stored
from companion.training.checkpoints import checkpoint_key
from companion.training.hardware import CPU
from tests.conftest import interrupted
from tests.models.common import refuses

IMAGES = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CROP = v2.Compose([v2.RandomResizedCrop(32, (0.5, 1.0), antialias=True), v2.RandomHorizontalFlip()])


def teachers(seed=1):
    torch.manual_seed(seed)
    return Teachers({"MAE": build("pocket teacher"), "MoCo v3": build("pocket teacher", width=64)})


def cached(folder, asked=None, views=None, **options):
    return dmt_cache.fill(folder, asked or teachers(), views or Views(IMAGES), hardware=CPU, **options)


def test_a_view_is_always_the_same():
    views = Views(IMAGES, CROP, seed=5)
    first, state = [views[i] for i in (0, 1)], torch.random.get_rng_state()
    assert torch.equal(views[0], first[0]) and torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(9)
    assert all(torch.equal(views[i], x) for i, x in enumerate(first))
    same = Views(IMAGES[:1].expand(2, -1, -1, -1), CROP)
    assert not torch.equal(same[0], same[1]), "each image has an augmentation of its own"
    assert not torch.equal(Views(IMAGES, CROP, seed=6)[0], first[0])
    assert torch.equal(Views(TensorDataset(IMAGES, IMAGES))[3], IMAGES[3])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cached_losses_are_the_losses(tmp_path, dtype):
    asked = teachers()
    cache = cached(tmp_path, asked, dtype=dtype, batch=4)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-3, "atol": 2e-3}
    for tokens, true in zip(cache.tensors(), asked(IMAGES), strict=True):
        assert str(tokens.dtype) == f"torch.{dtype}"
        torch.testing.assert_close(tokens.float(), true, **near)
    image, *rows = cache[3]
    assert torch.equal(image, IMAGES[3]) and [row.shape for row in rows] == [(17, 48), (17, 64)]
    assert all(torch.equal(row, tokens[3]) for row, tokens in zip(rows, cache.tensors(), strict=True))
    torch.manual_seed(2)
    model, noise = DMT(build("pocket"), asked, decoder="pocket", mask_ratio=0.5), torch.rand(10, 16)
    live, read = model(IMAGES, noise=noise), model(IMAGES, cache.tensors(), noise)
    torch.testing.assert_close(live.total, read.total, **near)
    written = sum(f.stat().st_size for f in tmp_path.glob("*.npy")) - 2 * 128  # less the headers
    assert written == dmt_cache.size(10, 17, (48, 64)) * (2 if dtype == "float32" else 1)


def test_a_killed_build_resumes_where_it_was_written_and_a_finished_cache_runs_no_teacher(tmp_path, monkeypatch):
    """Five batches, killed in the fourth, the record of the third not yet written."""
    clock = iter([0.0, 61.0, 61.0, 122.0, 122.0, 123.0, *[200.0] * 9])
    monkeypatch.setattr(stored, "time", SimpleNamespace(monotonic=clock.__next__))
    with interrupted(monkeypatch, Teachers, "forward", 3):
        cached(tmp_path, batch=2, dtype="float32")
    asked, read = teachers(), []
    refuses((lambda: cached(tmp_path, teachers(seed=8), dtype="float32"), "teachers"))
    expected, forward = asked(IMAGES), Teachers.forward
    monkeypatch.setattr(Teachers, "forward", lambda self, images: read.append(len(images)) or forward(self, images))
    cache = cached(tmp_path, asked, dtype="float32", batch=2)
    assert read == [2, 2, 2], "four of ten images were recorded"
    assert {f.name for f in tmp_path.iterdir()} == {"0.npy", "1.npy", "cache.json"}
    torch.testing.assert_close(cache.tensors(), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(Teachers, "forward", None)
    assert len(cached(tmp_path, asked, dtype="float32")) == 10


def test_a_cache_of_something_else_is_refused_and_left_alone(tmp_path):
    cached(tmp_path)
    before, reheaded = {f.name: f.read_bytes() for f in tmp_path.iterdir()}, teachers()
    reheaded.models["MAE"].blocks[0].attn.num_heads = 8
    refuses(
        (lambda: cached(tmp_path, teachers(seed=8)), "teachers"),
        (lambda: cached(tmp_path, reheaded), "teachers"),
        (lambda: cached(tmp_path, views=Views(IMAGES + 0.01)), "images"),
        (lambda: cached(tmp_path, views=Views(IMAGES, CROP)), "augment"),
        (lambda: cached(tmp_path, views=Views(IMAGES[1:])), "images"),
        (lambda: cached(tmp_path, dtype="float32"), "float32"),
        (lambda: cached(tmp_path / "new", dtype="int8"), "int8"),
        (lambda: cached(tmp_path / "new", batch=0), "batch"),
        (lambda: dmt_cache.fill(tmp_path / "new", teachers(), Views(IMAGES[:0])), "views"),
    )
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


class Files(TensorDataset):
    """Images with paths, which are not read."""

    def __init__(self, folder):
        super().__init__(IMAGES)
        self.sources = [str(folder / "train" / f"{i}.png") for i in range(len(IMAGES))]

    tensors = property(lambda self: (None,), lambda self, value: None)

    def __getitem__(self, index):
        return IMAGES[index], 0

    def __len__(self):
        return len(IMAGES)


class Brighter:
    """An augmentation whose repr is its address."""

    def __init__(self, by):
        self.by = by

    def __call__(self, image):
        return image + self.by


def test_a_cache_belongs_to_what_its_augmentation_does_and_its_images_may_move(tmp_path, monkeypatch):
    here, moved = Files(tmp_path / "here"), Files(tmp_path / "moved" / "away")
    cached(tmp_path / "a", views=Views(here, lambda image: image + 0.5))
    monkeypatch.setattr(Teachers, "forward", None)
    for views in (Views(moved, lambda image: 0.5 + image), Views(moved, Brighter(0.5))):
        assert len(cached(tmp_path / "a", views=views)) == 10
    fewer = Files(tmp_path / "here")
    fewer.sources[3] = str(tmp_path / "here" / "train" / "other.png")
    refuses(
        (lambda: cached(tmp_path / "a", views=Views(here, lambda image: image + 0.4)), "augment"),
        (lambda: cached(tmp_path / "a", views=Views(here, Brighter(0.4))), "augment"),
        (lambda: cached(tmp_path / "a", views=Views(fewer, Brighter(0.5))), "images"),
        (lambda: cached(tmp_path / "a", views=Views(here, Brighter(0.5), seed=1)), "images"),
    )


def test_a_cache_without_a_sample_is_accepted_by_the_name_of_its_augmentation(tmp_path):
    for views in (Views(IMAGES, CROP), Views(Files(tmp_path), CROP), Views(IMAGES, lambda image: image)):
        folder = tmp_path / str(id(views))
        note = cached(folder, views=views).folder / "cache.json"
        written = json.loads(note.read_text())
        name = getattr(views.augment, "__qualname__", repr(views.augment))
        content = views.images if views.images is IMAGES else views.images.sources
        key = checkpoint_key(images=10, augment=name, seed=0, content=content)
        note.write_text(json.dumps({k: v for k, v in written.items() if k != "sample"} | {"images": key}))
        if views.augment is CROP:
            assert len(cached(folder, views=views)) == 10
        else:  # all lambdas have one name
            refuses((lambda folder=folder, views=views: cached(folder, views=views), "images"))


def test_damaged_caches_and_what_cannot_be_cached(tmp_path, monkeypatch):
    large = teachers()
    large.models["MAE"].blocks[-1].mlp.fc2.weight.data *= 1e7
    refuses((lambda: cached(tmp_path / "large", large), "float16"), error=CompanionError)
    file = cached(tmp_path / "b").folder / "0.npy"
    file.write_bytes(file.read_bytes()[:5000])
    refuses((lambda: cached(tmp_path / "b"), r"0\.npy"), error=CorruptFile)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    refuses((lambda: cached(tmp_path / "c"), "GB"), error=CompanionError)
