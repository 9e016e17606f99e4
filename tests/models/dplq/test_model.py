"""DPLQ: counts, the formulas one image at a time, noise and controls, domain models, names, bad inputs."""

import argparse

import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from companion import backbones
from companion.errors import BadCheckpoint, CorruptFile, MissingWeights
from companion.evaluation.parity import Case, folder
from companion.models.dplq import DPLQ, MAE, DomainModel, domain_model
from companion.models.dplq import parity as cases
from companion.models.dplq.model import IMAGENET, NoFeatures, halves_cosine, sam_state
from companion.models.layers.clip_prompting import MaPLe, Texts
from companion.toy import encoders
from companion.toy.datasets.tokens import Tokenizer
from companion.training.fit import CPU, fit, predict
from companion.training.schedules import adamw
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


def small_mae(**changes) -> MAE:
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch=8, width=64, depth=2, heads=1, decoder_width=32, decoder_depth=1, decoder_heads=2)
    return MAE(**(sizes | changes)).eval()


def full_size() -> tuple[CLIP, Texts]:
    """A CLIP of ViT-B/16's sizes and texts, shapes only."""
    with torch.device("meta"):
        vision = CLIPVisionCfg(layers=12, width=768, patch_size=16, image_size=224)
        clip = CLIP(512, vision, CLIPTextCfg(77, 1, width=512, heads=8, layers=12), quick_gelu=True)
        return clip, Texts(torch.zeros(5, 77, 512), torch.tensor([7], device="cpu"))


@pytest.mark.parametrize(
    ("depth", "deep"),
    [(9, {"deep_text": 8_192, "mix_image": 1_579_008}), (3, {"deep_text": 2_048, "mix_image": 394_752})],
)
def test_trainable_parameters_at_full_size(depth, deep):
    parts = {"ctx": 1_024, "proj": 393_984, "meta_net": 33_312, "mix_text": 131_584} | deep
    clip, texts = full_size()
    with torch.device("meta"):
        model, maple = DPLQ(clip, texts, None, 512, depth=depth), MaPLe(clip, texts, None, depth=depth)
        real = DPLQ(clip, texts, None, 512, depth=depth, language="real", vision="real")
    assert model.count() == sum(parts.values()) == {9: 2_147_104, 3: 956_704}[depth]
    counted = {part: sum(p.numel() for n, p in model.trained().items() if n.startswith(part)) for part in parts}
    assert counted == parts
    assert depth == 3 or round(100 * model.count() / maple.count(), 1) == 60.4
    assert real.count() - model.count() == 262_656 - 131_584 + (depth - 1) * (393_984 - 197_376)


@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"language": "real", "vision": "real"}, {"axes": "i, j"}])
def test_gradients_reach_every_trained_tensor_and_nothing_frozen(options, clip):
    """With depth 4 the text tower, of 2 blocks, is too shallow for two of the prompts: the image tower trains them."""
    mae = small_mae().train()
    model = build(clip.train(), mae, **options).train()
    F.cross_entropy(model(images()), torch.tensor([0, 2])).backward()
    # with one prompted layer there is no deep one: its stacks are empty
    assert all(p.grad.abs().sum() > 0 for p in model.trained().values() if p.numel())
    assert not {n for n in model.trained() if n.startswith(("clip.", "domain."))}
    assert all(p.grad is None for m in (model.clip, model.domain) for p in m.parameters())
    assert not model.clip.training and not model.domain.training
    assert clip.training and mae.training and all(p.requires_grad for p in mae.encoder.blocks.parameters())
    if model.deep_text.numel():
        assert (model.deep_text.grad.abs().sum((1, 2)) > 0).all()
    fresh = DPLQ(clip, CLASSES, Tokenizer(), WIDTH, depth=4)
    assert torch.equal(fresh.ctx, clip.token_embedding(Tokenizer()("a photo"))[0, 1:3])  # the first two words


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
    a, b = draw(3, 5), draw(3, 5, seed=2)
    torch.testing.assert_close(halves_cosine(torch.cat([a, b], -1)), F.cosine_similarity(a, b))


def test_axes_and_real_layers_mix_what_they_say(clip):
    f = features()
    for axes, place in (("jk", slice(64, 128)), ("ri", slice(0, 64))):
        model = build(clip, axes=axes, noise="off")
        x = torch.zeros(2, 2, 128)
        x[..., place] = model.ctx + model.meta_net(f)[:, None]
        torch.testing.assert_close(model.prompts(f).context, model.mix_text(x))
    model = build(clip, axes="i, j", noise="off")
    assert model.mix_text.inputs == 256
    x = torch.zeros(2, 2, 256)
    x[..., 64:128], x[..., 128:192] = model.ctx, model.meta_net(f)[:, None]
    torch.testing.assert_close(model.prompts(f).context, model.mix_text(x))
    model = build(clip, language="real", vision="real", noise="off")
    prompts = model.prompts(f)
    torch.testing.assert_close(prompts.context, model.mix_text(model.ctx + prompts.bias[:, None]))
    last = F.linear(model.deep_text[2] + prompts.bias[:, None], model.mix_image.weight[2], model.mix_image.bias[2])
    torch.testing.assert_close(prompts.deep_image[2], last)


@torch.no_grad()
def test_noise_as_released_makes_predictions_random_and_dependent_on_the_batch(clip):
    model, x, f = build(clip), images(3), features(3)
    assert model.noise == "always" and not model.training
    assert (model(x, f) - model(x, f)).abs().max() > 1e-3
    eps = draw(3, 64)
    alone = torch.cat([model(x[i : i + 1], f[i : i + 1], eps[i : i + 1]) for i in range(3)])
    assert (model(x, f, eps) - alone).abs().max() > 1e-3  # μ is of the whole batch
    torch.manual_seed(5)
    first = model(x, f)
    torch.manual_seed(5)
    assert torch.equal(model(x, f), first)


@torch.no_grad()
def test_without_noise_an_image_is_judged_alone(clip):
    model, x, f = build(clip, noise="off").train(), images(3), features(3)
    together = model(x, f)
    alone = torch.cat([model(x[i : i + 1], f[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, build(clip)(x, f, torch.zeros(3, 64)), rtol=0, atol=1e-5)
    model = build(clip, noise="train")
    assert torch.equal(model(x, f), together)
    assert not torch.equal(model.train()(x, f), model(x, f))


def test_noise_is_as_large_as_the_mean_of_all_features_and_spares_the_image_tower(clip):
    model, f, eps = build(clip), features(), draw(2, 64)
    quiet, noisy = model.prompts(f, torch.zeros_like(eps)), model.prompts(f, eps)
    assert torch.equal(quiet.deep_image, noisy.deep_image) and torch.equal(quiet.first_image, noisy.first_image)
    wanted = model.mix_text(F.pad(model.ctx + (quiet.bias + f.mean() * eps)[:, None], (64, 0)))
    torch.testing.assert_close(noisy.context, wanted)
    centred = f - f.mean()
    torch.testing.assert_close(model.prompts(centred, eps).context, model.prompts(centred, 0 * eps).context)


@torch.no_grad()
def test_cached_features_give_the_same(clip):
    mae = small_mae()
    model = build(clip, mae, noise="off")
    kept = predict(mae, TensorDataset(images(3)), batch=2, hardware=CPU)
    assert kept.shape == (3, 32)
    torch.testing.assert_close(model(images(3)), model(images(3), kept), rtol=0, atol=1e-5)


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
def test_a_domain_model_of_any_name_and_its_own_normalisation(clip, monkeypatch):
    monkeypatch.setattr(backbones, "build", lambda name, *_, **__: encoders.build(name))
    released = domain_model("pocket_vit", clip=clip)
    own = domain_model("pocket_vit", clip=clip, normalise="own")
    vit = encoders.build("pocket_vit")
    torch.testing.assert_close(released(images()), vit(images()))
    torch.testing.assert_close(own(images()), vit(images()))  # the pocket CLIP's normalisation is the pocket ViT's
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    clip_input, imagenet = backbones.input_of(clip), IMAGENET

    def normal(x, wanted):
        return (x - torch.tensor(wanted.mean)[:, None, None]) / torch.tensor(wanted.std)[:, None, None]

    wrapped = DomainModel(vit, 16, clip_input, imagenet)
    small = F.interpolate(normal(pixels, imagenet), 16)
    resized = DomainModel(encoders.build("pocket_vit", "random", img_size=16), 16, clip_input, imagenet)
    seen = []
    resized.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    resized(normal(pixels, clip_input))
    torch.testing.assert_close(seen[0], small, rtol=0, atol=1e-5)
    assert wrapped.num_features == 48 and not wrapped.train().encoder.training


def test_the_masked_autoencoder_is_read_unmasked_and_in_order(clip):
    mae = small_mae()
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole = mae.encode(images())
    shuffled = mae.encode(images(), order)
    torch.testing.assert_close(shuffled[:, 1:], whole[:, 1:].take_along_dim(order[..., None], 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(mae.decode(shuffled, order), mae.decode(whole), rtol=0, atol=1e-5)
    torch.testing.assert_close(mae(images()), mae.decode(whole)[:, 1:].mean(1))
    encoder = small_mae(tap="encoder")
    assert encoder.num_features == 64 and mae.num_features == 32
    torch.testing.assert_close(encoder(images()), encoder.encode(images())[:, 1:].mean(1))


def test_the_masked_autoencoder_learns_to_fill_in_what_it_did_not_see():
    mae = small_mae(width=64, heads=4).train()
    colours = torch.rand(64, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 4 - 2
    data = TensorDataset(colours.expand(-1, -1, 32, 32).contiguous())
    history = fit(mae, lambda m, b: m.loss(b[0]), data, epochs=30, batch=16, optimizer=adamw(3e-3), hardware=CPU)
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert not mae.encoder.pos_embed.requires_grad and not mae.decoder_pos_embed.requires_grad


def test_the_masked_loss_is_of_the_hidden_pixels_alone(monkeypatch):
    """With a head that outputs a constant, the loss is the mean square over exactly the masked patches."""
    mae = small_mae()
    torch.nn.init.zeros_(mae.decoder_pred.weight)
    torch.nn.init.zeros_(mae.decoder_pred.bias)
    monkeypatch.setattr(torch, "rand", lambda b, n, device=None: torch.arange(n).repeat(b, 1) / n)
    x = images()
    hidden = torch.ones(4, 4, dtype=torch.bool)
    hidden[0] = False  # the first quarter of the patches in raster order is visible
    mask = hidden.repeat_interleave(8, 0).repeat_interleave(8, 1)
    torch.testing.assert_close(mae.loss(x), x[:, :, mask].square().mean())


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
def test_half_precision_runs(clip):
    model = build(clip, noise="off")
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(), features())
    torch.testing.assert_close(logits.float(), model(images(), features()), rtol=0, atol=0.3)


@torch.no_grad()
def test_official_names_round_trip(clip):
    model, eps = build(clip), draw(2, 64)
    state = model.to_official()
    assert state["prompt_learner.compound_prompt_projections.2.k_weight"].shape == (32, 12)
    assert state["prompt_learner.visual_net_orthogonality.r_weight"].shape == (32, 16)
    # in the authors' state dict: used by nothing, or part of a domain model
    leftover = ("visual_net.linear1.weight", "remote_model.cls_token", "medical_model.pos_embed")
    leftover = dict.fromkeys(leftover, torch.zeros(4, 64))
    again = DPLQ.from_official(state | leftover, clip, CLASSES, Tokenizer(), noise="off")
    assert again.noise == "off" and len(again.deep_text) == 3
    assert torch.equal(again(images(), features(), eps), model(images(), features(), eps))
    assert all(torch.equal(again.to_official()[name], value) for name, value in state.items())
    with_domain = build(clip, small_mae()).to_official()
    again = DPLQ.from_official(with_domain, clip, CLASSES, Tokenizer(), domain=small_mae(), noise="off")
    torch.testing.assert_close(again(images()), again(images(), small_mae()(images())))


def test_all_names_of_the_released_model_are_known():
    """Every tensor of the authors' model but the unused net, with its shape, comes back from ours at full size."""
    case = Case(folder() / "dplq" / "model_vitb16")
    clip, texts = full_size()
    with torch.device("meta"):
        ours = {name: list(t.shape) for name, t in DPLQ(clip, texts, None, 512).to_official().items()}
    assert ours == {name: shape for name, shape in case.names.items() if not name.startswith("visual_net.")}
    assert case.facts["trainable_without_gradient"] == [n for n in case.names if n.startswith("visual_net.")]
    # the gradient norms that parity compares are of every trained tensor
    assert len([name for name in cases.recorded(case) if name.startswith("grad:")]) == 60


def test_a_checkpoint_that_does_not_fit_lists_its_names(clip):
    state = build(clip).to_official()
    state["extra"] = torch.zeros(1)
    del state["prompt_learner.compound_prompt_projections.1.j_weight"]
    state["prompt_learner.visual_net_orthogonality.bias"] = torch.zeros(3)
    assert misfits(DPLQ.from_official, state, clip, CLASSES, Tokenizer()) == (
        ["prompt_learner.compound_prompt_projections.1.j_weight"],
        ["extra"],
        ["prompt_learner.visual_net_orthogonality.bias (3,), expected (64,)"],
    )
    with pytest.raises(BadCheckpoint, match=r"meta_net\.linear1\.weight"):
        DPLQ.from_official({"ctx": torch.zeros(2, 64)}, clip, CLASSES, Tokenizer())


def test_a_file_of_the_remote_sensing_model(clip, tmp_path):
    mae = small_mae()
    state = mae.to_official()
    assert {"cls_token", "blocks.1.attn.qkv.weight", "decoder_blocks.0.mlp.fc2.bias", "mask_token"} <= state.keys()
    again = MAE.from_official(state, decoder_heads=2)
    assert torch.equal(again(images()), mae(images()))
    # as MAE's code saves it: next to the optimiser's state, an argparse.Namespace among it
    saved = {"model": MAE(depth=1, decoder_depth=1).to_official(), "args": argparse.Namespace(lr=1)}
    torch.save(saved, tmp_path / "m.pth")
    assert domain_model("remote-sensing", tmp_path / "m.pth", clip=clip).num_features == 512
    assert domain_model("remote-sensing", tmp_path / "m.pth", clip=clip, tap="encoder").num_features == 768
    state["decoder_norm.bias"] = torch.zeros(1)
    state["typo"] = state.pop("norm.bias")
    expected = ["norm.bias"], ["typo"], ["decoder_norm.bias (1,), expected (32,)"]
    assert misfits(MAE.from_official, state, decoder_heads=2) == expected
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("remote-sensing", "medical"):
        with pytest.raises(BadCheckpoint, match="missing"):
            domain_model(name, tmp_path / "other.safetensors", clip=clip)
    (tmp_path / "broken.pth").write_bytes((tmp_path / "m.pth").read_bytes()[:1000])
    with pytest.raises(CorruptFile, match=r"broken\.pth"):
        domain_model("remote-sensing", tmp_path / "broken.pth", clip=clip)


def test_what_is_not_accepted(clip, tmp_path, monkeypatch):
    model = build(clip)
    refuses(
        (lambda: build(clip, noise="sometimes"), "noise = 'sometimes'"),
        (lambda: build(clip, language="complex"), "language"),
        (lambda: build(clip, vision="complex"), "vision"),
        (lambda: build(clip, vision="real").to_official(), "no others"),
        (lambda: build(clip, axes="kj"), "axes"),
        (lambda: build(clip, depth=0), "depth"),
        (lambda: build(clip, depth=7), "1 to 6"),
        (lambda: build(clip, tokens=0), "tokens"),
        (lambda: build(clip, 0), "num_features"),
        (lambda: build(clip, torch.nn.Identity()), "num_features"),
        (lambda: model(images()), "without a domain model"),
        (lambda: model(images(), draw(2, WIDTH + 1)), rf"\(b, {WIDTH}\)"),
        (lambda: model(images(), draw(WIDTH)), rf"\(b, {WIDTH}\)"),
        (lambda: small_mae(tap="head"), "tap"),
        (lambda: domain_model("nothing", clip=clip), "nothing"),
        (lambda: domain_model("remote-sensing", tmp_path / "absent.pth", clip=clip), r"absent\.pth"),
        (lambda: domain_model("clip", clip=clip, normalise="mine"), "normalise"),
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
    torch.save(small_mae(image_size=48).to_official(), tmp_path / "mae.pth")
    mae = domain_model("remote-sensing", tmp_path / "mae.pth", clip=clip)
    assert (mae.size, mae(images()).shape) == (48, (2, 32))
    torch.save(small_mae().to_official(), tmp_path / "mae.pth")
    assert domain_model("remote-sensing", tmp_path / "mae.pth", clip=clip).size is None
    medical = domain_model("medical", "random", clip=clip)
    assert (medical.size, medical.num_features) == (1024, 256)
    assert DPLQ(clip, CLASSES, Tokenizer(), medical, depth=2).meta_net.linear1.in_features == 256
