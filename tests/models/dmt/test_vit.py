"""The ViT of DMT's teachers and students: counts, masking, position embeddings, released names, and bad input."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from companion.errors import BadCheckpoint, BadParameter
from companion.models.dmt.vit import POSITIONS, ViT, build, visible
from tests.models.common import assert_recomputed_gradients_are_equal, misfits, numbers, refuses


def student(**options):
    torch.manual_seed(2)
    return build("pocket", **options)


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise():
    return torch.rand(4, 16, generator=torch.Generator().manual_seed(1))


def test_sizes():
    for size, whole, trained in (
        ("tiny", 5_524_416, 5_486_592),
        ("small", 21_665_664, 21_590_016),
        ("base", 85_798_656, 85_647_360),  # without the fixed table
    ):
        with torch.device("meta"):
            assert numbers(build(size, positions="learned")) == whole and numbers(build(size), trained=True) == trained


def test_a_quarter_of_the_patches_is_seen_and_bad_sizes_are_refused():
    assert visible(196, 0.75) == 49
    refuses(
        (lambda: visible(196, 1.0), "mask_ratio"),
        (lambda: visible(4, 0.9), "leaves a patch"),
        (lambda: student(image=33), "image"),
        (lambda: student(heads=5), "heads"),
        (lambda: student(last_heads=5), "heads"),
        (lambda: student(positions="x"), "positions"),
        (lambda: build("huge"), "size"),
    )


def test_it_is_timms_vit(images):
    vit = student(positions="learned").eval()
    theirs = VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4, num_classes=0, global_pool="").eval()
    theirs.load_state_dict(vit.state_dict())
    assert torch.allclose(vit(images), theirs(images), atol=1e-6)


def test_dropped_patches_do_not_matter_and_their_order_does_not_either(images, noise):
    vit, keep = student().eval(), noise.argsort(1)[:, :8]
    seen = vit(images, keep)
    changed = images.clone()
    gone = torch.ones(4, 16).scatter(1, keep, 0).unflatten(1, (4, 4))
    changed += 10 * F.interpolate(gone[:, None], scale_factor=8)
    assert torch.equal(vit(changed, keep), seen)
    other = torch.randperm(8)
    assert torch.allclose(vit(images, keep[:, other])[:, 1:], seen[:, 1:][:, other], atol=1e-5)
    everything = torch.arange(16).expand(4, -1)
    assert torch.allclose(vit(images, everything), vit(images), atol=1e-6)


def test_masked_patches_are_replaced(images):
    vit = student(masked=True).eval()
    masked = torch.zeros(4, 16, dtype=torch.bool)
    assert torch.equal(vit(images, masked=masked), vit(images))
    masked[:, 3] = True
    changed = images.clone()
    changed[:, :, :8, 24:] = 7.0  # patch 3, the last of the first row
    assert torch.equal(vit(images, masked=masked), vit(changed, masked=masked))
    assert not torch.allclose(vit(images), vit(changed))
    with pytest.raises(BadParameter, match="masked"):
        student()(images, masked=masked)


def test_hidden_layers_and_attention(images):
    vit = student().eval()
    first, last = vit.hidden(images, (0, 1))
    assert torch.equal(vit.hidden(images, (-2,))[0], first) and torch.equal(vit.norm(last), vit(images))
    rows = vit.attention(images)
    assert rows.shape == (4, 4, 16) and (rows.sum(-1) < 1).all()
    q, k, _ = vit.qkv(first)
    assert torch.allclose(rows, (q @ k.mT / 8**0.5).softmax(-1)[:, :, 0, 1:])
    q, k, _ = vit.qkv(vit.embed(images), 0)
    assert torch.allclose(vit.attention(images, 0), (q @ k.mT / 8**0.5).softmax(-1)[:, :, 0, 1:])
    with pytest.raises(BadParameter, match="layers"):
        vit.hidden(images, (2,))


def test_features_are_the_cls_token_and_the_mean_patch_token_without_it(images):
    """A perturbation of the [CLS] token alone reaches the first half, one of the patches the second."""
    vit = student().eval()
    for tokens in (torch.zeros(4, 17, 32), torch.randn(4, 17, 32)):
        vit.forward = lambda *_, tokens=tokens: tokens
        cls, mean = vit.features(images).chunk(2, 1)
        tokens[:, 0] += 1
        assert torch.equal(vit.features(images).chunk(2, 1)[0], cls + 1)
        assert torch.equal(vit.features(images).chunk(2, 1)[1], mean)
        tokens[:, 5] += 16
        assert torch.allclose(vit.features(images).chunk(2, 1)[1], mean + 1, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_other_sizes(positions):
    """Patches are in raster order; larger images have resized position embeddings."""
    vit = student(positions=positions).eval()
    wide = torch.rand(2, 3, 48, 64)
    tokens = vit.embed(wide) - vit.embed(torch.zeros_like(wide))
    assert tokens.shape == (2, 1 + 6 * 8, 32) and not tokens[:, 0].any()
    patch = vit.embed(wide[:, :, 16:24, 40:48].repeat(1, 1, 4, 4)) - vit.embed(torch.zeros(2, 3, 32, 32))
    assert torch.allclose(tokens[:, 1 + 2 * 8 + 5], patch[:, 1], atol=1e-5)
    assert torch.isfinite(vit(wide)).all()
    for shape in [(2, 3, 30, 32), (2, 1, 32, 32), (3, 32, 32)]:
        with pytest.raises(BadParameter, match="images"):
            vit(torch.rand(shape))


def test_gradient_checkpointing_changes_no_gradient(images):
    assert_recomputed_gradients_are_equal(student, lambda vit: vit.forward_features(images).square().mean())


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("prefix", ["", "module.", "module.base_encoder.", "backbone.", "module.backbone."])
def test_official_names_there_and_back(prefix, kind, images):
    vit = student(positions=kind, masked=kind == "learned").eval()
    state = vit.to_official(prefix)
    others = {"head.0.weight": torch.ones(2), "head.mlp.0.weight": torch.ones(2, 2)}
    state |= {prefix + name: value for name, value in others.items()}
    if "base_encoder" in prefix:
        state["module.momentum_encoder.cls_token"] = state["module.predictor.0.weight"] = torch.ones(2)
    loaded = ViT.from_official(state, heads=4)
    assert loaded.positions == kind and not loaded.training
    assert torch.equal(loaded(images), vit(images))


def test_a_checkpoint_that_does_not_fit():
    state = student().to_official()
    with pytest.raises(BadCheckpoint, match="pos_embed"):
        ViT.from_official({name: value for name, value in state.items() if name != "pos_embed"})
    state["blocks.1.attn.typo"] = state.pop("blocks.1.attn.proj.bias")
    expected = ["blocks.1.attn.proj.bias"], ["blocks.1.attn.typo"], []
    assert misfits(ViT.from_official, state, heads=4) == expected
