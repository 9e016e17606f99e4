"""ECAMP: losses by hand, what the words see, variants, initial weights, checkpoints."""

import copy
from dataclasses import replace

import pytest
import torch

from companion import backbones
from companion.errors import BadCheckpoint
from companion.models.ecamp import model as ecamp
from companion.models.ecamp import official
from companion.models.ecamp.model import Batch
from companion.models.ecamp.variants import METHODS
from tests.models.common import numbers, refuses

OPTIONS = {"heads": 4, "decoder_heads": 4, "text_heads": 4, "window": 6, "dropout": 0.0}


def pairs(count=2, size=32, words=40, length=20, patches=64, window=6):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, words, (count, length), generator=generator)
    labels[:, length - 4 :] = 0
    hidden = torch.rand(count, length, generator=generator) < 0.7
    return Batch(
        images=torch.randn(count, 3, 2 * size, 2 * size, generator=generator),
        ids=torch.where(hidden & (labels > 0), 3, labels),
        labels=labels,
        attention=(labels > 0).long(),
        weights=0.5 + torch.rand(count, length, generator=generator),
        noise=torch.rand(count, patches, generator=generator),
        window=torch.randint(0, round(patches**0.5) - window + 1, (count, 2), generator=generator),
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ecamp.build("pocket").eval()


def test_attention_maps_are_shares_and_the_recipe_of_the_heat_map(model):
    batch = pairs()
    maps = model.attention(ecamp.shrink(batch.images), batch.ids, batch.attention)
    assert maps.shape == (2, 4, 20, 64)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 20))
    # of two heads the one that attends more counts at each patch; fourth roots, from 0 to 1
    heads = torch.tensor([[0, 1 / 256, 16 / 256, 0], [1 / 256, 1 / 256, 0, 81 / 256]])
    torch.testing.assert_close(ecamp.heat(heads), torch.tensor([[0, 0], [0.5, 1.0]]))


@pytest.mark.parametrize("method", METHODS)
def test_variants_train_all_they_have(method):
    torch.manual_seed(0)
    model = METHODS[method][0]("pocket").train()
    losses = model(pairs())
    losses.total.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {"encoder.pos_embed", "decoder.pos_embed"}
    assert losses.mim > 0 and losses.mlm > 0 and bool(losses.sr) == (method != "ECAMP, no super-resolution")


def test_initial_weights():
    torch.manual_seed(0)
    model = ecamp.build("pocket")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound and not module.bias.any(), name
    words, kernel = model.text.embeddings.word_embeddings.weight, model.encoder.patch_embed.proj.weight.detach()
    assert not words[0].any() and words.std().item() == pytest.approx(0.02, rel=0.1)
    assert 0.1 < kernel.std() < kernel.abs().max() <= (6 / (96 + 48)) ** 0.5


def test_starts_from_mae(model):
    """MAE's decoder is deeper: its first blocks are loaded."""
    mae = {n: t + 1 for n, t in model.to_official().items() if not n.startswith(("bert", "super"))}
    fresh = copy.deepcopy(model)
    refuses((lambda: ecamp.build("huge"), "size"))
    official.load_mae(fresh, mae | {"decoder_blocks.7.norm1.weight": torch.ones(48)})
    for name, tensor in fresh.state_dict().items():
        added = 1 if name.startswith(("encoder", "decoder")) else 0
        assert torch.equal(tensor, model.state_dict()[name] + added), name
    encoder_only = {n: t for n, t in mae.items() if not n.startswith(("decoder", "mask"))}
    official.load_mae(copy.deepcopy(model), encoder_only)
    del encoder_only["norm.bias"]
    with pytest.raises(BadCheckpoint, match=r"norm\.bias"):
        official.load_mae(model, encoder_only)


def test_the_paper_size_has_the_released_parameters_and_takes_timms_mae():
    with torch.device("meta"):
        model = ecamp.build("paper", text=ecamp.Bert(pooler=True))
        mae = backbones.timm.create_model("vit_base_patch16_224.mae", pretrained=False, num_classes=0).state_dict()
    assert (numbers(model), numbers(model, trained=True)) == (183_425_240, 183_173_080)
    assert {n for n in mae if not n.startswith("fc_norm")} <= set(model.official_names().values())


def test_names_of_older_versions_of_transformers_are_read(model):
    batch, state = pairs(), model.to_official()
    older = {n.replace("context_fusion_layer", "cross_attn_layer"): t for n, t in state.items()}
    del older["bert_encoder.model.cls.predictions.decoder.bias"]  # older transformers store it once
    older["bert_encoder.model.bert.embeddings.position_ids"] = torch.arange(20)[None]
    pooled = ecamp.build("pocket", text=replace(ecamp.SIZES["pocket"]["text"], pooler=True))
    for one in (older, pooled.to_official() | state):
        torch.testing.assert_close(ecamp.ECAMP.from_official(one, **OPTIONS)(batch).total, model(batch).total)
