"""H-ViT: gradients and inputs of the levels, padding and background, names, checkpoints, heatmaps."""

import numpy as np
import pytest
import torch

from companion.errors import BadCheckpoint, CorruptFile
from companion.models.hvit import figures
from companion.models.hvit import model as hvit
from companion.models.hvit.model import HViT, PatchBag, PatchEncoder, RegionEncoder, SlideTransformer
from companion.slides import Tiles
from companion.viz import heatmaps
from tests.models.common import assert_recomputed_gradients_are_equal, misfits, numbers, refuses


def pocket(variant: str = "local", head: str = "regression", seed: int = 0, **options) -> HViT:
    torch.manual_seed(seed)
    return hvit.build("pocket", variant, head, patches=4, **options).eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def pixels(slides: int = 1, regions: int = 2) -> torch.Tensor:
    return draw(slides, regions, 3, 128, 128)


def test_parameters_at_paper_scale():
    """All, and what Local trains, by the patches along a region's side; counted on the authors' code."""
    for patches, expected in ((4, (25_007_047, 3_341_383)), (16, (25_042_951, 3_377_287))):
        with torch.device("meta"):
            model = hvit.build("paper", "local", "classification", patches=patches)
        assert (numbers(model), numbers(model, trained=True)) == expected


@pytest.mark.parametrize(
    ("variant", "levels"),
    [("global", ["slide"]), ("local", ["region", "slide"]), ("whole", ["patch", "region", "slide"])],
)
def test_gradients_come_where_training_is(variant, levels):
    model = pocket(variant).train()
    hvit.loss("regression", model(pixels()), torch.tensor([3])).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == set(model.trained()) and {name.split(".")[0] for name in got} == set(levels)
    assert not any(module.training for level in model.frozen for module in getattr(model, level).modules())


def test_the_positions_of_a_frozen_level_can_be_trained():
    slide, region = SlideTransformer(48), RegionEncoder(4, 48, 48, 1, 3)
    model = HViT(slide, region, variant="global", positions=True)
    assert {n for n in model.trained() if not n.startswith("slide.")} == {"region.pos_embed"}
    # the caller's levels are neither frozen nor set to eval mode
    assert slide.training and region.training and all(p.requires_grad for p in region.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    x, grade = pixels(), torch.tensor([3])
    assert_recomputed_gradients_are_equal(lambda: pocket("whole"), lambda m: hvit.loss("regression", m(x), grade))


@torch.no_grad()
def test_every_level_starts_the_same_pass():
    model, x, trace = pocket(), pixels(2, 3), {}
    whole = model(x, trace=trace)
    for start in ("patches", "regions"):
        torch.testing.assert_close(model(trace[start]), whole)
    shapes = {"patch_attention": (2, 3, 16, 3, 8, 8), "region_attention": (2, 3, 3, 4, 4), "pooling": (2, 3)}
    assert {name: tuple(trace[name].shape) for name in shapes} == shapes
    # patches lie row by row
    torch.testing.assert_close(trace["patches"][:, 0, 1 * 4 + 2], model.patch(x[:, 0, :, 32:64, 64:96]))
    # global and local are one function
    frozen = pocket("global", seed=5)
    frozen.load_state_dict(model.state_dict())
    torch.testing.assert_close(frozen(x), whole)


@pytest.mark.parametrize(("position", "invariant"), [("none", True), ("sine", False), ("learned", False)])
def test_the_order_of_regions_counts_with_positions_only(position, invariant):
    torch.manual_seed(0)
    x, level = draw(1, 5, 48), SlideTransformer(48, position=position, longest=5).eval()
    gap = (level(x) - level(x[:, [3, 1, 4, 0, 2]])).abs().max()
    assert gap < 1e-5 if invariant else gap > 1e-4
    if not invariant:
        refuses((lambda: level(draw(1, 6, 48)), "6"))


@torch.no_grad()
def test_background_is_no_key_in_any_block():
    model, x = pocket("whole"), pixels()
    share = torch.rand(1, 2, 16, 64, generator=torch.Generator().manual_seed(3)) + 0.01
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(model(x, tissue=share), model(x), **near)
    share[0, 0, 5] = 0  # a patch without tissue
    share[0, 1, 2, 10:30] = 0
    seen, other = model(x, tissue=share), x.clone()
    assert (seen - model(x)).abs().max() > 1e-4
    other[0, 0, :, 32:64, 32:64] += 3  # patch 5 of the first region
    torch.testing.assert_close(model(other, tissue=share), seen, **near)
    assert (model(other) - model(x)).abs().max() > 1e-4
    assert model(x, tissue=torch.zeros_like(share)).isfinite().all()


def test_the_padding_of_short_slides_changes_nothing():
    x = draw(2, 4, 16, 48)
    present = torch.tensor([[True, True, True, True], [True, True, False, False]])
    changed = x.clone()
    changed[1, 2:] = 100
    for model in (pocket(), PatchBag(48, pooling="mean").eval(), PatchBag(48).eval()):
        both = model(changed, present=present)
        torch.testing.assert_close(both[:1], model(x[:1]))
        torch.testing.assert_close(both[1:], model(x[1:, :2]))
    bag = PatchBag(48).eval()  # it has no order
    torch.testing.assert_close(bag(x), bag(x.flip(2)))
    assert (pocket()(x) - pocket()(x.flip(2))).abs().max() > 1e-4
    refuses((lambda: pocket()(x, present=present & False), "present"))


def test_what_would_be_silently_wrong_is_refused():
    refuses(
        (lambda: hvit.loss("ordinal", torch.zeros(1, 5), torch.tensor([6])), "6"),
        (lambda: HViT(SlideTransformer(), RegionEncoder(4, dim=96, heads=3)), "192"),
        (lambda: pocket()(torch.zeros(1, 2, 15, 48)), "15"),
        (lambda: pocket()(torch.zeros(1, 1, 3, 100, 100)), "32"),
        (lambda: pocket(levels=("region", "slide"))(pixels()), "patch"),
        (lambda: PatchEncoder(32, 4, 48, 1, 3)(torch.zeros(1, 3, 32, 32), torch.ones(1, 9)), "64"),
    )


@pytest.mark.parametrize("head", hvit.HEADS)
def test_the_authors_names_there_and_back(head):
    slide = SlideTransformer(192, head=head, position="learned", longest=8)
    model = HViT(slide, RegionEncoder(4, depth=2), PatchEncoder(depth=1), "local").eval()
    state, ours = model.to_official(), model.state_dict()
    again = HViT.from_official(state, head)
    assert again.state_dict().keys() == ours.keys()
    assert all(torch.equal(t, ours[n]) for n, t in again.state_dict().items())
    assert (again.slide.head, again.slide.classes, again.variant) == (head, 6, "local")
    state["typo"] = state.pop("global_rho.0.bias")
    assert misfits(HViT.from_official, state, head) == (["global_rho.0.bias"], ["typo"], [])


def test_what_the_outputs_mean_must_be_said_or_be_plain():
    states = {h: hvit.build("paper", "global", h, levels=("slide",)).to_official() for h in hvit.HEADS}
    for head in ("regression", "coral"):
        assert HViT.from_official(states[head]).slide.head == head
    classes = {head: HViT.from_official(states["ordinal"], head).slide.classes for head in ("corn", "classification")}
    assert classes == {"corn": 6, "classification": 5}
    refuses(
        (lambda: HViT.from_official(states["ordinal"]), "head"),
        (lambda: HViT.from_official(states["regression"], "ordinal"), "regression"),
    )


def test_a_dino_checkpoint_gives_its_teacher(tmp_path):
    """HIPT's files: wrapped names, a projection head, and the trainer's settings next to the tensors."""
    encoder, student = PatchEncoder(depth=1), PatchEncoder(depth=1)
    wrapped = {f"module.backbone.{n}": t for n, t in encoder.state_dict().items()}
    wrapped["module.head.mlp.0.weight"] = torch.zeros(2, 384)
    other = {f"module.backbone.{n}": t for n, t in student.state_dict().items()}
    torch.save({"student": other, "teacher": wrapped, "epoch": 3, "args": object}, tmp_path / "dino.pth")
    read = PatchEncoder.from_official(hvit.read_checkpoint(tmp_path / "dino.pth"))
    assert all(torch.equal(t, read.state_dict()[n]) for n, t in encoder.state_dict().items())
    assert (read.image, read.token, read.heads) == (256, 16, 6)
    (tmp_path / "bad.pth").write_bytes((tmp_path / "dino.pth").read_bytes()[:2000])
    refuses((lambda: hvit.read_checkpoint(tmp_path / "bad.pth"), r"bad\.pth"), error=CorruptFile)
    refuses((lambda: RegionEncoder.from_official(encoder.state_dict()), r"phi\.0\.weight"), error=BadCheckpoint)


# --- heatmaps ---------------------------------------------------------------------------------------------------------


def test_ranks_are_shares_of_what_is_lower_and_maps_of_patches_are_laid_row_by_row():
    assert heatmaps.ranks(np.array([[3.0, 1.0], [2.0, 3.0]])).tolist() == [[0.5, 0.0], [0.25, 0.5]]
    assert heatmaps.ranks(np.array([0.1, 0.7, 0.2]), axes=1).tolist() == [0, 2 / 3, 1 / 3]
    attention = np.random.default_rng(0).random((4, 2, 3, 3))
    laid = heatmaps.patch_map(attention)
    assert laid.shape == (2, 6, 6)
    np.testing.assert_array_equal(laid[1, :3, 3:], heatmaps.ranks(attention[1, 1]))
    assert heatmaps.region_map(attention[:2, 0], 6).shape == (2, 6, 6)
    refuses((lambda: heatmaps.patch_map(attention[:3]), "3"), (lambda: heatmaps.region_map(attention[0], 7), "7"))


def test_factorised_maps_weigh_the_levels():
    """Scores that are the same everywhere stay so; with the released weights Global's shrink unless gamma is 0.5."""
    patch, region = np.random.default_rng(0).random((2, 8, 8))
    for gamma, expected in ((0.5, (patch + region + 0.3) / 3), (0.0, patch)):
        for found in (
            heatmaps.factorised(patch, region, 0.3, gamma, "local"),
            heatmaps.granular([patch], [region], 0.3, 2, gamma, "local"),
        ):
            np.testing.assert_allclose(found, expected)
    flat = [np.full((8, 8), 0.6)] * 4
    for quirks, expected in ((False, 0.6), (True, 0.6 * 1.3 / 1.7)):
        found = heatmaps.granular(flat[:2], flat, 0.6, 1, 0.3, "global", official_quirks=quirks)
        np.testing.assert_allclose(found, expected)


def test_overlapping_maps_are_averaged():
    maps = [((0, 0), np.full((4, 4), 0.2)), ((16, 0), np.full((4, 4), 0.8)), ((-8, 24), np.full((4, 4), 0.4))]
    scores, there = heatmaps.stitch(maps, (8, 10), 8)
    assert scores[0].tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.8, 0.8, 0, 0, 0, 0])  # overlaps are averaged
    assert there[:, 9].sum() == 0 and there[3, 0] and scores[3, 0] == pytest.approx(0.3)


def test_maps_lie_on_their_regions():
    corners = np.array([[8, 4], [40, 4], [8, 36]])
    tiles = Tiles(corners, np.ones(3), np.zeros(3), step=32, level=0, pixels=32, region=32)
    maps = np.arange(3 * 4).reshape(3, 2, 2) / 12
    found = figures.stitched(maps, tiles, (80, 90))
    assert found.shape == (80, 90) and np.isnan(found[:4]).all() and np.isnan(found[36:68, 40:]).all()
    for (x, y), values in zip(corners, maps, strict=True):
        np.testing.assert_allclose(found[y : y + 32, x : x + 32][::31, ::31], values, atol=1e-6)
    half = figures.stitched(np.stack([maps] * 3, -1), tiles, (40, 45), 2)
    np.testing.assert_allclose(half[2:18:15, 4:20:15, 1], maps[0], atol=1e-6)
