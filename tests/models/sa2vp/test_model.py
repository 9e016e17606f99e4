"""SA²VP and VPT: what is trained, the formulas line by line, attention maps, loading."""

import pytest
import timm
import torch
from timm.layers import GluMlp
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch.nn import functional as F

from companion.errors import BadCheckpoint
from companion.models.layers.classifying import FineTuning, LinearProbe
from companion.models.sa2vp import SA2VP, SA2VPSwin, loss
from companion.models.sa2vp.baselines import VPT
from companion.models.sa2vp.model import neighbourhood
from companion.training.fit import fit
from companion.training.hardware import CPU
from companion.training.schedules import adamw
from companion.viz.attention import Recorder
from tests.models.common import BLOCKS, assert_recomputed_gradients_are_equal, draw, misfits, refuses
from tests.parity.runner import ROOT, Case

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def small_vit(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    settings = dict(img_size=(12, 28), patch_size=4, embed_dim=24, depth=6, num_heads=3, num_classes=0) | changes
    return VisionTransformer(**settings).eval()


def small_swin(**changes) -> SwinTransformer:
    torch.manual_seed(0)
    settings = dict(img_size=64, embed_dim=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 4, 8), window_size=2)
    return SwinTransformer(**settings | {"num_classes": 0} | changes).eval()


BACKBONES = {"ViT": (small_vit, draw(2, 3, 12, 28)), "Swin": (small_swin, draw(2, 3, 64, 64))}
either = pytest.mark.parametrize("name", list(BACKBONES))


def small(name: str = "ViT", **options) -> tuple[SA2VP | SA2VPSwin, torch.Tensor]:
    """A small model in eval mode, and two images for it."""
    backbone, images = BACKBONES[name]
    kind = SA2VP if name == "ViT" else SA2VPSwin
    return kind(backbone(), 5, 4, **options).eval(), images


@pytest.mark.parametrize("i", [0, 1])
def test_what_an_interaction_of_swin_adds_to_which_tokens(i):
    """The first of two blocks adds to the prompt tokens what they read from the image's, the second the other way."""
    model, images = small("Swin", scale=0.7)
    with torch.no_grad():
        for layer in model.adapters:  # trained ones: new adapters add nothing
            layer.up.weight.normal_()
        image, prompt = model.embed(images)
        (to_image, to_prompt), named = model.step(i, image, prompt)
        block, added = model.backbone.layers[model.stage].blocks[i], 0.7 * named["fusion"].view_as(image)
        assert added.abs().max() > 0.1
        torch.testing.assert_close(to_prompt, block(prompt) + (added if i == 0 else 0), **CLOSE)
        torch.testing.assert_close(to_image, block(image) + (added if i == 1 else 0), **CLOSE)


@either
def test_a_step_changes_everything_trained_and_nothing_frozen(name):
    model, x = small(name, dropout=0.0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    data = torch.utils.data.TensorDataset(x.repeat(2, 1, 1, 1), torch.tensor([0, 1, 2, 3]))
    fit(model, loss, data, epochs=3, batch=4, optimizer=adamw(1e-2), hardware=CPU)
    trained = set(model.trained())
    assert not any(n.startswith("backbone.") for n in trained)
    assert {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])} == trained


@pytest.mark.parametrize("kind", [SA2VP, SA2VPSwin, FineTuning, LinearProbe, VPT])
def test_the_backbone_of_the_caller_is_left_alone(kind):
    backbone = (small_swin() if kind is SA2VPSwin else small_vit()).train()
    model = kind(backbone, 5).eval()
    assert all(p.requires_grad for p in backbone.parameters()) and backbone.training and not model.backbone.training
    assert all(m.p == 0 for m in backbone.modules() if isinstance(m, torch.nn.Dropout))
    # what is trained has tensors of its own
    owned = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert owned and not owned & {p.data_ptr() for p in backbone.parameters()}


@either
@pytest.mark.parametrize("make", [FineTuning, LinearProbe, VPT, lambda b, c: VPT(b, c, deep=False)])
def test_baselines_train_their_head_and_only_fine_tuning_the_backbone(make, name):
    backbone, images = BACKBONES[name]
    model = make(backbone(), 5).train()
    F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    tuned = isinstance(model, FineTuning)
    assert any(p.grad is not None for p in model.backbone.parameters()) == tuned == model.backbone.training
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050"])
@pytest.mark.parametrize("make", [FineTuning, LinearProbe])
def test_heads_fit_backbones_whose_classifier_has_a_layer_of_its_own(make, name):
    backbone = timm.create_model(name, num_classes=0)
    assert make(backbone, 5)(torch.randn(2, 3, 224, 224)).shape == (2, 5)


def test_a_swin_without_whole_windows_is_named():
    swin = small_swin(strict_img_size=False)
    refuses((lambda: VPT(swin, 5)(torch.randn(1, 3, 48, 48)), "positions"))


@either
def test_without_fusion_the_image_pathway_is_the_frozen_backbone_and_no_image_informs_the_prompts(name):
    model, x = small(name, scale=0.0)
    image, prompt = (model.head(part) for part in model.forward_features(x))
    assert torch.equal(model(x), image)
    torch.testing.assert_close(image, model.head(model.backbone(x)), **CLOSE)
    torch.testing.assert_close(prompt[0], prompt[1], **CLOSE)
    model.scale = 1.5
    fused, informed = (model.head(part) for part in model.forward_features(x))
    assert (fused - image).abs().max() > 1e-3 and (informed[0] - informed[1]).abs().max() > 1e-4
    tokens, _ = model.forward_intermediates(x)
    assert tokens[0].shape == tokens[1].shape == (2, *((22, 24) if name == "ViT" else (16, 64)))


SWINS = [{"global_pool": "max"}, {"strict_img_size": False}, {"qkv_bias": False}, {"head_dim": 8}]


@pytest.mark.parametrize(
    ("name", "changes"), [*(("ViT", c) for c in BLOCKS if "scale_attn_norm" not in c), *(("Swin", c) for c in SWINS)]
)
def test_the_image_pathway_and_vpt_without_prompts_are_any_backbone(name, changes):
    make, x = BACKBONES[name]
    try:
        make(**changes)
    except AssertionError:
        pytest.skip("this release of timm has no such Swin")
    for model in (SA2VP if name == "ViT" else SA2VPSwin)(make(**changes), 5, 4, scale=0.0), VPT(make(**changes), 5, 0):
        torch.testing.assert_close(model.eval()(x), model.head(model.backbone(x)), **CLOSE)


@either
@pytest.mark.parametrize("attention", ["aligned", "padded"])
def test_attention_maps_of_every_block_and_interaction_are_recorded(name, attention):
    model, x = small(name, attention=attention)
    with torch.no_grad(), Recorder(model) as record:
        model(x)
    cross = [m for kind, m in zip(record.names, record.maps, strict=True) if kind == "cross"]
    assert len(cross) == 6 and len(set(record.names)) == (7 if name == "ViT" else 10)
    outside = ~neighbourhood(model.grid, class_token=name == "ViT")
    for weights in cross:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights[..., : outside.shape[1]][..., outside[: weights.shape[2]]] == 0).all()


@either
def test_recomputed_gradients_are_equal(name):
    batch = BACKBONES[name][1], torch.tensor([0, 1])
    assert_recomputed_gradients_are_equal(lambda: small(name)[0], lambda m: loss(m, batch))


def test_dropout_draws_for_every_image():
    model = SA2VP(small_vit(), 5, 4, dropout=0.5).train()
    image, prompt = model(draw(1, 3, 12, 28).repeat(2, 1, 1, 1))
    assert not torch.equal(image[0], image[1]) and not torch.equal(prompt[0], prompt[1])


FORMS = [{"pre_norm": True}, {"no_embed_class": True}, {"reg_tokens": 2}, {"pos_embed": "none"}]
FORMS += [{"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}, {"dynamic_img_size": True}]


def test_backbones_of_another_form_are_refused_not_run_wrongly():
    """CLIP's ViTs have a norm before the blocks, DeiT-III's no position for the [CLS] token, ..."""
    vits = [small_vit(**changes) for changes in FORMS]
    own = [small_vit(block_fn=ResPostBlock), small_vit(mlp_layer=GluMlp)]
    own += [small_vit(**changes) for changes in BLOCKS if "scale_attn_norm" in changes]
    refuses(
        *((lambda kind=kind, vit=vit: kind(vit, 5), "VisionTransformer") for vit in vits for kind in (SA2VP, VPT)),
        *((lambda vit=vit: SA2VP(vit, 5), "VisionTransformer") for vit in own),
        (lambda: SA2VP(small_vit(depth=4), 5), "depth 4"),
        (lambda: SA2VP(small_vit(depth=3), 5), "depth 3"),
        (lambda: SA2VPSwin(small_swin(), 5, stage=1), "1 with 1 blocks"),
        (lambda: SA2VP(small_vit(), 5, attention="other"), "attention"),
        (lambda: SA2VP(small_vit(), 5, new_maps=3), "new_maps"),
        (lambda: SA2VPSwin(small_swin(), 5, stage=-2), "stage"),
        (lambda: VPT(small_swin(window_size=3), 5), r"\(16, 16\)"),
    )
    for vit in own:
        VPT(vit, 5)(BACKBONES["ViT"][1])


@either
@pytest.mark.parametrize("deep", [True, False])
def test_vpt_without_prompts_is_the_backbone(deep, name):
    backbone, images = BACKBONES[name]
    model = VPT(backbone(), 5, tokens=0, deep=deep).eval()
    torch.testing.assert_close(model(images), model.head(model.backbone(images)), **CLOSE)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_of_vpt_are_replaced_in_every_block_or_stay(deep):
    model, images = VPT(small_vit(), 5, tokens=3, deep=deep).eval(), BACKBONES["ViT"][1]
    vit = model.backbone
    x = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(images)], 1) + vit.pos_embed
    kept = model.prompts[0].expand(2, -1, -1)
    for i, block in enumerate(vit.blocks):
        y = block(torch.cat([x[:, :1], model.prompts[i].expand(2, -1, -1) if deep else kept, x[:, 1:]], 1))
        x, kept = torch.cat([y[:, :1], y[:, 4:]], 1), y[:, 1:4]
    torch.testing.assert_close(model(images), model.head(vit.norm(x[:, 0])), **CLOSE)


def test_frozen_copies_are_not_read_and_a_missing_third_of_a_tensor_is_named():
    official = dict(Case(ROOT / "sa2vp" / "tiny_vit_full").state)
    start = "vit_base.transformer.encoder."
    copy = {f"{start}cross_attn.2.attn.to_k.weight": official[f"{start}layer.2.attn.key.weight"]}
    SA2VP.from_official(official | copy, heads=3)
    refuses((lambda: SA2VP.from_official({"a": torch.zeros(1)}), "deep_ppt"), error=BadCheckpoint)
    third = f"{start}layer.3.attn.key.weight"
    del official[third]
    assert misfits(SA2VP.from_official, official, heads=3) == ([third], [], [])
