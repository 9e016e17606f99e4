"""Degradations: the prompt describes the operations, a seed reproduces them, and images are independent."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from torch import Tensor

pytest.importorskip("diffusers")

from companion.data import restoration
from companion.models.tip import degradations as d
from companion.models.tip.degradations import BLIND, TASKS, Degraded, Op, Recipe, blind, degrade, parse, prompt
from companion.models.tip.recipe import TEXTS, texts
from companion.training import fit
from tests.data.test_restoration import picture
from tests.models.common import refuses

PASS = d.Pass(0, (1, 2), (0, 0), (1, 1), gaussian=(20, 20), poisson=(0.1, 0.1))  # nothing but noise


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return torch.from_numpy(photographs.astronaut()[:128, 160:288].copy()).movedim(-1, 0) / 255


def test_prompts_of_the_paper_and_back() -> None:
    assert prompt([Op("blur", 0.4), Op("noise", 0.08)]) == "Deblur with sigma 0.4; Denoise with sigma 0.08"
    three = "Deblur with sigma 3.0; Upsample to 6.0x; Dejpeg with quality 50"
    assert prompt([Op("blur", 3), Op("resize", 6), Op("jpeg", 50)]) == three
    assert prompt([]) == "" and parse("") == () and parse(BLIND) is parse(BLIND.lower()) is None
    for seed in range(40):
        ops = Recipe().draw(seed)
        assert parse(prompt(ops)) == parse(prompt(ops).upper()) == ops
    wrong = ("Deblur with sigma -1", "Denoise with sigma 1.50", "Dejpeg with quality 0", "zebra")
    refuses(*((lambda text=text: parse(text), "Accepted") for text in wrong))


def test_draws_follow_the_recipe() -> None:
    assert [op.kind for op in Recipe(skip=0.0).draw(0)] == [*d.KINDS] * 2 and Recipe(skip=1.0).draw(0) == ()
    drawn = [op for seed in range(1500) for op in Recipe().draw(seed)]
    for kind, (low, high) in {"blur": (0.2, 6), "resize": (1, 8), "noise": (0, 0.25), "jpeg": (20, 95)}.items():
        found = np.array([op.value for op in drawn if op.kind == kind])
        assert 0.46 < len(found) / 3000 < 0.54 and low <= found.min() and found.max() <= high
        assert np.ptp(found) > 0.9 * (high - low)


def test_seeds_are_whole_numbers_of_any_type_from_0_on() -> None:
    assert Recipe().draw(np.int64(3)) == Recipe().draw(3) == Recipe().draw([3])
    refuses(*((lambda seed=seed: Recipe().draw(seed), "seed") for seed in (-1, 0.5, [2, -1])))


def test_numbers_of_a_prompt_are_those_of_the_operation(photo: Tensor) -> None:
    flat = torch.full((3, 64, 64), 0.5)
    assert abs(float((degrade(flat, [Op("noise", 0.08)], 0) - flat).std()) - 0.08) < 0.002
    point = torch.zeros(3, 41, 41)
    point[:, 20, 20] = 1
    spread = degrade(point, [Op("blur", 2.0)], 0)[0]
    places = torch.arange(41.0) - 20
    assert abs(float((spread.sum(0) * places**2).sum()) - 4) < 0.2  # a variance of sigma^2, truncated at 3 sigma
    assert abs(float(spread.sum()) - 1) < 1e-5
    errors = [(degrade(photo, [Op("jpeg", quality)], 0) - photo).square().mean() for quality in (20, 80)]
    assert errors[0] > 2 * errors[1] > 0
    torch.testing.assert_close(degrade(flat, [Op("blur", 3.0), Op("resize", 2.0)], 0), flat, atol=1e-5, rtol=0)


def test_edges_and_tiny_images() -> None:
    x = torch.zeros(3, 8, 8)
    x[:, 0, 0] = 1
    corners = [float(degrade(x, [Op("blur", 1.0)], 0, edge=edge)[0, -1, -1]) for edge in ("replicate", "circular")]
    assert corners[0] == 0 < corners[1]
    tiny, ops = torch.rand(3, 1, 1), Recipe(skip=0.0).draw(0)
    assert degrade(tiny, ops, 0, edge="circular").shape == blind(tiny, 0).shape == tiny.shape
    refuses((lambda: degrade(2 + x, (), 0), "float"), (lambda: blind(x.byte(), 0), "uint8"))


@pytest.mark.parametrize(("up", "down"), [(1.0, 0.0), (0.0, 1.0), (0.25, 0.5)])
def test_sides_are_enlarged_and_reduced_with_their_probabilities(up: float, down: float, monkeypatch) -> None:
    def resized(x: Tensor, size: list[int], mode: str) -> Tensor:
        asked.append(size[0])
        return whole(x, size, mode)

    whole, asked = d._interpolated, list[int]()
    monkeypatch.setattr(d, "_interpolated", resized)
    monkeypatch.setattr(d, "PASSES", (PASS._replace(resize=(up, down), factor=(0.5, 2)),) * 2)
    for seed in range(100):
        blind(torch.full((3, 40, 40), 0.5), seed)
    sides = np.array(asked).reshape(100, -1)[:, 0]  # of 40, in the first pass
    assert abs((sides > 40).mean() - up) < 0.15 and abs((sides < 40).mean() - down) < 0.15


def test_kernels_sum_to_one_and_are_all_drawn(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    kernels = [d._kernel(rng, d.PASSES[0]) for _ in range(300)]
    for kernel in kernels:
        assert abs(kernel.sum() - 1) < 1e-9
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)
    assert {kernel.shape for kernel in kernels} == {(side, side) for side in range(7, 23, 2)}
    assert 0.05 < np.mean([kernel.min() < -1e-9 for kernel in kernels]) < 0.17  # a tenth are sinc kernels
    monkeypatch.setattr(d, "SINC", 0)
    monkeypatch.setattr(d, "KERNELS", {"iso": 1.0})
    iso = d._kernel(rng, PASS._replace(sigma=(1, 1.0001)))
    middle = len(iso) // 2
    assert iso[middle, middle + 1] / iso[middle, middle] == pytest.approx(np.exp(-0.5), rel=1e-3)


def test_noise_of_both_kinds(photo: Tensor, monkeypatch) -> None:
    def noise(clean: Tensor, gaussian: int, grey: int) -> Tensor:
        monkeypatch.setattr(d, "GAUSSIAN", gaussian)
        monkeypatch.setattr(d, "GREY", grey)
        return d._noisy(np.random.default_rng(0), clean, PASS) - clean

    flat = torch.full((1, 3, 128, 128), 0.5)
    assert abs(float(noise(flat, 1, 0).std()) - 20 / 255) < 1e-3
    grey = noise(flat, 1, 1)
    assert torch.allclose(grey[:, 0], grey[:, 1])
    # of 4 levels: the variance of a count is its mean
    ramp = torch.tensor([0.0, 0.25, 0.5, 0.75]).repeat(64, 32)[None, None].expand(1, 3, -1, -1)
    assert abs(float(noise(ramp, 0, 0)[ramp == 0.5].std()) - 0.1 * (0.5 / 4) ** 0.5) < 2e-3
    # grey noise counts whole grey values: a mean of three channels has thousands, and would leave next to no noise
    whole = ((photo * photo.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(0) * 255).round() / 255
    levels = 2 ** np.ceil(np.log2(len(whole.unique())))
    inside = (photo.amin(0) > 0.1) & (photo.amax(0) < 0.9)  # a tenth of the noise, so that nothing is clamped
    expected = 0.1 * (whole[inside].mean() / levels) ** 0.5
    assert 0.95 < float(noise(photo[None], 0, 1)[0, 0][inside].std() / expected) < 1.05


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> restoration.Captioned:
    rows = [f'{{"file": "{i}.png", "caption": "picture {i}"}}\n' for i in range(12)]
    for i in range(12):
        picture(tmp_path / "images" / f"{i}.png", (40, 30) if i % 2 else (24, 50), i)
    (tmp_path / "captions.jsonl").write_text("".join(rows))
    return restoration.own(tmp_path)["train"]


def test_test_samples_have_what_their_prompts_describe(pictures: restoration.Captioned) -> None:
    test = Degraded(pictures, 16, **TASKS["parameterised"])
    for i in range(len(test)):
        sample, again = test[i], test[i]
        assert sample.clean.shape == (3, 16, 16)
        assert sample.semantic == f"picture {i}" and parse(sample.restoration) == sample.ops
        assert torch.equal(degrade(sample.clean, parse(sample.restoration), (0, i)), sample.degraded)
        assert torch.equal(again.degraded, sample.degraded) and again[2:] == sample[2:]
    assert not torch.equal(Degraded(pictures, 16, seed=1, **TASKS["parameterised"])[0].degraded, test[0].degraded)
    sample = Degraded(pictures, 16, **TASKS["real-esrgan"])[0]  # has no words
    assert sample.restoration == BLIND and sample.ops is None and sample.semantic == "picture 0"


def test_training_samples_are_drawn_with_the_probabilities(pictures: restoration.Captioned) -> None:
    torch.manual_seed(0)
    train = Degraded(pictures, 8, share_blind=0.4, blind_prompt=0.2, no_caption=0.3)
    found = [train[i % 12] for i in range(240)]
    named = [s for s in found if s.ops is not None]
    assert abs(len(named) / 240 - 0.6) < 0.1
    assert abs(np.mean([s.restoration == BLIND for s in named]) - 0.2) < 0.1
    assert abs(np.mean([s.semantic == "" for s in found]) - 0.3) < 0.1
    assert all(s.restoration == BLIND for s in found if s.ops is None)
    # other numbers in each epoch, and the same again
    seeded = fit._Seeded(Degraded(pictures, 8), 3)
    a, b, c = seeded[0, 5], seeded[1, 5], seeded[0, 5]
    assert torch.equal(a.degraded, c.degraded) and not torch.equal(a.degraded, b.degraded)


def test_prompts_of_a_test(pictures: restoration.Captioned) -> None:
    found = [Degraded(pictures, 8, **TASKS["parameterised"])[i] for i in (0, 1, 2)]
    semantic, named = [s.semantic for s in found], [s.restoration for s in found]
    assert len(set(named)) == 3
    expected = {
        "own": (semantic, named),
        "no text": ([""] * 3, [BLIND] * 3),
        "semantic only": (semantic, [BLIND] * 3),
        "blind prompt": (semantic, [BLIND] * 3),
        "restoration only": ([""] * 3, named),
        "wrong semantic prompt": ([semantic[1], semantic[2], semantic[0]], named),
        "wrong restoration prompt": (semantic, [named[1], named[2], named[0]]),
        "prompts swapped": (named, semantic),
    }
    assert {kind: texts(found, kind) for kind in TEXTS} == expected
    refuses(
        (lambda: texts([found[0]] * 2, "wrong semantic prompt"), "wrong semantic prompt"),
        (lambda: Degraded(pictures, 0), "size"),
        (lambda: Degraded(pictures, 8, no_caption=1.5), "no_caption"),
    )


def test_squares_are_the_middle_or_anywhere() -> None:
    x = torch.linspace(0, 1, 30).expand(3, 10, 30)
    for where, left in ((0.0, 0), (0.5, 10), (1.0, 20)):
        assert torch.equal(d._square(x, 10, where), x[:, :, left : left + 10])
        assert torch.equal(d._square(x.mT, 10, where), x.mT[:, left : left + 10])
    assert d._square(x, 7, 0.3).shape == (3, 7, 7) and d._square(x, 64, 0.5).shape == (3, 64, 64)
    noise = torch.randint(0, 256, (3, 40, 40)).to(torch.uint8)  # Pillow never lets details alias
    pillow = Image.fromarray(noise.permute(1, 2, 0).numpy()).resize((10, 10), Image.Resampling.BICUBIC)
    found = d._square(noise / 255, 10, 0.5).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, np.asarray(pillow) / 255, atol=1.5 / 255)
