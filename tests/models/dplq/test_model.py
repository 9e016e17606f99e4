"""DPLQ: gradients, noise and controls, domain models, the authors' names. Its outputs are recorded cases."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from companion.errors import BadCheckpoint, CorruptFile, MissingWeights
from companion.models.dplq import DPLQ, DomainModel, MAEFeatures, domain_model
from companion.models.dplq.model import NoFeatures
from companion.models.dplq.official import sam_state
from companion.models.layers import mae
from companion.toy import encoders
from companion.toy.tokens import Tokenizer
from tests.models.common import draw, refuses

CLASSES = ["red disc", "green ring", "large violet cross"]
WIDTH = 20  # of the domain features here


@pytest.fixture
def clip():
    return encoders.build("pocket_clip")


def images(count: int = 2) -> torch.Tensor:
    return draw(count, 3, 32, 32)


def features(count: int = 2) -> torch.Tensor:
    return draw(count, WIDTH, seed=2) + 0.5


def build(clip, domain=WIDTH, **changes) -> DPLQ:
    """A DPLQ whose parameters are all different from their initialisation and from each other."""
    torch.manual_seed(0)
    model = DPLQ(clip, CLASSES, Tokenizer(), domain, **({"depth": 4} | changes)).eval()
    with torch.no_grad():
        for p in model.trained().values():
            p.add_(0.1 * torch.randn_like(p))
    return model


def small_mae(size=32) -> MAEFeatures:
    torch.manual_seed(0)
    return MAEFeatures(
        mae.MAE(
            mae.encoder(img_size=size, patch_size=8, embed_dim=64, depth=2, num_heads=1), (32, 1, 2), normalise=False
        )
    ).eval()


@pytest.mark.parametrize("options", [{}, {"depth": 1}])
def test_gradients_reach_every_trained_tensor_and_nothing_frozen(options, clip):
    """With depth 4 the text tower, of 2 blocks, is too shallow for two of the prompts: the image tower trains them."""
    domain = small_mae().train()
    model = build(clip.train(), domain, **options).train()
    F.cross_entropy(model(images()), torch.tensor([0, 2])).backward()
    # with one prompted layer there is no deep one: its stacks are empty
    assert all(p.grad.abs().sum() > 0 for p in model.trained().values() if p.numel())
    assert not {n for n in model.trained() if n.startswith(("clip.", "domain."))}
    assert all(p.grad is None for m in (model.clip, model.domain) for p in m.parameters())
    assert not model.clip.training and not model.domain.training
    assert clip.training and domain.training
    assert all(p.requires_grad for p in domain.model.encoder.blocks.parameters())


@torch.no_grad()
@pytest.mark.parametrize(("noise", "training"), [("always", False), ("train", True), ("train", False), ("off", True)])
def test_noise_makes_predictions_random_and_dependent_on_the_batch(noise, training, clip):
    """As released ("always") in the test too: μ is the mean over the whole batch."""
    model, x, f = build(clip, noise=noise).train(training), images(3), features(3)
    noisy = noise == "always" or (noise == "train" and training)
    torch.manual_seed(5)
    first, other = model(x, f), model(x, f)
    assert (first - other).abs().max() > 1e-3 if noisy else torch.equal(first, other)
    torch.manual_seed(5)
    assert torch.equal(model(x, f), first)
    eps = draw(3, 64) if noisy else torch.zeros(3, 64)
    alone = torch.cat([model(x[i : i + 1], f[i : i + 1], eps[i : i + 1]) for i in range(3)])
    gap = (model(x, f, eps) - alone).abs().max()
    assert gap > 1e-3 if noisy else gap < 1e-4


@torch.no_grad()
def test_controls(clip):
    none = build(clip, domain_model("none", clip=clip))
    assert torch.equal(none(images()), none(images()))  # μ is 0: the noise is gone too
    prompts = none.prompts(none.domain_features(images()))
    assert torch.equal(prompts.context[0], prompts.context[1])
    f = domain_model("clip", clip=clip)(images())
    torch.testing.assert_close(f.square().mean(1), torch.ones(2))
    torch.testing.assert_close(F.normalize(f, dim=-1), clip.encode_image(images(), normalize=True))


def test_medsam_names_of_both_releases_are_timms():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "mlp_dim": 128}
    config = transformers.SamVisionConfig(**sizes, output_channels=16, window_size=2, global_attn_indexes=[1])
    torch.manual_seed(0)
    theirs = transformers.SamVisionModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "neck_chans": 16, "window_size": 2}
    ours = timm.create_model("samvit_base_patch16", num_classes=0, global_attn_indexes=(1,), **sizes).eval()
    state = sam_state(theirs.state_dict())
    assert state.keys() == ours.state_dict().keys()
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x)[0].mean((2, 3)), rtol=0, atol=1e-4)
    original = {"image_encoder." + n.replace("mlp.fc", "mlp.lin"): t for n, t in state.items()}
    again = sam_state(original | {"mask_decoder.x": torch.zeros(1)})
    assert again.keys() == state.keys()


def test_checkpoints_that_do_not_fit_are_refused(clip, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    refuses(
        (lambda: domain_model("remote-sensing", tmp_path / "other.safetensors", clip=clip), "patch_embed"),
        (lambda: domain_model("medical", tmp_path / "other.safetensors", clip=clip), "attn"),
        (lambda: DPLQ.from_official({"ctx": torch.zeros(2, 64)}, clip, CLASSES, Tokenizer()), "meta_net"),
        error=BadCheckpoint,
    )
    refuses((lambda: domain_model("medical", tmp_path / "broken.pth", clip=clip), "broken"), error=CorruptFile)


def test_what_would_run_wrongly_is_refused(clip, tmp_path, monkeypatch):
    refuses(
        (lambda: build(clip, noise="sometimes"), "'always', 'train', 'off'"),
        (lambda: build(clip, depth=7), "1 to 6"),
        (lambda: build(clip)(images()), "domain"),
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses(
        (lambda: domain_model("remote-sensing", clip=clip), "Remote-Sensing-RVSA"),
        (lambda: domain_model("medical", clip=clip), "medsam-vit-base"),
        error=MissingWeights,
    )


@pytest.mark.parametrize(("batch", "expected"), [(1, [1, 1, 1]), (None, [3])])
def test_a_domain_model_of_large_images_takes_them_one_by_one(batch, expected):
    sizes, encoder = [], NoFeatures(4)
    encoder.register_forward_hook(lambda module, given, output: sizes.append(len(given[0])))
    assert DomainModel(encoder, batch=batch)(torch.zeros(3, 3, 8, 8)).shape == (3, 4)
    assert sizes == expected


def test_domain_models_of_another_size_get_their_size(clip, tmp_path):
    """A CLIP that reads 32 pixels, and encoders that read 224 or 48."""
    other = domain_model("vit_tiny_patch16_224", "random", clip=clip).train()
    assert (other.size, other(images()).shape, other.encoder.training) == (224, (2, 192), False)
    for size, resized in ((48, 48), (32, None)):
        # as MAE's code saves it: next to the optimiser's state, an argparse.Namespace among it
        state = {"model": small_mae(size).model.to_official(), "args": argparse.Namespace(lr=1)}
        torch.save(state, tmp_path / "mae.pth")
        ours = domain_model("remote-sensing", tmp_path / "mae.pth", clip=clip)
        assert (ours.size, ours(images()).shape) == (resized, (2, 32))
    medical = domain_model("medical", "random", clip=clip)
    assert (medical.size, medical.batch, medical.num_features) == (1024, 1, 256)
    assert DPLQ(clip, CLASSES, Tokenizer(), medical, depth=2).meta_net.linear1.in_features == 256
