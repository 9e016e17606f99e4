"""Attention maps read by hooks are the model's own; rollout, class-token maps and PCA by hand."""

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from companion.errors import BadParameter
from companion.viz.attention import Recorder, class_token_map, photograph_maps, rollout, token_pca


def sharpen(model):
    """Random weights make almost even maps, which hide mistakes: larger ones make the maps uneven."""
    for p in model.parameters():
        nn.init.normal_(p, *((0.0, 0.15) if p.ndim > 1 else (1.0, 0.3)))
    return model.eval()


X = (2, 3, 32, 32)


def vit(**options):
    size = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5)
    return timm.models.vision_transformer.VisionTransformer(**size, **options)


def timm_vit(fused=True):
    model = vit(qk_norm=fused)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model, (torch.randn(X),)


def timm_swin(fused=False):
    size = dict(img_size=56, patch_size=2, window_size=7, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=3)
    model = timm.models.swin_transformer.SwinTransformer(**size)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model, (torch.randn(2, 3, 56, 56),)


def clip():
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 60, "width": 48, "heads": 3, "layers": 2}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)


def open_clip_both():
    return clip(), (torch.randn(X), torch.randint(1, 60, (2, 12)))


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4}


def hf_vit(kind="sdpa"):
    config = transformers.ViTConfig(hidden_size=48, intermediate_size=64, image_size=32, patch_size=8, **SMALL)
    config._attn_implementation = kind
    return transformers.ViTModel(config), (torch.randn(X),)


def hf_clip():
    small, vocabulary = SMALL | {"hidden_size": 32, "intermediate_size": 48}, {"eos_token_id": 59, "bos_token_id": 58}
    text = {**small, **vocabulary, "vocab_size": 60, "max_position_embeddings": 12}
    vision = {**small, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return transformers.CLIPModel(config), (torch.randint(1, 60, (2, 10)), torch.randn(X))


def hf_bert(kind="sdpa"):
    config = transformers.BertConfig(vocab_size=60, hidden_size=48, intermediate_size=64, **SMALL)
    config._attn_implementation = kind
    seen = torch.ones(2, 9, dtype=torch.long)
    seen[1, 6:] = 0
    return transformers.BertModel(config), (torch.randint(1, 60, (2, 9)), seen)


FAMILIES = {
    "timm ViT": timm_vit,
    "timm ViT, unfused": lambda: timm_vit(fused=False),
    "timm Swin": timm_swin,
    "timm Swin, fused": lambda: timm_swin(fused=True),
    "open_clip visual": lambda: (clip().visual, (torch.randn(X),)),
    "open_clip visual and text": open_clip_both,
    "transformers ViT, sdpa": hf_vit,
    "transformers ViT, eager": lambda: hf_vit("eager"),
    "transformers CLIP, sdpa": hf_clip,
    "transformers BERT, sdpa": hf_bert,
    "transformers BERT, eager": lambda: hf_bert("eager"),
}


def record(model, *inputs, **options):
    """The maps of one forward pass and the layers they belong to."""
    with torch.no_grad(), Recorder(model, **options) as found:
        model(*inputs)
    return found


def value_path(module, attention, x):
    """softmax(q k) v through the layer's own value and output weights, written apart from the library's way."""
    if isinstance(module, nn.MultiheadAttention):
        value = nn.functional.linear(x, *(p.chunk(3)[2] for p in (module.in_proj_weight, module.in_proj_bias)))
        out = module.out_proj
    elif hasattr(module, "qkv"):
        value, out = module.qkv(x).chunk(3, dim=-1)[2], module.proj
    elif hasattr(module, "v_proj"):
        value, out = module.v_proj(x), getattr(module, "o_proj", None) or module.out_proj
    else:
        value, out = module.value(x), nn.Identity()
    heads = attention.shape[1]
    parts = [attention[:, h] @ value.chunk(heads, dim=-1)[h] for h in range(heads)]
    return out(torch.cat(parts, dim=-1))


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [t for v in values if v is not None and not isinstance(v, str) for t in tensors(v)]


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_give_the_layer_output_and_the_model_the_same_bits(family):
    model, inputs = FAMILIES[family]()
    sharpen(model)
    with torch.no_grad():
        no_grad = tensors(model(*inputs))
    with_grad = tensors(model(*inputs))
    calls = []

    def keep(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        calls.append((module, x, output[0] if isinstance(output, tuple) else output))

    with torch.no_grad(), Recorder(model) as found:
        handles = [model.get_submodule(name).register_forward_hook(keep, with_kwargs=True) for name in found._watched]
        during = tensors(model(*inputs))
    for handle in handles:
        handle.remove()
    assert len(found.maps) == len(found.names) == len(calls) >= 2
    for name, attention, (module, x, output) in zip(found.names, found.maps, calls, strict=True):
        assert model.get_submodule(name) is module
        assert attention.dtype == torch.float32 and attention.device.type == "cpu" and not attention.requires_grad
        assert attention.shape[-2:] == (x.shape[1], x.shape[1])
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]), rtol=0, atol=1e-5)
        assert attention.std(-1).mean() > 0.2 / attention.shape[-1]  # uneven enough for the next line to mean something
        with torch.no_grad():
            ours = value_path(module, attention, x)
        assert (ours - output).abs().max() <= 1e-5 * max(1, output.abs().max())
    with Recorder(model) as found:
        during_grad = tensors(model(*inputs))
    assert found.maps
    assert len(no_grad) > 0
    torch.testing.assert_close((during, during_grad), (no_grad, with_grad), rtol=0, atol=0)


class Softmaxes(TorchFunctionMode):
    """What every softmax gives, in order: of timm's unfused attention, the maps themselves."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.Tensor.softmax, nn.functional.softmax):
            self.found.append(output)
        return output


EVA = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
SWIN_V2 = dict(img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=0)
HIERA = dict(img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 2, 1), q_pool=2, num_classes=0)
RELATIVE = [
    ("EVA-02", lambda: timm.models.Eva(**EVA, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True)),
    ("EVA, three projections", lambda: timm.models.Eva(**EVA, qkv_fused=False, scale_attn_inner=True)),
    (
        "DINOv3",
        lambda: timm.models.Eva(
            **EVA, use_rot_pos_emb=True, num_reg_tokens=2, rope_type="dinov3", rope_rotate_half=True, qkv_bias=False
        ),
    ),
    ("Eva with rope attention", lambda: timm.models.Eva(**EVA, use_rot_pos_emb=True, attn_type="rope")),
    ("BEiT", lambda: timm.models.Beit(**EVA, use_rel_pos_bias=True)),
    ("BEiT, one bias", lambda: timm.models.Beit(**EVA, use_shared_rel_pos_bias=True)),
    ("SwinV2", lambda: timm.models.SwinTransformerV2(**SWIN_V2)),
    ("Hiera", lambda: timm.models.Hiera(**HIERA, mask_unit_attn=(True, True, False))),
]


@pytest.mark.parametrize("build", [build for _, build in RELATIVE], ids=[name for name, _ in RELATIVE])
def test_maps_of_timms_other_transformers_are_their_own_softmax(build):
    """The reference is the softmax inside timm's unfused attention; the maps are recorded from the fused one."""
    torch.manual_seed(0)
    model = sharpen(build())
    images = torch.randn(2, 3, *(64 if isinstance(model, timm.models.Hiera) else 32,) * 2)
    with torch.no_grad():
        plain = model.forward_features(images)
        with Recorder(model) as found:
            assert torch.equal(model.forward_features(images), plain)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        with Softmaxes() as true:
            model.forward_features(images)
    assert len(found.maps) == len(true.found) >= 2
    for ours, theirs in zip(found.maps, true.found, strict=True):
        if theirs.ndim == 5:  # Hiera's mask units: (batch, heads, units, queries, keys)
            theirs = theirs.transpose(1, 2).flatten(0, 1)
        assert theirs.std(-1).mean() > 0.1 / theirs.shape[-1]  # uneven enough for the next line to mean something
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_others_are_refused():
    for build in (
        lambda: timm.create_model("xcit_nano_12_p16_224", num_classes=0),
        lambda: timm.create_model("cait_xxs24_224", depth=1, num_classes=0),
        lambda: timm.create_model("test_maxvit", num_classes=0),
    ):
        with pytest.raises(BadParameter, match="EVA-02, DINOv3, BEiT"):
            Recorder(build())
    with pytest.raises(BadParameter, match=r"4 queries, 16 keys' is not accepted.*Hiera"):
        rollout([torch.rand(1, 2, 4, 16)])


def test_training_is_the_same_bits_with_dropout():
    model = vit(proj_drop_rate=0.2, attn_drop_rate=0.2).train()
    model.blocks[0].attn.qkv = nn.Sequential(nn.Dropout(0.3), model.blocks[0].attn.qkv)  # as adapters have it
    x = torch.randn(X)

    def step():
        torch.manual_seed(5)
        model.zero_grad()
        out = model(x)
        out.sum().backward()
        return out.detach(), model.patch_embed.proj.weight.grad.clone()

    plain = step()
    with Recorder(model):
        watched = step()
    assert all(map(torch.equal, plain, watched))


def test_masks_reach_the_maps():
    for make, layers in ((open_clip_both, ["transformer*"]), (hf_clip, ["text_model*"])):
        model, inputs = make()
        maps = record(sharpen(model), *inputs, layers=layers).maps
        assert len(maps) == 2 and all(m.triu(1).abs().max() == 0 for m in maps)  # the text encoder is causal
    model, inputs = hf_bert()
    maps = record(sharpen(model), *inputs).maps
    assert all(m[1, ..., 6:].abs().max() == 0 and m[0, ..., 6:].min() > 0 for m in maps)  # padding


def test_multihead_attention_padding_heads_and_cross_inputs():
    layer = sharpen(nn.MultiheadAttention(12, 3, kdim=7, vdim=5))  # sequence first
    query, key, value = torch.randn(4, 2, 12), torch.randn(6, 2, 7), torch.randn(6, 2, 5)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    mask = torch.randn(2 * 3, 4, 6)
    with torch.no_grad(), Recorder(layer) as found:
        _, theirs = layer(query, key, value, padding.float() * -1e9, attn_mask=mask, average_attn_weights=False)
        _, bool_theirs = layer(query, key, value, key_padding_mask=padding, average_attn_weights=False)
    assert found.names == ["", ""]
    torch.testing.assert_close(found.maps, [theirs, bool_theirs])


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_afterwards():
    model = vit().eval()
    x = torch.randn(1, 3, 32, 32)
    with Recorder(model) as found:
        assert hooks(model) == 3
        model(x)
    assert hooks(model) == 0 and len(found.maps) == 3
    with pytest.raises(RuntimeError), found:
        model(torch.randn(1, 5, 32, 32))
    assert hooks(model) == 0 and found.maps == []
    model(x)
    assert found.maps == []
    with pytest.raises(BadParameter, match="none of them ran"), Recorder(model):
        model.patch_embed(x)
    assert hooks(model) == 0


def test_layers_can_be_chosen():
    model = vit().eval()
    x = torch.randn(1, 3, 32, 32)
    assert record(model, x, layers=[-1, 0]).names == ["blocks.0.attn", "blocks.2.attn"]
    assert record(model, x, layers=["*.1.*"]).names == ["blocks.1.attn"]
    for wrong in (3, -4, "layers.*"):
        with pytest.raises(BadParameter, match=r"blocks\.2\.attn"):
            Recorder(model, layers=[wrong])
    with pytest.raises(BadParameter, match="Sequential"):
        Recorder(nn.Sequential(nn.Linear(2, 2)))


def test_a_layer_that_does_something_else_is_refused():
    class Biased(timm.layers.Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x, attn_mask=torch.eye(x.shape[1]) * 3)

    layer = sharpen(Biased(16, num_heads=2))
    x = torch.randn(1, 5, 16)
    with pytest.raises(BadParameter, match="Biased does something else"), Recorder(layer):
        layer(x)
    assert hooks(layer) == 0

    def read(module, args, kwargs):
        q, k, _ = module.qkv(args[0]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT * module.scale + torch.eye(5) * 3).softmax(-1)

    assert record(layer, x, also={Biased: read}).maps[0].shape == (1, 2, 5, 5)


def test_bf16_models_are_recorded():
    x = torch.randn(X)
    maps = record(vit().eval().bfloat16(), x.bfloat16()).maps
    with torch.autocast("cpu", torch.bfloat16):
        maps = maps + record(vit().eval(), x).maps
    for attention in maps:
        assert attention.dtype == torch.float32
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 17))


def test_rollout_by_hand():
    first = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    second = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    maps = [torch.stack([first, first])[None], torch.stack([second, second])[None]]
    # (I + A)/2: [[.9, .1], [.2, .8]] and [[.75, .25], [0, 1]]; the second times the first
    expected = torch.tensor([[[0.725, 0.275], [0.2, 0.8]]])
    torch.testing.assert_close(rollout(maps), expected)
    torch.testing.assert_close(rollout(maps, residual=0.0), (second @ first)[None])
    torch.testing.assert_close(rollout(maps, residual=1.0), torch.eye(2)[None])


def test_rollout_heads():
    heads = torch.tensor([[[0.8, 0.2], [0.5, 0.5]], [[0.4, 0.6], [0.9, 0.1]]])[None]
    largest = torch.tensor([[0.8 / 1.4, 0.6 / 1.4], [0.9 / 1.4, 0.5 / 1.4]])
    smallest = torch.tensor([[0.4 / 0.6, 0.2 / 0.6], [0.5 / 0.6, 0.1 / 0.6]])
    torch.testing.assert_close(rollout([heads], residual=0, head="max")[0], largest)
    torch.testing.assert_close(rollout([heads], residual=0, head="min")[0], smallest)
    with pytest.raises(BadParameter, match="median"):
        rollout([heads], head="median")
    maps = [torch.randn(3, 4, 11, 11).softmax(-1) for _ in range(5)]
    for head in ("mean", "max", "min"):
        torch.testing.assert_close(rollout(maps, 0.3, head, drop=[2, 5]).sum(-1), torch.ones(3, 9))


def test_rollout_drops_prompts():
    plain = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    # a prompt between the two tokens takes half of each row: what is left, scaled up, is `plain` again
    prompted = torch.tensor([[0.25, 0.5, 0.25], [0.3, 0.3, 0.4], [0.125, 0.5, 0.375]])
    mixed = [plain[None, None], prompted[None, None]]
    both = [prompted[None, None]] * 2
    for maps, drop in ((mixed, [(), (1,)]), (both, [1]), (both, range(1, 2)), (both, [-2])):
        torch.testing.assert_close(rollout(maps, drop=drop), rollout([plain[None, None]] * 2))
    for drop in ((), [(), (), ()]):
        with pytest.raises(BadParameter, match="drop"):
            rollout(mixed, drop=drop)


def test_class_token_map_skips_prompts():
    row = torch.tensor([9.0, 7, 8, 0, 1, 2, 3, 4, 5])  # class, two prompts, 2 x 3 patches
    attention = row.expand(1, 2, 9, 9)
    expected = torch.arange(6.0).view(1, 2, 3)
    assert torch.equal(class_token_map(attention, (2, 3), skip=2), expected)
    assert torch.equal(class_token_map(attention[:, 0], (2, 3), skip=2), expected)
    at_the_end = row.roll(-2)[[7 - 0, *range(1, 7), 0, 8]].expand(1, 1, 9, 9)
    assert torch.equal(class_token_map(at_the_end, (2, 3), skip=(-1, -2)), expected)
    with pytest.raises(BadParameter, match="8 are left, and the grid 2 x 3 has 6"):
        class_token_map(attention, (2, 3))


def test_token_pca_shares_one_basis():
    # three directions of decreasing spread, hidden in 16 channels: the colours are these coordinates
    coordinates = torch.randn(2, 12, 3) * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(16, 3)).Q
    colours = token_pca(coordinates @ basis.T + 4, (3, 4))
    assert colours.shape == (2, 3, 4, 3) and colours.min() == 0 and colours.max() == 1
    # PCA mixes them a little, as a small sample is not quite uncorrelated
    assert abs(np.corrcoef(colours[..., 0].ravel(), coordinates[..., 0].ravel())[0, 1]) > 0.97
    assert token_pca(coordinates[0] @ basis.T, (3, 4)).shape == (3, 4, 3)
    with pytest.raises(BadParameter, match="13"):
        token_pca(torch.randn(2, 13, 8), (3, 4))


def test_token_pca_segments_a_map_of_two_regions_whatever_the_sign():
    """Patches of an object in the middle hold one direction, those around it another, plus a weak texture."""
    inside = torch.zeros(2, 6, 8, dtype=torch.bool)
    inside[0, 2:4, 2:6] = inside[1, 1:5, 3:5] = True
    regions = torch.linalg.qr(torch.randn(16, 2)).Q.T
    tokens = 5 * regions[inside.long().flatten(1)] + 0.1 * torch.randn(2, 48, 16)
    colours = token_pca(tokens, (6, 8))
    assert np.array_equal(colours[..., 0] > 0.5, inside.numpy())  # the object, not the border, is bright
    # negated tokens have the same components with the other sign, and another order of channels other loadings
    np.testing.assert_allclose(token_pca(-tokens, (6, 8)), colours, atol=1e-4)
    np.testing.assert_allclose(token_pca(tokens.flip(-1), (6, 8)), colours, atol=1e-4)


@pytest.mark.parametrize("registers", [0, 2])
def test_photograph_maps_of_a_vit(registers):
    model = sharpen(vit(reg_tokens=registers, dynamic_img_size=True))
    images = torch.randn(3, 3, 32, 48)
    maps = photograph_maps(model, images)
    assert [tuple(m.shape) for m in maps.values()] == [(3, 4, 6), (3, 4, 6), (3, 4, 6, 3)]
    with Recorder(model) as record, torch.no_grad():
        tokens = model.forward_features(images)
    last = record.maps[-1][:, :, 0, 1 + registers :].mean(1).unflatten(1, (4, 6))
    torch.testing.assert_close(maps["[CLS] attention"], last)
    np.testing.assert_array_equal(maps["principal components"], token_pca(tokens[:, 1 + registers :], (4, 6)))
