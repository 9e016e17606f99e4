"""Degradations: the prompt describes the operations, a seed reproduces them, and images are independent."""

import numpy as np
import open_clip
import pytest
import torch
from skimage import data as photographs
from torch import Tensor

from companion.data import degradations as d
from companion.data.degradations import BLIND, Op, Recipe, blind, degrade, parse, prompt, scaled
from companion.errors import BadParameter
from tests.data.conftest import refused

SEEDS = range(40)
STILL = {"blur": 0, "sigma": (1, 2), "resize": (0, 0, 1), "factor": (1, 1)}  # of a `Pass`: nothing but noise


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return torch.from_numpy(photographs.astronaut()[:128, 160:288].copy()).movedim(-1, 0) / 255


def test_words_of_the_figures() -> None:
    assert prompt([Op("blur", 0.4), Op("noise", 0.08)]) == "Deblur with sigma 0.4; Denoise with sigma 0.08"
    assert prompt([Op("blur", 3), Op("resize", 6), Op("jpeg", 50)]) == (
        "Deblur with sigma 3.0; Upsample to 6.0x; Dejpeg with quality 50"
    )
    assert prompt([]) == ""
    assert parse("") == () and parse(BLIND) is None and parse(BLIND.lower()) is None


def test_the_models_default_is_the_blind_prompt() -> None:
    pipeline = pytest.importorskip("companion.models.tip.pipeline")
    assert pipeline.BLIND == BLIND


@pytest.mark.parametrize("seed", SEEDS)
def test_text_and_back(seed: int) -> None:
    ops = Recipe().draw(seed)
    assert parse(prompt(ops)) == ops
    assert parse(prompt(ops).upper()) == ops


GRAMMAR = r"Deblur with sigma 3\.0.*Upsample.*Denoise.*Dejpeg"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((f"Deblur{rest}", GRAMMAR) for rest in ("", " with sigma", " with sigma -1", " sigma 3.0")),
        ("Denoise with sigma 0.08, Deblur with sigma 1", GRAMMAR),
        ("Dejpeg with quality 50.5", GRAMMAR),
        *((text, GRAMMAR) for text in ("Upsample to 4", "Remove all", "Dehaze with sigma 1", "zebra")),
        ("Denoise with sigma 1.50", r"\d to \d"),
        ("Dejpeg with quality 0", r"\d to \d"),
        ("Upsample to 0.5x", r"\d to \d"),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    refused(BadParameter, said, parse, text)


def test_eight_instructions_fit_in_clips_77_tokens() -> None:
    """Whatever is drawn: the longest list there can be, and many drawn ones."""
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=200)
    longest = prompt([Op("blur", 6.0), Op("resize", 8.0), Op("noise", 0.25), Op("jpeg", 95)] * 2)
    texts = [longest, *(prompt(Recipe(skip=0.0).draw(seed)) for seed in range(100))]
    lengths = (tokenizer(texts) != 0).sum(1)
    assert int(lengths.max()) == 69 and lengths[0] == lengths.max()


def test_a_part_of_what_was_asked() -> None:
    text = "Deblur with sigma 3.0; Denoise with sigma 0.24; Dejpeg with quality 40"
    assert scaled(text, "noise", 0.5) == "Deblur with sigma 3.0; Denoise with sigma 0.12; Dejpeg with quality 40"
    assert scaled(text, "jpeg", 0.5).endswith("Dejpeg with quality 70")
    assert scaled("Upsample to 5.0x", "resize", 0.5) == "Upsample to 3.0x"
    assert scaled(text, "blur", 0.0) == "Denoise with sigma 0.24; Dejpeg with quality 40"
    assert scaled("Denoise with sigma 0.80", "noise", 2.0) == "Denoise with sigma 1.00"
    for wrong in (BLIND, "", "Deblur with sigma 1.0"):
        refused(BadParameter, "noise", scaled, wrong, "noise", 0.5)


def test_nothing_skipped_and_everything_skipped(photo: Tensor) -> None:
    assert [op.kind for op in Recipe(skip=0.0).draw(0)] == [*d.KINDS] * 2
    for seed in SEEDS:
        assert Recipe(skip=1.0).draw(seed) == ()
    assert torch.equal(degrade(photo, (), 0), photo)


@pytest.mark.parametrize("back", d.BACKS)
@pytest.mark.parametrize("seed", range(6))
def test_printed_numbers_rebuild_the_picture(photo: Tensor, seed: int, back: str) -> None:
    ops = Recipe(skip=0.3).draw(seed)
    y = degrade(photo, ops, seed, back=back)
    assert y.shape == photo.shape and y.amin() >= 0 and y.amax() <= 1 and not torch.equal(y, photo)
    torch.manual_seed(1)  # the global random state does not matter
    assert torch.equal(degrade(photo, parse(prompt(ops)), seed, back=back), y)
    assert not torch.equal(degrade(photo, [Op("noise", 0.1)], seed), degrade(photo, [Op("noise", 0.1)], seed + 1))


def test_draws_follow_the_probabilities() -> None:
    drawn = [Recipe().draw(seed) for seed in range(1500)]
    shares = {kind: np.mean([sum(op.kind == kind for op in ops) for ops in drawn]) / 2 for kind in d.KINDS}
    # resize leaves out what rounds to 1.0, noise what rounds to 0.00
    assert all(0.46 < share < 0.54 for share in shares.values()), shares
    for kind, (low, high) in {"blur": (0.2, 6), "resize": (1, 8), "noise": (0, 0.25), "jpeg": (20, 95)}.items():
        values = [op.value for ops in drawn for op in ops if op.kind == kind]
        assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high


def test_other_reading_of_the_skip() -> None:
    drawn = [[op.kind for op in Recipe(skip_scope="first_resize_only").draw(seed)] for seed in range(200)]
    assert [kind for kind in [*d.KINDS] * 2 if kind != "resize"] in [
        [k for k in kinds if k != "resize"] for kinds in drawn
    ]
    counts = [kinds.count("resize") for kinds in drawn]
    assert 0.4 < np.mean([count == 2 for count in counts]) < 0.6


def test_listed_values_and_a_skip_for_each_kind() -> None:
    listed = {"blur": (0.6, 0.9, 1.2), "resize": (4.0,), "noise": (0.05, 0.1, 0.2), "jpeg": (20, 50, 80)}
    skip = {"blur": 0.5, "resize": 0.75, "noise": 0.5, "jpeg": 0.0}
    recipe = Recipe(*listed.values(), passes=1, listed=True, skip=skip)
    drawn = [recipe.draw(seed) for seed in range(300)]
    assert {op for ops in drawn for op in ops} == {Op(kind, float(v)) for kind, many in listed.items() for v in many}
    assert all(ops[-1].kind == "jpeg" for ops in drawn)


@pytest.mark.parametrize(
    ("kind", "more", "less"), [("blur", 3.0, 1.0), ("resize", 6.0, 2.0), ("noise", 0.2, 0.05), ("jpeg", 20, 80)]
)
def test_more_is_more(photo: Tensor, kind: str, more: float, less: float) -> None:
    errors = [(degrade(photo, [Op(kind, value)], 0) - photo).square().mean() for value in (more, less)]
    assert errors[0] > errors[1] > 0


def test_numbers_mean_what_the_text_says(photo: Tensor) -> None:
    flat = torch.full((3, 64, 64), 0.5)
    assert abs(float((degrade(flat, [Op("noise", 0.08)], 0) - flat).std()) - 0.08) < 0.002
    point = torch.zeros(3, 41, 41)
    point[:, 20, 20] = 1
    spread = degrade(point, [Op("blur", 2.0)], 0)[0]
    places = torch.arange(41.0) - 20
    assert abs(float((spread.sum(0) * places**2).sum()) - 4) < 0.2  # a variance of sigma^2, truncated at 3 sigma
    assert abs(float(spread.sum()) - 1) < 1e-5
    small = degrade(photo, [Op("resize", 4.0)], 0, filter="nearest")
    assert len(small[0].unique()) <= 32 * 32
    assert torch.equal(degrade(flat, [Op("blur", 3.0), Op("resize", 2.0)], 0).round(decimals=5), flat)


def test_edges_and_tiny_pictures() -> None:
    x = torch.zeros(3, 8, 8)
    x[:, 0, 0] = 1
    assert degrade(x, [Op("blur", 1.0)], 0)[0, -1, -1] == 0
    assert degrade(x, [Op("blur", 1.0)], 0, edge="circular")[0, -1, -1] > 0
    for size in ((1, 1), (3, 5), (8, 8)):
        tiny = torch.rand(3, *size)
        for seed in range(3):
            assert degrade(tiny, Recipe(skip=0.0).draw(seed), seed, back="end").shape == tiny.shape
            assert degrade(tiny, Recipe(skip=0.0).draw(seed), seed, edge="circular").shape == tiny.shape
            assert blind(tiny, seed).shape == tiny.shape


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Recipe(skip=1.5), "probabilities"),
        (lambda: Recipe(skip={"blur": 0.5}), "each kind"),
        (lambda: Recipe(skip_scope="all"), "every_op"),
        (lambda: Recipe(noise=(0.3, 0.1)), "lower and an upper"),
        (lambda: Recipe(jpeg=(0, 90)), "1 to 100"),
        (lambda: Recipe(passes=0), "1 or more"),
        (lambda: degrade(torch.rand(1, 8, 8), (), 0), r"\(3, H, W\)"),
        (lambda: degrade(torch.full((3, 8, 8), 2.0), (), 0), r"\[0, 1\]"),
        (lambda: degrade(torch.zeros(3, 8, 8, dtype=torch.uint8), (), 0), "float"),
        (lambda: degrade(torch.rand(3, 8, 8), [Op("haze", 1)], 0), "blur"),
        (lambda: degrade(torch.rand(3, 8, 8), (), 0, back="pass"), "'end'"),
        (lambda: degrade(torch.rand(3, 8, 8), (), 0, edge="zero"), "circular"),
        (lambda: degrade(torch.rand(3, 8, 8), (), 0, filter="lanczos"), "bicubic"),
    ],
)
def test_bad_parameters(call, said: str) -> None:
    refused(BadParameter, said, call)


def test_blind_is_the_seeds_and_its_size(photo: Tensor) -> None:
    a, b = blind(photo, 0), blind(photo, 1)
    assert a.shape == photo.shape and a.amin() >= 0 and a.amax() <= 1
    assert torch.equal(a, blind(photo, 0)) and not torch.equal(a, b)
    small = blind(photo, 0, restore=False)
    assert small.shape == (3, 32, 32) and torch.equal((small * 255).round() / 255, small)
    errors = [float((blind(photo, seed) - photo).square().mean()) for seed in range(30)]  # it looks like the photograph
    assert 1e-3 < np.mean(errors) < 0.1, errors


def test_kernels_sum_to_one_and_are_all_drawn() -> None:
    s = d.RealESRGAN()  # the published settings
    assert (s.first.blur, s.first.sigma, s.second.blur, s.second.sigma) == (1.0, (0.2, 3.0), 0.8, (0.2, 1.5))
    assert [sum(shares) for shares in (s.first.resize, s.second.resize, s.first.kernels)] == pytest.approx([1] * 3)
    assert (s.final_sinc, s.sinc_first, s.scale) == (0.8, 0.5, 4)
    rng, sides, ringing = np.random.default_rng(0), set(), 0
    for _ in range(300):
        kernel = d._kernel(rng, s.first)
        assert kernel.shape[0] == kernel.shape[1] and abs(kernel.sum() - 1) < 1e-9
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)
        sides.add(len(kernel))
        ringing += kernel.min() < -1e-9
    assert sides == {7, 9, 11, 13, 15, 17, 19, 21}
    assert 0.05 < ringing / 300 < 0.17  # a tenth are sinc kernels
    still = d.Pass(1, (1, 1.0001), (0, 0, 1), (1, 1), (1, 1), (1, 1), sinc=0, kernels=(1, 0, 0, 0, 0, 0))
    iso = d._kernel(np.random.default_rng(0), still)
    middle = len(iso) // 2
    assert iso[middle, middle + 1] / iso[middle, middle] == pytest.approx(np.exp(-0.5), rel=1e-3)


def test_noise_of_both_kinds() -> None:
    flat = torch.full((1, 3, 128, 128), 0.5)
    gaussian = d.Pass(**STILL, gaussian=(20, 20), poisson=(1, 1), is_gaussian=1, grey=0)
    noise = d._noisy(np.random.default_rng(0), flat, gaussian) - flat
    assert abs(float(noise.std()) - 20 / 255) < 1e-3
    grey = d._noisy(np.random.default_rng(0), flat, d.Pass(**STILL, gaussian=(20, 20), poisson=(1, 1), grey=1)) - flat
    assert torch.allclose(grey[:, 0], grey[:, 1])
    # of 4 levels: the variance of a count is its mean
    ramp = torch.tensor([0.0, 0.25, 0.5, 0.75]).repeat(64, 32)[None, None].expand(1, 3, -1, -1)
    poisson = d.Pass(**STILL, gaussian=(1, 1), poisson=(0.1, 0.1), is_gaussian=0, grey=0)
    noise = d._noisy(np.random.default_rng(0), ramp, poisson) - ramp
    assert abs(float(noise[ramp == 0.5].std()) - 0.1 * (0.5 / 4) ** 0.5) < 2e-3


def test_grey_poisson_noise_counts_whole_grey_values(photo: Tensor) -> None:
    """A mean of three channels has thousands of values between the 256, and would leave next to no noise."""
    grey = (photo * photo.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(0)
    whole = (grey * 255).round() / 255
    levels = 2 ** np.ceil(np.log2(len(whole.unique())))
    # a tenth of the noise, so that nothing is clamped
    p = d.Pass(**STILL, gaussian=(1, 1), poisson=(0.1, 0.1), is_gaussian=0, grey=1)
    noise = (d._noisy(np.random.default_rng(0), photo[None], p) - photo)[0]
    inside = (photo.amin(0) > 0.1) & (photo.amax(0) < 0.9)
    expected = 0.1 * (whole[inside].mean() / levels) ** 0.5
    assert 0.95 < float(noise[0][inside].std() / expected) < 1.05
