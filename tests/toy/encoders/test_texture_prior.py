"""TIP's frozen parts at pocket scale: the shipped weights, the closed-form autoencoder, the trainable parameters."""

import pytest
import torch

pytest.importorskip("diffusers")

from companion.errors import BadParameter
from companion.models.tip import model as tip
from companion.models.tip.pipeline import TIPPipeline
from companion.toy import encoders
from companion.toy.datasets import restoration as pocket
from companion.toy.encoders import texture_prior as prior


def test_the_shipped_prior_is_that_of_the_card():
    pipe, card = prior.build(), encoders.read_card(prior.NAME)
    count = sum(t.numel() for part in (pipe.vae, pipe.unet) for t in part.state_dict().values())
    assert count == card["parameters"] and card["world"] == pocket.VERSION
    assert prior.ceiling(pipe.vae) == card["quality"]["PSNR of the autoencoder"]
    told, untold = (card["quality"][name]["texture of its caption"] for name in ("UNet", "UNet untrained"))
    assert told > 90 > 60 > untold
    assert not any(p.requires_grad for part in (pipe.vae, pipe.unet) for p in part.parameters())


def test_the_autoencoder_is_exact_on_what_it_keeps():
    images, _ = prior.shown("train", 0, (30, 10))
    whole = prior.PatchPCA(channels=48, block_out_channels=(48,) * 3)
    assert whole.learn(images) == pytest.approx(1.0)
    z = tip.to_latents(whole, images)
    assert z.shape == (40, 48, 4, 4)
    assert (tip.to_images(whole, z) - images).abs().max() < 1e-3
    part = prior.PatchPCA()
    share = part.learn(images)
    z = tip.to_latents(part, images)
    rows = z.movedim(1, -1).flatten(0, -2)
    assert 0.9 < share < 1 and rows.mean(0).abs().max() < 1e-3 and (rows.std(0) - 1).abs().max() < 1e-3
    # a projection: once through is as often as one likes, before pixels are clamped
    again = part.encode(part.decode(z).sample).latent_dist.mode()
    assert (again - z).abs().max() < 1e-3
    with pytest.raises(BadParameter, match="patch"):
        prior.PatchPCA(patch=8)


def test_training_learns_and_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setenv("COMPANION_PROGRESS", "off")
    monkeypatch.setattr(pocket, "COUNTS", {"train": (60, 20), "val": (4, 2), "test": (8, 2)})
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    vae, net, history, share = prior.train(seed=0, steps=4)
    assert torch.equal(state, torch.random.get_rng_state()) and len(history) == 4 and 0 < share < 1
    again = prior.train(seed=0, steps=4)[1]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = prior.unet()
    changed = [not torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True)]
    # without a gate the values of self-attention's first step are all there is; nothing may stay as it was
    assert all(changed)
    found = prior.measure(vae, net, seed=0)
    assert set(found) == {"loss, right caption", "loss, no caption", "loss, wrong caption", "texture of its caption"}
    kl = prior.ceiling(prior.train_kl(seed=0, steps=3), seed=0)
    assert kl["scenes"] > 0


def test_the_adaptor_starts_from_the_prior_and_from_its_seed():
    one, again, other = (prior.build(seed=seed) for seed in (1, 1, 2))
    hints = [p.adaptor.branch.controlnet_cond_embedding.conv_in.weight for p in (one, again, other)]
    assert torch.equal(hints[0], hints[1]) and not torch.equal(hints[0], hints[2])
    assert torch.equal(one.adaptor.branch.conv_in.weight, other.unet.conv_in.weight)
    plain = prior.build("add", seed=1)
    more = [sum(p.numel() for p in pipe.adaptor.parameters()) for pipe in (one, plain)]
    assert more[0] - more[1] == 7872
    untrained = prior.build(prior="untrained", seed=1)
    assert not torch.equal(untrained.unet.conv_in.weight, one.unet.conv_in.weight)
    with pytest.raises(BadParameter, match="'trained', 'untrained'"):
        prior.build(prior="none")


def test_the_pipeline_is_saved_and_loaded(tmp_path):
    pipe = prior.build(seed=4)
    pipe.save_pretrained(tmp_path / "tip")
    again = TIPPipeline.from_pretrained(tmp_path / "tip")
    noise, image = torch.randn(1, 12, 16, 8), torch.rand(1, 3, 64, 32)  # larger than in training
    ours, theirs = (p(image, "a picture with rows", steps=2, latents=noise).images for p in (pipe, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for name in ("vae", "unet", "adaptor", "text_encoder"):
        state = getattr(again, name).state_dict()
        assert all(torch.equal(t, state[n]) for n, t in getattr(pipe, name).state_dict().items()), name


def test_every_word_of_the_captions_and_prompts_is_known():
    words = prior.text()
    for caption in (*pocket.CAPTIONS, "Remove all degradation", "Denoise with sigma 0.05; Dejpeg with quality 50"):
        assert "<unknown>" not in words.words(caption)
