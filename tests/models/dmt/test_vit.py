"""The ViT of DMT's teachers and students: visible and masked patches, attention, released names."""

import pytest
import torch
from torch.nn import functional as F

from companion.errors import BadCheckpoint
from companion.models.dmt import figures
from companion.models.dmt.vit import ViT, build
from companion.models.layers.pos_embed import resize_pos_embed, sincos_table
from tests.models.common import assert_recomputed_gradients_are_equal, misfits, refuses
from tests.parity.runner import ROOT as PARITY
from tests.parity.runner import Case


def student(**options):
    torch.manual_seed(2)
    return build("pocket", **options)


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_dropped_patches_do_not_matter_and_their_order_does_not_either(images):
    vit = student().eval()
    keep = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :8]
    seen = vit(images, keep)
    gone = torch.ones(4, 16).scatter(1, keep, 0).unflatten(1, (4, 4))
    changed = images + 10 * F.interpolate(gone[:, None], scale_factor=8)
    torch.testing.assert_close(vit(changed, keep), seen, rtol=1e-5, atol=1e-5)
    assert (vit(changed) - vit(images)).abs().max() > 0.01
    torch.testing.assert_close(vit(images, keep.flip(1))[:, 1:], seen[:, 1:].flip(1), rtol=1e-5, atol=1e-5)


def test_masked_patches_are_replaced(images):
    vit, masked, changed = student(masked=True).eval(), torch.zeros(4, 16, dtype=torch.bool), images.clone()
    masked[:, 3] = True
    changed[:, :, :8, 24:] = 7.0  # patch 3, the last of the first row
    torch.testing.assert_close(vit(images, masked=masked), vit(changed, masked=masked), rtol=1e-5, atol=1e-5)
    assert (vit(images, masked=masked) - vit(images)).abs().max() > 0.01


def test_attention_of_the_cls_token(images):
    vit, seen = student().eval(), []
    attn = vit.blocks[-1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    vit(images)
    torch.testing.assert_close(vit.attention(images), seen[0][:, :, 0, 1:])
    assert figures.attention({"student": vit}, torch.zeros(1, 3, 32, 72))["student"].shape == (1, 4, 9)


def test_by_default_it_is_vit_b16():
    with torch.device("meta"):
        vit = ViT()
    sizes = {"blocks": len(vit.blocks), "heads": vit.blocks[0].attn.num_heads, "width": vit.width, "N": vit.patches}
    assert sizes == {"blocks": 12, "heads": 12, "width": 768, "N": 196}


def test_gradient_checkpointing_changes_no_gradient(images):
    assert_recomputed_gradients_are_equal(student, lambda vit: vit.forward_features(images).square().mean())


@pytest.mark.parametrize("prefix", ["", "module.", "module.base_encoder.", "backbone.", "module.backbone."])
def test_official_names_there_and_back(prefix, images):
    for kind in ("mae", "mocov3", "learned"):
        vit = student(positions=kind, masked=kind == "learned").eval()
        state = {prefix + name: value for name, value in vit.to_official().items()}
        state[prefix + "head.mlp.0.weight"] = torch.ones(2, 2)
        if "base_encoder" in prefix:
            state["module.momentum_encoder.cls_token"] = state["module.predictor.0.weight"] = torch.ones(2)
        loaded = ViT.from_official(state, heads=4)
        assert loaded.positions == kind and not loaded.training and torch.equal(loaded(images), vit(images))


def test_a_checkpoint_that_does_not_fit():
    state = student().to_official()
    without = {name: value for name, value in state.items() if name != "pos_embed"}
    refuses((lambda: ViT.from_official(without), "pos_embed"), error=BadCheckpoint)
    state["blocks.1.attn.typo"] = state.pop("blocks.1.attn.proj.bias")
    expected = ["blocks.1.attn.proj.bias"], ["blocks.1.attn.typo"], []
    assert misfits(ViT.from_official, state, heads=4) == expected
    refuses((lambda: build("huge"), "size"))


@pytest.mark.slow
def test_the_effects_of_the_findings():
    """MoCo v3's table next to MAE's, and the 0.1 that iBOT adds to the sides of a new grid."""
    apart = (sincos_table(768, 14, "mae") - sincos_table(768, 14, "mocov3")).abs()
    assert round(100 * float((apart > 0.1).float().mean())) == 30
    recorded = Case(PARITY / "dmt" / "ibot_vitb")
    model, image = ViT.from_official(recorded.state, 12), recorded.input("image_other")
    with torch.no_grad():
        moved = model(image)
        model.pos_embed = torch.nn.Parameter(resize_pos_embed(model.pos_embed, (6, 6)))
        exact = model(image)
    assert float((moved - exact).abs().max()) == pytest.approx(0.10, abs=0.01)
    assert float(moved.abs().max()) == pytest.approx(4.2, abs=0.1)
