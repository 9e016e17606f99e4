"""MetaSegNet: the network and its unimodal version, texts, official names, tiles."""

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, BertTokenizer

from companion.evaluation.tables import published_table
from companion.models.metasegnet import bands, decoder, figures, segment
from companion.models.metasegnet.maps import augmented, reader
from companion.models.metasegnet.model import Fusion, MetaSegNet, loss, swin
from companion.models.metasegnet.text import BertText, Words
from companion.viz.attention import Recorder
from tests.models.common import EXCHANGES, assert_recomputed_gradients_are_equal, draw, numbers, refuses

TEXTS = ["bare land is pale sand", "bare land is red laterite; towns use clay tiles"]
CLASSES = 8
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def text(**options):
    torch.manual_seed(1)
    return Words.of(TEXTS, **options)


def bert() -> tuple[BertModel, BertTokenizer]:
    """A small BERT that knows a few words, and its tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sand", "soil", "clay"]
    model = BertModel(BertConfig(vocab_size=len(words), **sizes), add_pooling_layer=False)
    return model, BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def build(encoder=None, **options):
    """A small network whose norms are not the identity, as after training."""
    torch.manual_seed(0)
    model = MetaSegNet.build(CLASSES, encoder, "pocket", **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * draw(module.num_features))
            module.running_var.copy_(1 + draw(module.num_features, seed=2).abs())
    return model


def test_the_full_size_network_has_the_published_parameters():
    with torch.device("meta"):  # states as wide as BERT's
        model = MetaSegNet.build(8, Words(["a"], width=768, layers=0))
    encoder, parts = numbers(model.encoder) + numbers(model.norms), (numbers(model.decoder), numbers(model.fusions))
    row = published_table("metasegnet", "counts").set_index("method").iloc[-1]
    assert row.tolist() == [encoder + sum(parts), encoder, *parts]
    assert [fusion.heads for fusion in model.fusions.values()] == [4, 8, 16, 32]


@pytest.mark.parametrize(("height", "width"), [(50, 37), (9, 5)])
@torch.no_grad()
def test_images_of_any_size_are_padded_below_and_right(height, width):
    model, x = build(text()), draw(2, 3, height, width)
    before, padded = model(x, TEXTS), F.pad(x, (0, -width % 4, 0, -height % 4))
    assert before.shape == (2, CLASSES, height, width)
    assert all(torch.equal(a, b) for a, b in zip(model.maps(x), model.maps(padded), strict=True))
    x[0] += 5
    change = (model(x, TEXTS) - before).abs().amax((1, 2, 3))
    assert change[0] > 1e-3 and change[1] < 1e-5, "images of a batch are independent"


def test_padding_of_width_is_that_of_height():
    """The released decoder cannot mirror columns; turned by 90 degrees, ours does to columns what it does to rows."""
    block = decoder.Block(16, 4, 4).eval()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):  # kernels that look the same along both axes
            module.weight.data = (module.weight.data + module.weight.data.mT) / 2
    table = block.attention.table.data.view(7, 7, 4)
    block.attention.table.data = ((table + table.transpose(0, 1)) / 2).reshape(49, 4)
    x = draw(1, 16, 10, 8)
    torch.testing.assert_close(block(x.mT).mT, block(x), **CLOSE)


def test_the_maps_of_other_timm_encoders_are_those_of_timms_feature_extractor():
    encoder, x = timm.create_model("convnext_atto", num_classes=0).eval(), draw(1, 3, 64, 48)
    model = MetaSegNet(encoder, 3, text(), width=16, heads=2, window=2, fusion_heads=4).eval()
    theirs = timm.create_model("convnext_atto", features_only=True).eval()
    state = {n.replace("stages.", "stages_").replace("stem.", "stem_"): t for n, t in encoder.state_dict().items()}
    theirs.load_state_dict(state, strict=False)
    for found, expected in zip(model.maps(x), theirs(x)[-4:], strict=True):
        normed = F.layer_norm(expected.movedim(1, -1), expected.shape[1:2]).movedim(-1, 1)
        torch.testing.assert_close(found, normed, **CLOSE)
    assert model(x, TEXTS[:1]).shape == (1, 3, 64, 48)


def test_networks_of_one_text_encoder_do_not_share_it():
    words = text()
    networks = [build(words) for _ in range(2)]
    owned = [{p.data_ptr() for p in module.parameters()} for module in (words, *(n.text for n in networks))]
    assert len(set.union(*owned)) == sum(map(len, owned))


def test_a_callers_encoder_is_not_changed_and_can_be_checkpointed():
    encoder = timm.create_model("resnet10t")
    MetaSegNet(encoder, 3, width=16, heads=2, window=2)
    assert encoder(draw(1, 3, 64, 64)).shape == (1, 1000), "its head is still there"
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    assert_recomputed_gradients_are_equal(build, lambda model: loss(model, (draw(2, 3, 32, 32), labels)))


# --- the fusion with a text -------------------------------------------------------------------------------------------


def test_fusion_is_the_formula():
    fusion = Fusion(8, 6, 2)
    fusion.gates.data = torch.tensor([0.7, 0.3])
    x, words, mask = draw(1, 8, 2, 3), draw(1, 5, 6), torch.tensor([[True, True, True, False, False]])
    tokens, keep = x[0].flatten(1).T, words[0, :3]  # padding is not attended to
    q, k, v = fusion.query(fusion.norm1(tokens)), fusion.key(keep), fusion.value(keep)
    heads = [slice(0, 4), slice(4, 8)]
    attention = [(q[:, h] @ k[:, h].T / 2).softmax(-1) for h in heads]
    y = tokens + 0.7 * fusion.out(torch.cat([a @ v[:, h] for a, h in zip(attention, heads, strict=True)], -1))
    y = y + 0.3 * fusion.mlp(fusion.norm2(y))
    with Recorder(fusion) as record:
        torch.testing.assert_close(fusion(x, words, mask)[0].flatten(1).T, y)
    torch.testing.assert_close(record.maps[0][0], F.pad(torch.stack(attention), (0, 2)))


@torch.no_grad()
def test_with_closed_gates_it_is_the_twin_for_any_text():
    model, twin, x = build(text()), build(), draw(2, 3, 64, 64)
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if n in twin.state_dict()})
    assert (model(x, TEXTS) - model(x, TEXTS[::-1])).abs().max() > 1e-3
    for fusion in model.fusions.values():
        fusion.gates.zero_()
    torch.testing.assert_close(model(x, TEXTS), twin(x), **CLOSE)


@torch.no_grad()
def test_each_image_gets_its_own_text():
    model, x = build(text(), fusion_stages=(1, 3)), draw(2, 3, 64, 64)
    ids = model.text.ids(TEXTS)
    out, words = model(x, TEXTS), model.text.mask(ids)
    torch.testing.assert_close(model(x.flip(0), TEXTS[::-1]).flip(0), out, **CLOSE)
    torch.testing.assert_close(model(x, TEXTS[:1])[:1], out[:1], **CLOSE)  # one text for all
    torch.testing.assert_close(model(x, ids[:, : words.sum(1).max()]), out, **CLOSE)  # padding changes nothing
    attention = figures.attention(model, x, TEXTS)
    assert {k: tuple(a.shape) for k, a in attention.items()} == {1: (2, 16, 16, 48), 3: (2, 4, 4, 48)}
    assert all((a.sum((1, 2)) > 0).equal(words) for a in attention.values())


# --- text encoders ----------------------------------------------------------------------------------------------------


def test_words():
    encoder = text(width=16, length=9)
    assert encoder.words("Bare land: SNOW") == ["bare", "land", Words.UNKNOWN]
    ids, sand = encoder.ids(["", "sand", "Sand!"]), encoder.vocabulary.index("sand")
    assert ids.tolist() == [[row, *[0] * 8] for row in (1, sand, sand)] and encoder.mask(ids).sum() == 3
    refuses((lambda: encoder.ids(["sand " * 10]), "9"))
    texts = encoder.eval()(encoder.ids(["sand", "clay sand", "clay"]))
    torch.testing.assert_close(texts[1:2], encoder(encoder.ids(["clay sand"])), **CLOSE)  # by itself
    encoder.embedding.weight.data *= 1e5  # pre-norm: what the layers add is not larger for it
    words = encoder.norm(encoder.embedding(ids[:, 0]))
    torch.testing.assert_close(encoder(ids)[:, 0], words, rtol=0, atol=1e-3)
    zones = Words(["cfa", "bwh"], layers=0).eval()  # a one-hot zone
    found = zones(zones.ids(["Cfa", "BWh", "Cfa"]))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0, 0], found[1, 0])


def test_gradients_reach_what_is_trained_and_nothing_else():
    model = build(BertText(*bert(), 10)).train()
    loss(model, (draw(2, 3, 64, 64), torch.randint(0, CLASSES + 1, (2, 64, 64)), ["sand", "clay"])).backward()
    trained = model.trained()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    assert not any(n.startswith("text.") for n in trained)


def test_frozen_texts_are_encoded_once():
    model, tokenizer = bert()
    encoder, rows = BertText(model, tokenizer, 10), []
    count = lambda _, args, kwargs: rows.append(len(kwargs["input_ids"]))  # noqa: E731
    encoder.model.register_forward_pre_hook(count, with_kwargs=True)
    network, x = build(encoder).train(), draw(3, 3, 32, 32)
    network(x, ["sand", "soil", "sand"])
    network(x, ["soil", "clay", "sand"])
    assert rows == [2, 1] and encoder.words("sand soil") == ["[CLS]", "sand", "soil", "[SEP]"]
    assert not encoder.model.training and model.training and all(t.requires_grad for t in model.parameters())
    ids = encoder.ids(["soil"])
    states = encoder(ids)
    encoder.load_state_dict({n: t + 0.1 for n, t in encoder.state_dict().items()})
    assert not torch.allclose(encoder(ids), states), "other weights, other states"


@torch.no_grad()
@pytest.mark.parametrize("way", EXCHANGES)
def test_states_of_texts_follow_the_text_encoder(way):
    (model, tokenizer), (other, _) = bert(), bert()
    encoder = BertText(model, tokenizer, 10)
    ids = encoder.ids(["sand", "soil"])
    before = encoder(ids)
    EXCHANGES[way](encoder.model, other)
    assert torch.equal(encoder(ids), BertText(other, tokenizer, 10)(ids)) and not torch.equal(encoder(ids), before)


def test_states_of_texts_are_of_the_type_asked_for_and_bounded():
    encoder = BertText(*bert(), 10)
    ids = encoder.ids(["sand", "soil"])
    states = encoder(ids)
    encoder.load_state_dict(encoder.state_dict())  # the states are computed again
    with torch.autocast("cpu", torch.bfloat16):
        encoder(ids)
    assert torch.equal(encoder(ids), states) and states.dtype == torch.float32
    for _ in range(100):  # a text for each image
        encoder(torch.randint(8, (2, 10)))
    assert len(encoder._states) < 100


# --- official names --------------------------------------------------------------------------------------------------


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((70, 45), 16, 5), ((16, 100), 16, 0), ((33, 33), 32, 31), ((9, 50), 64, 8)]
)
def test_tiles_of_a_local_network_give_the_whole_image(size, tile, overlap):
    pixelwise, x = nn.Conv2d(3, 4, 1), draw(3, *size)
    found = list(bands(pixelwise, reader(x), size, tile=tile, overlap=overlap, batch=3))
    assert [top for top, _ in found] == [0, *torch.tensor([b.shape[1] for _, b in found]).cumsum(0)[:-1]]
    torch.testing.assert_close(torch.cat([band for _, band in found], 1), pixelwise(x[None])[0].detach(), **CLOSE)
    classes = segment(lambda x: x.round(), x, tile=tile, overlap=overlap)
    assert classes.dtype == torch.uint8 and torch.equal(classes, x.round().argmax(0).byte())


def test_what_would_silently_give_wrong_maps_is_refused():
    model, twin, x = build(text()), build(), draw(2, 3, 32, 32)
    assert model.predict([], [], texts=[]) == []
    refuses(
        (lambda: model.predict([Image.new("RGB", (8, 8))], [], texts=[]), "texts"),
        (lambda: MetaSegNet.build(3, size="large"), "size"),
        (lambda: build(text(), fusion_stages=(0, 1)), "fusion_stages"),
        (lambda: MetaSegNet(swin(depths=(1, 1, 1), num_heads=(1, 2, 4), embed_dim=8), 3), "encoder"),
        (lambda: augmented(twin, x, "flips"), "kind"),
        (lambda: twin(x, TEXTS), "bare land"),
        (lambda: model(x), "None"),
        (lambda: segment(twin, x[0], tile=16, overlap=16), "16"),
        (lambda: segment(lambda x: x[:, :1].expand(-1, 300, -1, -1), x[0]), "300"),
    )
