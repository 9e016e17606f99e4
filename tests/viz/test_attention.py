"""Attention maps read by hooks are the model's own; rollout, [CLS] maps and PCA by hand."""

import math

import numpy as np
import open_clip
import pytest
import timm
import torch
from torch import nn

from companion.errors import BadParameter
from companion.viz.attention import Recorder, class_token_map, photograph_maps, rollout, token_pca
from tests.models.common import refuses


def sharpen(model):
    """Random weights give almost uniform maps, which hide mistakes: larger ones give peaked maps."""
    for p in model.parameters():
        nn.init.normal_(p, *((0.0, 0.15) if p.ndim > 1 else (1.0, 0.3)))
    return model.eval()


def vit(**options):
    size = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5)
    return timm.models.vision_transformer.VisionTransformer(**size, **options)


def clip():
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 60, "width": 48, "heads": 3, "layers": 2}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0))
SWIN = dict(img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=0)
EVA = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
DINO_V3 = dict(use_rot_pos_emb=True, num_reg_tokens=2, rope_type="dinov3", rope_rotate_half=True, qkv_bias=False)
FAMILIES = {  # the model, its inputs, the number of maps
    "ViT": (lambda: vit(qk_norm=True), (IMAGES,), 3),
    "Swin": (lambda: timm.models.SwinTransformer(**SWIN), (IMAGES,), 4),
    "EVA-02": (lambda: timm.models.Eva(**EVA, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True), (IMAGES,), 2),
    "DINOv3": (lambda: timm.models.Eva(**EVA, **DINO_V3), (IMAGES,), 2),
    "BEiT": (lambda: timm.models.Beit(**EVA, use_rel_pos_bias=True), (IMAGES,), 2),
    "open_clip": (clip, (IMAGES, TOKENS), 4),
}


def record(model, *inputs, **options):
    with torch.no_grad(), Recorder(model, **options) as found:
        model(*inputs)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_model_gives_the_same_bits_and_each_layer_a_map(family):
    make, inputs, count = FAMILIES[family]
    model = sharpen(make())
    with torch.no_grad():
        plain = model(*inputs)
        with Recorder(model) as found:
            torch.testing.assert_close(model(*inputs), plain, rtol=0, atol=0)
    assert len(found.maps) == len(found.names) == count
    for attention in found.maps:
        assert attention.ndim == 4 and attention.dtype == torch.float32
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]), rtol=0, atol=1e-5)
        assert attention.std(-1).mean() > 0.1 / attention.shape[-1]  # not uniform
    if family == "open_clip":  # its text encoder is causal
        assert all(m.triu(1).abs().max() == 0 for m in record(model, *inputs, layers=["transformer*"]).maps)


def test_maps_are_those_of_the_inputs_before_dropout():
    layer, x = sharpen(timm.layers.Attention(16, num_heads=2, attn_drop=0.5)), torch.randn(1, 5, 16)
    q, k, _ = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(record(layer.train(), x).maps[0], expected.detach())
    layer = sharpen(nn.MultiheadAttention(12, 3, dropout=0.5))  # sequence first
    query, key, mask = torch.randn(4, 2, 12), torch.randn(6, 2, 12), torch.randn(2 * 3, 4, 6)
    with torch.no_grad():
        _, expected = layer(query, key, key, attn_mask=mask, average_attn_weights=False)
        with Recorder(layer.train()) as found:
            layer(query, key, key, None, False, mask)
    torch.testing.assert_close(found.maps, [expected])


def test_recording_leaves_a_training_with_dropout_as_it_is():
    model = vit(proj_drop_rate=0.2, attn_drop_rate=0.2).train()
    model.blocks[0].attn.qkv = nn.Sequential(nn.Dropout(0.3), model.blocks[0].attn.qkv)  # as adapters have it

    def step():
        torch.manual_seed(5)
        model.zero_grad()
        out = model(IMAGES)
        out.sum().backward()
        return out.detach(), model.patch_embed.proj.weight.grad.clone()

    plain = step()
    with Recorder(model):
        watched = step()
    assert all(map(torch.equal, plain, watched))


def test_layers_are_chosen_by_index_or_name_and_hooks_are_removed():
    model = vit().eval()
    assert record(model, IMAGES, layers=[-1, 0]).names == ["blocks.0.attn", "blocks.2.attn"]
    found = record(model, IMAGES, layers=["*.1.*"])
    assert found.names == ["blocks.1.attn"]
    with pytest.raises(RuntimeError), found:
        model(IMAGES[:, :2])
    model(IMAGES)
    assert found.maps == [] and not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules()) and model.blocks[1].attn.fused_attn
    with pytest.raises(BadParameter), found:
        model.patch_embed(IMAGES)  # no attention layer ran
    refuses(
        (lambda: Recorder(model, layers=[3]), "blocks.2.attn"),
        (lambda: Recorder(nn.Sequential(nn.Linear(2, 2))), "Sequential"),
    )


def test_a_layer_that_forms_no_map_is_refused_and_may_bring_its_own():
    class Fused(timm.layers.Attention):
        def forward(self, x):
            return x

    layer, x = Fused(16, num_heads=2), torch.randn(1, 5, 16)
    refuses((lambda: record(layer, x), "Fused"))
    layer.attention_map = lambda x: torch.eye(5).expand(1, 2, 5, 5)
    assert record(layer, x).maps[0].shape == (1, 2, 5, 5)


def test_rollout_by_hand():
    first, second = torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    heads = torch.stack([first + 0.1, first - 0.1])  # their mean counts
    # (I + A) / 2: [[.9, .1], [.2, .8]] and [[.75, .25], [0, 1]]; the second times the first
    expected = torch.tensor([[[0.725, 0.275], [0.2, 0.8]]])
    torch.testing.assert_close(rollout([heads[None], second[None, None]]), expected)
    double = rollout([heads[None].double(), second[None, None].double()])
    torch.testing.assert_close(double, expected.double())
    refuses((lambda: rollout([torch.rand(1, 2, 4, 16)]), "4, 16"))


def test_the_map_of_the_class_token_leaves_prompts_out():
    row = torch.tensor([9.0, 7, 8, 0, 1, 2, 3, 4, 5])  # [CLS], two prompts, 2 x 3 patches
    expected = torch.arange(6.0).view(1, 2, 3)
    for attention in (row.expand(1, 2, 9, 9), row.expand(1, 9, 9)):
        assert torch.equal(class_token_map(attention, (2, 3), skip=2), expected)
    refuses((lambda: class_token_map(row.expand(1, 9, 9), (2, 3)), "8"))


def test_token_pca_separates_two_regions_whatever_the_sign():
    """Patches of an object in the middle have one direction, those around it another, plus a weak texture."""
    inside = torch.zeros(2, 6, 8, dtype=torch.bool)
    inside[0, 2:4, 2:6] = inside[1, 1:5, 3:5] = True
    regions = torch.linalg.qr(torch.randn(16, 2)).Q.T
    tokens = 5 * regions[inside.long().flatten(1)] + 0.1 * torch.randn(2, 48, 16)
    colours = token_pca(tokens, (6, 8))
    assert colours.shape == (2, 6, 8, 3) and colours.min() == 0 and colours.max() == 1
    assert np.array_equal(colours[..., 0] > 0.5, inside.numpy())  # the object, not the border, is bright
    np.testing.assert_allclose(token_pca(-tokens, (6, 8)), colours, atol=1e-3)
    refuses((lambda: token_pca(tokens, (6, 9)), "54"), (lambda: token_pca(torch.rand(2, 8), (1, 2)), "tokens = 2"))


def test_maps_of_photographs_leave_the_prefix_tokens_out():
    model = sharpen(vit(reg_tokens=2, dynamic_img_size=True))
    images = torch.randn(3, 3, 32, 48)
    maps = photograph_maps(model, images)
    with Recorder(model) as found, torch.no_grad():
        model.forward_features(images)
    last = found.maps[-1][:, :, 0, 3:].mean(1).unflatten(1, (4, 6))
    torch.testing.assert_close(maps["[CLS] attention"], last)
    torch.testing.assert_close(maps["rollout"], rollout(found.maps)[:, 0, 3:].unflatten(1, (4, 6)))
    assert maps["principal components"].shape == (3, 4, 6, 3)
    refuses((lambda: photograph_maps(vit(class_token=False, global_pool="avg"), images), "vit"))
