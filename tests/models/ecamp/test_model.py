"""ECAMP: counts, exact properties of the specification, gradients, variants, checkpoints, and errors of bad input."""

import copy

import pytest
import torch
from torch.nn import functional as F

from companion import backbones
from companion.errors import BadCheckpoint
from companion.models.ecamp import model as ecamp
from companion.models.ecamp.model import Batch
from tests.models.common import misfits, numbers, refuses


def pairs(count=2, size=32, words=40, length=20, patches=64, window=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, words, (count, length), generator=generator)
    labels[:, length - 4 :] = 0
    hidden = torch.rand(count, length, generator=generator) < 0.7
    side = round(patches**0.5)
    return Batch(
        images=torch.randn(count, 3, 2 * size, 2 * size, generator=generator),
        ids=torch.where(hidden & (labels > 0), 3, labels),
        labels=labels,
        attention=(labels > 0).long(),
        weights=0.5 + torch.rand(count, length, generator=generator),
        noise=torch.rand(count, patches, generator=generator),
        window=torch.randint(0, side - window + 1, (count, 2), generator=generator),
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ecamp.build("pocket").eval()


def test_parameters_and_sizes_are_the_released_ones():
    with torch.device("meta"):
        model, plain = ecamp.build("paper", pooler=True), ecamp.build("paper")
    assert numbers(model) == 183_425_240 and plain.text.pooler is None
    assert numbers(model, trained=True) == 183_173_080
    assert numbers(model.encoder) == 85_646_592 + 151_296 + 768
    assert numbers(model.decoder) == 13_398_784 + 100_864
    assert numbers(model.super_resolution) == 168
    assert numbers(model.project) == numbers(model.text.pooler) == 590_592
    text = [numbers(part) for part in (model.text.embeddings, model.text.fusion, model.text.layers, model.text.head)]
    assert text == [23_239_680, 7_681_536, 28_362_240, 23_662_128]
    assert (model.patches, int(model.patches * (1 - ecamp.MASKED)), model.window) == (196, 49, 12)
    assert model.text.embeddings.positions.num_embeddings == 256


def test_mim_loss_is_three_quarters_of_the_error_on_hidden_patches(model):
    batch, trace = pairs(3), {}
    losses = model(batch, trace)
    hidden = trace["hidden"].bool()
    assert hidden.sum(1).tolist() == [48, 48, 48] and trace["keep"].shape == (3, 16)
    target = ecamp.patchify(trace["low"], 4)
    torch.testing.assert_close(losses.mim, 0.75 * F.mse_loss(trace["pixels"][hidden], target[hidden]))
    assert losses.total == losses.mim + losses.sr + losses.mlm and all(x > 0 for x in losses)
    assert trace["super_resolved"].shape == (3, 3, 64, 64) and trace["super_resolved"].min() >= 0


def test_only_the_window_counts_and_its_corner_is_row_and_column(model):
    mask = ecamp.windows(torch.tensor([[2, 1]]), 12, 32, 448)[0, 0]
    assert mask[64, 32] == 1 and mask[63, 32] == 0 and mask[64, 31] == 0 and mask[447, 415] == 1 and mask[447, 416] == 0
    assert mask.mean() == pytest.approx((384 / 448) ** 2)
    batch, trace = pairs(1), {}
    before = model(batch, trace).sr
    inside = ecamp.windows(batch.window, 6, 8, 64)
    assert inside.sum() == 48 * 48
    changed = torch.where(inside.bool(), trace["super_resolved"] - 1, batch.images)
    assert ecamp.sr_loss(trace["super_resolved"], changed, inside).item() == pytest.approx(48**2 / 64**2)
    outside = torch.where(inside.bool(), batch.images, 7.0)
    assert ecamp.sr_loss(trace["super_resolved"], outside, inside) == before
    whole = ecamp.build("pocket", window=None)
    whole.load_state_dict(model.state_dict())
    assert whole.eval()(batch).sr == ecamp.sr_loss(trace["super_resolved"], batch.images) > before


def test_fusion_has_no_order_of_patches_and_equal_ones_give_one_context(model):
    fusion, there, trace = model.text.fusion, torch.ones(2, 1, 1, 20, dtype=torch.bool), {}
    x, z = torch.randn(2, 20, 96), torch.randn(2, 16, 96)
    torch.testing.assert_close(fusion(x, there, z), fusion(x, there, z[:, torch.randperm(16)]))
    fusion(x, there, z[:, :1].expand(-1, 16, -1), trace)
    torch.testing.assert_close(trace["context"], fusion.cross.value(z[:, :1]).expand(-1, 20, -1))


def test_encoder_does_not_depend_on_the_order_of_the_patches(model):
    images, order = torch.randn(2, 3, 32, 32), torch.rand(2, 64).argsort(1)
    raster, shuffled = model.forward_features(images), model.forward_features(images, order)
    torch.testing.assert_close(shuffled[:, 1:], raster[:, 1:].take_along_dim(order[..., None], 1))


def test_what_the_words_see_and_what_counts(model):
    batch, a, b, c = pairs(), {}, {}, {}
    loss = model(batch, a).mlm
    # every position counts in the loss
    torch.testing.assert_close(loss, (a["cross_entropy"] * batch.weights).sum() / batch.weights.numel())
    assert (a["cross_entropy"][batch.attention == 0] > 0).all()
    # padding is not read
    model(batch._replace(ids=torch.where(batch.attention == 0, 7, batch.ids)), b)
    there = batch.attention.bool()
    torch.testing.assert_close(a["logits"][there], b["logits"][there])
    # nor is the image's [CLS] token
    cls = (torch.arange(17) == 0)[:, None]
    with model.encoder.norm.register_forward_hook(lambda module, args, tokens: tokens + 5 * cls):
        model(batch, b)
    torch.testing.assert_close(a["logits"], b["logits"], rtol=0, atol=0)
    # the image comes through the fusion
    model(batch._replace(images=batch.images.flip(0)), c)
    assert torch.equal(a["embedded"], c["embedded"]) and (a["logits"] - c["logits"]).abs().max() > 1e-3


def test_attention_maps_are_shares_and_change_nothing(model):
    batch = pairs()
    torch.testing.assert_close(model(batch).mlm, model(batch, {}).mlm)
    maps = model.attention(ecamp.shrink(batch.images), batch.ids, batch.attention)
    assert maps.shape == (2, 4, 20, 64)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 20))
    # of two heads the one that attends more counts at each patch; fourth roots, from 0 to 1
    heads = torch.tensor([[0, 1 / 256, 16 / 256, 0], [1 / 256, 1 / 256, 0, 81 / 256]])
    torch.testing.assert_close(ecamp.heat(heads), torch.tensor([[0, 0], [0.5, 1.0]]))
    torch.testing.assert_close(ecamp.heat(heads, 4)[0::3, 0::3], ecamp.heat(heads))


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"text": False, "super_resolution": False}, {"sr", "mlm"}),
        ({"super_resolution": False}, {"sr"}),
        ({"text": False}, {"mlm"}),
        ({"fusion": "patch"}, set()),
        ({"fusion": "mean"}, set()),
        ({"fusion": "pooled", "super_resolution": False}, {"sr"}),
        ({"window": None}, set()),
        ({"predict": "high-res", "super_resolution": False, "fusion": "pooled"}, {"sr"}),
        ({"dropout": 0.1}, set()),
        ({"positions": "mae"}, set()),
    ],
)
def test_variants_train_all_they_have(options, absent):
    torch.manual_seed(0)
    model = ecamp.build("pocket", **options).train()
    losses = model(pairs())
    assert {n for n in ("mim", "sr", "mlm") if getattr(losses, n) == 0} == absent
    losses.total.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {"encoder.pos_embed", "decoder.pos_embed"}
    assert without == {n for n, p in model.named_parameters() if not p.requires_grad}


def test_initial_weights():
    torch.manual_seed(0)
    model = ecamp.build("pocket")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert not module.bias.any()
    assert not model.text.embeddings.words.weight[0].any()
    assert model.text.embeddings.words.weight.std().item() == pytest.approx(0.02, rel=0.1)
    kernel = model.encoder.patch_embed.proj.weight.detach()
    assert kernel.abs().max() <= (6 / (96 + 48)) ** 0.5 and kernel.std() > 0.1


def test_official_names_come_back(model):
    batch = pairs()
    state = model.to_official()
    again = ecamp.ECAMP.from_official(state, heads=4, decoder_heads=4, text_heads=4, window=6, dropout=0.0)
    assert again(batch).total == model(batch).total
    assert {n: t.shape for n, t in again.to_official().items()} == {n: t.shape for n, t in state.items()}
    assert state["bert_encoder.model.cls.predictions.bias"] is state["bert_encoder.model.cls.predictions.decoder.bias"]


def test_older_and_other_files_load(model):
    batch = pairs()
    options = {"heads": 4, "decoder_heads": 4, "text_heads": 4, "window": 6, "dropout": 0.0}
    older = {n.replace("context_fusion_layer", "cross_attn_layer"): t for n, t in model.to_official().items()}
    del older["bert_encoder.model.cls.predictions.decoder.bias"]  # older transformers store it once
    older["bert_encoder.model.bert.embeddings.position_ids"] = torch.arange(20)[None]
    assert ecamp.ECAMP.from_official(older, **options)(batch).total == model(batch).total
    with_pooler = ecamp.build("pocket", pooler=True)
    again = ecamp.ECAMP.from_official(with_pooler.to_official(), **options)
    assert torch.equal(again.text.pooler.weight, with_pooler.text.pooler.weight)
    # MRM: no fusion layer, no super-resolution, the decoder predicts the high resolution
    mrm = ecamp.build("pocket", predict="high-res", super_resolution=False, fusion="pooled", text_width=48).eval()
    again = ecamp.ECAMP.from_official(mrm.to_official(), **options)
    assert again.fusion == "pooled" and again.scale == 2 and again.super_resolution is None
    assert again(batch).total == mrm(batch).total


def test_a_checkpoint_that_does_not_fit_is_told_by_name(model):
    state = model.to_official()
    state["typo"] = state.pop("blocks.1.attn.qkv.bias")
    state["decoder_norm.weight"] = torch.ones(3)
    expected = ["blocks.1.attn.qkv.bias"], ["typo"], ["decoder_norm.weight (3,), expected (48,)"]
    assert misfits(ecamp.ECAMP.from_official, state, heads=4, decoder_heads=4, text_heads=4, window=6) == expected
    with pytest.raises(BadCheckpoint, match="decoder_pos_embed"):
        ecamp.ECAMP.from_official({"pos_embed": torch.zeros(1, 65, 96)})


def test_starts_from_mae(model):
    mae = {n: t + 1 for n, t in model.to_official().items() if not n.startswith(("bert", "super"))}
    mae |= {"decoder_blocks.7.norm1.weight": torch.ones(48)}  # MAE's decoder is deeper
    fresh = copy.deepcopy(model)
    filled = fresh.load_mae(mae)
    assert "encoder.pos_embed" in filled and "decoder.blocks.0.norm1.weight" in filled
    assert torch.equal(fresh.encoder.pos_embed, model.encoder.pos_embed + 1)
    assert all(torch.equal(a, b) for a, b in zip(fresh.text.parameters(), model.text.parameters(), strict=True))
    encoder_only = {n: t for n, t in mae.items() if not n.startswith(("decoder", "mask"))}
    assert all(n.startswith("encoder.") for n in copy.deepcopy(model).load_mae(encoder_only))
    del encoder_only["norm.bias"]
    with pytest.raises(BadCheckpoint, match=r"missing: norm\.bias"):
        model.load_mae(encoder_only)


def test_timm_mae_fits():
    """timm's release of MAE's ViT-B/16 has the encoder's names."""
    with torch.device("meta"):
        own = ecamp.build("paper").official_names().values()
        mae = backbones.timm.create_model("vit_base_patch16_224.mae", pretrained=False, num_classes=0).state_dict()
    assert {n for n in mae if not n.startswith("fc_norm")} <= set(own)


def test_bad_options_and_inputs(model):
    batch, longer = pairs(), {"ids": torch.zeros(2, 21, dtype=torch.long), "attention": torch.ones(2, 21)}
    other, image = ecamp.build("pocket", fusion="mean"), torch.zeros(1, 3, 32, 32)
    refuses(
        (lambda: ecamp.build("large"), "paper"),
        (lambda: ecamp.build("pocket", fusion="sum"), "both"),
        (lambda: ecamp.build("pocket", positions="sine"), "mae"),
        (lambda: ecamp.build("pocket", image=30), "multiple"),
        (lambda: ecamp.build("pocket", window=9), "1 to 8"),
        (lambda: ecamp.build("pocket", predict="high-res"), "super_resolution"),
        (lambda: ecamp.build("pocket", predict="both"), "low-res"),
        (lambda: ecamp.build("pocket", text_heads=5), "divisor"),
        (lambda: model(batch._replace(images=batch.images[..., :32, :32])), "side of 64"),
        (lambda: model(batch._replace(**longer)), "at most 20 words"),
        (lambda: other.attention(image, batch.ids[:1], batch.attention[:1]), "'patch'"),
    )
