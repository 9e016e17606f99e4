"""MetaSegNet: the network and its unimodal version, texts, losses, augmentation, sliding windows."""

import math
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertModel

from companion import climate
from companion.backbones import read_state
from companion.errors import BadCheckpoint, BadParameter
from companion.evaluation.metrics import landcover
from companion.evaluation.parity import Case, folder
from companion.evaluation.tables import published_table
from companion.models.metasegnet import model as metasegnet
from companion.models.metasegnet.model import Decoder, Fusion, MetaSegNet, bands, joint_loss, views
from companion.models.metasegnet.text import BertText, ClipText, Words, headless
from companion.ops.papers import paper
from companion.training.checkpoints import trained_state
from companion.training.fit import CPU, fit
from companion.training.schedules import adamw
from tests.models.common import assert_recomputed_gradients_are_equal, gflop, misfits, numbers, refuses

TEXTS = ["bare land is pale sand", "bare land is red laterite; towns use clay tiles"]
CLASSES = 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(**options):
    torch.manual_seed(1)
    return Words.of(TEXTS, **options)


def build(encoder=None, **options):
    torch.manual_seed(0)
    return MetaSegNet.build(CLASSES, encoder, "pocket", **options).eval()


def settled(model):
    """The same network with norms that are not the identity, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * draw(module.num_features))
            module.running_var.copy_(1 + draw(module.num_features, seed=1).abs())
    return model


@pytest.mark.parametrize("classes", [6, 7, 8])
def test_the_largest_network_has_the_size_of_the_authors(classes):
    with torch.device("meta"):
        model, ours = MetaSegNet.build(classes), full_size(classes)
    counts, found = ({n: numbers(part) for n, part in one.named_children()} for one in (model, ours))
    assert counts["encoder"] + counts["norms"] == 86_745_016
    assert counts["decoder"] == 9_233_462 + 256 * (classes - 6)
    assert sum(counts.values()) == 95_978_478 + 256 * (classes - 6)
    if classes == 8:  # as in the table
        counted = [sum(counts.values()) + found["fusions"], 86_745_016, counts["decoder"], found["fusions"]]
        assert published_table("metasegnet", "counts").set_index("method").iloc[-1].tolist() == counted
    shared = {n: t.shape for n, t in ours.state_dict().items() if not n.startswith(("text.", "fusions."))}
    assert shared == {n: t.shape for n, t in model.state_dict().items()}, "the twin is the same network without text"


def full_size(classes=8):
    """The reconstruction at full size, on no memory: Swin-B, states as wide and as many as BERT's."""
    with torch.device("meta"):
        return MetaSegNet.build(classes, Words(["a"], width=768, length=128, layers=0)).eval()


def test_unetformer_has_the_size_of_the_authors():
    with torch.device("meta"):
        encoder = timm.create_model("resnet18", num_classes=0)
        model = MetaSegNet(encoder, 6, norms=False, width=64, heads=8, decoder="unetformer")
    parts = model.encoder, model.decoder, model.decoder.auxiliary
    assert [numbers(part) for part in parts] == [11_176_512, 548_382, 37_376]
    for c, d in ((64, 48), (256, 48)):  # the formula of a fusion
        assert numbers(Fusion(c, d, 4)) == 2 * c**2 + 2 * c * d + 4 * c + 4 * c + 4 * c**2 + 3 * c + 2


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 37), (32, 96), (9, 5)])
def test_logits_of_any_size_lie_where_the_image_does(height, width):
    """A change in one corner of one image changes the logits most in that quarter, and no other image's."""
    model, x = settled(build(text())), draw(2, 3, height, width)
    with torch.no_grad():
        before, whole = model(x, TEXTS), F.pad(x, (0, -width % 4, 0, -height % 4))  # with zeros below and right
        assert all(torch.equal(a, b) for a, b in zip(model.maps(x), model.maps(whole), strict=True))
        assert before.shape == (2, CLASSES, height, width)
        for bottom in (0, 1):
            for right in (0, 1):
                changed = x.clone()
                changed[0, :, -4 if bottom else 0 :, -4 if right else 0 :][:, :4, :4] += 5
                difference = (model(changed, TEXTS) - before).abs().sum(1)
                row, column = divmod(int(difference[0].argmax()), width)
                assert difference[0].max() > 1e-3 and not difference[1].any()
                if height > 32:  # more than one window of the coarsest map
                    assert (row >= height / 2, column >= width / 2) == (bottom, right)


def test_padding_of_width_is_that_of_height():
    """The released decoder cannot mirror columns; turned by 90 degrees, ours does to columns what it does to rows."""
    block = settled(metasegnet.Block(16, 4, 4, "ft_unetformer")).eval()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):  # kernels that look the same along both axes
            module.weight.data = (module.weight.data + module.weight.data.mT) / 2
    table = block.attention.table.data.view(7, 7, 4)
    block.attention.table.data = ((table + table.transpose(0, 1)) / 2).reshape(49, 4)
    x = draw(1, 16, 10, 8)
    torch.testing.assert_close(block(x.mT).mT, block(x), rtol=1e-4, atol=1e-5)


def test_zero_init_is_the_twin_for_any_text():
    model, twin = settled(build(text(), zero_init=True)), settled(build())
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if n in twin.state_dict()})
    x = draw(2, 3, 64, 64)
    for texts in (TEXTS, [TEXTS[1]], ["towns", ""]):
        torch.testing.assert_close(model(x, texts), twin(x), rtol=1e-4, atol=1e-6)
    assert not torch.equal(settled(build(text()))(x, TEXTS), settled(build(text()))(x, TEXTS[::-1]))


def test_padding_of_a_text_changes_nothing():
    model = settled(build(text()))
    x, ids = draw(2, 3, 64, 64), model.text.ids(TEXTS)
    n = int(model.text.mask(ids).sum(1).max())
    torch.testing.assert_close(model(x, ids[:, :n]), model(x, ids), rtol=1e-4, atol=1e-5)
    states, mask = model.text(ids), model.text.mask(ids)
    junk = states.where(mask[..., None], 100.0)  # what stands in the padding is not looked at
    for a, b in zip(*(model.fusions["2"](draw(2, 48, 8, 8), s, mask, True) for s in (states, junk)), strict=True):
        torch.testing.assert_close(a, b)


def test_pairs_keep_together():
    model = settled(build(text()))
    x = draw(2, 3, 64, 64)
    out = model(x, TEXTS)
    torch.testing.assert_close(model(x.flip(0), TEXTS[::-1]).flip(0), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x[1:], TEXTS[1:]), out[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x, [TEXTS[0]])[:1], out[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x, model.text.ids(TEXTS)), out)


def test_attention_on_request():
    model = settled(build(text(), fusion_stages=(1, 3)))
    x, trace = draw(2, 3, 64, 64), {}
    torch.testing.assert_close(model(x, TEXTS, trace), model(x, TEXTS))
    mask = model.text.mask(model.text.ids(TEXTS))
    assert {k: a.shape[1:3] for k, a in trace["attention"].items()} == {1: (16, 16), 3: (4, 4)}
    for a in trace["attention"].values():
        torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1]))
        assert a.sum((1, 2))[~mask].eq(0).all() and a.sum((1, 2))[mask].gt(0).all()
    same = [torch.equal(a, b) for a, b in zip(trace["maps"], trace["fused"], strict=True)]
    assert same == [False, True, False, True]


def test_fusion_is_the_formula():
    fusion = Fusion(8, 6, 2)
    fusion.gates.data = torch.tensor([0.7, 0.3])
    x, words, mask = draw(1, 8, 2, 3), draw(1, 5, 6), torch.tensor([[True, True, True, False, False]])
    tokens, keep = x[0].flatten(1).T, words[0, :3]
    q, k, v = fusion.query(fusion.norm1(tokens)), fusion.key(keep), fusion.value(keep)
    heads = [slice(0, 4), slice(4, 8)]
    mixed = torch.cat([(q[:, h] @ k[:, h].T / 2).softmax(-1) @ v[:, h] for h in heads], -1)
    y = tokens + 0.7 * fusion.out(mixed)
    y = y + 0.3 * fusion.mlp(fusion.norm2(y))
    torch.testing.assert_close(fusion(x, words, mask)[0][0].flatten(1).T, y)


def test_the_maps_of_other_timm_encoders_are_those_of_timms_feature_extractor():
    for name, norms in (("resnet10t", False), ("convnext_atto", True)):
        encoder, x = timm.create_model(name, pretrained=False, num_classes=0).eval(), draw(1, 3, 64, 48)
        model = MetaSegNet(encoder, 3, text(), norms=norms, width=16, heads=2, window=2, fusion_heads=4).eval()
        theirs = timm.create_model(name, pretrained=False, features_only=True).eval()
        theirs.load_state_dict(
            {n.replace("stages.", "stages_").replace("stem.", "stem_"): t for n, t in encoder.state_dict().items()},
            strict=False,
        )
        maps = model.maps(x)
        for found, expected in zip(maps, theirs(x)[-4:], strict=True):
            expected = F.layer_norm(expected.movedim(1, -1), (expected.shape[1],)).movedim(-1, 1) if norms else expected
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert model(x, TEXTS[:1]).shape == (1, 3, 64, 48)


def test_a_callers_encoder_is_not_changed_and_can_be_checkpointed():
    encoder = timm.create_model("resnet10t", pretrained=False)
    before = encoder(draw(1, 3, 64, 64)).shape
    MetaSegNet(encoder, 3, norms=False, width=16, heads=2, window=2)
    assert encoder(draw(1, 3, 64, 64)).shape == before, "its head is still there"
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    assert_recomputed_gradients_are_equal(build, lambda model: model.loss(draw(2, 3, 32, 32), None, labels))


def test_swin_is_timms_where_maps_are_whole_windows():
    sizes = metasegnet.SIZES["pocket"]["swin"] | {"depths": (2, 2, 2, 2)}
    ours = metasegnet.swin(**sizes).eval()
    for p in ours.parameters():  # weights of a size that lets a difference through
        p.data += 0.2 * draw(*p.shape)
    options = {"num_classes": 0, "always_partition": True, "strict_img_size": False}
    theirs = timm.models.swin_transformer.SwinTransformer(**options, **sizes).eval()
    theirs.load_state_dict(ours.state_dict())
    x = draw(1, 3, 128, 128)
    torch.testing.assert_close(ours(x), theirs(x))
    x = draw(1, 3, 96, 96)  # 24, 12, 6 and 3 tokens a side: the last two are padded
    assert not torch.allclose(ours(x), theirs(x), atol=1e-4)


def test_words():
    encoder = text(width=16, length=12)
    assert encoder.words("Bare land: SNOW") == ["bare", "land", Words.UNKNOWN]
    ids = encoder.ids(["", "sand", "Sand!"])
    assert ids[0].tolist() == [1] + [0] * 11 and torch.equal(ids[1], ids[2])
    assert encoder.mask(ids).sum(1).tolist() == [1, 1, 1]
    refuses(
        (lambda: encoder.ids(["sand " * 13]), "at most 12"),
        (lambda: encoder.ids("abc"), "texts"),
        (lambda: encoder.ids([1, 2]), "texts"),
        (lambda: Words("abc"), "vocabulary"),
        (lambda: Words([]), "vocabulary"),
        (lambda: Words(["a", "a"]), "vocabulary"),
    )
    zones = Words(["cfa", "bwh"], layers=0).eval()  # a one-hot zone
    found = zones(zones.ids(["Cfa", "BWh", "Cfa"]))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0, 0], found[1, 0])


def tiny_clip():
    torch.manual_seed(3)
    vision = CLIPVisionCfg(1, width=32, head_width=16, patch_size=16, image_size=32)
    return CLIP(16, vision, CLIPTextCfg(12, 64, width=32, heads=2, layers=2)).eval()


class ClipTokens:
    """Ids as CLIP's tokenizer makes them: start, words, end, zeros."""

    def __call__(self, texts):
        rows = [[62, *[1 + len(word) for word in t.split()], 63] for t in texts]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows])

    def decode(self, ids):
        return f" w{ids[0]} "


def test_clip_is_frozen_and_its_states_are_its_own():
    clip = tiny_clip()
    encoder = ClipText(clip, ClipTokens())
    ids = encoder.ids(["a bb", "ccc"])
    states = encoder(ids)
    assert states.shape == (2, 12, 32) and encoder.mask(ids).sum(1).tolist() == [4, 3]
    assert encoder.words("a bb") == ["w62", "w2", "w3", "w63"]
    with torch.no_grad():  # CLIP's own pooling of our states
        pooled = states[torch.arange(2), ids.argmax(1)] @ clip.text_projection
        torch.testing.assert_close(pooled, clip.encode_text(ids))
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(p.requires_grad for p in clip.parameters()), "the caller's CLIP is not changed"


def test_clips_own_tokenizer_holds_every_text_of_a_zone():
    torch.manual_seed(0)
    vision = CLIPVisionCfg(1, width=32, head_width=16, patch_size=16, image_size=32)
    clip = CLIP(16, vision, CLIPTextCfg(77, 49408, width=32, heads=2, layers=1))
    encoder, prompts = ClipText(clip, open_clip.get_tokenizer("ViT-B-16")), climate.Prompts.read()
    assert encoder.words("bare soil!") == ["<start_of_text>", "bare", "soil", "!", "<end_of_text>"]
    texts = prompts.texts(list(prompts.zones))
    assert encoder.mask(encoder.ids(texts)).sum(1).max() < 77  # none is truncated


class BertTokens:
    pad_token_id = 0

    def __call__(self, texts, max_length, **_):
        rows = [[1, *[2 + len(word) for word in t.split()], 2] for t in texts]
        return {"input_ids": torch.tensor([row + [0] * (max_length - len(row)) for row in rows])}

    def convert_ids_to_tokens(self, ids):
        return [f"t{i}" for i in ids]


def test_frozen_texts_are_encoded_once():
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**shape, intermediate_size=32), add_pooling_layer=False)
    encoder, rows = BertText(bert, BertTokens(), 10), []
    count = lambda _, args, kwargs: rows.append(len(kwargs["input_ids"]))  # noqa: E731
    encoder.model.register_forward_pre_hook(count, with_kwargs=True)
    model = build(encoder).train()
    assert bert.training and not encoder.model.training and model.training
    assert all(t.requires_grad for t in bert.parameters()), "the caller's model is not changed"
    x = draw(3, 3, 32, 32)
    model(x, ["a bb", "ccc", "a bb"])
    model(x, ["ccc", "d", "a bb"])
    assert rows == [2, 1]
    assert encoder.words("a bb") == ["t1", "t3", "t4", "t2"]
    first = encoder(encoder.ids(["ccc"]))
    encoder.load_state_dict({n: t + 0.1 for n, t in encoder.state_dict().items()})
    assert not torch.allclose(encoder(encoder.ids(["ccc"])), first)
    assert not any(name.startswith("text.") for name in model.trained())


def test_gradients_reach_what_is_trained_and_nothing_else():
    model = build(ClipText(tiny_clip(), ClipTokens())).train()
    model.loss(draw(2, 3, 64, 64), ["a bb", "ccc"], torch.randint(0, CLASSES + 1, (2, 64, 64))).backward()
    trained = model.trained()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)


def test_the_auxiliary_head_counts_in_training_only():
    model = build(decoder="unetformer")
    x, labels = draw(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64))
    with torch.no_grad():
        trace = {}
        logits = model(x, trace=trace)
        assert trace["auxiliary"].shape == logits.shape
        assert torch.equal(model.loss(x, None, labels), joint_loss(logits, labels, CLASSES))
    model.train().loss(x, None, labels).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_soft_cross_entropy_and_dice():
    logits, labels = draw(2, 4, 6, 5), torch.randint(0, 3, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    labels[0, :2] = 4
    valid = (labels != 4).float().mean()
    expected = F.cross_entropy(logits, labels, ignore_index=4, label_smoothing=0.05) * valid
    torch.testing.assert_close(metasegnet.soft_cross_entropy(logits, labels, 4), expected)
    assert metasegnet.dice_loss(logits, torch.full_like(labels, 4), 4) == 0  # nothing to find, nothing to lose
    perfect = 100.0 * F.one_hot(labels.clamp_max(3), 5)[..., :4].movedim(-1, 1)
    assert metasegnet.dice_loss(perfect, labels, 4) < 1e-6
    # over the whole batch: class 0 has 6 pixels, 4 of them found and nothing else; class 1 has 2, which are 2 of 3
    truth, shown = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 0]]]), torch.tensor([[[0, 1, 1, 1]], [[0, 0, 0, 2]]])
    found = metasegnet.dice_loss(100.0 * F.one_hot(shown, 3).movedim(-1, 1), truth, 3)
    expected = [1 - 8.05 / 10.05, 1 - 4.05 / 5.05, 0]  # and class 2 is nowhere: its false alarm costs nothing here
    assert found.item() == pytest.approx(sum(expected) / 3)
    moved = logits.clone()
    moved[0, :, :2] += draw(4, 2, 5)  # where the label is to be ignored
    for loss in (metasegnet.dice_loss, metasegnet.soft_cross_entropy):
        assert torch.equal(loss(moved, labels, 4), loss(logits, labels, 4))


def test_training_is_kept_in_a_file(tmp_path):
    model, encoder = build(text()), text()
    ids = encoder.ids([TEXTS[i % 2] for i in range(8)])
    data = TensorDataset(draw(8, 3, 32, 32), ids, torch.randint(0, CLASSES, (8, 32, 32)))
    history = fit(model, lambda m, b: m.loss(*b), data, epochs=4, batch=4, optimizer=adamw(0.003), hardware=CPU)
    assert history[-1]["loss"] < history[0]["loss"]
    torch.save(trained_state(model), tmp_path / "model.pt")
    again = build(text())
    again.load_state_dict(read_state(tmp_path / "model.pt"), strict=True)
    x = draw(2, 3, 32, 32)
    assert torch.equal(again.eval()(x, TEXTS), model.eval()(x, TEXTS))


def test_official_names_round_trip():
    state = build().to_official()
    names = {f"decoder.{n}" for n in Case(folder() / "metasegnet" / "decoder_ft_swin_b").names}
    assert {n for n in state if n.startswith("decoder.")} == names
    counters = {"backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(4)}
    model = MetaSegNet.from_official(state | counters)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in build().state_dict().items()}
    assert all(torch.equal(t, state[n]) for n, t in model.to_official().items())
    multimodal = MetaSegNet.from_official(state, text(), fusion_heads=4, zero_init=True)
    x = draw(1, 3, 64, 64)
    torch.testing.assert_close(multimodal(x, TEXTS[:1]), model(x), rtol=1e-4, atol=1e-6)


def test_a_unetformer_on_a_resnet_loads_too():
    encoder = timm.create_model("resnet18", num_classes=0)
    options = {"norms": False, "width": 16, "heads": 2, "decoder": "unetformer"}
    state = MetaSegNet(encoder, 5, **options).to_official()
    model = MetaSegNet.from_official(state)
    assert model.decoder.auxiliary is not None and all(torch.equal(t, state[n]) for n, t in model.to_official().items())


def test_checkpoints_that_do_not_fit():
    state = build().to_official()
    decoder = {n: t for n, t in state.items() if n.startswith("decoder.")}
    state["typo"] = state.pop("decoder.p3.weights")
    state["backbone.norm0.bias"] = torch.zeros(5)
    missing, unknown, (shape,) = misfits(MetaSegNet.from_official, state)
    assert (missing, unknown) == (["decoder.p3.weights"], ["typo"]) and "backbone.norm0.bias (5,)" in shape
    refuses(
        (lambda: MetaSegNet.from_official({}), r"decoder\.pre_conv"),
        (lambda: MetaSegNet.from_official(decoder), r"backbone\.layers"),
        error=BadCheckpoint,
    )


def test_augmentation_of_what_does_not_mind_flips_is_nothing():
    assert [len(views(kind)) for kind in ("none", "lr", "d4", "d4 loveda")] == [1, 4, 16, 8]
    torch.manual_seed(0)
    pixelwise, x = nn.Conv2d(3, 4, 1), draw(2, 3, 24, 16)
    torch.testing.assert_close(metasegnet.augmented(pixelwise, x, "lr"), pixelwise(x))
    seen = []
    metasegnet.augmented(lambda x: seen.append(x.shape[-2:]) or pixelwise(x), x, "d4")
    assert {tuple(s) for s in seen} == {(18, 12), (24, 16), (30, 20), (36, 24)}


def test_an_image_that_fits_a_tile_is_predicted_whole():
    model = settled(build(text()))
    predict = lambda x: model(x, TEXTS[:1])  # noqa: E731
    for size in ((64, 64), (40, 64), (33, 21)):
        x = draw(3, *size)
        (band,) = bands(predict, x, tile=64, overlap=16)
        assert band.top == 0
        torch.testing.assert_close(band.logits, predict(x[None])[0].detach())


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((70, 45), 16, 5), ((16, 100), 16, 0), ((33, 33), 32, 31), ((9, 50), 16, 8)]
)
def test_tiles_of_a_local_network_give_the_whole_image(size, tile, overlap):
    torch.manual_seed(0)
    pixelwise, x = nn.Conv2d(3, 4, 1), draw(3, *size)
    found = list(bands(pixelwise, x, tile=tile, overlap=overlap, batch=3))
    tops = [band.top for band in found]
    assert tops == sorted(set(tops)) and tops[0] == 0
    logits = pixelwise(x[None])[0].detach()
    torch.testing.assert_close(torch.cat([band.logits for band in found], 1), logits)
    assert torch.equal(metasegnet.segment(pixelwise, x, tile=tile, overlap=overlap), logits.argmax(0).byte())


def test_blending_is_smooth_where_tiles_disagree():
    calls = iter(range(100))

    def predict(x):  # the first tile predicts 0, the next 1
        return torch.full((len(x), 1, *x.shape[-2:]), float(next(calls)))

    (band,) = bands(predict, torch.zeros(3, 8, 24), tile=16, overlap=8, batch=1)
    row = band.logits[0, 0]
    assert row[:8].eq(0).all() and row[16:].eq(1).all() and row.diff().min() >= 0 and row.diff().max() < 0.2


LARGE = """
import torch
from companion.ops import record  # getrusage would count the test process, which may be large
from companion.models.metasegnet import bands
plane = torch.randn(8, 3)
rows, before = 0, record.peak_memory_mb()
source = lambda top, left, height, width: torch.full((3, height, width), top / 6000)
predict = lambda x: torch.einsum("kc,bchw->bkhw", plane, x)
for band in bands(predict, source, (6000, 6000), tile=512, overlap=128):
    rows += band.logits.shape[1]
print(rows, before, record.peak_memory_mb())
"""


@pytest.mark.slow
def test_6000_pixels_a_side_are_segmented_in_less_than_2_gb():
    """A map of 8 classes of that size is 1.15 GB of logits: only the rows that further tiles overlap may be held."""
    result = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    rows, before, after = map(int, result.stdout.split())
    assert rows == 6000 and after < 2_000 and after - before < 8 * 6000 * 6000 * 4 / 1e6 / 2


def test_metrics_leave_out_and_nan():
    truth, predicted = torch.tensor([0, 0, 1, 9, 3, -1]), torch.tensor([0, 1, 1, 0, 0, 1])
    matrix = landcover.confusion(truth, predicted, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    found = landcover.scores(matrix)
    assert found.iou[:2].tolist() == [50, 50] and math.isnan(found.iou[2]) and found.miou == 50
    assert math.isclose(found.mf1, 200 / 3) and math.isclose(found.oa, 200 / 3)
    # a class that is left out of the means counts in the overall accuracy
    without = landcover.scores(matrix, [1, 2])
    assert without.miou == 50 and math.isclose(without.oa, 200 / 3)
    # GeoSeg's F1 has no value for a class that is missed or only predicted
    missed = torch.tensor([[2, 1, 0], [0, 0, 0], [1, 0, 0]])
    assert landcover.scores(missed).f1.tolist() == pytest.approx([200 / 3, 0, 0])
    found = landcover.scores(missed, undefined=True)
    assert found.f1.isnan().tolist() == [False, True, True] and found.mf1 == pytest.approx(200 / 3)
    with pytest.raises(BadParameter, match="left_out"):
        landcover.scores(matrix, [0, 1, 2])


def test_bad_options_and_calls():
    model, twin, x = build(text()), build(), draw(2, 3, 32, 32)

    def tiles(image=x[0], **options):
        return lambda: list(bands(twin, image, **{"tile": 16, "overlap": 4} | options))

    refuses(
        (lambda: build(text(), decoder="fpn"), "decoder"),
        (lambda: build(text(), heads=5), "heads"),
        (lambda: build(text(), window=3), "window"),
        (lambda: build(text(), fusion_heads=5), "fusion_heads"),
        (lambda: build(text(), fusion_stages=(0, 1)), "fusion_stages"),
        (lambda: MetaSegNet.build(CLASSES, text(), "huge"), "size"),
        (lambda: MetaSegNet(nn.Conv2d(3, 3, 1), 4), "encoder"),
        (lambda: Decoder([8, 8], 4), "four maps"),
        (lambda: Decoder([8] * 4, 1), "classes"),
        (lambda: twin(x[0]), "images"),
        (lambda: twin(x[:, :2]), "images"),
        (lambda: twin((x * 9).byte()), "images"),
        (lambda: twin(x, TEXTS), "no text"),
        (lambda: model(x), "a text for each"),
        (lambda: model(x, [*TEXTS, "a"]), "3 of them"),
        (tiles(overlap=16), "overlap"),
        (tiles(overlap=-1), "overlap"),
        (tiles(batch=0), "batch"),
        (tiles(lambda *_: x[0]), "size"),
        (lambda: ClipText(nn.Linear(2, 2), ClipTokens()), "clip"),
        (lambda: views("rotate"), "augmentation"),
    )


def test_the_claims_name_methods_and_tasks_and_means_of_quoted_rows_are_those_they_print():
    potsdam = published_table("metasegnet", "potsdam_secondhand").set_index("method")
    classes = ["ImpSurf", "Building", "LowVeg", "Tree", "Car"]
    assert ((potsdam[classes].mean(axis=1) - potsdam["mF1"]).abs() < 0.11).all()
    loveda = published_table("metasegnet", "loveda_secondhand").set_index("method")
    assert ((loveda.drop(columns="mIoU").mean(axis=1) - loveda["mIoU"]).abs() < 0.11).all()
    facts = paper("metasegnet")
    methods = {c[side] for c in facts["claims"] for side in ("better", "worse") if side in c}
    assert set(facts["parameters"]["method"]["choices"]) <= methods - {"wrong zone's text"}
    assert {task for c in facts["claims"] for task in c.get("tasks", [])} == {"seen", "left out"}


def test_the_cost_is_what_was_counted():
    model, words = full_size(), 128
    cost = published_table("metasegnet", "cost").set_index("method")
    with torch.device("meta"), torch.no_grad():
        maps = model.maps(torch.zeros(1, 3, 512, 512))
        encoder = gflop(lambda: model.maps(torch.zeros(1, 3, 512, 512)))
        decoder = gflop(lambda: model.decoder(maps, (512, 512)))
        text, mask = torch.zeros(1, words, 768), torch.ones(1, words, dtype=torch.bool)
        pairs = zip(model.fusions.values(), maps, strict=True)
        fusion = sum(gflop(lambda f=f, m=m: f(m, text, mask)) for f, m in pairs)
    found = [round(encoder + decoder + fusion, 1), round(encoder, 1), round(fusion, 1)]
    assert cost.iloc[1].tolist() == found
    assert cost.iloc[0].tolist()[:2] == [round(encoder + decoder, 1), round(encoder, 1)]


def test_a_text_without_its_header_keeps_its_description():
    prompts = climate.Prompts.read()
    text = prompts.text("Cfa")
    hidden = headless(text)
    assert hidden == "climate zone unknown, unknown unknown." + text.partition(".")[2]
    encoder = Words.of([text])
    ids, plain = encoder.ids([hidden])[0], encoder.ids([text])[0]
    changed = ids != plain
    assert changed.sum() == 3 and (ids[changed] == 1).all()  # code and name: the encoder's unknown word
    assert headless(prompts.text("Dfb", "name"), "[UNK]") == "climate zone [UNK], [UNK] [UNK] [UNK] [UNK] [UNK]"
    for text in (prompts.constant, prompts.unknown, ""):
        assert headless(text) == text
    # with the header away, zones of one description are one
    assert headless("climate zone BSh, hot steppe. dry.") == headless("climate zone BWh, hot desert. dry.")
