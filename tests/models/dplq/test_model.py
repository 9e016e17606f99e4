"""DPLQ: the formulas one image at a time, noise and controls, domain models, the authors' names."""

import argparse
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion import backbones
from companion.errors import BadCheckpoint, CorruptFile, MissingWeights
from companion.models.dplq import DPLQ, MAEFeatures, domain_model
from companion.models.dplq.model import IMAGENET, NoFeatures, sam_state
from companion.models.layers import mae
from companion.toy import encoders
from companion.toy.datasets.tokens import Tokenizer
from companion.training.fit import CPU, predict
from tests.models.common import draw, misfits, refuses

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


def small_mae(tap="decoder", size=32) -> MAEFeatures:
    torch.manual_seed(0)
    return MAEFeatures(mae.MAE(mae.encoder(size, 8, 64, 2, 1), (32, 1, 2), normalise=False), tap).eval()


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
    if model.deep_text.numel():
        assert (model.deep_text.grad.abs().sum((1, 2)) > 0).all()


def one_image(model: DPLQ, image: torch.Tensor, f: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Sections 3.2 to 3.7 for one image (3, 32, 32): the four-block formula, open_clip's blocks, a class at a time."""

    def quaternion(c, weight, bias):
        r, i, j, k = weight
        c1, c2 = c.chunk(2, -1)
        return torch.cat([-c1 @ j - c2 @ k, c2 @ j - c1 @ k, c1 @ r - c2 @ i, c1 @ i + c2 @ r], -1) + bias

    clip, net = model.clip, model.meta_net
    beta = net.linear2(F.relu(net.linear1(f)))
    ctx = quaternion(model.ctx + beta + noise, model.mix_text.weight, model.mix_text.bias)
    layers = zip(model.deep_text, model.mix_image.weight, model.mix_image.bias, strict=True)
    deep = [quaternion(p + beta, weight, bias) for p, weight, bias in layers]
    n = len(model.ctx)

    x = torch.cat([clip.visual._embeds(image[None]), model.proj(model.ctx)[None]], dim=1)  # no norm before the blocks
    for i, block in enumerate(clip.visual.transformer.resblocks):
        if 1 <= i <= len(deep):
            x = torch.cat([x[:, :-n], deep[i - 1][None]], dim=1)
        x = block(x)
    image_feature = clip.visual._pool(x)[0] @ clip.visual.proj

    logits = []
    for embedded, end in zip(model.embedded, model.ends, strict=True):
        x = torch.cat([embedded[:1], ctx, embedded[1 + n :]])[None] + clip.positional_embedding
        for i, block in enumerate(clip.transformer.resblocks):
            if 1 <= i <= len(deep):
                x = torch.cat([x[:, :1], model.deep_text[i - 1][None], x[:, 1 + n :]], dim=1)
            x = block(x, attn_mask=clip.attn_mask)
        text_feature = clip.ln_final(x)[:, end] @ clip.text_projection
        logits.append(clip.logit_scale.exp() * F.cosine_similarity(image_feature, text_feature))
    return torch.cat(logits)


@torch.no_grad()
def test_a_batch_is_the_formulas_one_image_and_one_class_at_a_time(clip):
    model, f, eps = build(clip), features(), draw(2, 64, seed=3)
    expected = [one_image(model, x, y, f.mean() * e) for x, y, e in zip(images(), f, eps, strict=True)]
    torch.testing.assert_close(model(images(), f, eps), torch.stack(expected), rtol=0, atol=2e-5)


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
    assert torch.equal(NoFeatures(7)(images()), torch.zeros(2, 7))
    none = build(clip, domain_model("none", clip=clip))
    assert torch.equal(none(images()), none(images()))  # μ is 0: the noise is gone too
    prompts = none.prompts(none.domain_features(images()))
    assert torch.equal(prompts.context[0], prompts.context[1])
    own = domain_model("clip", clip=clip)
    f = own(images())
    torch.testing.assert_close(f.square().mean(1), torch.ones(2))
    torch.testing.assert_close(F.normalize(f, dim=-1), clip.encode_image(images(), normalize=True))
    assert build(clip, own)(images()).shape == (2, 3)


@torch.no_grad()
def test_a_domain_model_gets_images_at_its_size_and_as_clip_or_as_itself_normalises_them(clip):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    half = (0.5, 0.5, 0.5)  # of timm's ViT-Tiny
    inputs = {"clip": backbones.input_of(clip), "own": replace(IMAGENET, mean=half, std=half)}

    def normal(wanted):
        return (pixels - torch.tensor(wanted.mean)[:, None, None]) / torch.tensor(wanted.std)[:, None, None]

    for normalise, wanted in inputs.items():
        model, seen = domain_model("vit_tiny_patch16_224", "random", clip=clip, normalise=normalise).train(), []
        model.encoder.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(normal(inputs["clip"]))
        torch.testing.assert_close(seen[0], F.interpolate(normal(wanted), 224), rtol=0, atol=1e-5)
        assert not model.encoder.training


@torch.no_grad()
def test_the_masked_autoencoder_is_read_in_any_order_and_at_the_tap():
    decoder, encoder, x = small_mae(), small_mae("encoder"), images()
    model, order = decoder.model, torch.stack([torch.randperm(16), torch.randperm(16)])
    tokens = model.decoder(model.encode(x))
    torch.testing.assert_close(model.decoder(model.encode(x, order), order), tokens, rtol=0, atol=1e-5)
    assert (encoder.num_features, decoder.num_features) == (64, 32)
    torch.testing.assert_close(encoder(x), encoder.model.encode(x)[:, 1:].mean(1))
    torch.testing.assert_close(decoder(x), tokens[:, 1:].mean(1))


def test_the_masked_loss_is_of_the_hidden_pixels_alone():
    """With a head that outputs a constant, the loss is the mean square over exactly the masked patches."""
    model, x, hidden = small_mae().model, images(), torch.ones(4, 4, dtype=torch.bool)
    torch.nn.init.zeros_(model.pixels.weight)
    hidden[0] = False  # the first quarter of the patches in raster order is visible
    mask = hidden.repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(model(x, torch.arange(16.0).repeat(2, 1)), x[:, :, mask].square().mean())


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


@torch.no_grad()
def test_the_authors_tensors_round_trip_and_features_can_be_cached(clip):
    domain, eps = small_mae(), draw(2, 64)
    model = build(clip, domain)
    state = model.to_official()
    assert state["prompt_learner.compound_prompt_projections.2.k_weight"].shape == (32, 12)
    assert state["prompt_learner.visual_net_orthogonality.r_weight"].shape == (32, 16)
    # in the authors' state dict: used by nothing, or part of a domain model
    leftover = ("visual_net.linear1.weight", "remote_model.cls_token", "medical_model.pos_embed")
    leftover = dict.fromkeys(leftover, torch.zeros(4, 64))
    again = DPLQ.from_official(state | leftover, clip, CLASSES, Tokenizer(), domain=domain, noise="off")
    assert again.noise == "off" and len(again.deep_text) == 3
    kept = predict(domain, TensorDataset(images()), batch=2, hardware=CPU)
    assert kept.shape == (2, 32) and torch.equal(again(images(), kept, eps), model(images(), kept, eps))
    torch.testing.assert_close(again(images()), again(images(), kept), rtol=0, atol=2e-5)
    assert all(torch.equal(again.to_official()[name], value) for name, value in state.items())


def test_checkpoints_that_do_not_fit_are_refused(clip, tmp_path):
    state = build(clip).to_official()
    state["extra"] = torch.zeros(1)
    del state["prompt_learner.compound_prompt_projections.1.j_weight"]
    state["prompt_learner.visual_net_orthogonality.bias"] = torch.zeros(3)
    missing, unknown, shapes = misfits(DPLQ.from_official, state, clip, CLASSES, Tokenizer())
    assert (missing, unknown) == (["prompt_learner.compound_prompt_projections.1.j_weight"], ["extra"])
    assert [text.partition(" ")[0] for text in shapes] == ["prompt_learner.visual_net_orthogonality.bias"]
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    refuses(
        (lambda: domain_model("remote-sensing", tmp_path / "other.safetensors", clip=clip), "patch_embed"),
        (lambda: domain_model("medical", tmp_path / "other.safetensors", clip=clip), "attn"),
        (lambda: DPLQ.from_official({"ctx": torch.zeros(2, 64)}, clip, CLASSES, Tokenizer()), "meta_net"),
        error=BadCheckpoint,
    )
    refuses((lambda: domain_model("medical", tmp_path / "broken.pth", clip=clip), "broken"), error=CorruptFile)


def test_a_file_of_the_remote_sensing_model(clip, tmp_path):
    # as MAE's code saves it: next to the optimiser's state, an argparse.Namespace among it
    model = mae.MAE(mae.encoder(depth=1), (512, 1, 16))
    torch.save({"model": model.to_official(), "args": argparse.Namespace(lr=1)}, tmp_path / "m.pth")
    assert domain_model("remote-sensing", tmp_path / "m.pth", clip=clip).num_features == 512
    assert domain_model("remote-sensing", tmp_path / "m.pth", clip=clip, tap="encoder").num_features == 768


def test_what_would_run_wrongly_is_refused(clip, tmp_path, monkeypatch):
    model = build(clip)
    refuses(
        (lambda: build(clip, noise="sometimes"), "'always', 'train', 'off'"),
        (lambda: build(clip, depth=7), "1 to 6"),
        (lambda: build(clip, torch.nn.Identity()), "num_features"),
        (lambda: model(images()), "domain"),
        (lambda: model(images(), draw(WIDTH)), r"\(b, F\)"),
        (lambda: domain_model("remote-sensing", tmp_path / "absent.pth", clip=clip), r"absent\.pth"),
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuses(
        (lambda: domain_model("remote-sensing", clip=clip), "Remote-Sensing-RVSA"),
        (lambda: domain_model("medical", clip=clip), "medsam-vit-base"),
        error=MissingWeights,
    )


def test_domain_models_of_another_size_get_their_size(clip, tmp_path):
    """A CLIP that reads 32 pixels, and encoders that read 224 or 48."""
    other = domain_model("vit_tiny_patch16_224", "random", clip=clip)
    assert (other.size, other(images()).shape) == (224, (2, 192))
    for size, resized in ((48, 48), (32, None)):
        torch.save(small_mae(size=size).model.to_official(), tmp_path / "mae.pth")
        own = domain_model("remote-sensing", tmp_path / "mae.pth", clip=clip)
        assert (own.size, own(images()).shape) == (resized, (2, 32))
    medical = domain_model("medical", "random", clip=clip)
    assert (medical.size, medical.num_features) == (1024, 256)
    assert DPLQ(clip, CLASSES, Tokenizer(), medical, depth=2).meta_net.linear1.in_features == 256
