"""Attention read by hooks is the model's own, and the house figures are legible."""

import io
import math

import matplotlib.pyplot as plt
import numpy as np
import open_clip
import pandas as pd
import pytest
import skimage.data
import skimage.transform
import timm
import torch
import transformers
from torch import nn

from companion.errors import BadParameter
from companion.viz import figures
from companion.viz.figures import Recorder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    plt.close("all")


# ------------------------------------------------------------------------------------------------------- the recorder


def sharpen(model):
    """Random weights make almost even maps, which hide mistakes: larger ones make the maps uneven."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
        else:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


def vit(**options):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=5, **options
    )


def timm_vit():
    return vit(qk_norm=True), (torch.randn(2, 3, 32, 32),)


def timm_vit_unfused():
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model, (torch.randn(2, 3, 32, 32),)


def timm_swin(fused=False):
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=56, patch_size=2, window_size=7, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=3
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model, (torch.randn(2, 3, 56, 56),)


def clip():
    return open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
        text_cfg={"context_length": 12, "vocab_size": 60, "width": 48, "heads": 3, "layers": 2},
    )


def open_clip_visual():
    return clip().visual, (torch.randn(2, 3, 32, 32),)


def open_clip_both():
    return clip(), (torch.randn(2, 3, 32, 32), torch.randint(1, 60, (2, 12)))


def hf_vit(kind="sdpa"):
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    config._attn_implementation = kind
    return transformers.ViTModel(config), (torch.randn(2, 3, 32, 32),)


def hf_clip():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 59, "bos_token_id": 58},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return transformers.CLIPModel(config), (torch.randint(1, 60, (2, 10)), torch.randn(2, 3, 32, 32))


def hf_bert(kind="sdpa"):
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config._attn_implementation = kind
    seen = torch.ones(2, 9, dtype=torch.long)
    seen[1, 6:] = 0
    return transformers.BertModel(config), (torch.randint(1, 60, (2, 9)), seen)


FAMILIES = {
    "timm ViT": timm_vit,
    "timm ViT, unfused": timm_vit_unfused,
    "timm Swin": timm_swin,
    "timm Swin, fused": lambda: timm_swin(fused=True),
    "open_clip visual": open_clip_visual,
    "open_clip visual and text": open_clip_both,
    "transformers ViT, sdpa": hf_vit,
    "transformers ViT, eager": lambda: hf_vit("eager"),
    "transformers CLIP, sdpa": hf_clip,
    "transformers BERT, sdpa": hf_bert,
    "transformers BERT, eager": lambda: hf_bert("eager"),
}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_give_the_layer_output(family):
    model, inputs = FAMILIES[family]()
    sharpen(model)
    calls = []

    def keep(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        calls.append((module, x, output[0] if isinstance(output, tuple) else output))

    with torch.no_grad(), Recorder(model) as record:
        handles = [model.get_submodule(name).register_forward_hook(keep, with_kwargs=True) for name in record._watched]
        model(*inputs)
    for handle in handles:
        handle.remove()
    assert len(record.maps) == len(record.names) == len(calls) >= 2
    for name, attention, (module, x, output) in zip(record.names, record.maps, calls, strict=True):
        assert model.get_submodule(name) is module
        assert attention.dtype == torch.float32 and attention.device.type == "cpu" and not attention.requires_grad
        assert attention.shape[-2:] == (x.shape[1], x.shape[1])
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]), rtol=0, atol=1e-5)
        assert attention.std(-1).mean() > 0.2 / attention.shape[-1]  # uneven enough for the next line to mean something
        with torch.no_grad():
            ours = value_path(module, attention, x)
        assert (ours - output).abs().max() <= 1e-5 * max(1, output.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["no_grad", "grad"])
def test_outputs_are_the_same_bits(family, mode):
    model, inputs = FAMILIES[family]()
    sharpen(model)

    def tensors(output):
        if isinstance(output, torch.Tensor):
            return [output]
        values = output.values() if hasattr(output, "values") else output
        return [t for v in values if v is not None and not isinstance(v, str) for t in tensors(v)]

    with torch.set_grad_enabled(mode == "grad"):
        before = tensors(model(*inputs))
        with Recorder(model) as record:
            during = tensors(model(*inputs))
    assert record.maps
    assert len(before) == len(during) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))


def test_training_is_the_same_bits_with_dropout():
    model = vit(proj_drop_rate=0.2, attn_drop_rate=0.2).train()
    model.blocks[0].attn.qkv = nn.Sequential(nn.Dropout(0.3), model.blocks[0].attn.qkv)  # as adapters have it
    x = torch.randn(2, 3, 32, 32)

    def step():
        torch.manual_seed(5)
        model.zero_grad()
        out = model(x)
        out.sum().backward()
        return out.detach(), model.patch_embed.proj.weight.grad.clone()

    plain = step()
    with Recorder(model):
        watched = step()
    assert torch.equal(plain[0], watched[0]) and torch.equal(plain[1], watched[1])


def test_masks_reach_the_maps():
    model, inputs = open_clip_both()
    with torch.no_grad(), Recorder(sharpen(model)) as record:
        model(*inputs)
    text = [m for n, m in zip(record.names, record.maps, strict=True) if not n.startswith("visual")]
    assert len(text) == 2
    assert all(m.triu(1).abs().max() == 0 for m in text)  # the text tower is causal

    model, inputs = hf_clip()
    with torch.no_grad(), Recorder(sharpen(model), layers=["text_model*"]) as record:
        model(*inputs)
    assert len(record.maps) == 2 and all(m.triu(1).abs().max() == 0 for m in record.maps)

    model, inputs = hf_bert()
    with torch.no_grad(), Recorder(sharpen(model)) as record:
        model(*inputs)
    assert all(m[1, ..., 6:].abs().max() == 0 and m[0, ..., 6:].min() > 0 for m in record.maps)  # padding


def test_multihead_attention_padding_heads_and_cross_inputs():
    layer = sharpen(nn.MultiheadAttention(12, 3, kdim=7, vdim=5))  # sequence first
    query, key, value = torch.randn(4, 2, 12), torch.randn(6, 2, 7), torch.randn(6, 2, 5)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    mask = torch.randn(2 * 3, 4, 6)
    with torch.no_grad(), Recorder(layer) as record:
        _, theirs = layer(query, key, value, padding.float() * -1e9, attn_mask=mask, average_attn_weights=False)
        _, bool_theirs = layer(query, key, value, key_padding_mask=padding, average_attn_weights=False)
    assert record.names == ["", ""]
    torch.testing.assert_close(record.maps[0], theirs)
    torch.testing.assert_close(record.maps[1], bool_theirs)


@pytest.mark.parametrize("make", [hf_vit, hf_bert])
def test_maps_are_what_transformers_gives_when_asked(make):
    model, inputs = make("sdpa")
    sharpen(model)
    with torch.no_grad(), Recorder(model) as record:
        model(*inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        asked = model(*inputs, output_attentions=True).attentions
    for ours, theirs in zip(record.maps, asked, strict=True):
        torch.testing.assert_close(ours, theirs)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_afterwards():
    model = vit().eval()
    x = torch.randn(1, 3, 32, 32)
    with Recorder(model) as record:
        assert hooks(model) == 3
        model(x)
    assert hooks(model) == 0 and len(record.maps) == 3
    with pytest.raises(RuntimeError), record:
        model(torch.randn(1, 5, 32, 32))
    assert hooks(model) == 0 and record.maps == []
    model(x)
    assert record.maps == []


def test_no_map_at_all_is_an_error():
    model = vit().eval()
    with pytest.raises(BadParameter, match="none of them ran"), Recorder(model):
        model.patch_embed(torch.randn(1, 3, 32, 32))
    assert hooks(model) == 0


def test_layers_can_be_chosen():
    model = vit().eval()
    x = torch.randn(1, 3, 32, 32)

    def names(layers):
        with Recorder(model, layers=layers) as record:
            model(x)
        return record.names

    assert names([-1, 0]) == ["blocks.0.attn", "blocks.2.attn"]
    assert names(["*.1.*"]) == ["blocks.1.attn"]
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

    with Recorder(layer, also={Biased: read}) as record:
        layer(x)
    assert record.maps[0].shape == (1, 2, 5, 5)


def test_bf16_models_are_recorded():
    model = vit().eval().bfloat16()
    with torch.no_grad(), Recorder(model) as record:
        model(torch.randn(2, 3, 32, 32).bfloat16())
    model = vit().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Recorder(model) as autocast:
        model(torch.randn(2, 3, 32, 32))
    for attention in record.maps + autocast.maps:
        assert attention.dtype == torch.float32
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 17))


# ------------------------------------------------------------------------------------------------ from maps to numbers


def test_rollout_by_hand():
    first = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    second = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    maps = [torch.stack([first, first])[None], torch.stack([second, second])[None]]
    # (I + A)/2: [[.9, .1], [.2, .8]] and [[.75, .25], [0, 1]]; the second times the first
    expected = torch.tensor([[[0.725, 0.275], [0.2, 0.8]]])
    torch.testing.assert_close(figures.rollout(maps), expected)
    torch.testing.assert_close(figures.rollout(maps, residual=0.0), (second @ first)[None])
    torch.testing.assert_close(figures.rollout(maps, residual=1.0), torch.eye(2)[None])


def test_rollout_heads():
    heads = torch.tensor([[[0.8, 0.2], [0.5, 0.5]], [[0.4, 0.6], [0.9, 0.1]]])[None]
    largest = torch.tensor([[0.8 / 1.4, 0.6 / 1.4], [0.9 / 1.4, 0.5 / 1.4]])
    smallest = torch.tensor([[0.4 / 0.6, 0.2 / 0.6], [0.5 / 0.6, 0.1 / 0.6]])
    torch.testing.assert_close(figures.rollout([heads], residual=0, head="max")[0], largest)
    torch.testing.assert_close(figures.rollout([heads], residual=0, head="min")[0], smallest)
    with pytest.raises(BadParameter, match="median"):
        figures.rollout([heads], head="median")


def test_rollout_drops_prompts():
    plain = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    # a prompt between the two tokens takes half of each row: what is left, scaled up, is `plain` again
    prompted = torch.tensor([[0.25, 0.5, 0.25], [0.3, 0.3, 0.4], [0.125, 0.5, 0.375]])
    mixed = [plain[None, None], prompted[None, None]]
    expected = figures.rollout([plain[None, None]] * 2)
    torch.testing.assert_close(figures.rollout(mixed, drop=[(), (1,)]), expected)
    torch.testing.assert_close(figures.rollout([prompted[None, None]] * 2, drop=[1]), expected)
    torch.testing.assert_close(figures.rollout([prompted[None, None]] * 2, drop=range(1, 2)), expected)
    torch.testing.assert_close(figures.rollout([prompted[None, None]] * 2, drop=[-2]), expected)
    for drop in ((), [(), (), ()]):
        with pytest.raises(BadParameter, match="drop"):
            figures.rollout(mixed, drop=drop)


def test_rollout_rows_sum_to_one():
    maps = [torch.randn(3, 4, 11, 11).softmax(-1) for _ in range(5)]
    for head in ("mean", "max", "min"):
        joined = figures.rollout(maps, 0.3, head, drop=[2, 5])
        assert joined.shape == (3, 9, 9)
        torch.testing.assert_close(joined.sum(-1), torch.ones(3, 9))


def test_class_token_map_skips_prompts():
    row = torch.tensor([9.0, 7, 8, 0, 1, 2, 3, 4, 5])  # class, two prompts, 2 x 3 patches
    attention = row.expand(1, 2, 9, 9)
    expected = torch.arange(6.0).view(1, 2, 3)
    assert torch.equal(figures.class_token_map(attention, (2, 3), skip=2), expected)
    assert torch.equal(figures.class_token_map(attention[:, 0], (2, 3), skip=2), expected)
    at_the_end = row.roll(-2)[[7 - 0, *range(1, 7), 0, 8]].expand(1, 1, 9, 9)
    assert torch.equal(figures.class_token_map(at_the_end, (2, 3), skip=(-1, -2)), expected)
    with pytest.raises(BadParameter, match="8 are left, and the grid 2 x 3 has 6"):
        figures.class_token_map(attention, (2, 3))


def test_token_pca_shares_one_basis():
    # three directions of decreasing spread, hidden in 16 channels: the colours are these coordinates
    coordinates = torch.randn(2, 12, 3) * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(16, 3)).Q
    colours = figures.token_pca(coordinates @ basis.T + 4, (3, 4))
    assert colours.shape == (2, 3, 4, 3) and colours.min() == 0 and colours.max() == 1
    # PCA mixes them a little, as a small sample is not quite uncorrelated
    first = np.corrcoef(colours[..., 0].ravel(), coordinates[..., 0].ravel())[0, 1]
    assert abs(first) > 0.97
    assert figures.token_pca(coordinates[0] @ basis.T, (3, 4)).shape == (3, 4, 3)
    with pytest.raises(BadParameter, match="13"):
        figures.token_pca(torch.randn(2, 13, 8), (3, 4))


class Locator(nn.Module):
    """Class c is scored by channel c of the attended patch tokens: its Grad-CAM is known."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Identity()

    def forward(self, tokens):
        return self.embed(tokens)[:, 1:].sum(1)


def test_grad_cam_by_hand():
    tokens = torch.zeros(2, 5, 3)
    tokens[0, 1, 0], tokens[0, 2, 0], tokens[0, 3, 1], tokens[1, 4, 1] = 2.0, 4.0, 1.0, -3.0
    model = Locator()
    cam = figures.grad_cam(model, model.embed, tokens, 0, (2, 2))
    assert torch.equal(cam, torch.tensor([[[0.5, 1.0], [0, 0]], [[0, 0], [0, 0]]]))
    cam = figures.grad_cam(model, model.embed, tokens, torch.tensor([1, 0]), (2, 2))
    assert torch.equal(cam[0], torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    by_function = figures.grad_cam(model, model.embed, tokens, lambda logits: logits[:, 0], (2, 2))
    assert torch.equal(by_function, figures.grad_cam(model, model.embed, tokens, 0, (2, 2)))


def test_grad_cam_leaves_the_model_alone():
    model = vit().eval()
    model.requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        cam = figures.grad_cam(model, model.blocks[-1].norm1, x, 3, (4, 4))
    assert cam.shape == (2, 4, 4) and cam.min() >= 0 and cam.max() == 1
    assert hooks(model) == 0 and all(p.grad is None for p in model.parameters())
    with pytest.raises(BadParameter, match="earlier"):
        figures.grad_cam(model, model.norm, x, 3, (4, 4))  # only the class token goes on from here
    with pytest.raises(BadParameter, match="16 tokens; 17"):
        figures.grad_cam(model, model.blocks[-1].norm1, x, 3, (4, 4), skip=0)
    swin, (images,) = timm_swin()
    swin.eval()
    assert figures.grad_cam(swin, swin.layers[-1].blocks[-1].norm1, images, 1, (14, 14)).shape == (2, 14, 14)


# ------------------------------------------------------------------------------------------------------------- pictures


def photographs(number, size=224):
    names = ["astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry"]
    arrays = [skimage.transform.resize(getattr(skimage.data, n)(), (size, size), anti_aliasing=True) for n in names]
    images = torch.tensor(np.stack(arrays[:number]), dtype=torch.float32).permute(0, 3, 1, 2)
    return (images - 0.5) / 0.5


HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
METHODS = [
    "Linear probing",
    "Full fine-tuning",
    "VPT-Shallow",
    "VPT-Deep",
    "SA²VP (aligned)",
    "SA²VP, global attention",
]
TASKS = ["CIFAR-100", "Oxford-IIIT Pets", "CLEVR distance", "dSprites orientation", "Diabetic Retinopathy", "where"]


def table(tasks=TASKS, methods=METHODS):
    rng = np.random.default_rng(0)
    values = pd.DataFrame(rng.uniform(5, 100, (len(tasks), len(methods))), index=tasks, columns=methods)
    return values, pd.DataFrame(rng.uniform(0.2, 8, values.shape), index=tasks, columns=methods)


def histories(methods=METHODS, seeds=3):
    rng = np.random.default_rng(0)
    return {
        m: {
            "training loss": np.exp(-np.linspace(0, 3, 20)) + rng.uniform(0, 0.2, (seeds, 20)),
            "validation accuracy (%)": 90 - 60 * np.exp(-np.linspace(0, 3, 20)) + rng.uniform(0, 5, (seeds, 20)),
        }
        for m in methods
    }


def grid_figure():
    images = photographs(5)
    rows = {name: torch.rand(5, 14, 14) ** 3 for name in ("Linear probing", "VPT-Deep", "SA²VP")}
    titles = ["astronaut", "tabby cat", "a cup of coffee", "rocket on its pad", "retina, left eye"]
    return figures.attention_grid(images, rows, titles, **HALF)


HOUSE_FIGURES = {
    "grid": grid_figure,
    "grid, shared": lambda: figures.attention_grid(
        photographs(2), {"Rollout, last layer": torch.rand(2, 14, 14) / 196}, shared=True, mode="nearest", **HALF
    ),
    "images": lambda: figures.show_images(
        photographs(6), ["true: tabby cat, predicted: Egyptian cat"] * 6, columns=3, **HALF
    ),
    "small images": lambda: figures.show_images(photographs(6, 32), [f"class {i}" for i in range(6)], **HALF),
    "bars": lambda: figures.bars(*table()),
    "bars of one method": lambda: figures.bars(table(methods=["SA²VP"])[0]),
    "bars of a benchmark": lambda: figures.bars(*table([f"{t} {i}" for i in range(3) for t in TASKS], METHODS[:4])),
    "curves": lambda: figures.curves(histories()),
    "rates": lambda: figures.rates(
        {
            "centre error (pixels)": {m: (np.arange(51), np.linspace(0, 1, 51)) for m in METHODS},
            "overlap (IoU)": {m: (np.linspace(0, 1, 21), np.linspace(1, 0, 21)) for m in METHODS},
        },
        dict.fromkeys(METHODS, "99.9 / 88.8"),
    ),
    "radar": lambda: figures.radar(
        {name: {f"A{i}": 50 + 2.0 * i for i in range(count)} for name, count in (("LasHeR", 19), ("RGBT234", 12))},
        30,
        90,
    ),
    "curves of one method": lambda: figures.curves({"SA²VP": {"loss": [3.0, 2, 1]}}),
}


@pytest.mark.parametrize("name", HOUSE_FIGURES)
def test_house_figures_are_legible_and_small(name):
    figure = HOUSE_FIGURES[name]()
    assert isinstance(figure, plt.Figure)
    assert figures.overlapping_text(figure) == []
    for text in figures.visible_texts(figure):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
        assert text.get_fontsize() >= 8  # 11 pixels at 100 dpi
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert len(file.getvalue()) <= 300_000
    assert figure.dpi == 100


def test_overlapping_text_finds_overlaps():
    figure, ax = plt.subplots()
    ax.text(0.5, 0.5, "one")
    ax.text(0.51, 0.5, "two")
    assert figures.overlapping_text(figure) == [("one", "two")]


def test_style_stays_inside():
    before = dict(plt.rcParams)
    figures.curves({"a": {"loss": [1, 2]}})
    assert dict(plt.rcParams) == before
    with figures.style():
        assert plt.rcParams["axes.spines.top"] is False
    assert dict(plt.rcParams) == before


def test_colours_differ_for_colour_blind_readers():
    """Simulated deuteranopia (Machado et al. 2009, severity 1): every two colours stay apart."""
    deuteranopia = np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    )
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in figures.COLOURS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ deuteranopia.T, 0, 1)
    lab = skimage.color.xyz2lab(
        skimage.color.rgb2xyz(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    )
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(lab), 1)]
    assert apart.min() > 10


def test_denormalise_and_overlay_show_the_numbers():
    image = torch.rand(3, 20, 30)
    normalised = (image - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    shown = figures.denormalise(normalised, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    np.testing.assert_allclose(shown, image.permute(1, 2, 0).numpy(), atol=1e-6)
    _, ax = plt.subplots()
    heat = torch.arange(6.0).view(2, 3)
    drawn = figures.overlay(ax, image, heat, mode="nearest")
    np.testing.assert_array_equal(drawn.get_array(), heat.numpy())
    assert drawn.get_extent() == [-0.5, 29.5, 19.5, -0.5] and drawn.get_clim() == (0, 5)
    assert figures.overlay(ax, image, heat, limits=(0, 10)).get_clim() == (0, 10)
    with pytest.raises(BadParameter, match="bicubic"):
        figures.overlay(ax, image, heat, mode="bicubic")


def test_bars_and_curves_show_the_numbers():
    values, spread = table(TASKS[:2], METHODS[:2])
    values.iloc[0, 1] = math.nan
    figure = figures.bars(values, spread)
    texts = {t.get_text() for t in figure.axes[0].texts}
    expected = {f"{values.iloc[i, j]:.1f} ± {spread.iloc[i, j]:.1f}" for i, j in ((0, 0), (1, 0), (1, 1))}
    assert texts == expected
    with pytest.raises(BadParameter):
        figures.bars(values, spread.iloc[:1])
    frame = pd.DataFrame({"epoch": [2, 4, 6], "loss": [3.0, 2.0, 1.0]})
    (line,) = figures.curves({"SA²VP": frame}).axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[2, 3], [4, 2], [6, 1]])
    runs = np.array([[1.0, 2.0], [3.0, 6.0]])
    ax = figures.curves({"SA²VP": {"loss": runs}}).axes[0]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2, 4])
    with pytest.raises(BadParameter):
        figures.curves({"SA²VP": {}})


def test_boxes_stand_where_they_should():
    image = np.zeros((20, 30, 3), np.uint8)
    drawn = figures.boxed(image, {"white": (4, 5, 10, 8), "red": (6, 7, 4, 4)}, scale=2)
    assert drawn.shape == (40, 60, 3)
    rows, columns = np.nonzero((drawn == 255).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 26, 8, 28)
    red = (drawn == (255, 0, 0)).all(-1)
    assert red[14, 12] and not red[18, 16]
    ax = plt.subplots()[1]
    figures.boxes(ax, image, {"white": (4, 5, 10, 8)})
    assert ax.patches[0].get_bbox().bounds == (3.5, 4.5, 10, 8)
    assert ax.get_xlim() == (-0.5, 29.5) and ax.get_ylim() == (19.5, -0.5)


def test_radar_closes_its_line():
    figure = figures.radar({"x": {"a": 10.0, "b": 20.0, "c": 30.0}}, 0, 40)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [10, 20, 30, 10]


def test_wrong_numbers_of_pictures_are_told():
    images = torch.rand(3, 3, 8, 8)
    with pytest.raises(BadParameter, match="2 titles"):
        figures.show_images(images, ["a", "b"])
    with pytest.raises(BadParameter, match="VPT: 2 maps"):
        figures.attention_grid(images, {"VPT": torch.rand(2, 4, 4)})


def test_tsne_keeps_clusters_apart_and_repeats():
    centres = torch.eye(3, 8) * 20
    labels = torch.arange(60) % 3
    features = centres[labels] + torch.randn(60, 8)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    places = figures.tsne(features, labels, axes[0], seed=1, names=["disc", "cross", "bar"])
    again = figures.tsne(features, labels, axes[1], seed=1)
    np.testing.assert_array_equal(places, again)
    means = np.stack([places[labels == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(places[:, None] - means, axis=-1).argmin(1)
    np.testing.assert_array_equal(nearest, labels.numpy())
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["disc", "cross", "bar"]
    assert figures.overlapping_text(figure) == []
