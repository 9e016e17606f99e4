"""H-ViT: gradients and inputs of the levels, padding and background, names, checkpoints."""

import functools

import pytest
import timm
import torch

from companion.errors import BadCheckpoint, CorruptFile
from companion.models.hvit import model as hvit
from companion.models.hvit.model import HViT, PatchEncoder, RegionEncoder, SlideTransformer
from companion.models.hvit.official import read_checkpoint
from tests.models.common import assert_recomputed_gradients_are_equal, refuses


def pocket(variant: str = "local", head: str = "regression", seed: int = 0, **options) -> HViT:
    torch.manual_seed(seed)
    return hvit.build("pocket", variant, head, patches=4, **options).eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def pixels(slides: int = 1, regions: int = 2) -> torch.Tensor:
    return draw(slides, regions, 3, 128, 128)


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


def test_the_callers_levels_are_neither_frozen_nor_set_to_eval_mode():
    slide, region = SlideTransformer(48), RegionEncoder(4, 48, 48, 1, 3)
    HViT(slide, region, variant="global")
    assert slide.training and region.training and all(p.requires_grad for p in region.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    x, grade = pixels(), torch.tensor([3])
    assert_recomputed_gradients_are_equal(lambda: pocket("whole"), lambda m: hvit.loss("regression", m(x), grade))


@torch.no_grad()
def test_every_level_starts_the_same_pass():
    model, x = pocket(), pixels(2, 3)
    whole, patches = model(x), model.embed_patches(x.flatten(0, 1))
    regions = model.embed_regions(patches).unflatten(0, (2, 3))
    for start in (patches.unflatten(0, (2, 3)), regions):
        torch.testing.assert_close(model(start), whole)
    # patches lie row by row
    torch.testing.assert_close(patches[[0, 3], 1 * 4 + 2], model.patch(x[:, 0, :, 32:64, 64:96]))
    # global and local are one function
    frozen = pocket("global", seed=5)
    frozen.load_state_dict(model.state_dict())
    torch.testing.assert_close(frozen(x), whole)


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
    model, x = pocket(), draw(2, 4, 16, 48)
    present = torch.tensor([[True, True, True, True], [True, True, False, False]])
    changed = x.clone()
    changed[1, 2:] = 100
    both = model(changed, present=present)
    torch.testing.assert_close(both[:1], model(x[:1]))
    torch.testing.assert_close(both[1:], model(x[1:, :2]))
    seen: list[int] = []
    model.region.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    share = draw(2, 4, 16, 4)
    torch.testing.assert_close(
        model(changed, tissue=share, present=present)[1:], model(x[1:, :2], tissue=share[1:, :2])
    )
    assert seen == [6, 2]  # the region level embeds no padding
    assert (model(x) - model(x.flip(2))).abs().max() > 1e-4  # patches have positions
    refuses((lambda: model(x, present=present & False), "present"))


def test_what_would_be_silently_wrong_is_refused():
    refuses(
        (lambda: hvit.loss("ordinal", torch.zeros(1, 5), torch.tensor([6])), "6"),
        (lambda: hvit.loss("regression", torch.zeros(2, 1), torch.tensor([[1], [2]])), "grades"),
        (lambda: pocket()(torch.zeros(1, 0, 48)), "regions"),
        (lambda: PatchEncoder(32, 4, 48, 1, 3)(torch.zeros(1, 3, 30, 32)), "4"),
        (lambda: PatchEncoder(16, 16), "side"),
        (lambda: RegionEncoder(1), "side"),
        (lambda: pocket(levels=("regions", "slide")), "levels"),
        (lambda: pocket("whole")(draw(1, 1, 3, 64, 256)), "regions"),
        (lambda: pocket(levels=("region", "slide"))(pixels()), "patch"),
    )


def test_what_the_outputs_mean_must_be_said_or_be_plain():
    states = {h: hvit.build("paper", "global", h, levels=("slide",)).to_official() for h in hvit.HEADS}
    for head in ("regression", "coral"):
        assert HViT.from_official(states[head]).slide.head == head
    classes = {head: HViT.from_official(states["ordinal"], head).num_classes for head in ("corn", "classification")}
    assert classes == {"corn": 6, "classification": 5}
    refuses(
        (lambda: HViT.from_official(states["ordinal"]), "head"),
        (lambda: HViT.from_official(states["regression"], "ordinal"), "regression"),
    )


def test_a_dino_checkpoint_gives_its_teacher(tmp_path):
    """HIPT's files: wrapped names, a projection head, and the trainer's settings next to the tensors."""
    encoder = PatchEncoder(depth=1)
    wrapped = {f"module.backbone.{n}": t for n, t in encoder.state_dict().items()}
    student = {n: t + 1 for n, t in wrapped.items()}
    wrapped["module.head.mlp.0.weight"] = torch.zeros(2, 384)
    torch.save({"student": student, "teacher": wrapped, "epoch": 3, "args": object}, tmp_path / "dino.pth")
    read = PatchEncoder.from_official(read_checkpoint(tmp_path / "dino.pth"))
    assert all(torch.equal(t, read.state_dict()[n]) for n, t in encoder.state_dict().items())
    (tmp_path / "bad.pth").write_bytes((tmp_path / "dino.pth").read_bytes()[:2000])
    refuses((lambda: read_checkpoint(tmp_path / "bad.pth"), r"bad\.pth"), error=CorruptFile)
    refuses((lambda: RegionEncoder.from_official(encoder.state_dict()), r"phi\.0\.weight"), error=BadCheckpoint)


@torch.no_grad()
@pytest.mark.parametrize("init_values", [None, 1e-5])
def test_a_timm_vit_as_the_patch_level(init_values):
    """Its LayerScale is folded into the linear layers."""
    torch.manual_seed(0)
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    vit = timm.models.VisionTransformer(**options, init_values=init_values).eval()
    for name, tensor in vit.named_parameters():
        if "ls" in name or "pos_embed" in name:
            tensor.normal_()
    images, level = torch.randn(2, 3, 56, 56), PatchEncoder.from_timm(vit)
    assert (level.image, level.token, level.dim) == (56, 14, 48) and not level.training
    tokens = level.forward_intermediates(images)[1]["tokens"]
    torch.testing.assert_close(tokens, vit.forward_features(images), rtol=1e-4, atol=1e-5)
    others = [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}]
    made = [timm.models.VisionTransformer(**options | changes) for changes in others]
    refuses(*((functools.partial(PatchEncoder.from_timm, other), "CLS") for other in made))


def test_a_region_encoder_is_of_regions_of_8_by_8_patches_by_default():
    encoder = RegionEncoder(depth=1)
    assert encoder.pos_embed.shape == RegionEncoder(8, depth=1).pos_embed.shape
    assert encoder.pos_embed.shape[1] == 1 + 7**2  # of DINO's largest crop
